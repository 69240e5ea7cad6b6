"""Every random draw of a training step, each from (seed, step) or (seed, global sample index) alone.

No process has a random state of its own, so the number of processes and resumes change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from latentvae.images.tensors import as_floats
from latentvae.models.loading import spatial_compression_ratio
from latentvae.training.augmenting import DRAWS, Augmentation
from latentvae.training.config import AugmentName, EquivarianceConfig, MaskConfig
from latentvae.training.data.batches import CropBatch
from latentvae.training.data.teacher_cache import TeacherCrop
from latentvae.training.distillation import original_share
from latentvae.training.module import Transform
from latentvae.training.setup import Run


class Stream(IntEnum):
    """Keeps the draws of one sample apart."""

    POSTERIOR = 0
    LATENT_NOISE = 1
    MASK = 2
    EQUIVARIANCE = 3
    AUGMENT = 4


@dataclass
class Inputs:
    """One forward pass's tensors on the device, every random choice made."""

    target: torch.Tensor  # images to compare with, (B, C, H, W)
    arguments: tuple[Any, ...]  # of TrainableVAE.forward
    augmentation: Augmentation  # of what a discriminator sees
    images: torch.Tensor  # as they are, (B, C, H, W): nothing hidden or transformed


def draw_inputs(run: Run, batch: CropBatch) -> Inputs:
    """Move a batch to the device, and make its random choices."""
    config, seed = run.config.regularise, run.config.seed
    sent = batch.pixel_values.to(run.accelerator.device, non_blocking=True)
    images = as_floats(sent)
    images = images.to(run.config.train.dtype, memory_format=run.config.train.memory_format)
    # (B, C, H, W) to latents (B, c, h, w) with h = H / ratio
    ratio = spatial_compression_ratio(run.state.vae)
    height, width = (side // ratio for side in images.shape[-2:])
    shape = (run.state.vae.config["latent_channels"], height, width)

    def noise(stream: Stream) -> torch.Tensor:
        return sample_noise(seed, batch.positions, shape, stream).to(images, non_blocking=True)

    latent_noise = config.latent_noise * noise(Stream.LATENT_NOISE) if config.latent_noise else None
    # a smaller picture would have no patch for the discriminator, or nothing left to pool in LPIPS
    least = -(-run.smallest_side // ratio)
    transform = draw_transform(config.equivariance, seed, run.state.step, (height, width), least)
    target = images if transform is None else transform.images(images, ratio)
    # only the input is hidden: the target has all pixels
    seen = mask(images, config.mask, seed, batch.positions)
    given = None
    if batch.teacher is not None:
        given = TeacherCrop(*(each.to(images, non_blocking=True) for each in batch.teacher))
    # once the target is the original alone, the teacher need not draw
    with_pictures = original_share(run.config.distil, run.state.step) < 1
    arguments = (seen, noise(Stream.POSTERIOR), latent_noise, transform, given, with_pictures)
    augmentation = draw_augmentation(run.config.adversarial.augment, seed, batch.positions)
    return Inputs(target, arguments, augmentation, images)


def draw_transform(
    config: EquivarianceConfig, seed: int, step: int, size: tuple[int, int], least: int
) -> Transform | None:
    """The step's transform of the whole global batch, or None with probability 1 - p.

    Args:
        config: probability, and the range of scales in 32nds.
        seed: of the run.
        step: optimizer step.
        size: height and width of the latents.
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
    height, width = (max(least, round(side * scale)) for side in size)
    return Transform((height, width), turns)


def draw_augmentation(kinds: Sequence[AugmentName], seed: int, positions: torch.Tensor) -> Augmentation:
    """What images, by their global sample index in `positions` (B,), go through before they are judged."""
    wanted = positions.tolist() if kinds else []
    draws = [torch.rand(DRAWS, generator=generator(seed, Stream.AUGMENT, position)) for position in wanted]
    return Augmentation(kinds, torch.stack(draws) if draws else torch.empty(0, DRAWS))


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


def sample_noise(
    seed: int, positions: torch.Tensor, shape: tuple[int, int, int], stream: Stream = Stream.POSTERIOR
) -> torch.Tensor:
    """Standard normal noise (B, *shape), one draw for each global sample index in `positions` (B,)."""
    # on the CPU and row by row: a GPU's generator, or one draw for the batch, would depend on who draws what
    noise = torch.empty(len(positions), *shape)  # (B, c, h, w)
    for row, position in zip(noise, positions.tolist(), strict=True):
        row.normal_(generator=generator(seed, stream, position))
    return noise


def generator(seed: int, stream: Stream, index: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone."""
    # consecutive seeds start Mersenne Twister in well mixed states; the odd multiplier keeps runs apart
    key = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + index) % 2**63
    return torch.Generator().manual_seed(key)
