"""GroupNorm and SiLU of channels_last maps on a CPU, in one pass.

torch 2.15's own kernel for this case sums in float32 from one end to the other: a map of 512 x 512 comes out
wrong by 3e-5 of its range, thirty times a convolution's rounding, and larger ones by more. Here blocks are
measured on their own and put together in float64 (Chan, Golub & LeVeque 1983).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from latentvae.runtime.kernels import blocks, compiled

_NOTHING = nn.Identity()
BLOCK = 2**17  # values in a block, that they stay in a core's cache
_Rows = tuple[int, slice]  # an image's number, and some rows of it


def suits_norm(norm: nn.GroupNorm, x: torch.Tensor) -> bool:
    """Whether `affine` and `apply` can stand in for `norm` on x, and the map is large enough."""
    if not norm.affine or norm.num_channels != x.shape[1]:
        return False
    return compiled.suits(norm, x) or (blocks.suits_blocks(norm, x) and x.numel() > BLOCK)


def affine(norm: nn.GroupNorm, x: torch.Tensor) -> blocks.Affine:
    """The scale and shift of every channel that normalise x (B, C, H, W), from its statistics."""
    if compiled.suits(norm, x):
        return blocks.Affine(*compiled.affine(norm, x))
    source = x.detach().permute(0, 2, 3, 1)  # (B, H, W, C), as channels_last lies in memory
    batch, _, width, channels = source.shape
    jobs = _jobs(source)
    per_image = len(jobs) // batch
    means, variances = source.new_empty((2, batch, per_image, channels), dtype=torch.float64)
    counts = means.new_tensor([(rows.stop - rows.start) * width for _, rows in jobs[:per_image]])

    def worker() -> Callable[[tuple[int, _Rows]], None]:
        def measure(numbered: tuple[int, _Rows]) -> None:
            number, (image, rows) = numbered
            values = source[image : image + 1, rows].permute(0, 3, 1, 2)
            values = values.contiguous(memory_format=torch.channels_last)  # a crop is not
            _, variance = torch.batch_norm_update_stats(values, None, None, 0.0)
            mean = values.mean((0, 2, 3))  # that of the line above is less precise
            means[image, number % per_image], variances[image, number % per_image] = mean, variance

        return measure

    blocks.share_out(enumerate(jobs), worker)
    return _combine(norm, means, variances, counts)


def _combine(
    norm: nn.GroupNorm, means: torch.Tensor, variances: torch.Tensor, counts: torch.Tensor
) -> blocks.Affine:
    """Put the blocks' means and variances, (B, blocks, C), together by groups."""
    groups = (norm.num_groups, -1)
    means, variances = means.unflatten(2, groups), variances.unflatten(2, groups)  # (B, blocks, G, C / G)
    # Chan: the variance of all is that within the blocks plus that between their means
    counts = counts[:, None, None] / (counts.sum() * means.shape[3])
    mean = (counts * means).sum((1, 3), keepdim=True)
    variance = (counts * (variances + (means - mean).square())).sum((1, 3), keepdim=True)
    scale = (variance + norm.eps).rsqrt().expand(-1, -1, -1, means.shape[3])
    shift = (-mean * scale).flatten(1)
    weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    dtype = norm.weight.dtype
    return blocks.Affine((scale.flatten(1) * weight).to(dtype), (shift * weight + bias).to(dtype))


def apply(x: torch.Tensor, normalise: blocks.Affine, *, silu: bool) -> torch.Tensor:
    """x (B, C, H, W) normalised, and activated if asked for, as a new channels_last map."""
    if compiled.suits(_NOTHING, x):
        return compiled.apply(x, *normalise, silu=silu)
    source = x.detach().permute(0, 2, 3, 1)
    output = blocks.new_map(source, *source.shape)

    def worker() -> Callable[[_Rows], None]:
        def write(job: _Rows) -> None:
            image, rows = job
            target = output[image, rows]
            torch.addcmul(normalise.shift[image], source[image, rows], normalise.scale[image], out=target)
            if silu:
                F.silu(target, inplace=True)

        return write

    blocks.share_out(_jobs(source), worker)
    return output.permute(0, 3, 1, 2)


def _jobs(source: torch.Tensor) -> list[_Rows]:
    """Blocks of whole rows of each image."""
    batch, height, width, channels = source.shape
    rows = max(1, min(BLOCK // (width * channels), 2048 // width))
    parts = [slice(start, min(start + rows, height)) for start in range(0, height, rows)]
    return [(image, part) for image in range(batch) for part in parts]
