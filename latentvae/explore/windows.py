"""Filling in large images window by window: only where something is missing, in memory set by the window."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL

from latentvae.errors import LatentVAEError
from latentvae.explore.extension import check_missing, extend
from latentvae.explore.imputation import Filling, fill

LEAST = 64  # pixels a side: less has no surroundings to learn from
OVERLAP = 4  # a window shares this part of its side with each neighbour


@dataclass(frozen=True)
class Window:
    """A part of an image, and which part of it no neighbour shares."""

    top: int
    left: int
    height: int
    width: int

    def of(self, images: torch.Tensor) -> torch.Tensor:
        """A view of (..., H, W)."""
        return images[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def weights(self) -> torch.Tensor:
        """(height, width): 1 in the middle, falling to almost 0 at the sides, so that neighbours blend."""
        height, width = (_ramp(side) for side in (self.height, self.width))
        return height[:, None] * width


@dataclass
class _Blend:
    """Pictures as sums of weighted windows, begun with what no window will cover."""

    start: torch.Tensor
    total: torch.Tensor = field(init=False)
    weight: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros_like(self.start)
        self.weight = torch.zeros_like(self.start[:1, :1])

    def add(self, window: Window, images: torch.Tensor) -> None:
        weights = window.weights().to(images)
        window.of(self.total).add_(weights * images)
        window.of(self.weight).add_(weights)

    def result(self) -> torch.Tensor:
        covered = self.weight > 0
        return torch.where(covered, self.total / self.weight.where(covered, torch.ones(())), self.start)


def fill_in_windows(
    vae: AutoencoderKL, images: torch.Tensor, missing: torch.Tensor, side: int = 512, **options: Any
) -> Filling:
    """Complete an image as `fill` does, in overlapping windows that are blended; known pixels are kept.

    Windows without missing pixels are left out; one in which no pixel is known keeps the smooth extension.
    Not the numbers of `fill` on the whole image: each window has latents and weights of its own.

    Args:
        vae: any AutoencoderKL.
        images: (1, C, H, W) in [-1, 1].
        missing: (H, W) bool.
        side: of a window in pixels, 64 or more; an image no larger is one window.
        options: of `fill`.

    Returns:
        A filling whose `plate` and `detail` are means over the windows.

    Raises:
        ImageError, LatentVAEError: as `fill`; or a side below 64.
    """
    if side < LEAST:
        raise LatentVAEError(f"windows of {side} pixels came; {LEAST} or more were wanted.")
    if max(images.shape[-2:]) <= side:
        return fill(vae, images, missing, **options)
    check_missing(images, missing)
    smooth = extend(images, missing)
    blends = {name: _Blend(smooth) for name in ("images", "smooth", "decoded")}
    weights = []
    for window in windows(missing.shape[0], missing.shape[1], side):
        hole = window.of(missing)
        if not hole.any() or hole.all():
            continue
        part = fill(vae, window.of(images), hole, **options)
        weights.append((part.plate, part.detail))
        for name, blend in blends.items():
            blend.add(window, getattr(part, name).to(smooth))
    plate, detail = torch.tensor(weights or [(0.0, 0.0)]).mean(0).tolist()
    found = {name: blend.result() for name, blend in blends.items()}
    filled = torch.where(missing.to(images.device), found["images"], images)
    return Filling(filled, found["smooth"], found["decoded"], plate, detail)


def windows(height: int, width: int, side: int) -> Iterator[Window]:
    """Windows of at most `side` pixels that cover an image and overlap by a quarter or more."""
    for top in _starts(height, side):
        for left in _starts(width, side):
            yield Window(top, left, min(side, height), min(side, width))


def _starts(length: int, side: int) -> list[int]:
    if length <= side:
        return [0]
    count = -(-(length - side) // (side - side // OVERLAP)) + 1
    return [round(number * (length - side) / (count - 1)) for number in range(count)]


def _ramp(side: int) -> torch.Tensor:
    reach = side // OVERLAP
    nearest = torch.minimum(torch.arange(side), torch.arange(side).flip(0)) + 1.0
    return (nearest / (reach + 1)).clamp(max=1.0)
