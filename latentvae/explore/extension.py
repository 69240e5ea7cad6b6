"""Smooth extension of an image from its known pixels into a hole: what can be said without any model."""

import torch
from torch.nn.functional import avg_pool2d, interpolate, pad

from latentvae.errors import ImageError

MAX_ITERATIONS = 400
TOLERANCE = 1e-4  # of the first residual


@torch.no_grad()
def extend(images: torch.Tensor, missing: torch.Tensor, *, order: int = 1) -> torch.Tensor:
    """Continue known pixels into the missing ones as smoothly as can be; known pixels are kept bit for bit.

    Order 1 solves Laplace's equation in the hole (a membrane: never beyond the values around it). Order 2
    solves the biharmonic equation (a thin plate: continues slopes, better between scattered pixels, worse
    across large holes). Conjugate gradients from a pyramid of means.

    Args:
        images: (B, C, H, W) float; what missing pixels hold is not looked at, and may be NaN.
        missing: (H, W) bool, True where a pixel is to be found.
        order: 1 or 2.

    Raises:
        ImageError: no pixel is known, the sizes differ, or another order.
    """
    if order not in (1, 2):
        raise ImageError(f"order {order} came, but 1 (membrane) or 2 (thin plate) was wanted.")
    check_missing(images, missing)
    known = ~missing.to(images.device)
    values = images.masked_fill(~known, 0.0)
    if known.all():
        return values
    inside = (~known).to(values.dtype)
    found = _pyramid(values, known.expand_as(values[:1, :1]))
    residual = -inside * _stiffness(found, order)
    direction, square = residual.clone(), _norm(residual)
    goal = TOLERANCE**2 * square
    for _ in range(MAX_ITERATIONS):
        if bool((square <= goal).all()):
            break
        bent = inside * _stiffness(direction, order)
        length = square / (direction * bent).sum((-2, -1), keepdim=True).clamp_min(1e-30)
        found, residual = found + length * direction, residual - length * bent
        before, square = square, _norm(residual)
        direction = residual + square / before.clamp_min(1e-30) * direction
    return torch.where(known, values, found)


def check_missing(images: torch.Tensor, missing: torch.Tensor) -> None:
    """Check that images (B, C, H, W) and missing (H, W) belong together and that some pixel is known.

    Raises:
        ImageError: they do not, or none is.
    """
    if images.ndim != 4 or missing.dtype != torch.bool or missing.shape != images.shape[-2:]:
        raise ImageError(
            f"images {tuple(images.shape)} came with a {missing.dtype} mask {tuple(missing.shape)}; wanted "
            f"(B, C, H, W) and a bool mask (H, W) of the same size: do not resize one without the other."
        )
    if bool(missing.all()):
        raise ImageError(
            "every pixel is missing, so there is nothing to fill in from. White means missing: is the mask "
            "inverted?"
        )


def _norm(residual: torch.Tensor) -> torch.Tensor:
    return residual.square().sum((-2, -1), keepdim=True)


def _stiffness(values: torch.Tensor, order: int) -> torch.Tensor:
    """The graph Laplacian, once or twice; nothing flows over the edges of the image."""
    for _ in range(order):
        padded = pad(values, (1, 1, 1, 1), mode="replicate")
        across = padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
        along = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]
        values = 4 * values - across - along
    return values


def _pyramid(values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Fill missing pixels with the mean of what is known around them, at the finest scale that has any."""
    if bool(known.all()):
        return values
    weight = known.to(values.dtype)

    def halve(x: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)

    share = halve(weight)
    coarse = _pyramid(halve(values * weight) / share.clamp_min(1e-9), share > 0)
    height, width = values.shape[-2:]
    size = (2 * coarse.shape[-2], 2 * coarse.shape[-1])
    wide = interpolate(coarse, size=size, mode="bilinear")[..., :height, :width]
    return torch.where(known, values, wide)
