"""Exact tiling where an image would not fit into memory, and only there."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import ImageError
from latentvae.runtime import memory
from latentvae.runtime.kernels import compiled
from latentvae.runtime.patches import patched, restore
from latentvae.runtime.tiling import planning, switch

TILE_SIZES = (512, 256, 128, 64)  # the largest that fits is the fastest


def tile_to_fit(
    vae: AutoencoderKL, path: Path, height: int, width: int, tile_size: int | None, scratch: Path | None
) -> None:
    """Have the VAE tile an image that would not fit, or that is larger than `tile_size`; otherwise not.

    Args:
        path: of the image, for the message.
        tile_size: None: tile only what would not fit.
        scratch: folder for the maps of tiled images; None: main memory.

    Raises:
        ImageError: it would not fit even so, with what it would take and what there is.
    """
    restore(vae, "tiling")  # what the image before needed says nothing of this one
    needed, free = memory.ordinary_peak(vae, height, width), memory.free_memory(vae.device)
    if needed <= free and tile_size is None:
        return
    chosen, least = fitting_tile(vae, height, width, free, tile_size, on_disk=scratch is not None)
    if chosen is None:
        raise ImageError(
            f"{path} of {width}x{height} px would take about {needed / 1e9:.1f} GB, or "
            f"{least / 1e9:.1f} GB in tiles, and {free / 1e9:.1f} GB are free: "
            f"make it smaller{'' if scratch else ', or give --scratch FOLDER to a verb that has it'}."
        )
    switch.enable_exact_tiling(vae, chosen, scratch, progress=True, memory=memory.SHARE * free)


def fitting_tile(
    vae: AutoencoderKL, height: int, width: int, free: float, tile_size: int | None, *, on_disk: bool
) -> tuple[int | None, int]:
    """The largest side of tiles with which an image fits into `free` bytes, or None; and the least it takes.

    Args:
        tile_size: the only one to try; None: all of `TILE_SIZES`.
        on_disk: maps lie in a scratch folder, and do not count.
    """
    peaks = []
    for size in TILE_SIZES if tile_size is None else (tile_size,):
        # half of what is free is for maps and tile, but a plan that needs more than that may still fit
        peaks.append(_tiled_peak(vae, height, width, size, memory.SHARE * free, on_disk))
        if peaks[-1] <= free:  # planning small tiles of a large image takes seconds
            return size, peaks[-1]
    return None, min(peaks)


def _tiled_peak(
    vae: AutoencoderKL, height: int, width: int, tile_size: int, allowed: float, on_disk: bool
) -> int:
    """Bytes above the weights that an image takes in tiles; maps in a scratch folder do not count."""
    place = Path() if on_disk else vae.device
    steps = planning.plan(vae, height, width, tile_size=tile_size, scratch=place, memory=allowed)
    return max(_memory(each, on_disk=on_disk) for each in (steps.encode, steps.decode))


def _memory(course: planning.Course, *, on_disk: bool) -> int:
    return course.tile_bytes if on_disk else course.peak_bytes


@dataclass(frozen=True)
class Way:
    """One way to encode or decode an image, and what it takes.

    Attributes:
        verb: encode or decode.
        tile_size: largest side of a tile; None: whole.
        on_disk: whether maps lie in a scratch folder.
        peak_bytes: of memory, above the weights and the input.
        disk_bytes: in the scratch folder.
        tflop: computed in all.
        seconds: about, at a rate that was measured.
    """

    verb: str
    tile_size: int | None
    on_disk: bool
    peak_bytes: int
    disk_bytes: int
    tflop: float
    seconds: float


def ways(
    vae: AutoencoderKL, height: int, width: int, tile_size: int, free: float, rates: dict[str, float]
) -> list[Way]:
    """Whole, in tiles with maps in memory, in tiles with maps on disk: of encoding, then of decoding.

    Args:
        free: bytes; maps and a tile may take `memory.SHARE` of them, as in `tile_to_fit`.
        rates: FLOP/s by verb, as `measured_rates` gives them.
    """
    in_memory, in_folder = (
        planning.plan(vae, height, width, tile_size=tile_size, scratch=place, memory=memory.SHARE * free)
        for place in (vae.device, Path())
    )
    whole, peaks = planning.whole_tflop(vae, height, width), whole_peaks(vae, height, width)
    found = []
    for verb in ("encode", "decode"):
        rate = rates[verb] / 1e12
        found.append(Way(verb, None, False, peaks[verb], 0, whole[verb], whole[verb] / rate))
        for steps, on_disk in ((in_memory, False), (in_folder, True)):
            course: planning.Course = getattr(steps, verb)
            if course.stages:
                sizes = _memory(course, on_disk=on_disk), course.store_bytes * on_disk
                found.append(Way(verb, tile_size, on_disk, *sizes, course.tflop, course.tflop / rate))
    return found


def whole_peaks(vae: AutoencoderKL, height: int, width: int) -> dict[str, int]:
    """Bytes above the weights that encoding and decoding take without tiling.

    With `optimize` on a CPU: the maps that live at once, as `forwards.resnet` and blocks hold them.
    Elsewhere a norm's result and libraries' own buffers come on top: the bound that `tile_to_fit` goes by.
    """
    bound = memory.ordinary_peak(vae, height, width)
    ours = vae.device.type == "cpu" and bool(patched(vae, "optimize")) and compiled.library() is not None
    if not ours:
        return {"encode": bound, "decode": bound}
    widths, layers = vae.config["block_out_channels"], vae.config["layers_per_block"]
    pixels, itemsize = height * width, vae.dtype.itemsize
    down, up = [widths[0], *widths[:-1]], [widths[-1], *widths[:0:-1]]  # channels that each block gets
    smaller = [pixels / 4**level for level in range(len(widths))]
    encode = [_block_peak(*each, layers, grows=False) for each in zip(down, widths, smaller, strict=True)]
    decode = [
        _block_peak(*each, layers + 1, grows=each[2] < pixels)
        for each in zip(up, widths[::-1], smaller[::-1], strict=True)
    ]
    return {"encode": round(max(encode) * itemsize), "decode": round(max(decode) * itemsize)}


def _block_peak(given: int, channels: int, pixels: float, resnets: int, *, grows: bool) -> float:
    """Values that live at once in a block: what it was given lives to its end, as its caller holds it.

    Args:
        given: channels that come in, `channels` go out. resnets: how many.
        pixels: of its resnets. grows: an upsampler of twice the side follows.
    """
    # a resnet's two maps are out beside what it gets, and with other channels that once more, mapped to these
    first = given + 2 * channels + channels * (given != channels)
    later = given + 3 * channels if resnets > 1 else 0
    return pixels * max(first, later, given + channels + 4 * channels if grows else 0)


def estimate(
    vae: AutoencoderKL, height: int, width: int, tile_size: int | None = None, *, on_disk: bool = False
) -> float:
    """Seconds, about, to encode and decode an image as `tile_to_fit` has it; times a small one for that."""
    restore(vae, "tiling")  # of the image before
    rates, tflop = measured_rates(vae), planning.whole_tflop(vae, height, width)
    free = memory.free_memory(vae.device)
    if tile_size is not None or memory.ordinary_peak(vae, height, width) > free:
        side, _ = fitting_tile(vae, height, width, free, tile_size, on_disk=on_disk)
        steps = planning.plan(
            vae, height, width, tile_size=side or TILE_SIZES[-1], memory=memory.SHARE * free
        )
        tflop = {course.verb: course.tflop for course in (steps.encode, steps.decode)}
    return sum(tflop[verb] * 1e12 / rates[verb] for verb in rates)


@torch.no_grad()
def measured_rates(vae: AutoencoderKL, side: int = 256) -> dict[str, float]:
    """FLOP/s of encoding and decoding an image of that side, each timed once after a run to warm up."""
    image = torch.zeros(1, vae.config["in_channels"], side, side, device=vae.device, dtype=vae.dtype)
    latents = vae.encode(image).latent_dist.mode()
    tflop, rates = planning.whole_tflop(vae, side, side), {}
    for verb, run in (("encode", lambda: vae.encode(image)), ("decode", lambda: vae.decode(latents))):
        taken = []
        for _ in range(2):
            start = time.perf_counter()
            run()
            if vae.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        rates[verb] = tflop[verb] * 1e12 / min(taken)
    return rates
