"""What Accelerate wraps: one module whose forward is the whole way from images to reconstructions."""

from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import nn

from latentvae.models.latents import Posterior
from latentvae.training.draws import Transform


class Outputs(NamedTuple):
    """Of a training forward pass; the teacher's moments where there is a teacher."""

    moments: torch.Tensor  # (B, 2c, h, w)
    reconstructions: torch.Tensor  # (B, C, H, W), of the transformed size where there is a transform
    teacher_moments: torch.Tensor | None = None


class TrainableVAE(nn.Module):
    """Encode, sample, decode in one `forward`: only what goes through it is synchronised between ranks.

    Args:
        vae: trained in place.
        teacher: frozen; its latents are decoded instead of the student's, which only learns to match them.
    """

    def __init__(self, vae: AutoencoderKL, teacher: AutoencoderKL | None = None) -> None:
        super().__init__()
        self.vae = vae
        self.frozen = [teacher]  # in a list, so that its weights are neither synchronised nor optimised

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor,
        latent_noise: torch.Tensor | None = None,
        transform: Transform | None = None,
    ) -> Outputs:
        """Reconstruct images (B, C, H, W) from the latents that `noise` (B, c, h, w) picks.

        Args:
            images: what the encoder sees, in [-1, 1].
            noise: standard normal, for the posterior.
            latent_noise: added to the latents, for a decoder that must bear a diffusion model's errors.
            transform: applied to the latents.
        """
        moments = self.vae.encode(images).latent_dist.parameters
        (teacher,) = self.frozen
        teacher_moments = None
        if teacher is not None:
            with torch.no_grad():
                teacher_moments = teacher.encode(images).latent_dist.parameters
        latents = Posterior(moments if teacher_moments is None else teacher_moments).at(noise)
        if latent_noise is not None:
            latents = latents + latent_noise
        if transform is not None:
            latents = transform.latents(latents)
        return Outputs(moments, self.vae.decode(latents).sample, teacher_moments)
