"""`latentvae agree`: whether two models speak the same latent space, as figures and a picture."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL

from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.cli.options import Device, Json
from latentvae.cli.session import finish, image_channels, load_model, make_folder, print_json, skip
from latentvae.images.drawing import grid
from latentvae.images.reading import find_images, load_image
from latentvae.models.latents import Scaling
from latentvae.pipelines.agree import (
    MAX_LOSS,
    MIN_SCORE,
    Agreement,
    Pair,
    agreement_of,
    both_ways,
    check_same_shape,
    plain_copy,
    probe_images,
)

PICTURE = "agreement.png"
COLUMNS = ("image", "A", "B", "B decodes A's latents", "A decodes B's latents")
MAX_ROWS = 8  # of the picture; the figures are of all images


def agree(
    a: Annotated[str, typer.Argument(help="Model whose latents a diffusion model was trained on.")],
    b: Annotated[str, typer.Argument(help="Model to take its place. Both as --model of the other verbs.")],
    photos: Annotated[
        list[Path] | None,
        typer.Argument(help="Images or folders. Default: a sample picture and synthetic extremes."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the picture.")] = Path(
        "latentvae-output"
    ),
    size: Annotated[int, typer.Option(min=16, help="Largest side of the images' centres, pixels.")] = 256,
    device: Device = None,
    json: Json = False,
) -> None:
    """Say whether a diffusion model trained on A's latents can use B: each decodes the latents of both."""
    vaes = tuple(load_model(model, device, "fp32") for model in (a, b))
    check_same_shape(*vaes)
    skipped: list[dict[str, str]] = []
    images = read_images(photos, vaes[0], size, skipped)
    scalings = (Scaling.of(vaes[0].config), Scaling.of(vaes[1].config))
    copies = tuple(plain_copy(vae) for vae in vaes)
    pairs = [both_ways(copies, scalings, image.to(vaes[0].device)) for image in images]
    agreement = agreement_of(pairs)
    picture = make_folder(output) / PICTURE
    draw(pairs[:MAX_ROWS], picture)
    if json:
        print_json({"a": a, "b": b, **agreement.as_dict(), "picture": str(picture), "skipped": skipped})
    else:
        typer.echo("\n".join([*report(agreement), f"\nLook at {picture}."]))
    finish(skipped, len(images))


def read_images(
    photos: list[Path] | None, vae: AutoencoderKL, size: int, skipped: list[dict[str, str]]
) -> list[torch.Tensor]:
    """The centres of images, (1, C, H, W) each, or the probes.

    Raises:
        LatentVAEError: none of them can be read, or the model takes other channels than images have.
    """
    image_channels(vae)  # pictures are drawn of these too
    if not photos:
        return probe_images(vae.config["in_channels"])
    channels, images = vae.config["in_channels"], []
    for path in find_images(photos):
        try:
            image = load_image(path, channels=channels)
        except ImageError as error:
            skip(path, error, skipped)
            continue
        top, left = (max(side - size, 0) // 2 for side in image.shape[-2:])
        images.append(image[None, :, top : top + size, left : left + size])
    if not images:
        finish(skipped, 0)
    return images


def draw(pairs: list[Pair], path: Path) -> None:
    """A row for each image: as it is, through each model, and decoded by each from the other's latents."""
    rows = [[row[0].cpu() for row in (pair.images, *pair.own, *pair.crossed)] for pair in pairs]
    try:
        grid(rows, COLUMNS).save(path)
    except OSError as error:
        raise LatentVAEError(f"{path} cannot be written ({error}). Choose another --output.") from error


def report(agreement: Agreement) -> list[str]:
    """The figures, with what each was wanted to be, and the verdict."""
    figures: list[tuple[str, str]] = [
        ("agreement of latents", f"{agreement.score:.4f} (1: the same; wanted: {MIN_SCORE} or more)"),
        ("correlation", f"{agreement.correlation:.4f}"),
        ("scale of B's latents", f"x {agreement.scale_ratio:.4f}"),
        ("PSNR of A", f"{agreement.psnr_a:.2f} dB"),
        ("PSNR of B", f"{agreement.psnr_b:.2f} dB"),
        ("B decodes A's latents", f"{agreement.psnr_b_decodes_a:.2f} dB"),
        ("A decodes B's latents", f"{agreement.psnr_a_decodes_b:.2f} dB"),
        ("lost by that, at most", f"{agreement.loss:.2f} dB (wanted: {MAX_LOSS:g} or less)"),
        ("images", f"{agreement.image_count}"),
    ]
    width = max(len(name) for name, _ in figures)
    verdict = (
        "The same latent space: what was trained on A's latents can use B."
        if agreement.same
        else "Different latent spaces: what was trained on A's latents cannot use B."
    )
    return [*(f"{name.ljust(width)}  {value}" for name, value in figures), "", verdict]
