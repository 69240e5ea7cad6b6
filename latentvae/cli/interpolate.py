"""`latentvae interpolate`: frames between images, as a strip, an animation and figures."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from diffusers import AutoencoderKL

from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.cli.options import Device, Json, LPIPSNet, LPIPSWeights, Model, Precision, Store, TileSize
from latentvae.cli.session import (
    check_output,
    counted,
    find_lpips,
    finish,
    load_model,
    make_folder,
    print_json,
    read_images,
)
from latentvae.images.reading import find_images
from latentvae.images.saving import save_image
from latentvae.runtime.memory import free_memory
from latentvae.runtime.tiling.fitting import tile_to_fit
from latentvae.toolbox.editing.interpolate import (
    Interpolation,
    Route,
    Step,
    match_size,
    save_animation,
    step_sizes,
    strip,
)
from latentvae.toolbox.editing.interpolate import interpolate as run

COPIES = 1.5  # of all frames that memory holds at once: an animation's are bytes


def interpolate(
    paths: Annotated[
        list[Path], typer.Argument(help="Two or more images, in the order of the way; or folders.")
    ],
    model: Model = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what is written.")] = Path(
        "latentvae-output"
    ),
    frames: Annotated[
        int, typer.Option("--frames", "-n", min=2, help="From one image to the next, both counted.")
    ] = 9,
    route: Annotated[
        Literal["spherical", "linear", "both"], typer.Option(help="Through the latents.")
    ] = "spherical",
    closed: Annotated[bool, typer.Option("--closed", help="Go back to the first image at the end.")] = False,
    fit: Annotated[
        bool, typer.Option("--fit", help="Scale and crop the other images to the first one's size.")
    ] = False,
    animation: Annotated[
        Literal["webp", "gif", "none"], typer.Option(help="webp is lossless, gif has 256 colours.")
    ] = "webp",
    fps: Annotated[float, typer.Option(min=0.1, max=100, help="Frames per second.")] = 10.0,
    separate: Annotated[bool, typer.Option("--separate", help="Write every frame as a PNG too.")] = False,
    lpips_net: LPIPSNet = "alex",
    lpips_weights: LPIPSWeights = None,
    device: Device = None,
    precision: Precision = "fp32",
    tile_size: TileSize = None,
    store: Store = None,
    json: Json = False,
) -> None:
    """Interpolate between images: writes a strip, an animation and the size of each step."""

    routes: tuple[Route, ...] = ("linear", "spherical") if route == "both" else (route,)
    check_places([output, *(output / name for name in routes if separate)], paths)
    files = find_images(paths)
    vae = load_model(model, device, precision)
    make_folder(output)
    lpips, reason = find_lpips(lpips_net, lpips_weights, vae.device)
    read, skipped = read_ends(files, vae, tile_size, store)
    if fit:
        read = match(vae, read, tile_size, store)
    used = [*read, next(iter(read))] if closed else list(read)
    images = [read[path] for path in used]
    check_room((len(images) - 1) * (frames - 1) + 1, images[0])
    results = []
    for name in routes:
        found = run(vae, images, frames, name, progress=True)
        steps = step_sizes(found.frames, lpips)
        results.append(figures(name, found, steps))
        write_pictures(output, name, found, steps, closed, None if animation == "none" else animation, fps)
        if separate:
            write_frames(make_folder(output / name), found)
        del found  # it may be gigabytes
    about = {"images": [str(path) for path in used], "lpips_net": lpips_net if lpips else None}
    report({**about, "lpips_missing_reason": reason, "routes": results, "skipped": skipped}, output, json)
    finish(skipped, len(read))


def check_places(places: list[Path], paths: list[Path]) -> None:
    """Raises LatentVAEError where one of the folders to write to is one of images."""
    for place in places:
        check_output(place, paths)


def read_ends(
    files: list[Path], vae: AutoencoderKL, tile_size: int | None, store: Path | None
) -> tuple[dict[Path, torch.Tensor], list[dict[str, str]]]:
    """The images that can be used, and those skipped; LatentVAEError where fewer than two can."""
    skipped: list[dict[str, str]] = []
    read = {path: image for path, image, _ in read_images(files, vae, skipped, tile_size, store)}
    if len(read) < 2:
        why = f"; {skipped[0]['reason']}" if skipped else "."
        came = f"{len(read)} of {counted(len(files), 'image')} could be used"
        raise LatentVAEError(f"{came}, but a way has two ends: name two or more{why}")
    return read, skipped


def check_room(count: int, image: torch.Tensor) -> None:
    """Raises ImageError where so many frames of the image's size would not fit into memory."""

    channels, height, width = image.shape
    needed = COPIES * count * channels * height * width * 4
    free = free_memory(torch.device("cpu"))
    if needed > free:
        raise ImageError(
            f"{count} frames of {width}x{height} px would take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: ask for fewer --frames, or shrink the images."
        )


def match(
    vae: AutoencoderKL, read: dict[Path, torch.Tensor], tile_size: int | None, store: Path | None
) -> dict[Path, torch.Tensor]:
    """All images at the first one's size, and the VAE tiling if that size must be."""

    first, *_ = read
    height, width = read[first].shape[-2:]
    tile_to_fit(vae, first, height, width, tile_size, store)
    return {path: match_size(image, height, width) for path, image in read.items()}


def figures(route: str, found: Interpolation, steps: list[Step]) -> dict[str, Any]:
    """Every step, and how long and how even the way is, as JSON values."""
    summary: dict[str, Any] = {"route": route, "positions": found.positions}
    for name in ("lpips", "rms"):
        sizes = [asdict(step)[name] for step in steps]
        known = None not in sizes
        total = sum(sizes) if known else None
        summary[f"{name}_steps"] = sizes if known else None
        summary[f"{name}_total"] = total
        summary[f"{name}_largest_over_mean"] = max(sizes) * len(sizes) / total if total else None
    return summary


def write_pictures(
    output: Path,
    route: str,
    found: Interpolation,
    steps: list[Step],
    closed: bool,
    animation: str | None,
    fps: float,
) -> None:
    """Save the strip and the animation."""

    strip(found, steps).save(output / f"{route}.strip.png")
    if animation is not None:  # which is endless: the way back to the first image ends before it
        shown = found.frames[:-1] if closed else found.frames
        save_animation(shown, output / f"{route}.{animation}", fps)


def write_frames(folder: Path, found: Interpolation) -> None:
    """Save every frame as a PNG, numbered in order."""

    for number, frame in enumerate(found.frames):
        save_image(frame, folder / f"{number:04d}.png")


def report(result: dict[str, Any], output: Path, as_json: bool) -> None:
    """Write the figures beside the pictures, and print them."""

    text = json.dumps(result, indent=1)  # in ASCII: names need not be UTF-8
    (output / "interpolation.json").write_text(text, encoding="ascii")
    if as_json:
        print_json(result)
        return
    for each in result["routes"]:
        sizes, name, digits = each["lpips_steps"], f"LPIPS-{result['lpips_net']}", 3
        if sizes is None:
            sizes, name, digits = each["rms_steps"], "rms of 255", 1
        typer.echo(f"{each['route']}: {len(each['positions'])} frames; steps in {name}:")
        typer.echo("  " + " ".join(f"{size:.{digits}f}" for size in sizes) + f"; sum {sum(sizes):.{digits}f}")
    if result["lpips_missing_reason"] is not None:
        typer.echo(f"Note: LPIPS was not measured: {result['lpips_missing_reason']}")
    typer.echo(f"\nLook at {output / result['routes'][0]['route']}.strip.png.")
