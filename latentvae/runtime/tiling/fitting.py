"""Exact tiling where an image would not fit into memory, and only there."""

from pathlib import Path

from diffusers import AutoencoderKL

from latentvae.base.errors import ImageError
from latentvae.runtime import memory
from latentvae.runtime.patches import restore
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
    allowed = memory.SHARE * free
    # half of what is free is for maps and tile, but a plan that needs more than that may still fit
    sizes = TILE_SIZES if tile_size is None else (tile_size,)
    peaks = [_tiled_peak(vae, height, width, size, allowed, scratch is not None) for size in sizes]
    chosen = next((size for size, peak in zip(sizes, peaks, strict=True) if peak <= free), None)
    if chosen is None:
        raise ImageError(
            f"{path} of {width}x{height} px would take about {needed / 1e9:.1f} GB, or "
            f"{min(peaks) / 1e9:.1f} GB in tiles, and {free / 1e9:.1f} GB are free: "
            f"make it smaller{'' if scratch else ', or give --store FOLDER to a verb that has it'}."
        )
    switch.enable_exact_tiling(vae, chosen, scratch, progress=True, memory=allowed)


def _tiled_peak(
    vae: AutoencoderKL, height: int, width: int, tile_size: int, allowed: float, on_disk: bool
) -> int:
    """Bytes above the weights that an image takes in tiles; maps in a scratch folder do not count."""
    steps = planning.plan(vae, height, width, tile_size=tile_size, memory=allowed)
    return max(each.peak_bytes - on_disk * each.store_bytes for each in (steps.encode, steps.decode))
