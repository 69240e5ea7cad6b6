"""`latentvae fill`: missing pixels from the known ones."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from tqdm import tqdm

from latentvae import images, models, runtime
from latentvae.base.errors import ImageError
from latentvae.base.files import make_folder
from latentvae.cli.options import OUTPUT, Seed, output_folder, tell
from latentvae.cli.places import with_ending, write_json
from latentvae.cli.session import Session, image_channels, takes
from latentvae.toolbox import editing

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

GRADIENTS = 4  # times the memory of a decoding that its gradients take: up to 3.6, measured on f8c4-small

Method = Annotated[
    Literal["optimise", "project", "one_pass"],
    typer.Option(
        help="optimise: Adam on latents. project: encode and decode again and again, which is faster. "
        "one_pass: once, for models trained with masked input."
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="More fill better and take longer. Default: 20; of project 3, of one_pass 1."),
]
Blend = Annotated[
    bool,
    typer.Option(
        help="Blend with a smooth extension of the known pixels, by weights found on hidden ones; "
        "otherwise the hole gets what the model decodes."
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(
        min=64,
        help="Fill in blended windows of this side, in pixels, only where some are missing. Default: with "
        "optimise, where the gradients of the whole image would not fit into memory.",
    ),
]


@takes("output", "model", ..., "device", "json")
def fill(
    session: Session,
    image: Annotated[Path, typer.Argument(help="The image.", show_default=False)],
    mask: Annotated[
        Path,
        typer.Argument(help="An image of the same size: white where a pixel is missing.", show_default=False),
    ],
    output: Annotated[Path, output_folder("Folder for the pictures.")] = OUTPUT,
    method: Method = "optimise",
    steps: Steps = None,
    blend: Blend = True,
    original: Annotated[
        Path | None, typer.Option(help="The complete image, where there is one: prints PSNR in the hole.")
    ] = None,
    seed: Seed = 0,
    tile_size: Windows = None,
) -> None:
    """Fill in the missing pixels of an image: writes NAME.filled.png, NAME.comparison.png and NAME.fill.json.

    Known pixels are kept exactly, as 8 bits.
    """
    vae = session.load()
    # (1, C, H, W); (H, W); as images, or None
    known, missing, complete = _read_inputs(vae, image, mask, original)
    height, width = known.shape[-2:]
    # before anything is written: a refusal leaves no folder
    side = tile_size or _fitting_side(session, image, height, width, method)
    make_folder(output)
    options = {"method": method, "steps": steps, "blend": blend, "seed": seed}
    result = _complete_image(vae, known, missing, side, **options)
    about = {"image": str(image), "mask": str(mask), **options}
    # null in JSON where the image was filled in as a whole
    tiles = side if side < max(height, width) else None
    figures = {**about, "tile_size": tiles, **_measure(result, missing, complete)}
    figures |= _write_pictures(output / image.name, known, missing, result, complete)
    write_json(figures, output / with_ending(image.name, ".fill.json"))
    tell(figures, _lines(figures), session.json)


def _read_inputs(
    vae: AutoencoderKL, image: Path, mask: Path, original: Path | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The image (1, C, H, W), which pixels are missing (H, W), and the complete image where there is one.

    Raises:
        ImageError: one that cannot be read, or is of another size than the image.
    """
    channels, window = image_channels(vae), models.loading.window_of(vae)
    known, missing = images.scans.load(image, channels, window)[0][None], _load_mask(mask)
    _check_size(image, known, mask, missing)
    complete = None if original is None else images.scans.load(original, channels, window)[0][None]
    if complete is not None:
        _check_size(image, known, original, complete[0, 0])
    return known, missing, complete


def _complete_image(
    vae: AutoencoderKL, known: torch.Tensor, missing: torch.Tensor, side: int, **options: Any
) -> editing.fill.Filling:
    """Fill in, in windows where the image is larger than `side`, with a count of the steps."""
    # without a total: how many windows touch the hole is not known beforehand
    with tqdm(unit=" steps") as bar:
        if side >= max(known.shape[-2:]):
            return editing.fill.fill(vae, known, missing, progress=bar.update, **options)
        return editing.fill.fill_in_windows(vae, known, missing, side, progress=bar.update, **options)


def _load_mask(mask: Path) -> torch.Tensor:
    """Which pixels (H, W) are white, or nearer to white than to black; transparent ones are not."""
    # on black, so that what a painter left transparent is known, and not missing; > 0 is above mid-grey
    return images.reading.load_image(mask, channels=1, background=(0, 0, 0))[0] > 0


