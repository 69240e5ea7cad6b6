"""What a model says of one image, before any comparison: the terms of a search for odd ones."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate, pad

from latentvae.base.errors import LatentVAEError
from latentvae.measure.lpips import LPIPS
from latentvae.models.latents import decode, encode, pool_latents
from latentvae.models.loading import spatial_compression_ratio

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
GRID = 8  # places a side of a layout: any image size gives as many, and a normal image 64 vectors to keep

# Of `alone`
LAYERS = (1, 2)  # of an LPIPS network: textures and parts; the first sees edges, the last ones objects
SIDE = 64  # places a side at most: the distances between 64 x 64 places take 67 MB
NEAR = 4  # places around one that share its receptive field, and so look like it
EDGE = 1  # places along the border see the padding: they are unlike all others in any image
SHARE = 0.01  # of the places: the few loneliest ones, because a defect covers several


@dataclass(frozen=True)
class Look:
    """What the model says of one image, before any comparison.

    Attributes:
        terms: pixel, patch, kl and, with a network, lpips and alone.
        pooled: (2C,), mean and standard deviation of each latent channel over the image.
        layout: (64C,), the latents averaged over 8 x 8 equal parts of the image.
        error: (H, W), the squared error, averaged over the area of one latent pixel.
        lonely: (h, w), how far each place is from its like in the image; None without a network.
    """

    terms: dict[str, float]
    pooled: np.ndarray
    layout: np.ndarray
    error: torch.Tensor
    lonely: torch.Tensor | None = None

    def without_maps(self) -> "Look":
        """The same without its maps, which are as large as the image: to keep many."""
        return replace(self, error=torch.empty(0), lonely=None)


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
    latents = posterior.mode()  # (1, C, h, w), not a sample: the same image gives the same terms
    rebuilt = decode(vae, latents, padding).clamp(-1, 1)  # what is beyond cannot be seen, and is no error
    squares = (rebuilt - images.float()).square().mean(1, keepdim=True)  # (1, 1, H, W)
    error = _average(squares, spatial_compression_ratio(vae))[0, 0].cpu()
    terms, lonely = {"pixel": float(squares.mean()), "patch": float(error.max())}, None
    if lpips is not None:
        seen, again = (lpips.features(each.float()) for each in (images, rebuilt))
        terms["lpips"] = float(lpips.distance_from_features(seen, again))
        lonely = lonely_places(seen)
        terms["alone"] = loneliness(lonely)
    terms["kl"] = float(posterior.kl()) / squares.numel()  # per pixel, so that images of all sizes compare
    if not all(np.isfinite(value) for value in terms.values()):
        raise LatentVAEError(f"the model gave {terms}: compute in float32 (half precision overflows).")
    row, statistics = pool_latents(latents, GRID)[0], 2 * latents.shape[1]
    return Look(terms, row[:statistics], row[statistics:], error, lonely)


def _average(error: torch.Tensor, side: int) -> torch.Tensor:
    """Mean over squares of about `side` pixels around each pixel, (1, 1, H, W); edges have fewer."""
    reach = side // 2
    kernel = 2 * reach + 1
    # a mean over what is inside the image: zeros beyond its edges would make errors there look small
    weight = avg_pool2d(pad(torch.ones_like(error), (reach,) * 4), kernel, stride=1)
    return avg_pool2d(pad(error, (reach,) * 4), kernel, stride=1) / weight


@torch.no_grad()
def lonely_places(features: list[torch.Tensor]) -> torch.Tensor:
    """How far each place of an image is from the nearest one elsewhere in it.

    Textures and things of a photograph come again; a defect often does not. Needs no other image, so that
    sets in which no two images are alike can be judged.

    Args:
        features: of one image, from `LPIPS.features`: (1, C, h, w) for each layer.

    Returns:
        Distances in the network's features, (h, w) of 64 x 64 places at most; NaN along the border, and
        everywhere where the image is too small to have an elsewhere.
    """
    height, width = (min(side, SIDE) for side in features[LAYERS[0]].shape[-2:])
    maps = [_resize(features[layer].float(), height, width) for layer in LAYERS]
    places = torch.cat(maps, 1)[0].flatten(1).T  # (h w, C)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = (each.flatten().to(places.device) for each in (y, x))
    apart = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs())  # (h w, h w), in places
    distances = torch.cdist(places, places).masked_fill(apart <= NEAR, torch.inf).amin(1)
    inside = torch.minimum(torch.minimum(y, height - 1 - y), torch.minimum(x, width - 1 - x)) >= EDGE
    return distances.masked_fill(~(inside & distances.isfinite()), torch.nan).reshape(height, width).cpu()


def _resize(features: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Averaged where it has more places, interpolated where it has fewer."""
    if features.shape[-2] >= height and features.shape[-1] >= width:
        return adaptive_avg_pool2d(features, (height, width))
    return interpolate(features, (height, width), mode="bilinear")


def loneliness(places: torch.Tensor) -> float:
    """The mean over the loneliest hundredth of the places (h, w), one at least; 0 where all are NaN."""
    known = places[places.isfinite()]
    few = max(1, round(SHARE * len(known)))
    return float(known.topk(few).values.mean()) if len(known) else 0.0
