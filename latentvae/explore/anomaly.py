"""What a model says of one image, before any comparison: the terms of a search for odd ones."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import avg_pool2d, pad

from latentvae.errors import LatentVAEError
from latentvae.explore.features import pool
from latentvae.explore.places import loneliness, lonely_places
from latentvae.latents import decode, encode
from latentvae.model import spatial_compression_ratio
from latentvae.perceptual import LPIPS

GRID = 8  # places a side of a layout: any image size gives as many, and a normal image 64 vectors to keep

TERMS = {
    "pixel": "mean squared error of the reconstruction",
    "patch": "largest mean squared error over one latent pixel's area",
    "lpips": "perceptual distance to the reconstruction",
    "alone": "how far the loneliest places are, in perceptual features, from their like in the image",
    "kl": "KL of the posterior in nats per image pixel",
    "latent": "Mahalanobis distance of the pooled latents to those of normal images",
    "neighbour": "distance of the pooled latents, whitened, to the nearest normal image's",
    "layout": "distance of the latents, place by place, to the nearest normal image's",
}
LPIPS_TERMS = ("lpips", "alone")  # those that need a network


@dataclass(frozen=True)
class Look:
    """What the model says of one image, before any comparison.

    Attributes:
        terms: pixel, patch, kl and, with a network, lpips and alone.
        pooled: (2C,), mean and standard deviation of each latent channel over the image.
        layout: (64C,), the latents averaged over 8 x 8 equal parts of the image.
        error: (H, W), the squared error, averaged over the area of one latent pixel.
        lonely: (h, w), how far each place is from its like in the image (`places`); None without a network.
    """

    terms: dict[str, float]
    pooled: np.ndarray
    layout: np.ndarray
    error: torch.Tensor
    lonely: torch.Tensor | None = None


@torch.no_grad()
def look(vae: AutoencoderKL, images: torch.Tensor, lpips: LPIPS | None = None) -> Look:
    """Encode and decode one image (1, C, H, W) in [-1, 1] and measure what is odd about it.

    Raises:
        LatentVAEError: more than one image, a model that gives NaN, or an image too small for LPIPS.
    """
    if images.ndim != 4 or images.shape[0] != 1:
        raise LatentVAEError(f"shape {tuple(images.shape)} came; one image (1, C, H, W) was wanted.")
    images = images.to(vae.device)
    posterior, padding = encode(vae, images)
    latents = posterior.mode()
    rebuilt = decode(vae, latents, padding).clamp(-1, 1)
    squares = (rebuilt - images.float()).square().mean(1, keepdim=True)  # (1, 1, H, W)
    error = _average(squares, spatial_compression_ratio(vae))[0, 0].cpu()
    terms, lonely = {"pixel": float(squares.mean()), "patch": float(error.max())}, None
    if lpips is not None:
        seen, again = (lpips.features(each.float()) for each in (images, rebuilt))
        terms["lpips"] = float(lpips.distance_from_features(seen, again))
        lonely = lonely_places(seen)
        terms["alone"] = loneliness(lonely)
    terms["kl"] = float(posterior.kl()) / squares.numel()
    if not all(math.isfinite(value) for value in terms.values()):
        raise LatentVAEError(f"the model gave {terms}: compute in float32 (half precision overflows).")
    row, statistics = pool(latents, GRID)[0], 2 * latents.shape[1]
    return Look(terms, row[:statistics], row[statistics:], error, lonely)


def _average(error: torch.Tensor, side: int) -> torch.Tensor:
    """Mean over squares of about `side` pixels around each pixel, (1, 1, H, W); edges have fewer."""
    reach = side // 2
    kernel = 2 * reach + 1
    weight = avg_pool2d(pad(torch.ones_like(error), (reach,) * 4), kernel, stride=1)
    return avg_pool2d(pad(error, (reach,) * 4), kernel, stride=1) / weight
