"""`latentvae agree`: whether two models speak the same latent space, as figures and a picture."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentvae import images, models, pipelines, runtime
from latentvae.base.files import make_folder
from latentvae.cli.options import OUTPUT, output_folder, tell
from latentvae.cli.session import Session, image_channels, takes

if TYPE_CHECKING:
    import torch

EXIT_DIFFERENT = 6  # B is of no use to what was trained on A's latents
PICTURE = "agreement.png"
COLUMNS = ("image", "A", "B", "B decodes A's latents", "A decodes B's latents")
MAX_ROWS = 8  # of the picture; the figures are of all images


@takes(..., "device", "json")
def agree(
    session: Session,
    a: Annotated[str, typer.Argument(help="Model whose latents a diffusion model was trained on.")],
    b: Annotated[str, typer.Argument(help="Model to take its place. Both as --model of the other verbs.")],
    photos: Annotated[
        list[Path] | None,
        typer.Argument(help="Images or folders. Default: crops of a sample picture."),
    ] = None,
    output: Annotated[Path, output_folder("Folder for the picture.")] = OUTPUT,
    size: Annotated[int, typer.Option(min=16, help="Largest side of the images' centres, pixels.")] = 256,
) -> None:
    """Say whether a diffusion model trained on A's latents can use B: each decodes the latents of both.

    Ends with exit code 6 where it cannot, neither for text to image nor for image to image.
    """
    agreement, devices = pipelines.agree, runtime.devices
    place = devices.usable_device(session.device)
    with devices.fitting_on(place):
        vaes = tuple(models.spaces.load_autoencoder(model, device=place) for model in (a, b))
    agreement.check_same_shape(*vaes)
    channels = image_channels(vaes[0])  # even without photos: the picture is drawn of images too
    if photos:
        files = session.find_images(photos)
        centres = [image for _, image in session.read_centres(files, vaes[0], size)]
    else:
        centres = agreement.probe_images(channels)
    scale_of = models.latents.Scaling.of
    scalings = (scale_of(vaes[0].config), scale_of(vaes[1].config))
    # speed-ups round differently, which is not what is asked about
    with devices.fitting_on(place):
        copies = tuple(agreement.plain_copy(vae) for vae in vaes)
    pairs = [agreement.both_ways(copies, scalings, image.to(vaes[0].device)) for image in centres]
    name_of = models.spaces.space_name
    found = agreement.agreement_of(pairs, (name_of(vaes[0]), name_of(vaes[1])))
    picture = make_folder(output) / PICTURE
    _draw(pairs[:MAX_ROWS], picture)
    result = {"a": a, "b": b, **found.as_dict(), "picture": str(picture), **session.passed_over}
    tell(result, [*_lines(found), f"\nLook at {picture}."], session.json)
    if not (found.encodes or found.decodes):
        with suppress(typer.Exit):  # says what was skipped; that B is of no use is the more important code
            session.finish(len(centres))
        raise typer.Exit(EXIT_DIFFERENT)
    session.finish(len(centres))


def _draw(pairs: list[pipelines.agree.Pair], path: Path) -> None:
    """A row for each image: as it is, through each model, and decoded by each from the other's latents."""
    # (1, C, h, w) each, because images differ in size
    rows: list[list[torch.Tensor]] = [
        [row[0].cpu() for row in (pair.images, *pair.own, *pair.crossed)] for pair in pairs
    ]
    images.saving.save_picture(images.drawing.grid(rows, COLUMNS), path)


def _lines(found: pipelines.agree.Agreement) -> list[str]:
    """The figures, with what each was wanted to be, and the verdict."""
    agreement = pipelines.agree
    figures: list[tuple[str, str]] = [
        ("latent spaces, by config", "A: {}; B: {}".format(*found.spaces)),
        ("agreement of latents", f"{found.score:.4f} (1: the same; wanted: {agreement.MIN_SCORE} or more)"),
        ("correlation", f"{found.correlation:.4f}"),
        ("scale of B's latents", f"x {found.scale_ratio:.4f}"),
        ("PSNR of A", f"{found.psnr_a:.2f} dB"),
        ("PSNR of B", f"{found.psnr_b:.2f} dB"),
        ("B decodes A's latents", f"{found.psnr_b_decodes_a:.2f} dB"),
        ("A decodes B's latents", f"{found.psnr_a_decodes_b:.2f} dB"),
        (
            "B's pictures of A's latents",
            f"{found.decode_score:.3f} of 1, contrast x {found.contrast:.3f}",
        ),
        (
            "A's pictures of B's latents",
            f"{found.encode_score:.3f} of 1 (wanted: {agreement.MIN_PICTURE_SCORE})",
        ),
        ("lost by that, at most", f"{found.loss:.2f} dB (wanted: {agreement.MAX_LOSS:g} or less)"),
        ("images", f"{found.image_count}"),
    ]
    width = max(len(name) for name, _ in figures)
    if found.same:
        verdict = "The same latent space: what was trained on A's latents can use B."
    elif found.fits("both"):
        verdict = "Nearly the same latent space: good for text and image to image, not for a cache."
    elif found.encodes:
        verdict = "A understands B's latents, but B does not draw A's as A does: B encodes for A only."
    elif found.decodes:
        verdict = "B decodes A's latents: good for text to image; its own latents are not A's."
    else:
        verdict = "Different latent spaces: what was trained on A's latents cannot use B."
    return [*(f"{name.ljust(width)}  {value}" for name, value in figures), "", verdict]
