"""`latentvae plan`: what an image of some size takes, before anything runs."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentvae import runtime
from latentvae.base.errors import LatentVAEError
from latentvae.cli.options import duration, tell
from latentvae.cli.session import Session, takes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Model = Annotated[str, typer.Argument(metavar="MODEL", help="As --model of the other verbs.")]
Size = Annotated[str, typer.Argument(metavar="SIDE|WxH", help="Pixels: 2048, or 1920x1080.")]
Memory = Annotated[
    float | None, typer.Option(metavar="GB", help="Memory that an image may take. Default: what is free now.")
]
TileSize = Annotated[
    int | None,
    typer.Option(
        min=16,
        help="Side of the tiles, in pixels: smaller ones take less memory and more time. Default: the "
        "largest of 512, 256, 128, 64 that fits.",
    ),
]
Stages = Annotated[bool, typer.Option("--stages", help="Also a line for each stage of exact tiling.")]


@takes(..., "device", "precision", "json")
def plan(
    session: Session,
    model: Model,
    size: Size,
    memory: Memory = None,
    tile_size: TileSize = None,
    stages: Stages = False,
) -> None:
    """Say what an image of some size takes: memory and time, whole and in exact tiles, and what to choose."""
    height, width = parse_size(size)
    if memory is not None and memory <= 0:
        raise LatentVAEError(f"--memory {memory:g} came; wanted a number of GB above 0.")
    session.model = model
    vae = session.load()
    fitting, planning = runtime.tiling.fitting, runtime.tiling.planning
    free = memory * 1e9 if memory is not None else runtime.memory.free_memory(vae.device)
    choice = choose(vae, height, width, free, tile_size)
    side = choice["tile_size"] or tile_size or planning.DEFAULT_TILE
    rates = fitting.measured_rates(vae)
    ways = fitting.ways(vae, height, width, side, free, rates)
    asked = f"{width} x {height} px, {model}, {session.precision} on {vae.device}"
    said = f"{free / 1e9:.1f} GB {'allowed' if memory is not None else 'free'}"
    lines = [f"{asked}; {said} beside the weights", *table(ways)]
    speeds = ", ".join(f"{verb} {rate / 1e9:.0f} GFLOP/s" for verb, rate in rates.items())
    lines += [f"Times are estimates from a 256 px image that was just timed ({speeds}).", choice["advice"]]
    result: dict[str, Any] = {
        "width": width,
        "height": height,
        "free_bytes": free,
        "ways": [asdict(way) for way in ways],
    }
    result |= {"flop_per_second": rates, "choice": choice}
    if stages:
        steps = planning.plan(vae, height, width, tile_size=side, memory=runtime.memory.SHARE * free)
        lines.append(str(steps))
        result["stages"] = {
            each.verb: [asdict(stage) for stage in each.stages] for each in (steps.encode, steps.decode)
        }
    tell(result, lines, session.json)


def parse_size(size: str) -> tuple[int, int]:
    """Height and width of "SIDE" or "WxH".

    Raises:
        LatentVAEError: it is neither.
    """
    found = re.fullmatch(r"([1-9]\d*)(?:[xX]([1-9]\d*))?", size)
    if found is None:
        raise LatentVAEError(f"{size!r} is no size; wanted pixels as 2048, or width and height as 1920x1080.")
    width = int(found[1])
    return int(found[2] or width), width


def choose(vae: AutoencoderKL, height: int, width: int, free: float, tile_size: int | None) -> dict[str, Any]:
    """What the verbs would do with so many bytes, and a line of advice that says how to do it in Python."""
    fits = runtime.tiling.fitting.fitting_tile
    whole = runtime.memory.ordinary_peak(vae, height, width)
    if whole <= free and (tile_size is None or max(height, width) <= tile_size):
        return {"tile_size": None, "on_disk": False, "fits": True, "advice": "It fits whole: nothing to do."}
    close = ""
    if tile_size is None and max(runtime.tiling.fitting.whole_peaks(vae, height, width).values()) <= free:
        close = (
            f" Whole is close; verbs want {whole / 1e9:.1f} GB for that, with room for images and measures."
        )
    for on_disk in (False, True):
        tile, least = fits(vae, height, width, free, tile_size, on_disk=on_disk)
        if tile is not None:
            scratch = ', scratch="FOLDER"' if on_disk else ""
            option = " and --scratch FOLDER" if on_disk else ""
            advice = (
                f"Tile it: latentvae.enable_exact_tiling(vae, tile_size={tile}{scratch}, "
                f"memory={runtime.memory.SHARE * free:.2g}); on the command line --tile-size {tile}{option}."
            )
            return {"tile_size": tile, "on_disk": on_disk, "fits": True, "advice": advice + close}
    advice = (
        f"It does not fit: even in tiles, with maps on disk, it takes {least / 1e9:.1f} GB. Make it smaller."
    )
    return {"tile_size": None, "on_disk": False, "fits": False, "advice": advice}


def table(ways: list[runtime.tiling.fitting.Way]) -> list[str]:
    """A line for each way."""
    lines = [f"{'':8}{'':34}{'peak GB':>8}{'disk GB':>9}{'TFLOP':>8}{'time':>10}"]
    for way in ways:
        name = "whole" if way.tile_size is None else f"tiles of {way.tile_size} px, maps "
        name += "" if way.tile_size is None else "in a folder" if way.on_disk else "in memory"
        lines.append(
            f"{way.verb:8}{name:34}{way.peak_bytes / 1e9:8.2f}{way.disk_bytes / 1e9:9.2f}{way.tflop:8.2f}"
            f"{duration(way.seconds):>10}"
        )
    return lines
