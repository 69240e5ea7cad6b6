"""How finely latents are quantised."""

import numpy as np
import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import CodecError
from latentvae.models.latents import Posterior

QUALITY_OF_ONE_STD = 30  # the quality whose step is the latents' standard deviation
MOST = 2.0  # times larger or smaller than the mean a channel's step may be
QUALITY_PER_OCTAVE = 14  # this much more halves the steps: 100 gives a 32nd of the standard deviation


def steps(vae: AutoencoderKL, posterior: Posterior, quality: int) -> tuple[float, ...]:
    """The step of every latent channel: 2^((30 - quality) / 14) standard deviations, in half precision.

    Channels about which the encoder is less sure than about others get larger steps: in proportion to the
    square root of the posterior's standard deviation (its geometric mean over the image). Measured: 3 % fewer
    bits than equal steps, at equal PSNR and at equal LPIPS.

    Args:
        vae: `1 / scaling_factor` is taken for the standard deviation of its latents, as pipelines do.
        posterior: of the image.
        quality: 1 (steps of 4.2 standard deviations) to 100 (1/32).

    Raises:
        CodecError: another quality, or a scaling_factor that gives no step.
    """
    if not 1 <= quality <= 100:
        raise CodecError(f"quality {quality} came, but 1 (smallest) to 100 (best) was wanted.")
    std = 1 / (vae.config["scaling_factor"] or 1.0)
    mean = std * 2 ** ((QUALITY_OF_ONE_STD - quality) / QUALITY_PER_OCTAVE)
    doubt = posterior.logvar.cpu().double().mean((0, 2, 3)) / 4  # the logarithm of a std's square root
    shares = (doubt - doubt.mean()).exp().clamp(1 / MOST, MOST)
    found = tuple(float(np.float16(mean * share)) for share in shares.tolist())
    if not all(0 < step < np.inf for step in found):
        raise CodecError(
            f"a scaling_factor of {vae.config['scaling_factor']} gives no usable step: set it to one over "
            "the latents' standard deviation."
        )
    return found


def in_steps(latents: torch.Tensor, steps: tuple[float, ...]) -> np.ndarray:
    """Latents (1, C, h, w) in units of their channels' steps, float32 (C, h, w)."""
    return latents[0].cpu().float().numpy() / np.array(steps, dtype=np.float32)[:, None, None]


def dequantise(values: np.ndarray, steps: tuple[float, ...]) -> torch.Tensor:
    """Latents (1, C, h, w), float32, of whole numbers (C, h, w)."""
    return torch.from_numpy(values * np.array(steps, dtype=np.float32)[:, None, None])[None]
