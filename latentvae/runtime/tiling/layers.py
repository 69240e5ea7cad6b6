"""Layers of an `AutoencoderKL` that read only the part of their input that a box of their output needs.

Every layer is a map that may be read box by box: a box is computed from the boxes of its sources, which reach
a halo of a pixel or two further, by the model's own modules with their own zero padding. What a false border
has touched is cropped off; at true borders the halo ends as the map does, so that the padding is the right
one, or comes from the other side of the map where a convolution wraps around. Nothing but a `Stored` map
keeps what was computed: reading anything else twice computes it twice.
"""

import mmap
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from latentvae.base.errors import ModelError
from latentvae.runtime.forwards import conv_of, takes_norms
from latentvae.runtime.kernels import blocks, compiled
from latentvae.runtime.plain import takes_ours
from latentvae.runtime.seamless import wraps
from latentvae.runtime.tiling.maps import Box, OldEdges, Statistics, pieces, turns


class Map(ABC):
    """A map that is read box by box.

    Attributes:
        name: of the module in the encoder or decoder that makes it.
        statistics: the statistics of all of it, once they are known.
        sources: the maps that it is computed from.
        flops: what reading one of its pixels takes.
    """

    def __init__(self, name: str, channels: int, height: int, width: int, flops: float = 0.0) -> None:
        self.name, self.channels, self.height, self.width, self.flops = name, channels, height, width, flops
        self.statistics: Statistics | None = None

    sources: tuple["Map", ...] = ()

    @abstractmethod
    def read(self, box: Box) -> torch.Tensor:
        """The values in a box, (1, C, h, w)."""

    def around(self, box: Box) -> torch.Tensor:
        """The values in a box that may reach beyond the map, which begins anew there."""
        rows, columns = turns(box.top, box.bottom, self.height), turns(box.left, box.right, self.width)
        if len(rows) == len(columns) == 1:
            return self.read(Box(*rows[0], *columns[0]))
        strips = [torch.cat([self.read(Box(*row, *column)) for column in columns], 3) for row in rows]
        result = torch.cat(strips, 2)
        return result.contiguous(memory_format=_layout(strips[0]))

    def first_row(self, of: "Stored", row: int) -> int:
        """The first row of a stored map that reading this one needs, from `row` on downwards."""
        return min(source.first_row(of, self.above(row)) for source in self.sources)

    def above(self, row: int) -> int:
        """The first row of the sources that a row is computed from."""
        return row

    @abstractmethod
    def footprint(self, pixels: int) -> tuple[int, int]:
        """How many values lie in memory at the worst moment of reading a box of so many pixels, and after."""

    def stored(self) -> set["Stored"]:
        """The stored maps that this one is computed from."""
        return set().union(*(source.stored() for source in self.sources))


