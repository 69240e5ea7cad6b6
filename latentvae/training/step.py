"""One forward pass of the VAE in training, its noise, and its moving average."""

import copy
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import nn

from latentvae.latents import Posterior


class Outputs(NamedTuple):
    """Of a training forward pass: moments (B, 2C, h, w), reconstructions (B, C, H, W)."""

    moments: torch.Tensor
    reconstructions: torch.Tensor


class TrainableVAE(nn.Module):
    """Encode, sample, decode in one `forward`: only what goes through it is synchronised between ranks.

    Args:
        vae: trained in place.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> Outputs:
        """Reconstruct images (B, C, H, W) from the latents that `noise` (B, c, h, w) picks."""
        moments = self.vae.encode(images).latent_dist.parameters
        latents = Posterior(moments).at(noise)
        return Outputs(moments, self.vae.decode(latents).sample)


def posterior_noise(seed: int, positions: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise (B, *shape) that depends on (seed, global sample index) alone.

    So it is the same however many processes share the batch, and after a resume.
    """
    noise = torch.empty(len(positions), *shape)
    generator = torch.Generator()
    for row, position in zip(noise, positions.tolist(), strict=True):
        # consecutive seeds start Mersenne Twister in well mixed states; the odd multiplier keeps runs apart
        generator.manual_seed((seed * 0x9E3779B97F4A7C15 + position) % 2**63)
        row.normal_(generator=generator)
    return noise


class EMA:
    """Exponential moving average of a model's weights in float32, with the decay warmed up.

    Args:
        model: averaged; the average is `ema.model`, a copy in eval mode without gradients.
        decay: the final decay. At step n it is at most (1 + n) / (10 + n), so that short runs do not report
            their first weights.
    """

    def __init__(self, model: AutoencoderKL, decay: float) -> None:
        self.decay = decay
        self.model: AutoencoderKL = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: AutoencoderKL, step: int) -> None:
        """Move the average towards `model`, once per optimizer step; `step` counts from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            # lerp_ keeps weights that do not change exactly; mul_ and add_ round them
            average.lerp_(parameter.detach(), weight)
