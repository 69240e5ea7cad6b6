"""Whether an image fits into memory, and exact tiling where it does not."""

from pathlib import Path
from typing import TYPE_CHECKING

from latentvae.base.errors import ImageError

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

TILE_SIZES = (512, 256, 128, 64)  # the largest that fits is the fastest
SHARE = 0.5  # of the free memory that the store and a tile may take; the image and its measures need some too


def fit(
    vae: "AutoencoderKL", path: Path, height: int, width: int, tile_size: int | None, store: Path | None
) -> None:
    """Have the VAE tile an image that would not fit, or that is larger than `tile_size`; otherwise not.

    Args:
        path: of the image, for the message.
        tile_size: None: tile only what would not fit.
        store: folder for the maps of tiled images; None: main memory.

    Raises:
        ImageError: it would not fit even so, with what it would take and what there is.
    """
    from latentvae.runtime.patches import restore
    from latentvae.runtime.tiling.switch import enable_exact_tiling

    restore(vae, "tiling")
    needed, free = ordinary_peak(vae, height, width), free_memory(vae.device)
    if needed <= free and tile_size is None:
        return
    sizes = TILE_SIZES if tile_size is None else (tile_size,)
    peaks = [tiled_peak(vae, height, width, size, SHARE * free, stored=store is not None) for size in sizes]
    chosen = next((size for size, peak in zip(sizes, peaks, strict=True) if peak <= free), None)
    if chosen is None:
        raise ImageError(
            f"{path} of {width}x{height} px would take about {needed / 1e9:.1f} GB, or "
            f"{min(peaks) / 1e9:.1f} GB in tiles, and {free / 1e9:.1f} GB are free: "
            f"make it smaller{'' if store else ', or give --store FOLDER to a verb that has it'}."
        )
    enable_exact_tiling(vae, chosen, store, progress=True, memory=SHARE * free)


def tiled_peak(
    vae: "AutoencoderKL", height: int, width: int, tile_size: int, memory: float, stored: bool
) -> int:
    """Bytes above the weights that an image takes in tiles; not counting maps `stored` in files."""
    from latentvae.runtime.tiling.planning import plan

    steps = plan(vae, height, width, tile_size=tile_size, memory=memory)
    return max(each.peak_bytes - stored * each.store_bytes for each in (steps.encode, steps.decode))


def ordinary_peak(vae: "AutoencoderKL", height: int, width: int) -> int:
    """Bytes above the weights that an image takes without tiling."""
    # measured: Stable Diffusion's decoder peaks at 4.75 full-size maps of its second level's width
    map_channels = max(vae.config["block_out_channels"][:2])
    return 5 * map_channels * vae.dtype.itemsize * height * width


def free_memory(device: "torch.device") -> int:
    """Bytes that can still be taken on a device."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
