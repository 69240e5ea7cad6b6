"""3x3 convolutions with a quarter of the multiplications, for wide layers on a CPU.

A tile of outputs is bilinear in a patch of inputs and the kernel, so that it can be had as A (G w * B x) with
fewer products than by definition (Winograd's F(4x4, 3x3): 36 for 16 outputs instead of 144). The products are
matrix products over the channels, and so are the transforms. It runs in blocks, one for each thread, that
stay in the cache; the norm and activation before it and the sum after it are done to the blocks. Source:
Lavin & Gray 2015, arXiv:1509.09308; the interpolation points are ours.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F

from latentvae.runtime.kernels import blocks

MIN_CHANNELS = 128  # below, transforms cost more than products save
MIN_PIXELS = 1024  # of output; below, transforming the weights costs more than it saves
BLOCK = 36 * 64  # products of each channel in a block

_of_threads = blocks.ThreadBuffers()
_of_all, _all_in_use = blocks.Buffers(), threading.Lock()


@dataclass(frozen=True)
class Scheme:
    """A bilinear algorithm for a tile, the same along both axes.

    Attributes:
        a: outputs of a tile from products.
        g: factors from the kernel's three values.
        b: factors from a patch of inputs, which begins one pixel before the tile.
        step: from one patch to the next.
        offset: outputs of the first tile that lie before the map.
    """

    a: torch.Tensor
    g: torch.Tensor
    b: torch.Tensor
    step: int
    offset: int = 0

    @property
    def outputs(self) -> int:
        """How many outputs a tile has along an axis."""
        return len(self.a)

    @property
    def points(self) -> int:
        """How many products for each input channel a tile takes."""
        return len(self.g) ** 2

    def square(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One of the matrices for both axes at once."""
        matrix = getattr(self, name)
        return torch.kron(matrix, matrix).to(dtype)


def _toom_cook(points: tuple[float, ...]) -> Scheme:
    """F(n - 1, 3) for n points and infinity: a product of polynomials, interpolated, and transposed."""
    count = len(points) + 1
    a = [[*(point**row for point in points), float(row == count - 3)] for row in range(count - 2)]
    g: list[list[float]] = []
    b: list[list[float]] = []
    for point in (*points, None):
        others = [other for other in points if other != point]
        scale, polynomial = 1.0, [1.0]  # the polynomial with the other points as zeros, lowest degree first
        for other in others:
            scale *= 1.0 if point is None else point - other
            shifted, scaled = [0.0, *polynomial], [other * value for value in polynomial] + [0.0]
            polynomial = [x - y for x, y in zip(shifted, scaled, strict=True)]
        g.append([0.0, 0.0, 1.0] if point is None else [point**power / scale for power in range(3)])
        b.append(polynomial + [0.0] * (count - len(polynomial)))
    return Scheme(_matrix(a), _matrix(g), _matrix(b), step=count - 2)


def _matrix(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


# Mild points keep rounding errors near those of a direct convolution.
CONVOLUTION = _toom_cook((0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2))

# Nearest x2 and kernel (w0, w1, w2): with s = w0 + w1 + w2, outputs 2i and 2i + 1 are
# s x[i] + w0 (x[i-1] - x[i]) and s x[i] + w2 (x[i+1] - x[i]): three products for two outputs, not six.
UPSAMPLING = Scheme(
    a=_matrix([[1, 1, 0], [0, 1, 1]]),
    g=_matrix([[1, 0, 0], [1, 1, 1], [0, 0, 1]]),
    b=_matrix([[1, -1, 0], [0, 1, 0], [0, -1, 1]]),
    step=1,
)

# The same for outputs 2i - 1 to 2i + 2, which share s x[i]: five products for four outputs.
UPSAMPLING_OF_TWO = Scheme(
    a=_matrix([[0, 1, 1, 0, 0], [1, 0, 1, 0, 0], [0, 0, 1, 0, -1], [0, 0, 1, -1, 0]]),
    g=_matrix([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 0, 1]]),
    b=_matrix([[1, -1, 0], [1, -1, 0], [0, 1, 0], [0, 1, -1], [0, 1, -1]]),
    step=2,
    offset=1,
)


def is_likely_faster(conv: torch.nn.Conv2d, x: torch.Tensor, scheme: Scheme) -> bool:
    """Whether `convolve` is likely faster than a 3x3 `conv` of x, if it can stand in: see `suits_blocks`."""
    wide = min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
    return wide and pixels(x, scheme) >= MIN_PIXELS


