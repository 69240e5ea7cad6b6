"""Latents as one file that a visitor takes home, and that the demo or any program decodes again."""

import json
import struct
from dataclasses import astuple, dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from latentvae.base.errors import LatentVAEError
from latentvae.demo.guard import Limits
from latentvae.demo.one_model import Model
from latentvae.images.tensors import Padding
from latentvae.models.latents import Posterior
from latentvae.models.loading import spatial_compression_ratio

MAX_HEADER = 1 << 20  # bytes that are searched for the hash
AGAIN = "Download the latents again in the tab Reconstruct."


@dataclass(frozen=True)
class LatentsFile:
    """Latents (1, C, h, w), unscaled, and the padding that decoding crops off."""

    latents: torch.Tensor
    padding: Padding


def latents_to_bytes(model: Model, posterior: Posterior, latents: torch.Tensor, padding: Padding) -> bytes:
    """The bytes of a safetensors file: moments, latents, and the padding as six whole numbers.

    Moments (1, 2C, h, w) are means, then log-variances. The metadata names the weights.
    """
    tensors = {
        "moments": torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu().contiguous(),
        "latents": latents.float().cpu().contiguous(),
        "padding": torch.tensor(astuple(padding), dtype=torch.int64),
    }
    about = {
        "format": "latentvae.models.latents.1",
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "padding": "left, top, right, bottom, height, width",
        "scaling_factor": str(model.exact.config["scaling_factor"]),
    }
    return save(tensors, metadata=about)


def latents_from_bytes(data: bytes, name: str, model: Model, limits: Limits) -> LatentsFile:
    """Latents of a file that may come from anywhere.

    Raises:
        LatentVAEError: no safetensors file, no latents in it, those of another shape than the model's, too
            many, or with values that are not finite.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise LatentVAEError(
            f"{name} is no .lvae file by its content, and no whole safetensors file ({error}): fetch it "
            "again where it comes from."
        ) from error
    latents = tensors.get("latents")
    if latents is None or latents.ndim != 4 or not latents.is_floating_point():
        raise LatentVAEError(f"{name} holds no latents of floats (1, C, h, w). {AGAIN}")
    channels, ratio = model.exact.config["latent_channels"], spatial_compression_ratio(model.exact)
    batch, found, height, width = latents.shape  # (1, C, h, w)
    if batch != 1 or found != channels or 0 in latents.shape:
        raise LatentVAEError(
            f"{name} holds latents of shape {tuple(latents.shape)}; {model.name} decodes (1, {channels}, h, "
            "w): choose the model that made them."
        )
    padding = _padding(tensors, name, height * ratio, width * ratio)
    # the sides of the smallest picture that needs so many latents
    limits.check_side(name, (width - 1) * ratio + 1, (height - 1) * ratio + 1)
    padded = height * width * ratio**2  # of a line of pixels many times what it holds
    if padding.height * padding.width > limits.pixels or padded > 2 * limits.pixels:
        raise LatentVAEError(
            f"{name} holds latents of {padding.width} x {padding.height} pixels, computed as "
            f"{width * ratio} x {height * ratio}; up to {limits.pixels} pixels are decoded here: decode it "
            "with latentvae on your own machine."
        )
    if not bool(latents.float().isfinite().all()):
        raise LatentVAEError(f"{name} holds values that are NaN or infinite. {AGAIN}")
    return LatentsFile(latents.float(), padding)


def weights_of(data: bytes) -> str | None:
    """The hash of the weights that a file says it was made with; None where it says none, or is none."""
    try:
        # of the header alone, as safetensors defines it: its length in 8 bytes, little-endian, then JSON
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + min(length, MAX_HEADER)])
        found = header["__metadata__"]["weights_sha256"]
    except (struct.error, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and found else None


def _padding(tensors: dict[str, torch.Tensor], name: str, height: int, width: int) -> Padding:
    """The file's padding, or none where it has none."""
    stored = tensors.get("padding")
    if stored is None:
        return Padding(0, 0, 0, 0, height, width)
    # what `latents_to_bytes` writes; NaN and infinity would be no int
    whole_numbers = stored.dtype == torch.int64 and stored.numel() == 6
    values = [int(value) for value in stored.flatten().tolist()] if whole_numbers else []
    if len(values) == 6 and min(values) >= 0:
        padding = Padding(*values)
        whole = (
            padding.top + padding.height + padding.bottom == height
            and padding.left + padding.width + padding.right == width
        )
        if whole and padding.height > 0 and padding.width > 0:
            return padding
    raise LatentVAEError(f"{name} has a padding that does not fit its latents. {AGAIN}")
