"""Every random draw of a training step, each from (seed, step) or (seed, global sample index) alone.

No process has a random state of its own, so the number of processes and resumes change nothing.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch.nn.functional import interpolate

from latentvae.training.config import EquivarianceConfig, MaskConfig


class Stream(IntEnum):
    """Keeps the draws of one sample apart."""

    POSTERIOR = 0
    LATENT_NOISE = 1
    MASK = 2
    EQUIVARIANCE = 3


def generator(seed: int, stream: Stream, index: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone."""
    # consecutive seeds start Mersenne Twister in well mixed states; the odd multiplier keeps runs apart
    key = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + index) % 2**63
    return torch.Generator().manual_seed(key)


def sample_noise(
    seed: int, positions: torch.Tensor, shape: tuple[int, int, int], stream: Stream = Stream.POSTERIOR
) -> torch.Tensor:
    """Standard normal noise (B, *shape), one draw for each global sample index in `positions` (B,)."""
    # on the CPU and row by row: a GPU's generator, or one draw for the batch, would depend on who draws what
    noise = torch.empty(len(positions), *shape)  # (B, c, h, w)
    for row, position in zip(noise, positions.tolist(), strict=True):
        row.normal_(generator=generator(seed, stream, position))
    return noise


@dataclass(frozen=True)
class Transform:
    """Resizing and rotation by quarter turns, of latents and images alike (EQ-VAE, Kouzelis et al. 2025)."""

    side: int  # of the transformed latents
    quarter_turns: int

    def latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Transform latents (B, c, h, h) to (B, c, side, side)."""
        return self._apply(latents, self.side)

    def images(self, images: torch.Tensor, ratio: int) -> torch.Tensor:
        """Transform the target images (B, C, H, H) to the size that the latents now stand for."""
        return self._apply(images, self.side * ratio)

    def _apply(self, maps: torch.Tensor, side: int) -> torch.Tensor:
        if side != maps.shape[-1]:
            maps = interpolate(maps, (side, side), mode="bicubic", antialias=True, align_corners=False)
        return torch.rot90(maps, self.quarter_turns, (-2, -1))


def draw_transform(
    config: EquivarianceConfig, seed: int, step: int, side: int, least: int
) -> Transform | None:
    """The step's transform of the whole global batch, or None with probability 1 - p.

    Args:
        config: probability, and the range of scales in 32nds.
        seed: of the run.
        step: optimizer step.
        side: of the latents.
        least: smallest side that the losses can judge.
    """
    if config.probability == 0:
        return None
    random = generator(seed, Stream.EQUIVARIANCE, step)
    if torch.rand((), generator=random).item() >= config.probability:
        return None
    # one draw for all processes: latents of a batch must stay of one size
    scale = torch.randint(config.min_scale, config.max_scale + 1, (), generator=random).item() / 32
    turns = int(torch.randint(0, 4, (), generator=random).item())
    return Transform(max(least, round(side * scale)), turns)


def mask(images: torch.Tensor, config: MaskConfig, seed: int, positions: torch.Tensor) -> torch.Tensor:
    """Hide random boxes or pixels of images (B, C, H, W) behind mid-grey; with probability 1 - p, nothing.

    The model is asked for all pixels, so it learns to fill in what is missing.
    """
    if config.probability == 0:
        return images
    masked = images.clone()
    for image, position in zip(masked, positions.tolist(), strict=True):
        random = generator(seed, Stream.MASK, position)
        if torch.rand((), generator=random).item() < config.probability:
            image.masked_fill_(_hidden(image.shape[-2:], config, random).to(image.device), 0.0)
    return masked


def _hidden(size: torch.Size, config: MaskConfig, random: torch.Generator) -> torch.Tensor:
    """Which pixels (H, W) are hidden: a box half of the time, single pixels otherwise."""
    share = torch.rand((), generator=random).item() * config.max_share  # of the pixels, not of a side
    if torch.rand((), generator=random).item() < 0.5:
        return torch.rand(size, generator=random) < share
    hidden = torch.zeros(size, dtype=torch.bool)
    sides = [max(1, round(side * share**0.5)) for side in size]
    top, left = (
        int(torch.randint(0, n - s + 1, (), generator=random)) for n, s in zip(size, sides, strict=True)
    )
    hidden[top : top + sides[0], left : left + sides[1]] = True
    return hidden
