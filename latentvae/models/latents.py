"""From images to latents and back, at any size: encode, decode, scale, statistics."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import adaptive_avg_pool2d

from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.images.tensors import Padding, check_range, crop_padding, pad_to_multiple
from latentvae.models.loading import spatial_compression_ratio

# The clamp of diffusers and LDM: exp(20) is the largest variance, and keeps the KL finite in float32.
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
LARGEST_GRID = 64  # cells a side of pooled latents; more numbers than most images have latents


class Posterior:
    """The diagonal normal distribution q(latents | images) that an encoder's moments describe.

    Args:
        moments: (B, 2C, h, w), means then log-variances. Computed with in float32, or in float64 if they are.
    """

    def __init__(self, moments: torch.Tensor) -> None:
        if moments.dtype != torch.float64:  # in half precision exp and squares overflow at 65504
            moments = moments.float()
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)

    @property
    def std(self) -> torch.Tensor:
        """Standard deviations, (B, C, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> torch.Tensor:
        """The most likely latents, (B, C, h, w)."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Latents drawn from the posterior, (B, C, h, w); the draw is the generator's, on its own device."""
        # a CPU generator gives the same draw on every GPU; torch asks for noise on the generator's device
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.at(noise.to(self.mean.device))

    def at(self, noise: torch.Tensor) -> torch.Tensor:
        """The latents that standard normal `noise` (B, C, h, w) stands for (the reparametrisation trick)."""
        return self.mean + self.std * noise

    def kl_map(self) -> torch.Tensor:
        """KL divergence to the standard normal of every latent element in nats, (B, C, h, w).

        Kingma & Welling 2013, appendix B.
        """
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)

    def kl(self) -> torch.Tensor:
        """`kl_map` summed over C, h, w: (B,). Never in half precision: fp16 overflows at 4x64x64 latents."""
        return self.kl_map().flatten(1).sum(1)

    def known_kl(self) -> torch.Tensor | None:
        """`kl`, or None where all deviations are one number, as of a student whose teacher has none."""
        constant = self.logvar.numel() > 1 and bool(self.logvar.min() == self.logvar.max())
        return None if constant else self.kl()


class Reconstruction(NamedTuple):
    """What `reconstruct` returns: reconstructions (B, C, H, W) in [-1, 1], and the posterior behind them."""

    reconstructions: torch.Tensor
    posterior: Posterior


def encode(vae: AutoencoderKL, images: torch.Tensor) -> tuple[Posterior, Padding]:
    """Encode images of any size; sizes that the compression ratio does not divide are padded by reflection.

    Args:
        images: (B, C, H, W) in [-1, 1], any float dtype, any device. What looks like [0, 1] is warned of.

    Returns:
        The posterior over latents (B, c, h, w), and the padding that `decode` takes to give H x W back.

    Raises:
        ImageError: images of another number of channels than the model's, of integers, or far beyond [-1, 1].
    """
    channels = vae.config["in_channels"]
    if images.ndim != 4 or images.shape[1] != channels:
        raise ImageError(
            f"images of shape {tuple(images.shape)} came; this model takes (B, {channels}, H, W)."
        )
    check_range(images)
    padded, padding = pad_to_multiple(images, spatial_compression_ratio(vae))
    return Posterior(vae.encode(padded.to(vae.device, vae.dtype)).latent_dist.parameters), padding


def decode(vae: AutoencoderKL, latents: torch.Tensor, padding: Padding | None = None) -> torch.Tensor:
    """Decode unscaled latents (B, c, h, w) to images (B, C, H, W) near [-1, 1], float32, padding cropped off.

    float32 whatever the model's dtype (float64 stays), and not clamped: rounding is the caller's matter.
    """
    # (B, C, H, W) of padded size
    images = vae.decode(latents.to(vae.device, vae.dtype)).sample
    if images.dtype != torch.float64:
        images = images.float()
    return crop_padding(images, padding) if padding is not None else images


@torch.no_grad()
def reconstruct(
    vae: AutoencoderKL,
    images: torch.Tensor,
    *,
    sample: bool = False,
    generator: torch.Generator | None = None,
) -> Reconstruction:
    """Encode and decode images of any size, from the posterior's mode or from a sample of it."""
    posterior, padding = encode(vae, images)
    latents = posterior.sample(generator) if sample else posterior.mode()
    return Reconstruction(decode(vae, latents, padding), posterior)


class Scaling(NamedTuple):
    """What becomes of unscaled latents before a diffusion model sees them: (latents - shift) * factor.

    Numbers, or tensors (1, C, 1, 1) where each channel has its own.
    """

    shift: float | torch.Tensor
    factor: float | torch.Tensor

    @classmethod
    def of(cls, source: Any) -> "Scaling":
        """Of whatever has a `shift_factor` and a `scaling_factor`: a VAE's config, a store's manifest."""
        return cls(source.shift_factor or 0.0, source.scaling_factor)  # None is how diffusers says no shift

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """Unscaled latents to those the diffusion model sees."""
        shift, factor = (x.to(latents) if isinstance(x, torch.Tensor) else x for x in self)
        return (latents - shift) * factor

    def unscale(self, scaled_latents: torch.Tensor) -> torch.Tensor:
        """The diffusion model's latents to those the decoder takes."""
        shift, factor = (x.to(scaled_latents) if isinstance(x, torch.Tensor) else x for x in self)
        return scaled_latents / factor + shift

    def scale_moments(self, moments: torch.Tensor) -> torch.Tensor:
        """Moments (..., 2C, h, w) of scaled latents from those of unscaled ones; one factor for all."""
        mean, logvar = moments.chunk(2, dim=-3)
        # Var(f x) = f^2 Var(x), in logarithms; a shift moves means only
        return torch.cat([self.scale(mean), logvar + 2 * math.log(abs(float(self.factor)))], dim=-3)


