"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, DiffAugment).

A discriminator that has few images learns them by heart. Here real images, reconstructions and what the
generator's loss is taken of go through the same change of colour, shift or hole, image by image, and
gradients pass through. Ranges are those of the authors' code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from latentvae.training.config import AugmentName

SHIFT = 0.125  # of a side, at most
HOLE = 0.5  # of a side
DRAWS = 7  # numbers in [0, 1) that decide one image's augmentation


@dataclass(frozen=True)
class Augmentation:
    """One draw for each image of a batch; the same for whatever stands in that image's place.

    Args:
        kinds: what is done, in the order of colour, translation, cutout.
        draws: (B, 7) in [0, 1), on the CPU.
    """

    kinds: Sequence[AugmentName]
    draws: torch.Tensor

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) in [-1, 1], changed; gradients pass."""
        if "colour" in self.kinds:
            images = self._colour(images)
        if "translation" in self.kinds:
            images = self._translation(images)
        return self._cutout(images) if "cutout" in self.kinds else images

    def _colour(self, images: torch.Tensor) -> torch.Tensor:
        brightness, saturation, contrast = self.draws[:, :3].to(images).T[..., None, None, None]
        images = images + (brightness - 0.5)
        grey = images.mean(1, keepdim=True)
        images = grey + (images - grey) * (2 * saturation)
        mean = images.mean((1, 2, 3), keepdim=True)
        return mean + (images - mean) * (contrast + 0.5)

    def _translation(self, images: torch.Tensor) -> torch.Tensor:
        most = [round(side * SHIFT) for side in images.shape[-2:]]
        shifted = []
        for image, draw in zip(images, self.draws[:, 3:5].tolist(), strict=True):
            # from -most to most; what comes in at an edge is 0, mid-grey
            down, right = (int(each * (2 * n + 1)) - n for each, n in zip(draw, most, strict=True))
            shifted.append(pad(image, (right, -right, down, -down)))
        return torch.stack(shifted)

    def _cutout(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        kept = torch.ones(len(images), 1, height, width)
        for hole, draw in zip(kept, self.draws[:, 5:7].tolist(), strict=True):
            # the middle lies anywhere, so that a hole may be cut off by an edge
            middles = (int(each * (side + 1)) for each, side in zip(draw, (height, width), strict=True))
            (top, bottom), (left, right) = (
                (max(0, middle - half), middle + half)
                for middle, half in zip(
                    middles, (round(height * HOLE / 2), round(width * HOLE / 2)), strict=True
                )
            )
            hole[:, top:bottom, left:right] = 0
        return images * kept.to(images)
