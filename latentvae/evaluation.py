"""Measuring a VAE's reconstructions of many images."""

from collections.abc import Iterable
from typing import Literal

import torch
from diffusers import AutoencoderKL

from latentvae.latents import reconstruct
from latentvae.metrics import Metrics, MetricsSummary
from latentvae.perceptual import LPIPS


@torch.no_grad()
def evaluate(
    vae: AutoencoderKL,
    images: Iterable[tuple[str, torch.Tensor]],
    lpips: LPIPS | None = None,
    lpips_missing_reason: str | None = None,
    latents: Literal["mode", "sample"] = "mode",
    seed: int = 0,
) -> MetricsSummary:
    """Reconstruct images one by one, each at its own size, and compare them with the originals.

    Args:
        vae: any AutoencoderKL.
        images: (name, (C, H, W) in [-1, 1]) pairs.
        lpips: network from `load_lpips`, or None to leave LPIPS out.
        lpips_missing_reason: why it is left out, for the report.
        latents: decode the posterior's mode or a sample of it.
        seed: of the samples.
    """
    metrics = Metrics(lpips=lpips, lpips_missing_reason=lpips_missing_reason, latents=latents)
    generator = torch.Generator().manual_seed(seed)
    for name, image in images:
        result = reconstruct(vae, image[None], sample=latents == "sample", generator=generator)
        reconstructions = result.reconstructions.float()
        metrics.add(name, image[None].to(reconstructions.device), reconstructions, result.posterior.kl())
    return metrics.summary()