class Stored(Map):
    """A map that lies in a tensor.

    Args:
        tensor: (1, C, H, W); None while it is only planned.
        device: where its tiles are computed with.
        pages: the tensor's memory, row after row, if it can be given back by rows.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int],
        tensor: torch.Tensor | None = None,
        device: torch.device | None = None,
        pages: mmap.mmap | None = None,
    ) -> None:
        super().__init__(name, *shape)
        self.tensor, self.device, self.pages = tensor, device, pages
        self.freed, self.given_back = False, 0  # bytes of the first rows
        self.halo_kept = 0  # while it is overwritten: how much of the old is kept around the next tile
        self._edges: OldEdges | None = None

    def whole(self) -> torch.Tensor:
        """The tensor, (1, C, H, W)."""
        if self.tensor is None:
            raise RuntimeError(f"{self.name} was read before it was made, or after it was freed.")
        return self.tensor

    def read(self, box: Box) -> torch.Tensor:
        tile = self._edges.read(box) if self._edges is not None else box.of(self.whole())
        return tile.to(self.device)

    def write(self, box: Box, tile: torch.Tensor) -> None:
        """Write a tile; where its neighbours still want what was there, it is kept aside for them."""
        if self._edges is not None:
            self._edges.overwrite(box, tile)
        else:
            box.of(self.whole()).copy_(tile)

    def start_overwriting(self, halo: int) -> None:
        """From now on read the old values within `halo` pixels of the next tile, until `stop_overwriting`."""
        self.halo_kept = halo
        # without a halo nobody reads beyond the tile that is overwritten, and nothing is kept
        self._edges = OldEdges(self.tensor, halo) if halo and self.tensor is not None else None

    def start_row(self, first: Box) -> None:
        """Say that a row of tiles begins, with this box."""
        if self._edges is not None:
            self._edges.start_row(first)

    def stop_overwriting(self) -> None:
        """All tiles are written: read what they are from now on."""
        self.halo_kept, self._edges = 0, None

    def footprint(self, pixels: int) -> tuple[int, int]:
        # a box of a whole map is a view; old edges are put into a copy
        copied = self.channels * pixels if self.halo_kept else 0
        return copied, copied

    def stored(self) -> set["Stored"]:
        return {self}

    def first_row(self, of: "Stored", row: int) -> int:
        return max(row, 0) if of is self else of.height

    def give_back(self, rows: int) -> None:
        """Give back the memory of its first rows, as far as it can be: nobody will read them again."""
        if self.pages is None:
            return
        until = len(self.pages) // self.height * rows // mmap.PAGESIZE * mmap.PAGESIZE
        if until > self.given_back:
            self.pages.madvise(mmap.MADV_DONTNEED, self.given_back, until - self.given_back)
            self.given_back = until

    def free(self) -> None:
        """Give its memory back, unless someone else holds the tensor too."""
        self.tensor, self.pages, self.freed = None, None, True


class Norm:
    """GroupNorm with known statistics and the activation after it, in float32 at least and rounded once."""

    def __init__(self, norm: nn.GroupNorm, activation: nn.Module, statistics: Statistics | None) -> None:
        if statistics is None:
            raise RuntimeError("a norm was to be made of a map whose statistics nobody has measured.")
        self.norm, self.activation, self.statistics = norm, activation, statistics
        self._affine: tuple[torch.Tensor, torch.Tensor] | None = None

    def then(self, conv: nn.Conv2d, tile: torch.Tensor) -> torch.Tensor:
        """Norm, activation and a 3x3 convolution of a tile: in one go where the kernels compute all three."""
        if takes_norms(conv) and self._suits_kernels(tile):
            return conv(tile, before=self._affine_of_image())
        return conv(self(tile))

    def _suits_kernels(self, tile: torch.Tensor) -> bool:
        """Whether `optimize` has patched both, nobody would see that they are not called, and it can."""
        return takes_ours(self.norm, self.activation) and compiled.suits(self.norm, tile)

    def _affine_of_image(self) -> blocks.Affine:
        """What the norm does to each channel, float32 (1, C) each."""
        return blocks.Affine(*(value.float()[None] for value in self._scale_and_shift()))

    def __call__(self, tile: torch.Tensor) -> torch.Tensor:
        """Norm and activation of a tile."""
        # one pass over it; torch's operations below take four, and more in half precision
        if type(self.activation) is nn.SiLU and takes_ours(self.norm) and compiled.suits(self.norm, tile):
            return compiled.apply(tile, *self._affine_of_image(), silu=True)
        wide = torch.promote_types(tile.dtype, torch.float32)
        scale, shift = (value.to(wide).to(tile.device)[:, None, None] for value in self._scale_and_shift())
        result = torch.empty_like(tile, memory_format=_layout(tile))
        # addcmul writes straight into the result where that is wide enough; else each piece is rounded once
        for source, target in zip(pieces(tile), pieces(result), strict=True):
            value = torch.addcmul(shift, source.to(wide), scale, out=target if wide == tile.dtype else None)
            silu = isinstance(self.activation, nn.SiLU)
            value = F.silu(value, inplace=True) if silu else self.activation(value)
            if value is not target:
                target.copy_(value)
        return result

    def _scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._affine is None:
            # (C,) in float64, once for all tiles: x * scale + shift
            mean, variance = self.statistics.of_groups(self.norm.num_groups)
            scale = (variance + self.norm.eps).rsqrt()
            shift = -mean * scale
            weight, bias = (value.detach().to(mean.device).double() for value in _weight_and_bias(self.norm))
            self._affine = scale * weight, shift * weight + bias
        return self._affine


def _layout(tile: torch.Tensor) -> torch.memory_format:
    """The memory format of a tile that was cropped, so that torch's own question fails."""
    return torch.channels_last if tile.stride(1) == 1 else torch.contiguous_format