def pixels(x: torch.Tensor, scheme: Scheme) -> int:
    """Of output, in all images."""
    return x.shape[0] * x.shape[2] * x.shape[3] * (scheme.outputs // scheme.step) ** 2


def convolve(
    x: torch.Tensor,
    conv: torch.nn.Conv2d,
    scheme: Scheme = CONVOLUTION,
    before: blocks.Affine | None = None,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `conv` makes of x (B, C, H, W), or of x upsampled to nearest x2, as a channels_last map.

    Args:
        before: normalise x so, and apply SiLU, first.
        plus: add this to the result.
    """
    batch, _, height, width = x.shape
    source = x.detach().permute(0, 2, 3, 1)  # (B, H, W, C)
    size, step = scheme.outputs, scheme.step
    output = blocks.new_map(x, batch, height * size // step, width * size // step, conv.out_channels)
    sums = None if plus is None else plus.detach().permute(0, 2, 3, 1)
    bias = x.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    rows, columns = block_of_tiles(-(-height // step), -(-width // step), BLOCK // scheme.points)

    def worker() -> Callable[[tuple[int, int, int]], None]:
        block = _Block(scheme, factors, bias, rows, columns)

        def work(job: tuple[int, int, int]) -> None:
            image, top, left = job
            affine = None if before is None else blocks.Affine(before.scale[image], before.shift[image])
            block.read(source[image], affine, top, left)
            block.multiply()
            block.write(output[image], None if sums is None else sums[image], top, left)

        return work

    # an edge block's tiles may stick out of the image: `read` pads them, `write` crops them
    corners = product(range(batch), range(0, height, rows * step), range(0, width, columns * step))
    with _factors(conv.weight.detach(), scheme) as factors:  # made anew in every call: never stale
        blocks.share_out(corners, worker)
    return output.permute(0, 3, 1, 2)


@contextmanager
def _factors(weight: torch.Tensor, scheme: Scheme) -> Iterator[torch.Tensor]:
    """The kernels (K, C, 3, 3), transformed: (points, C, K)."""
    outputs, channels = weight.shape[:2]
    with factors_buffer(weight, scheme.points * channels * outputs) as buffer:
        result = buffer.view(scheme.points, channels * outputs)
        taps = weight.permute(2, 3, 1, 0).reshape(9, -1)
        torch.mm(scheme.square("g", weight.dtype), taps, out=result)
        yield result.view(-1, channels, outputs)


@contextmanager
def factors_buffer(like: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Room for so many factors, for as long as the block is open."""
    kept = _all_in_use.acquire(blocking=False)  # else another thread computes, and we take a buffer anew
    try:
        yield _of_all.take("factors", like, size) if kept else blocks.new_map(like, size)
    finally:
        if kept:
            _all_in_use.release()


def block_of_tiles(height: int, width: int, most: int) -> tuple[int, int]:
    """Rows and columns of equal blocks of so many tiles, near squares but rather wide."""
    columns = _even_share(width, 2 * round(most**0.5))
    return _even_share(height, max(1, most // columns)), columns


def _even_share(size: int, most: int) -> int:
    blocks = -(-size // most)
    return -(-size // blocks)


class _Block:
    """One thread's buffers, and the convolution of one block after another in them."""

    def __init__(
        self, scheme: Scheme, factors: torch.Tensor, bias: torch.Tensor, rows: int, columns: int
    ) -> None:
        points, channels, outputs = factors.shape
        self.scheme, self.factors, self.bias, self.rows, self.columns = scheme, factors, bias, rows, columns
        self.a, self.b = scheme.square("a", factors.dtype), scheme.square("b", factors.dtype)
        reach, step, size = scheme.b.shape[1], scheme.step, scheme.outputs
        shape = (rows * step + reach - step, columns * step + reach - step, channels)
        self.inputs = _of_threads.take("inputs", factors, *shape)
        # two buffers serve in turn, for the less there is, the more of it stays in the cache
        tiles = rows * columns
        even, odd = _of_threads.take("turns", factors, 2, points * tiles * max(channels, outputs))
        self.patches = even[: reach**2 * tiles * channels].view(reach, reach, rows, columns, channels)
        self.values = odd[: points * tiles * channels].view(points, tiles, channels)
        self.products = even[: points * tiles * outputs].view(points, tiles, outputs)
        self.tiles = odd[: size**2 * tiles * outputs].view(size, size, rows, columns, outputs)

    def read(self, source: torch.Tensor, before: blocks.Affine | None, top: int, left: int) -> None:
        """Copy the overlapping patches of the block at (top, left) of (H, W, C), zeros outside of it."""
        top, left = top - 1, left - 1
        bottom, right = top + self.inputs.shape[0], left + self.inputs.shape[1]
        region = source[max(top, 0) : bottom, max(left, 0) : right]
        if before is not None or region.shape != self.inputs.shape:
            first, start = max(-top, 0), max(-left, 0)
            last, end = first + region.shape[0], start + region.shape[1]
            inside = self.inputs[first:last, start:end]
            if before is None:
                inside.copy_(region)
            else:
                torch.addcmul(before.shift, region, before.scale, out=inside)
                F.silu(inside, inplace=True)
            for outside in (
                self.inputs[:first],
                self.inputs[last:],
                self.inputs[:, :start],
                self.inputs[:, end:],
            ):
                outside.zero_()
            region = self.inputs
        reach, step = self.scheme.b.shape[1], self.scheme.step
        windows = region.unfold(0, reach, step).unfold(1, reach, step)  # (rows, columns, C, reach, reach)
        self.patches.copy_(windows.permute(3, 4, 0, 1, 2))

    def multiply(self) -> None:
        """From patches to tiles."""
        # (points, reach²) x (reach², tiles * C)
        torch.mm(self.b, self.patches.flatten(0, 1).flatten(1), out=self.values.flatten(1))
        # for each point (tiles, C) x (C, K): here is the work
        torch.bmm(self.values, self.factors, out=self.products)
        # (size², points) x (points, tiles * K)
        torch.mm(self.a, self.products.flatten(1), out=self.tiles.flatten(0, 1).flatten(1))

    def write(self, output: torch.Tensor, plus: torch.Tensor | None, top: int, left: int) -> None:
        """Add bias and `plus`, and put the tiles where they belong in (H, W, K), cropped at its edges."""
        size, step = self.scheme.outputs, self.scheme.step
        tiles = self.tiles.permute(2, 0, 3, 1, 4)  # (rows, size, columns, size, K)
        height, width = self.rows * size, self.columns * size
        top, left = top * size // step, left * size // step
        target = output[top : top + height, left : left + width]
        if target.shape[:2] == (height, width):
            torch.add(tiles, self.bias, out=target.unflatten(0, (-1, size)).unflatten(2, (-1, size)))
        else:
            whole = (tiles + self.bias).flatten(2, 3).flatten(0, 1)
            target.copy_(whole[: target.shape[0], : target.shape[1]])
        if plus is not None:
            target.add_(plus[top : top + height, left : left + width])