def scale(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Unscaled latents to those a diffusion model sees: (latents - shift_factor) * scaling_factor."""
    return Scaling.of(vae.config).scale(latents)


def unscale(vae: AutoencoderKL, scaled_latents: torch.Tensor) -> torch.Tensor:
    """A diffusion model's latents to those the decoder takes: the inverse of `scale`."""
    return Scaling.of(vae.config).unscale(scaled_latents)


@dataclass(frozen=True)
class LatentStatistics:
    """First and second moments of unscaled latent samples over a set of images.

    `scaling_factor` is one over the standard deviation pooled over channels, each about its own mean, so that
    `(latents - latents_mean) * scaling_factor` has unit variance over all. `shift_factor` is the mean of all
    channels' means, for models that export their shift instead of folding it in.
    """

    latents_mean: list[float]
    latents_std: list[float]
    scaling_factor: float
    shift_factor: float
    image_count: int

    @property
    def pooled_std(self) -> float:
        """Standard deviation over all channels about `shift_factor`."""
        squares = [m * m + s * s for m, s in zip(self.latents_mean, self.latents_std, strict=True)]
        return math.sqrt(sum(squares) / len(squares) - self.shift_factor**2)

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return asdict(self)


@torch.no_grad()
def compute_latent_statistics(vae: AutoencoderKL, images: Iterable[torch.Tensor]) -> LatentStatistics:
    """Mean and standard deviation per channel of posterior samples, in float64, without drawing any.

    The variance of a sample is the variance of the means plus the mean of the variances (law of total
    variance), so nothing is drawn and the figures depend on the images alone.

    Args:
        images: batches (B, C, H, W) in [-1, 1], of any size each. Every latent pixel has the same weight.

    Raises:
        ValueError: no images.
    """
    count = image_count = 0  # latent pixels, images
    total = square = torch.zeros(1, dtype=torch.float64)
    for batch in images:
        posterior, _ = encode(vae, batch)
        mean = posterior.mean.cpu().double()  # in this order, because MPS has no float64
        variance = posterior.logvar.cpu().double().exp()
        total = total + mean.sum((0, 2, 3))
        square = square + (mean.square() + variance).sum((0, 2, 3))
        count += mean.shape[0] * mean.shape[2] * mean.shape[3]
        image_count += mean.shape[0]
    if count == 0:
        raise ValueError("no images to compute latent statistics from; give at least one batch.")
    mean = total / count
    variance = square / count - mean.square()
    return LatentStatistics(
        latents_mean=mean.tolist(),
        latents_std=variance.sqrt().tolist(),
        scaling_factor=variance.mean().rsqrt().item(),
        shift_factor=mean.mean().item(),
        image_count=image_count,
    )


def pool_latents(latents: torch.Tensor, grid: int = 0) -> np.ndarray:
    """Reduce latents of any size to one row an image.

    Mean and standard deviation over the whole image of each channel; and with a grid, the mean of each
    channel in each of grid x grid equal cells, which keeps where in the image things are. Images of other
    shapes have cells of other shapes; where there are fewer latents than cells, cells share them.

    Args:
        latents: (B, C, h, w), unscaled.
        grid: cells along a side, 0 for none.

    Returns:
        float64 (B, 2C + C * grid^2): means, standard deviations, then cells by channel, row and column.

    Raises:
        LatentVAEError: a grid below 0 or above 64, or latents that are not finite.
    """
    if not 0 <= grid <= LARGEST_GRID:
        raise LatentVAEError(f"grid {grid} came; wanted 0 (no cells) to {LARGEST_GRID} cells along a side.")
    if not torch.isfinite(latents).all():
        raise LatentVAEError(
            "the latents hold NaN or infinity: compute in float32 (half precision overflows)."
        )
    values = latents.detach().cpu().double()  # in this order, because MPS has no float64
    flat = values.flatten(2)  # (B, C, h w)
    parts = [flat.mean(2), flat.std(2, correction=0)]  # not n - 1, which is 0 for a single latent
    if grid:
        parts.append(adaptive_avg_pool2d(values, grid).flatten(1))
    pooled: np.ndarray = torch.cat(parts, 1).numpy()
    return pooled


def seeded_noise(shape: tuple[int, ...], seed: int, key: str, number: int) -> torch.Tensor:
    """Standard normal noise that depends on its arguments alone, float32 on the CPU.

    Args:
        shape: of the noise, such as (C, h, w).
        seed: other seeds, other noise.
        key: tells apart what would otherwise get the same noise, such as images.
        number: of the draw: more draws do not change the first ones.
    """
    return torch.randn(shape, generator=seeded_generator(seed, key, number))


def seeded_generator(seed: int, key: str, number: int) -> torch.Generator:
    """What draws the noise of `seeded_noise`, on the CPU."""
    # keys may be names of files that are not UTF-8
    digest = hashlib.sha256(f"{seed} {number} {key}".encode(errors="surrogateescape")).digest()
    # 63 bits: torch takes a seed as a signed 64-bit number
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
