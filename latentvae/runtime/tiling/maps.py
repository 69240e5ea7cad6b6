"""Maps: activations that are computed tile by tile and kept in memory or in files, and their statistics."""

import itertools
import math
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from latentvae.base.errors import LatentVAEError
from latentvae.runtime.kernels import compiled

# Elementwise work goes through a tile in pieces of this many values, which stay in a core's cache (2 MB of
# float32): 2 to 4 times faster on a CPU than tile by tile, and no temporary of a tile's size.
PIECE = 2**19

_NOTHING = torch.nn.Identity()


class Size(Protocol):
    """Anything with a height and a width."""

    height: int
    width: int


class Box(NamedTuple):
    """Rows top..bottom and columns left..right of a map, the ends not included."""

    top: int
    bottom: int
    left: int
    right: int

    def grown(self, halo: int) -> "Box":
        """This box and `halo` pixels around it."""
        return Box(self.top - halo, self.bottom + halo, self.left - halo, self.right + halo)

    def within(self, size: Size, wraps: tuple[bool, bool]) -> "Box":
        """This box as far as a map of that size goes, and beyond along the axes (y, x) that wrap around."""
        top, bottom = (-math.inf, math.inf) if wraps[0] else (0, size.height)
        left, right = (-math.inf, math.inf) if wraps[1] else (0, size.width)
        return Box(
            *(int(max(self.top, top)), int(min(self.bottom, bottom))),
            *(int(max(self.left, left)), int(min(self.right, right))),
        )

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of a whole map (1, C, H, W), as a view."""
        return tensor[:, :, self.top : self.bottom, self.left : self.right]

    def cropped(self, tile: torch.Tensor, outer: "Box") -> torch.Tensor:
        """This part of a tile that holds the box `outer`, as a view."""
        top, left = self.top - outer.top, self.left - outer.left
        return tile[:, :, top : top + self.bottom - self.top, left : left + self.right - self.left]


def turns(first: int, last: int, size: int) -> list[tuple[int, int]]:
    """first..last of an axis that begins anew after `size`, as spans within it."""
    spans = []
    while first < last:
        start = first % size
        spans.append((start, min(start + last - first, size)))
        first += spans[-1][1] - start
    return spans


def rows_of_boxes(size: Size, side: int) -> list[list[Box]]:
    """Cut a map into tiles of at most `side` pixels a side, as equal as they can be, row by row."""

    # equal, because a thin last tile would be nearly all halo
    def cuts(length: int) -> list[tuple[int, int]]:
        count = -(-length // side)
        ends = [length * number // count for number in range(count + 1)]
        return list(itertools.pairwise(ends))

    return [
        [Box(top, bottom, left, right) for left, right in cuts(size.width)]
        for top, bottom in cuts(size.height)
    ]


def pieces(tile: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows of a tile that fit into a CPU's cache; other devices have the whole tile at once."""
    if tile.device.type != "cpu":
        return iter((tile,))
    return iter(tile.split(max(PIECE // max(tile.shape[1] * tile.shape[3], 1), 1), dim=2))


class Statistics:
    """Mean and variance of every channel, from all tiles added so far, merged in float64.

    Chan, Golub & LeVeque 1979. Within a tile, sums are taken about a mean that is known already, so that
    float32 sums of squares lose nothing to a large mean.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.m2 = torch.zeros(0)  # (C,) each; m2 is the sum of squared deviations

    def add(self, tile: torch.Tensor, by_kernels: bool = False) -> None:
        """Take in a tile (1, C, h, w); with our kernels, if so wanted and they can."""
        if by_kernels and compiled.suits(_NOTHING, tile):
            self._merge(*_of_blocks(compiled.statistics_of(tile)))
            return
        wide = torch.promote_types(tile.dtype, torch.float32)
        pivot = self.mean.to(tile.device, wide) if self.count else tile[:, :, :1].to(wide).mean((0, 2, 3))
        # sums of (x - pivot) and of its square: float32 in a piece, float64 over the pieces
        first = second = torch.zeros((), dtype=torch.float64)
        for piece in pieces(tile):
            deviation = piece.to(wide) - pivot[:, None, None]
            first = first + _double(deviation.sum((0, 2, 3)))
            second = second + _double(deviation.square_().sum((0, 2, 3)))
        count = tile.shape[2] * tile.shape[3]
        # the square of the mean deviation comes off: the pivot is near the mean, not equal to it
        self._merge(count, _double(pivot) + first / count, second - first * first / count)

    def _merge(self, count: int, mean: torch.Tensor, m2: torch.Tensor) -> None:
        if not self.count:
            self.count, self.mean, self.m2 = count, mean, m2
            return
        total = self.count + count
        delta = mean - self.mean
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def of_groups(self, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of each group of channels, (C,) each: every channel has its group's."""
        means = self.mean.view(groups, -1)
        mean = means.mean(1, keepdim=True)
        # of a group: the variance within its channels plus that between their means
        m2 = self.m2.view(groups, -1).mean(1, keepdim=True) / self.count
        variance = m2 + (means - mean).square().mean(1, keepdim=True)
        return mean.expand_as(means).flatten(), variance.expand_as(means).flatten()

    def are_finite(self) -> bool:
        """Whether no NaN and no infinity was among all values."""
        return bool(torch.isfinite(self.mean + self.m2).all())


def _of_blocks(measured: compiled.Statistics) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Pixels, means and sums of squared deviations, (C,) each, of a tile whose blocks were measured."""
    counts, pixels = measured.counts[:, None], int(measured.counts.sum())
    mean = (counts * measured.means[0]).sum(0) / pixels
    return pixels, mean, (counts * (measured.variances[0] + (measured.means[0] - mean).square())).sum(0)


def _double(sums: torch.Tensor) -> torch.Tensor:
    return (sums.cpu() if sums.device.type == "mps" else sums).double()  # MPS has no float64


class Scratch:
    """Where maps lie between stages: in the memory of a device, or in mapped files of a scratch folder.

    The files have no name (or lose it as soon as they are open, where the system can do that), so that
    nothing is left of them however the process ends.

    Args:
        place: a device, or an existing folder.
        dtype: of all maps.
        layout: memory format of all maps.
    """

    def __init__(
        self,
        place: torch.device | Path,
        dtype: torch.dtype,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        self.place, self.dtype, self.layout = place, dtype, layout

    def empty(self, channels: int, height: int, width: int) -> tuple[torch.Tensor, mmap.mmap | None]:
        """Room for a map, (1, C, H, W), whatever it holds; and the pages whose rows may be given back."""
        count, pages = channels * height * width, None
        if isinstance(self.place, Path):
            memory = _map_file(self.place, count * self.dtype.itemsize)
            flat = torch.frombuffer(memory, dtype=self.dtype, count=count)
        elif gives_back(self.place) and self.layout == torch.channels_last:
            pages = mmap.mmap(-1, count * self.dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            flat = torch.frombuffer(pages, dtype=self.dtype, count=count)
        else:
            flat = torch.empty(count, dtype=self.dtype, device=self.place)
        if self.layout == torch.channels_last:  # (H, W, C) in memory, (C, H, W) to look at
            return flat.view(1, height, width, channels).permute(0, 3, 1, 2), pages
        return flat.view(1, channels, height, width), pages

    def check_room(self, wanted: int) -> None:
        """Refuse before anything is computed where the maps would not fit into the folder.

        Raises:
            LatentVAEError: with what is wanted and what there is.
        """
        if not isinstance(self.place, Path):
            return
        check_scratch_folder(self.place)  # again: it may have gone since tiling was switched on
        free = shutil.disk_usage(self.place).free
        if free < wanted:
            raise LatentVAEError(
                f"the scratch folder {self.place} has {free / 1e9:.2f} GB of free room; "
                f"{wanted / 1e9:.2f} GB are wanted. Free some, name a folder on another disk, or keep it in "
                "memory (scratch=None)."
            )


def gives_back(place: torch.device | Path) -> bool:
    """Whether memory there takes room row by row, as it is written, and can be given back so too."""
    return isinstance(place, torch.device) and place.type == "cpu" and sys.platform == "linux"


def check_scratch_folder(folder: Path) -> None:
    """Refuse a folder that is not there, or that cannot be written to.

    Raises:
        LatentVAEError: with the reason.
    """
    if not folder.is_dir():
        raise LatentVAEError(f"the scratch folder {folder} does not exist; wanted a folder. Create it first.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        raise LatentVAEError(
            f"the scratch folder {folder} cannot be written to ({reason}). Name another folder."
        ) from error


def _map_file(folder: Path, size: int) -> mmap.mmap:
    """Memory that a nameless file of that size in the folder backs."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so here, not by SIGBUS later
            else:
                os.truncate(file.fileno(), size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise LatentVAEError(
            f"no file of {size / 1e9:.2f} GB could be made in the scratch folder {folder} "
            f"({error.strerror or error}). Free some room, or name another folder."
        ) from error


class OldEdges:
    """What a map was at the edges of the tiles that have been overwritten: their neighbours' halo.

    Tiles are overwritten row by row, from left to right.

    Args:
        tensor: the map (1, C, H, W).
        halo: how many pixels beyond a tile its neighbour may still want of it.
    """

    def __init__(self, tensor: torch.Tensor, halo: int) -> None:
        self.tensor, self.halo = tensor, halo
        self.above = self.below = self.left = tensor[:, :, :0]
        self.row = Box(0, 0, 0, 0)

    def overwrite(self, box: Box, tile: torch.Tensor) -> None:
        """Write a tile, having kept what the tiles to its right and below will want."""
        # to the right they want these columns; what is below was kept by start_row
        left = Box(box.top, box.bottom, max(box.right - self.halo, 0), box.right).of(self.tensor).clone()
        box.of(self.tensor).copy_(tile)
        self.left, self.row = left, box

    def start_row(self, box: Box) -> None:
        """Keep the last lines of the row of tiles that begins with this box."""
        self.above = self.below  # the last lines of the row before: as they were before that was overwritten
        self.below = self.tensor[:, :, max(box.bottom - self.halo, 0) : box.bottom].clone()
        self.left, self.row = self.tensor[:, :, :0], Box(box.top, box.bottom, 0, 0)

    def read(self, box: Box) -> torch.Tensor:
        """A copy of a box around the tile that is next, as it was before anything was overwritten."""
        tile = box.of(self.tensor).clone()
        lines = max(self.row.top - box.top, 0)
        if lines:
            start = self.above.shape[2] - lines
            tile[:, :, :lines] = self.above[:, :, start:, box.left : box.right]
        columns = max(self.row.right - box.left, 0)
        if columns:
            until = lines + self.left.shape[2]
            tile[:, :, lines:until, :columns] = self.left[:, :, :, self.left.shape[3] - columns :]
        return tile
