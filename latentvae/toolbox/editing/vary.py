"""Images like an image: samples of its posterior, spread by a temperature."""

import hashlib
import math
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.images.tensors import to_uint8
from latentvae.measure.lpips import LPIPS
from latentvae.measure.metrics import psnr
from latentvae.models.latents import decode, encode, seeded_noise


@dataclass(frozen=True)
class Spread:
    """How wide an image's posterior is. With a small KL weight it is narrow: samples are all but alike."""

    posterior_std: float  # root mean square over the latents
    latents_std: float  # of the posterior's mean over positions, each channel about its own mean, pooled

    @property
    def ratio(self) -> float:
        """The share of the latents' own variation that temperature 1 adds."""
        return self.posterior_std / self.latents_std if self.latents_std else math.inf


class Variations:
    """All variations of one image: any copy at any temperature, each the same whatever else is asked for.

    A temperature is a multiple of the posterior's standard deviation: 0 gives the reconstruction, 1 a sample
    of the posterior, more than 1 is no longer what the encoder said. One copy has the same noise at every
    temperature, drawn from (seed, key, copy) alone.

    Args:
        image: (C, H, W) in [-1, 1], of any size.
        seed: of all images' noise.
        key: tells images apart. None: a hash of the image's pixels, so that names, folders and the order of
            files change nothing.
    """

    @torch.no_grad()
    def __init__(self, vae: AutoencoderKL, image: Tensor, seed: int = 0, key: str | None = None) -> None:
        if image.ndim != 3:
            raise ImageError(f"an image of shape {tuple(image.shape)} came; one image (C, H, W) was wanted.")
        self.vae, self.seed = vae, seed
        self.key = image_key(image) if key is None else key
        self.posterior, self.padding = encode(vae, image[None])

    def latents(self, temperature: float, copy: int) -> Tensor:
        """Unscaled latents of a copy, (1, c, h, w).

        Raises:
            LatentVAEError: a temperature that is negative or no number.
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise LatentVAEError(f"temperature {temperature} came, but a number of at least 0 was wanted.")
        mean = self.posterior.mode()  # (1, c, h, w)
        if temperature == 0:  # the reconstruction, bit for bit
            return mean
        noise = seeded_noise(mean.shape[1:], self.seed, self.key, copy)[None].to(mean)
        return mean + temperature * self.posterior.std * noise

    @torch.no_grad()
    def image(self, temperature: float, copy: int) -> Tensor:
        """A copy, (C, H, W) near [-1, 1], of the original's size. Errors as `latents`."""
        return decode(self.vae, self.latents(temperature, copy), self.padding)[0]

    @property
    def reconstruction(self) -> Tensor:
        """What temperature 0 gives, (C, H, W) near [-1, 1]."""
        return self.image(0.0, 0)

    @property
    def spread(self) -> Spread:
        """How much temperature 1 is, in figures."""
        mean = self.posterior.mode()
        own = mean - mean.mean((2, 3), keepdim=True)  # channels have means far apart, which are no variation
        return Spread(self.posterior.std.square().mean().sqrt().item(), own.square().mean().sqrt().item())


def vary(
    vae: AutoencoderKL, image: Tensor, temperature: float = 1.0, copies: int = 4, seed: int = 0
) -> Tensor:
    """Copies of an image (C, H, W) in [-1, 1] that differ as samples of its posterior do: (copies, C, H, W).

    Args:
        temperature: in multiples of the posterior's standard deviation; see `Variations`.
        copies: 1 or more. More copies do not change the first ones.
        seed: other seeds, other copies.

    Raises:
        LatentVAEError: a temperature below 0, or no copies.
    """
    if copies < 1:
        raise LatentVAEError(f"copies={copies} came, but at least 1 was wanted.")
    variations = Variations(vae, image, seed)
    return torch.stack([variations.image(temperature, copy) for copy in range(copies)])


@dataclass(frozen=True)
class Distance:
    """From one image to another, both rounded to 8 bits."""

    psnr: float  # dB; inf where they are identical
    lpips: float | None  # None without a network, or where the images are too small for it


class Reference:
    """An image (C, H, W) in [-1, 1] that others are compared with; its LPIPS features are computed once."""

    def __init__(self, image: Tensor, lpips: LPIPS | None = None) -> None:
        small = lpips is not None and min(image.shape[-2:]) < lpips.min_size  # its last layers would be empty
        self.image, self.lpips = image, None if small else lpips
        self._features = self._see(image)

    @torch.no_grad()
    def distance(self, image: Tensor) -> Distance:
        """Measure an image of the same shape. Raises LatentVAEError for another, or values not finite."""
        decibel = psnr(self.image[None], image[None]).item()
        if self.lpips is None:
            return Distance(decibel, None)
        return Distance(decibel, self.lpips.distance_from_features(self._features, self._see(image)).item())

    @torch.no_grad()
    def _see(self, image: Tensor) -> list[Tensor]:
        if self.lpips is None:
            return []
        # of 8-bit levels, as people get it, and as the PSNR beside it is
        return self.lpips.features(to_uint8(image[None]).to(self.lpips.shift) / 127.5 - 1)


def image_key(image: Tensor) -> str:
    """SHA-256 of an image's 8-bit pixels and shape."""
    # 8 bits, so that readers that differ in the last bits of a float give an image the same noise
    levels = to_uint8(image).cpu().contiguous()
    return hashlib.sha256(f"{tuple(levels.shape)}".encode() + levels.numpy().tobytes()).hexdigest()
