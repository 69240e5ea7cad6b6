"""New images: draws of a prior over latents, decoded."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from latentvae.base.errors import LatentVAEError
from latentvae.models.latents import decode
from latentvae.toolbox.priors.prior import Prior

# Draws at once, and latent pixels of them together. Other batches round otherwise: these are part of what a
# seed means.
BATCH, BATCH_LATENTS = 32, 2048


def sample(
    vae: AutoencoderKL,
    prior: Prior,
    count: int = 16,
    seed: int = 0,
    *,
    first: int = 0,
    labels: Sequence[int] | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Draw new images (count, C, H, W) in [-1, 1], float32 on the CPU.

    Image n depends on the prior, the seed and n alone, bit for bit on one machine: more images do not change
    the first ones, for draws are always computed in the same batches.

    Args:
        vae: the one whose latents the prior learned.
        prior: from `load_prior` or one of the fits; `StandardNormal(vae, height, width)` where none is.
        count: of images, 1 or more.
        seed: not negative; other seeds, other images.
        first: number of the first image.
        labels: of each image, for a prior by class; None: as often as among the images it learned from.

    Raises:
        LatentVAEError: another VAE, a count below 1, unknown labels, or a model that gives NaN.
    """
    return torch.cat(
        list(sample_batches(vae, prior, count, seed, first=first, labels=labels, progress=progress))
    )


@torch.no_grad()
def sample_batches(
    vae: AutoencoderKL,
    prior: Prior,
    count: int = 16,
    seed: int = 0,
    *,
    first: int = 0,
    labels: Sequence[int] | None = None,
    progress: bool = False,
) -> Iterator[torch.Tensor]:
    """The images of `sample` as they are drawn, some at a time: what is too many for memory can be written.

    Yields:
        (n, C, H, W), `count` images in all.

    Raises:
        LatentVAEError: as `sample`: of a wrong request before the first images.
    """
    check_request(prior, count, seed, first, labels)
    prior.check(vae)
    prior.to(vae.device)  # after the checks, which may refuse it
    size = batch_size(prior.card.latent_shape)
    wanted = dict(zip(range(first, first + count), labels, strict=True)) if labels is not None else None
    # batches begin at multiples of their size, whatever was asked for; what is too much is cut off
    starts = range(first // size * size, first + count, size)
    for start in tqdm(starts, unit="batch", disable=not progress or len(starts) < 2):
        numbers = range(start, start + size)
        # draws that nobody asked for get any label that exists
        of_each = [wanted.get(n, next(iter(wanted.values()))) for n in numbers] if wanted else None
        images = decode(vae, prior.latents(numbers, seed, of_each)).clamp(-1, 1).float().cpu()
        if not images.isfinite().all():
            raise LatentVAEError("the model gave values that are not finite: its weights may be damaged.")
        yield images[max(first - start, 0) : first + count - start]


def sample_labels(prior: Prior, count: int, seed: int, first: int = 0) -> list[int] | None:
    """The labels that `sample` draws where none are given; None for a prior without classes."""
    return prior.labels_of(range(first, first + count), seed)


def batch_size(latent_shape: tuple[int, int, int]) -> int:
    """How many draws are computed at once: it depends on their size alone, never on how many are wanted."""
    return max(1, min(BATCH, BATCH_LATENTS // int(np.prod(latent_shape[1:]))))


def check_request(prior: Prior, count: int, seed: int, first: int, labels: Sequence[int] | None) -> None:
    """Raise LatentVAEError for what cannot be drawn."""
    if count < 1:
        raise LatentVAEError(f"count={count} came; wanted 1 or more.")
    if seed < 0 or first < 0:
        raise LatentVAEError(f"seed={seed} and first={first} came; wanted numbers that are not negative.")
    if labels is None:
        return
    known = prior.card.labels
    if known is None:
        raise LatentVAEError(
            f"labels came, but this {prior.card.kind} prior has no classes: fit a diffusion prior "
            "with --by-class."
        )
    if len(labels) != count or not set(labels) <= set(known):
        unknown = sorted(set(labels) - set(known))
        raise LatentVAEError(
            f"{len(labels)} labels came for {count} images, unknown: {unknown}; wanted one each of {known}."
        )
