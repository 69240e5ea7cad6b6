"""How much memory an image takes, and how much there is: one formula, for tiling and for the verbs."""

import psutil
import torch
from diffusers import AutoencoderKL

SHARE = 0.5  # of the free memory that maps and a tile may take; the image and its measures need some too
# Measured: Stable Diffusion's decoder peaks at 4.75 full-size maps of its second level's width.
MAPS_AT_PEAK = 5


def ordinary_peak(vae: AutoencoderKL, height: int, width: int) -> int:
    """Bytes above the weights that an image of so many pixels takes without tiling."""
    return peak_of(max(vae.config["block_out_channels"][:2]), height * width, vae.dtype.itemsize)


def peak_of(channels: int, pixels: int, itemsize: int) -> int:
    """Bytes above the weights without tiling, from the wider of the first two levels and the values' size."""
    return MAPS_AT_PEAK * channels * itemsize * pixels


def batches_at_once(vae: AutoencoderKL, height: int, width: int) -> int:
    """How many batches of so many pixels a CPU can work on: one per core, as far as memory goes."""
    fitting = SHARE * free_memory(vae.device) // ordinary_peak(vae, height, width)
    # each works with one core: convolutions of small batches do not fill several
    return max(1, min(torch.get_num_threads(), int(fitting)))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available  # also for mps, which shares the main memory
