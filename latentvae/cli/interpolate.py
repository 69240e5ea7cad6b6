"""`latentvae interpolate`: frames between images, as a strip, an animation and figures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentvae import images, runtime
from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.base.files import make_folder
from latentvae.cli.options import OUTPUT, counted, output_folder, tell
from latentvae.cli.places import check_output, write_json
from latentvae.cli.session import IMAGE_OPTIONS, LPIPS_OPTIONS, Session, takes
from latentvae.toolbox import editing

if TYPE_CHECKING:
    import torch

COPIES = 1.5  # of all frames that memory holds at once: an animation's are bytes


Paths = Annotated[
    list[Path],
    typer.Argument(
        help="Two or more images, in the order of the way, again where it comes back; or folders."
    ),
]


@takes("model", ..., *LPIPS_OPTIONS, *IMAGE_OPTIONS)
def interpolate(
    session: Session,
    paths: Paths,
    output: Annotated[Path, output_folder("Folder for what is written.")] = OUTPUT,
    frames: Annotated[
        int, typer.Option("--frames", "-n", min=2, help="Frames from one image to the next, both counted.")
    ] = 9,
    route: Annotated[
        Literal["spherical", "linear", "both"],
        typer.Option(help="Through the latents: spherical keeps the contrast half-way, linear fades."),
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
) -> None:
    """Interpolate between images: writes a strip, an animation and the size of each step."""
    ways = editing.interpolate
    routes: tuple[editing.interpolate.Route, ...] = ("linear", "spherical") if route == "both" else (route,)
    # frames that lie among the images would be ends of the next way
    for place in [output, *(output / name for name in routes if separate)]:
        check_output(place, paths)
    # one by one: an image that is named again is passed again
    session.find_images(paths)
    files = [file for path in paths for file in images.reading.find_images(path, session.left_out.copy())]
    vae = session.load()
    make_folder(output)
    # steps in LPIPS tell jumps; without its weights the rms of pixels has to do
    lpips, reason = session.find_lpips()
    read = _read_ends(session, list(dict.fromkeys(files)))
    if fit:
        read = _match_first(session, read)
    # the first image again: of its own frame the animation leaves one out
    used = [file for file in files if file in read]
    used += used[:1] if closed else []
    ends = [read[path] for path in used]  # (C, H, W) each
    _check_room((len(ends) - 1) * (frames - 1) + 1, ends[0])
    results = []
    for name in routes:
        found = ways.interpolate(vae, ends, frames, name, progress=True)
        steps = ways.step_sizes(found.frames, lpips)
        results.append(_figures(name, found, steps))
        images.saving.save_picture(ways.strip(found, steps), output / f"{name}.strip.png")
        if animation != "none":  # which is endless: the way back to the first image ends before it
            shown = found.frames[:-1] if closed else found.frames
            ways.save_animation(shown, output / f"{name}.{animation}", fps)
        if separate:
            _write_frames(make_folder(output / name), found)
        del found  # it may be gigabytes
    about = {"images": [str(path) for path in used], "lpips_net": session.lpips_net if lpips else None}
    result = {**about, "lpips_missing_reason": reason, "routes": results, **session.passed_over}
    write_json(result, output / "interpolation.json")
    tell(result, [*_lines(result), f"\nLook at {output / routes[0]}.strip.png."], session.json)
    session.finish(len(read))


def _read_ends(session: Session, files: list[Path]) -> dict[Path, torch.Tensor]:
    """The images that can be used; LatentVAEError where fewer than two can."""
    read = {path: image for path, image, _ in session.read_images(files)}
    # an image that was skipped is named here too: the message of a missing end must say why
    if len(read) < 2:
        why = f"; {session.skipped[0]['reason']}" if session.skipped else "."
        came = f"{len(read)} of {counted(len(files), 'image')} could be used"
        raise LatentVAEError(f"{came}, but a way has two ends: name two or more{why}")
    return read


def _check_room(count: int, image: torch.Tensor) -> None:
    """Raises ImageError where so many frames of the image's size would not fit into memory."""
    channels, height, width = image.shape
    needed = COPIES * count * channels * height * width * 4  # float32
    free = runtime.memory.free_memory(image.device)  # the CPU's: frames leave the GPU one by one
    if needed > free:
        raise ImageError(
            f"{count} frames of {width}x{height} px would take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: ask for fewer --frames, or shrink the images."
        )


def _match_first(session: Session, read: dict[Path, torch.Tensor]) -> dict[Path, torch.Tensor]:
    """All images at the first one's size, and the VAE tiling if that size must be."""
    # sizes must agree for latents to have a mean; the first image is the one people chose first
    first, *_ = read
    height, width = read[first].shape[-2:]
    session.fit(first, height, width)
    return {path: editing.interpolate.match_size(image, height, width) for path, image in read.items()}


def _figures(
    route: str, found: editing.interpolate.Interpolation, steps: list[editing.interpolate.Step]
) -> dict[str, Any]:
    """Every step, and how long and how even the way is, as JSON values."""
    summary: dict[str, Any] = {"route": route, "positions": found.positions}
    for name in ("lpips", "rms"):
        sizes = [asdict(step)[name] for step in steps]
        # LPIPS is None where its weights are missing or the frames are too small
        known = None not in sizes
        total = sum(sizes) if known else None
        summary[f"{name}_steps"] = sizes if known else None
        summary[f"{name}_total"] = total
        summary[f"{name}_largest_over_mean"] = max(sizes) * len(sizes) / total if total else None
    return summary


def _write_frames(folder: Path, found: editing.interpolate.Interpolation) -> None:
    """Save every frame as a PNG, numbered in order."""
    for number, frame in enumerate(found.frames):
        images.saving.save_image(frame, folder / f"{number:04d}.png")


def _lines(result: dict[str, Any]) -> list[str]:
    """The size of every step, for people: as LPIPS, or else as the root of the mean square."""
    lines = []
    for each in result["routes"]:
        # LPIPS where there is one: equal steps in it look equal
        sizes, name, digits = each["lpips_steps"], f"LPIPS-{result['lpips_net']}", 3
        if sizes is None:
            sizes, name, digits = each["rms_steps"], "rms of 255", 1
        lines.append(f"{each['route']}: {len(each['positions'])} frames; steps in {name}:")
        steps = " ".join(f"{size:.{digits}f}" for size in sizes)
        lines.append(f"  {steps}; sum {sum(sizes):.{digits}f}")
    if result["lpips_missing_reason"] is not None:
        lines.append(f"Note: LPIPS was not measured: {result['lpips_missing_reason']}")
    return lines