def _check_size(image: Path, known: torch.Tensor, other: Path | None, plane: torch.Tensor) -> None:
    """Raises ImageError where a mask, or the original, is of another size than the image."""
    # one of another size could be scaled, but then it would mark other pixels
    if plane.shape != known.shape[-2:]:
        (height, width), (wanted_height, wanted_width) = plane.shape, known.shape[-2:]
        raise ImageError(
            f"{other} is {width} x {height} px, but {image} is {wanted_width} x {wanted_height} px: make it "
            "the same size (upright, as the image is shown), without blurring a mask"
        )


def _fitting_side(session: Session, image: Path, height: int, width: int, method: str) -> int:
    """The longer side of the image, or else the largest window whose gradients fit into memory.

    A method without gradients tiles exactly, and needs no windows.

    Raises:
        ImageError: not even the smallest does.
    """
    vae = session.vae
    if method != "optimise":
        session.fit(image, height, width)
        return max(height, width)
    # tiling keeps no activations, but gradients need all of them: only smaller inputs help
    peak, free = runtime.memory.ordinary_peak, runtime.memory.free_memory(vae.device)
    if GRADIENTS * peak(vae, height, width) <= free:
        return max(height, width)
    # from the largest: the fewer windows, the fewer seams to blend
    sides = runtime.tiling.fitting.TILE_SIZES
    for side in sides:
        if GRADIENTS * peak(vae, side, side) <= free:
            typer.echo(f"Too large for gradients at once: filled in windows of {side} px.", err=True)
            return side
    needed = GRADIENTS * peak(vae, sides[-1], sides[-1])
    raise ImageError(
        f"{image} of {width}x{height} px would take about {needed / 1e9:.1f} GB for the gradients even in "
        f"windows, and {free / 1e9:.1f} GB are free: use --method project."
    )


def _measure(
    result: editing.fill.Filling, missing: torch.Tensor, complete: torch.Tensor | None
) -> dict[str, Any]:
    """The weights of the blend, the share that was missing and, with an original, PSNR in the hole."""
    figures: dict[str, Any] = {
        "missing_share": float(missing.float().mean()),
        "plate": result.plate,
        "detail": result.detail,
        "psnr_in_hole": None,
    }
    # an empty hole has no error to average
    if complete is not None and missing.any():
        parts = {"filled": result.images, "smooth": result.smooth, "decoded": result.decoded}
        found = {name: editing.fill.hole_psnr(part, complete, missing) for name, part in parts.items()}
        # JSON has no infinity
        figures["psnr_in_hole"] = {name: value if isfinite(value) else None for name, value in found.items()}
    return figures


def _write_pictures(
    place: Path,
    known: torch.Tensor,
    missing: torch.Tensor,
    result: editing.fill.Filling,
    complete: torch.Tensor | None,
) -> dict[str, str]:
    """Save the filled image and a comparison; return their paths."""
    endings = (".filled.png", ".comparison.png")
    filled, compared = (place.with_name(with_ending(place.name, ending)) for ending in endings)
    images.saving.save_image(result.images, filled)
    # in the order of what was done, so that the picture reads from left to right
    parts = {"known": known.masked_fill(missing, 0.0), "smooth": result.smooth, "decoded": result.decoded}
    parts |= {"filled": result.images} | ({} if complete is None else {"original": complete})
    row = [part[0].cpu() for part in parts.values()]
    images.saving.save_picture(images.drawing.grid([row], list(parts)), compared)
    return {"filled": str(filled), "comparison": str(compared)}


def _lines(figures: dict[str, Any]) -> list[str]:
    """What was done, in words."""
    if figures["missing_share"] == 0:
        lines = ["The mask has no white pixel: nothing is missing, and the image is written as it is."]
    else:
        mixed = f"a smooth extension of the rest and {100 * figures['detail']:.0f} % of the model's detail"
        held = mixed if figures["blend"] else "what the model decodes"
        lines = [f"{100 * figures['missing_share']:.1f} % of the pixels were missing; the hole holds {held}."]
    if figures["psnr_in_hole"]:
        named = (
            f"{name} {'exact' if value is None else f'{value:.2f} dB'}"
            for name, value in figures["psnr_in_hole"].items()
        )
        lines.append(f"PSNR in the hole: {', '.join(named)}.")
    return [*lines, f"Look at {figures['comparison']}."]
