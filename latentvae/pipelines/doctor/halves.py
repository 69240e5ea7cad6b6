"""Whether half precision gives the same picture, from pixels to pixels, counted in levels of 8 bits."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import LatentVAEError
from latentvae.images.tensors import from_uint8, to_uint8
from latentvae.measure.activations import run_watched, stock_copy
from latentvae.measure.diagnosis import HALVES
from latentvae.measure.metrics import psnr


@dataclass(frozen=True)
class HalfPicture:
    """Reconstructions in a half precision against those in fp32, both as 8-bit pictures."""

    psnr: float  # dB, of the worst image; inf: identical
    largest: int  # difference of a value, of 255
    changed: float  # share of values that differ at all
    off: float  # share of values that differ by more than 4 of 255


@torch.no_grad()
def compare_halves(vae: AutoencoderKL, images: Mapping[str, torch.Tensor]) -> dict[str, HalfPicture]:
    """Encode and decode images in fp32, bf16 and fp16, each dtype its own latents.

    Unlike `diagnose`, which finds the layer that is to blame, this is what a user sees. On a CPU half
    precision is emulated as there.

    Args:
        vae: any AutoencoderKL; not changed.
        images: (B, C, H, W) each, in [-1, 1], by name.

    Returns:
        By dtype, "bf16" and "fp16".

    Raises:
        LatentVAEError: no images, or a dtype in which the model is not finite.
    """
    if not images:
        raise LatentVAEError("no images came; wanted one or more to compare the precisions on.")
    wanted = _pictures(vae, torch.float32, images)
    found = {}
    for name, dtype in HALVES.items():
        given = _pictures(vae, dtype, images)  # from latents of its own, as users get them
        differences = [(given[key].int() - wanted[key].int()).abs() for key in images]
        values = sum(map(torch.numel, differences))
        found[name] = HalfPicture(
            psnr=min(float(psnr(from_uint8(wanted[key]), from_uint8(given[key])).min()) for key in images),
            largest=max(int(each.max()) for each in differences),
            changed=sum(int((each > 0).sum()) for each in differences) / values,
            off=sum(int((each > 4).sum()) for each in differences) / values,
        )
    return found


def _pictures(
    vae: AutoencoderKL, dtype: torch.dtype, images: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """uint8 reconstructions by name."""
    outputs = run_watched(stock_copy(vae, dtype), images, title=str(dtype).removeprefix("torch."))
    for name, output in outputs.items():
        if not output.images.isfinite().all():
            call = output.encode_overflow or output.decode_overflow
            where = f": {call.layer} overflows first" if call else ""
            raise LatentVAEError(f"{name!r} is not finite in {dtype}{where}. See `latentvae doctor`.")
    return {name: to_uint8(output.images.float()) for name, output in outputs.items()}
