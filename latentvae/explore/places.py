"""Places of an image by their perceptual features, and how far the loneliest is from its like."""

import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

LAYERS = (1, 2)  # of an LPIPS network: textures and parts; the first sees edges, the last ones objects
SIDE = 64  # places a side at most: the distances between 64 x 64 places take 67 MB
NEAR = 4  # places around one that share its receptive field, and so look like it
EDGE = 1  # places along the border see the padding: they are unlike all others in any image
SHARE = 0.01  # of the places: the few loneliest ones, because a defect covers several


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
    y, x = (each.flatten().to(places.device) for each in _coordinates(height, width))
    apart = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs())
    distances = torch.cdist(places, places).masked_fill(apart <= NEAR, torch.inf).amin(1)
    inside = torch.minimum(torch.minimum(y, height - 1 - y), torch.minimum(x, width - 1 - x)) >= EDGE
    return distances.masked_fill(~(inside & distances.isfinite()), torch.nan).reshape(height, width).cpu()


def loneliness(places: torch.Tensor) -> float:
    """The mean over the loneliest hundredth of the places (h, w), one at least; 0 where all are NaN."""
    known = places[places.isfinite()]
    few = max(1, round(SHARE * len(known)))
    return float(known.topk(few).values.mean()) if len(known) else 0.0


def _coordinates(height: int, width: int) -> tuple[torch.Tensor, ...]:
    return torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")


def _resize(features: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Averaged where it has more places, interpolated where it has fewer."""
    if features.shape[-2] >= height and features.shape[-1] >= width:
        return adaptive_avg_pool2d(features, (height, width))
    return interpolate(features, (height, width), mode="bilinear")