def _weight_and_bias(norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm's parameters, which the hooks of offloading have brought by now."""
    if norm.weight.device.type == "meta":
        raise ModelError("the model's weights are on the meta device. Load them before you encode or decode.")
    return norm.weight, norm.bias


class Conv(Map):
    """A 3x3 convolution of a map, after its norm and activation where there is one. Halo: 1 pixel."""

    def __init__(self, name: str, source: Map, conv: nn.Conv2d, norm: Norm | None = None) -> None:
        # nine taps, a product and a sum each
        flops = source.flops + 18 * conv.in_channels * conv.out_channels
        super().__init__(name, conv.out_channels, source.height, source.width, flops)
        self.source, self.conv, self.norm, self.sources = source, conv, norm, (source,)
        self.wraps = wraps(conv)

    def read(self, box: Box) -> torch.Tensor:
        outer = box.grown(1).within(self, self.wraps)
        return box.cropped(self.apply(self.source.around(outer)), outer)

    def above(self, row: int) -> int:
        return -self.height if self.wraps[0] else row - 1  # the last row may want what is above the first

    def apply(self, tile: torch.Tensor) -> torch.Tensor:
        """Norm, activation and convolution of a tile; the outermost pixels are right at true borders only."""
        return self.conv(tile) if self.norm is None else self.norm.then(self.conv, tile)

    def footprint(self, pixels: int) -> tuple[int, int]:
        # at worst: reading the source; source and normed; normed and result
        peak, read = self.source.footprint(pixels)
        normed, result = self.source.channels * pixels, self.channels * pixels
        return max(peak, read + normed, normed + result), result


class Residual(Map):
    """The end of a resnet: the second convolution of `hidden`, the first's output, added to the source.

    Halo: 1 pixel of `hidden`, so 2 of the source where `hidden` is computed from it on the way.
    """

    def __init__(self, name: str, block: Any, source: Map, hidden: Map) -> None:
        flops = 18 * block.conv2.in_channels * block.conv2.out_channels + hidden.flops
        if isinstance(hidden, Stored):
            flops += source.flops  # the source is read for the sum alone; else one reading serves both
        if block.conv_shortcut is not None:
            flops += 2 * block.conv_shortcut.in_channels * block.conv_shortcut.out_channels
        super().__init__(name, block.conv2.out_channels, source.height, source.width, flops)
        self.block, self.source, self.hidden, self.sources = block, source, hidden, (source, hidden)
        self.norm = Norm(block.norm2, block.nonlinearity, hidden.statistics)
        self.wraps = wraps(block.conv2)
        # beyond the map, the first convolution makes what comes around only where both wrap
        self.at_once = isinstance(hidden, Conv) and hidden.wraps == self.wraps

    def above(self, row: int) -> int:
        return -self.height if self.wraps[0] else row - 1  # of its hidden map, by which it reaches furthest

    def reaches(self, over: Map) -> int:
        """How far from a tile it reads a source, on the way to its first half or as that."""
        if over is self.hidden:
            return 1
        return 2 if isinstance(self.hidden, Conv) else 0

    def may_replace(self, over: Map) -> bool:
        """Whether it may be written over a source while that is read: of the same size, and not around it."""
        wraps = (*self.wraps, *(self.hidden.wraps if isinstance(self.hidden, Conv) else ()))
        return over.channels == self.channels and not (self.reaches(over) and any(wraps))

    def read(self, box: Box) -> torch.Tensor:
        block, inner = self.block, box.grown(1).within(self, self.wraps)
        source = None
        if isinstance(self.hidden, Conv) and self.at_once:  # one reading of the source serves both
            outer = inner.grown(1).within(self, self.wraps)
            tile = self.source.around(outer)
            source = box.cropped(tile, outer)
            hidden = inner.cropped(self.hidden.apply(tile), outer)
        else:
            hidden = self.hidden.around(inner)  # from the scratch: the source is read later, without a halo
        result = box.cropped(self.norm.then(block.conv2, hidden), inner)
        del hidden  # before the source is read, or three tiles would lie in memory
        if source is None:
            source = self.source.read(box)
        if block.conv_shortcut is not None:
            source = block.conv_shortcut(source)
        result += source.to(result.device)
        if block.output_scale_factor != 1:  # always 1 in AutoencoderKL
            result /= block.output_scale_factor
        return result

    def footprint(self, pixels: int) -> tuple[int, int]:
        result = self.channels * pixels
        middle = self.block.conv2.in_channels * pixels
        peak, source = self.source.footprint(pixels)
        conv = self.block.conv_shortcut
        shortcut = 0 if conv is None else (conv.in_channels + conv.out_channels) * pixels
        if isinstance(self.hidden, Conv):
            normed = self.source.channels * pixels
            steps = [peak, source + normed + middle, source + 2 * middle, source + middle + result]
        else:
            hidden_peak, hidden = self.hidden.footprint(pixels)
            steps = [hidden_peak, hidden + middle, middle + result, result + peak]
        return max(*steps, result + source + shortcut), result


class Up(Map):
    """Nearest-neighbour upsampling and its convolution. Halo: 1 pixel of the small map."""

    def __init__(self, name: str, source: Map, upsampler: Any) -> None:
        channels = upsampler.out_channels
        flops = source.flops / 4 + 18 * source.channels * channels
        super().__init__(name, channels, 2 * source.height, 2 * source.width, flops)
        self.source, self.upsampler, self.sources = source, upsampler, (source,)
        self.wraps = wraps(conv_of(upsampler))

    def above(self, row: int) -> int:
        return -self.height if self.wraps[0] else (row - 1) // 2

    def read(self, box: Box) -> torch.Tensor:
        # a 3x3 window reaches 1 px of the large map, which is a repeated pixel of the small one
        reach = Box((box.top - 1) // 2, (box.bottom + 2) // 2, (box.left - 1) // 2, (box.right + 2) // 2)
        inner = reach.within(self.source, self.wraps)
        return box.cropped(self.upsampler(self.source.around(inner)), Box(*(2 * edge for edge in inner)))

    def footprint(self, pixels: int) -> tuple[int, int]:
        peak, read = self.source.footprint(pixels // 4)
        # the upsampled tile beside the small one, then beside the result
        wide, result = self.source.channels * pixels, self.channels * pixels
        return max(peak, read + wide + wide // 4, wide + wide // 4 + result), result


class Down(Map):
    """A convolution of stride 2, one line of zeros below and to the right. Halo: 1 pixel on those sides."""

    def __init__(self, name: str, source: Map, downsampler: Any) -> None:
        channels = downsampler.out_channels
        # each of its pixels takes four of the source's
        flops = 4 * source.flops + 18 * source.channels * channels
        super().__init__(name, channels, source.height // 2, source.width // 2, flops)
        self.source, self.downsampler, self.sources = source, downsampler, (source,)

    def above(self, row: int) -> int:
        return 2 * row

    def read(self, box: Box) -> torch.Tensor:
        # row t of a stride of 2 sees rows 2t to 2t + 2; stock pads right and below only
        inner = Box(
            2 * box.top,
            min(2 * box.bottom + 1, self.source.height),
            2 * box.left,
            min(2 * box.right + 1, self.source.width),
        )
        return self.downsampler(self.source.read(inner))

    def footprint(self, pixels: int) -> tuple[int, int]:
        peak, read = self.source.footprint(4 * pixels)
        result = self.channels * pixels
        return max(peak, 2 * read + result), result  # twice: the tile, and its copy with the line of zeros
