"""Images as tensors in [-1, 1] and as bytes, padded and cropped."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from latentvae.base.errors import ImageError

NEAR, LARGEST = 2.0, 8.0  # values beyond these are doubtful, and of another scale
DARK, LIGHT = 0.05, 0.5  # nearly all images in [0, 1] reach from below one to above the other


@dataclass(frozen=True)
class Padding:
    """Pixels added on each side of a picture of `height` x `width`; `crop` takes them off again."""

    left: int
    top: int
    right: int
    bottom: int
    height: int
    width: int

    def crop(self, images: torch.Tensor) -> torch.Tensor:
        """Cut the padding off images (..., H, W) of the padded size; a view, not a copy."""
        wanted = (self.top + self.height + self.bottom, self.left + self.width + self.right)
        if tuple(images.shape[-2:]) != wanted:
            raise ImageError(
                f"images to crop have shape {tuple(images.shape)}, but this padding was made for "
                f"{wanted[0]} x {wanted[1]} (H x W): pass what was decoded from the padded images, unresized"
            )
        return images[..., self.top : self.top + self.height, self.left : self.left + self.width]


def channels_last_array(samples: np.ndarray) -> np.ndarray:
    """Grey (H, W) as (H, W, 1); colour as it is."""
    return samples[..., None] if samples.ndim == 2 else samples


def channels_first_tensor(samples: np.ndarray) -> torch.Tensor:
    """(..., H, W, C) or (H, W) as a contiguous tensor (..., C, H, W)."""
    # copied: torch takes no negative strides, as turned views have, and warns of read-only arrays
    return torch.from_numpy(np.array(np.moveaxis(channels_last_array(samples), -1, -3), order="C"))


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Round images (..., C, H, W) in [-1, 1] to uint8 in 0..255; values outside are clamped.

    Raises ImageError where a value is NaN or infinite: a picture would hide it.
    """
    bad = images.numel() - int(torch.isfinite(images).sum())
    if bad:
        raise ImageError(
            f"{bad} of {images.numel()} values are NaN or infinite, but numbers in [-1, 1] were wanted: "
            "compute in float32 or bfloat16 (float16 overflows in many VAEs)"
        )
    # in float32: bfloat16 keeps 8 bits of a number, too few to tell 256 levels apart
    return images.detach().float().mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def from_uint8(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Scale uint8 to float32 in [-1, 1]: an array (H, W) or (..., H, W, C), or a tensor (..., C, H, W)."""
    if str(array.dtype).removeprefix("torch.") != "uint8":
        raise ImageError(f"{array.dtype} values came, but uint8 (0 to 255) was wanted: convert them first")
    images = channels_first_tensor(array) if isinstance(array, np.ndarray) else array
    return images.float().div_(127.5).sub_(1)


def as_floats(images: torch.Tensor) -> torch.Tensor:
    """uint8 as floats in [-1, 1]; floats, which a scan's depth needs, as they are."""
    return from_uint8(images) if images.dtype == torch.uint8 else images


def check_range(images: torch.Tensor) -> None:
    """Refuse images that are not on the scale of [-1, 1]; warn of [0, 1], and of values beyond 2.

    A little beyond is usual: resampling overshoots, and so do decoders.

    Raises:
        ImageError: integers, or values beyond 8 on either side.
    """
    remedy = "latentvae.load_image takes files, bytes, Pillow images and arrays, and gives that"
    if not images.is_floating_point():
        raise ImageError(f"images of {images.dtype} came; wanted floats in [-1, 1]: {remedy}")
    if not images.numel():
        return
    low, high = (float(value) for value in images.detach().aminmax())  # NaN passes: the model may say where
    came = f"images from {low:g} to {high:g} came; wanted [-1, 1] (black to white)"
    if max(-low, high) > LARGEST:
        raise ImageError(f"{came}: {remedy}")
    if 0 <= low < DARK < LIGHT < high <= 1:  # black is -1: pictures without a dark pixel are rare
        warnings.warn(f"{came}: if these are in [0, 1], encode images * 2 - 1", stacklevel=3)
    elif max(-low, high) > NEAR:
        warnings.warn(f"{came}: if these were normalised by a mean and a std, leave that out", stacklevel=3)


def pad_to_multiple(images: torch.Tensor, multiple: int) -> tuple[torch.Tensor, Padding]:
    """Reflect the right and bottom edges until H and W are multiples; the images themselves where they are.

    Args:
        images: (..., H, W), of any size down to 1 x 1 and any dtype.
        multiple: pixels, for instance the spatial_compression_ratio of a VAE.
    """
    height, width = images.shape[-2:]
    if multiple < 1 or 0 in (height, width):
        raise ImageError(f"images of {height} x {width} pixels cannot be padded to a multiple of {multiple}")
    padding = Padding(0, 0, -width % multiple, -height % multiple, height, width)
    for dim, added in ((-2, padding.bottom), (-1, padding.right)):
        # torch's own reflection refuses to add as many pixels as there are, such as 7 to 1
        if added:
            images = images.index_select(dim, _reflected(images.shape[dim], added, images.device))
    return images, padding


def crop_padding(images: torch.Tensor, padding: Padding) -> torch.Tensor:
    """Cut off what `pad_to_multiple` added."""
    return padding.crop(images)


def _reflected(size: int, added: int, device: torch.device) -> torch.Tensor:
    """Index 0..size-1, then back and forth without repeating an edge, as often as it takes."""
    period = max(2 * (size - 1), 1)  # 0 1 2 3 2 1 | 0 1 2 3 2 1 for a size of 4; one pixel is its own period
    index = torch.arange(size + added, device=device) % period
    return torch.where(index < size, index, period - index)
