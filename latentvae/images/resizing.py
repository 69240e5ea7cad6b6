"""What is done to an image's size: aspect buckets, the square middle, a shorter side, a small copy."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn.functional import interpolate

PREPROCESSING_VERSION = 3  # to be raised when the same image file would give other pixels
SHARES = 8  # sides of buckets are multiples of an eighth of the size, where the compression ratio allows
OWN_STEP = 8  # latents, that sides of images in buckets of their own are multiples of: 64 px of most models
MAX_ASPECT = 2.0  # longer side by shorter one of a bucket
MAX_RESIZED = 1 << 26  # pixels, scaled and not yet cropped: lines a pixel wide would become terabytes

Size = tuple[int, int]  # width, height


class Preprocessing(BaseModel):
    """What is done to an image between its file and the encoder's padding.

    `as-is`: nothing. `size`: scaled and cropped at the middle to the nearest of a few aspect ratios of about
    size x size pixels. `size-no-upscale`: the same, but images that would be enlarged keep their size, and
    are cropped at the middle to multiples of 8 latents (of one, where that is all).
    `centre-crop`: the shorter side scaled to `size`, and the square in the middle.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = PREPROCESSING_VERSION
    policy: Literal["as-is", "size", "size-no-upscale", "centre-crop"] = "as-is"
    size: int | None = None  # pixels; None with as-is
    channels: int = 3  # 3: RGB, 1: luminance
    range: tuple[float, float] | None = None  # samples that become -1 and 1; None: what the files' type holds


@dataclass(frozen=True)
class Geometry:
    """How an image of one size is scaled and cropped.

    Attributes:
        resized: width and height after scaling, or None.
        cropped: left, top, width and height of what is taken after that, or None.
    """

    resized: Size | None = None
    cropped: tuple[int, int, int, int] | None = None

    def apply(self, image: torch.Tensor) -> torch.Tensor:
        """Scale (antialiased bicubic, clamped) and crop an image (C, H, W) in [-1, 1]."""
        if self.resized is not None:
            width, height = self.resized
            # without antialiasing, shrinking skips pixels; bicubic overshoots [-1, 1] at edges
            image = interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0].clamp_(-1, 1)
        if self.cropped is not None:
            left, top, width, height = self.cropped
            image = image[:, top : top + height, left : left + width]
        return image

    def size(self, original: Size) -> Size:
        """Width and height of what an image of the original size becomes."""
        if self.cropped is not None:
            return self.cropped[2:]
        return self.resized or original

    def problem(self, original: Size) -> str | None:
        """Why an image of the original size cannot be scaled so, or None."""
        if self.resized is None or self.resized[0] * self.resized[1] <= MAX_RESIZED:
            return None
        (width, height), (wide, high) = original, self.resized
        return (
            f"its {width}x{height} px would have to be scaled to {wide}x{high} px before they are cropped; "
            f"at most {MAX_RESIZED} px are: crop it first, or leave it out"
        )

    def notes(self, original: Size) -> list[str]:
        """What a person should know: pixels that were made up."""
        if self.resized is None or self.resized[0] <= original[0]:
            return []
        return [f"enlarged x {self.resized[0] / original[0]:.3g}"]


def plan_geometry(original: Size, policy: Preprocessing, ratio: int) -> Geometry:
    """What the preprocessing does to an image of the original width and height.

    Args:
        ratio: the spatial_compression_ratio, that buckets are multiples of.
    """
    if policy.size is None:
        return Geometry()
    if policy.policy == "centre-crop":
        return _cover(original, (policy.size, policy.size))
    aspect = original[0] / original[1]
    # by the logarithm, so that 1:2 and 2:1 are equally far from a square
    bucket = min(buckets(policy.size, ratio), key=lambda size: abs(math.log(size[0] / size[1] / aspect)))
    covered = _cover(original, bucket)
    if policy.policy == "size-no-upscale" and covered.resized and covered.resized[0] > original[0]:
        width, height = (_own_side(side, ratio) for side in original)
        left, top = (original[0] - width) // 2, (original[1] - height) // 2
        return Geometry(None, None if (width, height) == original else (left, top, width, height))
    return covered


def _own_side(side: int, ratio: int) -> int:
    """A side that is not enlarged, rounded down so that images of about a size share a batch."""
    step = ratio * OWN_STEP if side >= ratio * OWN_STEP else ratio if side >= ratio else 1
    return side - side % step


def buckets(size: int, ratio: int) -> list[Size]:
    """Widths and heights of about size x size pixels, from 1:2 to 2:1, the square first."""
    step = ratio * max(1, round(size / SHARES / ratio))
    found: dict[Size, None] = {}
    for width in range(step, math.ceil(size * MAX_ASPECT) + 1, step):
        height = max(step, round(size * size / width / step) * step)
        if max(width, height) <= MAX_ASPECT * min(width, height):
            found[width, height] = found[height, width] = None
    square = max(step, round(size / step) * step)
    return sorted({**found, (square, square): None}, key=lambda pair: (pair[0] != pair[1], pair))


def _cover(original: Size, wanted: Size) -> Geometry:
    """Scale so that the wanted size is just covered, and take its middle."""
    scale = max(wanted[0] / original[0], wanted[1] / original[1])
    resized = tuple(max(side, round(scale * old)) for side, old in zip(wanted, original, strict=True))
    left, top = ((resized[axis] - wanted[axis]) // 2 for axis in (0, 1))
    return Geometry(
        None if resized == original else (resized[0], resized[1]),
        None if resized == wanted else (left, top, *wanted),
    )


def resize_short_side(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize (C, H, W) so that the shorter side is `size`, antialiased bicubic, clamped to [-1, 1]."""
    height, width = image.shape[-2:]
    ratio = size / min(height, width)
    resized = max(size, round(width * ratio)), max(size, round(height * ratio))
    return Geometry(resized).apply(image)


def thumbnail(image: Tensor, side: int) -> Tensor:
    """Shrink an image (C, H, W) in [-1, 1], antialiased, to a longer side of at most `side` pixels."""
    height, width = image.shape[-2:]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(scale * width)), max(1, round(scale * height))
    return Geometry(None if scale == 1 else size).apply(image.float().clamp(-1, 1))
