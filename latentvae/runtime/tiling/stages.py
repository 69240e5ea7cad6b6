"""The encoder and the decoder as stages that stream tiles, what each takes, what to keep between them."""

import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from latentvae.base.errors import LatentVAEError
from latentvae.runtime.tiling.layers import Conv, Down, Map, Norm, Residual, Stored, Up
from latentvae.runtime.tiling.maps import Box, Scratch, Statistics, rows_of_boxes

# A tile may take the memory of this many maps of the first level's width and tile_size x tile_size pixels.
MAPS_PER_TILE = 3
# Stock attention holds this many maps at its worst moment: its input, norm, queries, keys, values, results.
MAPS_OF_ATTENTION = 8
# Where nothing fits, the peak may be this much above the lowest: two plans a percent apart can differ by half
# of the computation.
ABOVE_LOWEST = 1.05


@dataclass(frozen=True)
class Stage:
    """One pass over all tiles of a map.

    Attributes:
        name: the module that ends it; "statistics of" where nothing is kept but those.
        tiles: how many.
        side: their largest side in pixels of the map.
        flops: what all of them take.
        store_bytes: the most that lies in the scratch meanwhile.
        tile_bytes: what a tile takes at its worst moment.
    """

    name: str
    tiles: int
    side: int
    flops: float
    store_bytes: int
    tile_bytes: int


class Walk:
    """Goes through the stages of a model and notes what each takes. `TiledRun` computes them as well.

    Args:
        itemsize: bytes of a value.
        tile_size: largest side of a tile, in pixels of the map that it is a tile of.
        width: channels of the model's first level.
        kept: names of the maps to store though they could be computed again.
        gives_back: whether the scratch takes and gives back room row by row.
    """

    def __init__(
        self, itemsize: int, tile_size: int, width: int, kept: frozenset[str], gives_back: bool
    ) -> None:
        self.itemsize, self.tile_size, self.kept, self.gives_back = itemsize, tile_size, kept, gives_back
        self.tile_values = MAPS_PER_TILE * width * tile_size**2
        self.stages: list[Stage] = []
        self.stored: list[Stored] = []
        self.skipped: dict[str, float] = {}  # maps that could be kept: the computation that this would save
        self.result_bytes = 0

    @property
    def store_bytes(self) -> int:
        """The most that lies in the scratch at any time."""
        return max(stage.store_bytes for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """The most that the scratch and a tile take together, beside the result."""
        return max(stage.store_bytes + stage.tile_bytes for stage in self.stages) + self.result_bytes

    @property
    def tile_bytes(self) -> int:
        """The most that a tile takes, beside the scratch, and the result."""
        return max(stage.tile_bytes for stage in self.stages) + self.result_bytes

    def keeps(self, node: Map) -> bool:
        """Whether to store a map that could be computed again from its sources."""
        if node.name not in self.kept:
            self.skipped[node.name] = node.flops * node.height * node.width
        return node.name in self.kept

    def store(self, node: Map, over: Stored | None = None, halo: int = 0, *, frees: bool = False) -> Stored:
        """Compute a map and keep it, and measure it.

        Args:
            over: a stored map of the same size that may be overwritten, and is from then on this map.
            halo: how far a tile of `node` reaches in `over`.
            frees: nobody reads the maps that it is computed from afterwards.
        """
        target = over if over is not None else self._new(node)
        if over is None:
            self.stored.append(target)
        elif over not in self.stored:  # the result, which is the caller's
            self.result_bytes = node.channels * node.height * node.width * self.itemsize
        target.start_overwriting(halo)
        done = node.stored() - {target} if frees else set()
        self._stage(node, target, done)
        for source in done:
            source.free()
        target.stop_overwriting()
        target.name = node.name
        return target

    def measure(self, node: Map) -> None:
        """Compute a map for its statistics only."""
        self._stage(node, None)

    def attend(self, name: str, attention: torch.nn.Module, source: Stored) -> None:
        """Replace a map by its attention, all of it at once: every pixel depends on every other."""
        pixels, channels = source.height * source.width, source.channels
        # queries with keys and weights with values; then the four projections
        flops = 4.0 * pixels**2 * channels + 8.0 * pixels * channels**2
        side, values = max(source.height, source.width), MAPS_OF_ATTENTION * channels * pixels
        self._note(name, 1, side, flops, values, self._values_stored())

    def _new(self, node: Map) -> Stored:
        return Stored(node.name, (node.channels, node.height, node.width))

    def _side(self, node: Map) -> int:
        # of a pixel; asked for 64, because layers that resample count in quarters
        values = node.footprint(64)[0] / 64
        largest = self.tile_size // 2 if isinstance(node, Down) else self.tile_size  # it reads twice its size
        return max(min(largest, math.isqrt(int(self.tile_values / values))), 4)

    def _stage(self, node: Map, target: Stored | None, done: Set[Stored] = frozenset()) -> None:
        boxes = rows_of_boxes(node, self._side(node))
        side = max(max(box.bottom - box.top, box.right - box.left) for row in boxes for box in row)
        name = node.name if target is not None else f"statistics of {node.name}"
        # a resnet reaches 2 px beyond a tile on each side
        with_halo = min(side + 4, node.height) * min(side + 4, node.width)
        tiles, flops = sum(map(len, boxes)), node.flops * node.height * node.width
        stored = self._values_stored() - self._values_spared(node, target, done, boxes)
        self._note(name, tiles, side, flops, node.footprint(with_halo)[0], stored)
        statistics = self._compute(node, target, done, boxes)
        (node if target is None else target).statistics = statistics

    def _compute(
        self, node: Map, target: Stored | None, done: Set[Stored], boxes: list[list[Box]]
    ) -> Statistics:
        return Statistics()

    def _values_stored(self) -> int:
        self.stored = [one for one in self.stored if not one.freed]
        return sum(_values(one, one.height) for one in self.stored)

    def _values_spared(
        self, node: Map, target: Stored | None, done: Set[Stored], boxes: list[list[Box]]
    ) -> int:
        """How many of these are never there at once: rows not written yet, and rows given back by then."""
        ours = [one for one in done if one in self.stored]
        if not (ours and self.gives_back):
            return 0
        # what is written over another map lies there already, and a result elsewhere
        new = {target} if target in self.stored and target.statistics is None else set()
        return min(
            sum(_values(one, node.first_row(one, first.top)) for one in ours)
            + sum(_values(one, one.height - first.bottom) for one in new)
            for first, *_ in boxes
        )

    def _note(self, name: str, tiles: int, side: int, flops: float, values: int, stored: int) -> None:
        sizes = stored * self.itemsize, values * self.itemsize
        self.stages.append(Stage(name, tiles, side, flops, *sizes))


def _values(stored: Stored, rows: int) -> int:
    return stored.channels * stored.width * rows


class TiledRun(Walk):
    """Computes the stages.

    Args:
        plan: a walk that was planned, with the same `kept`.
        scratch: where maps lie between stages.
        device: where tiles are computed.
        result: the whole result, (1, C, H, W); the last stage writes into it.
        bar: moved on by the TFLOP of every tile.
        by_kernels: measure with the kernels that `optimize` brings.
    """

    def __init__(
        self, plan: Walk, scratch: Scratch, device: torch.device, bar: "tqdm[Any]", by_kernels: bool = False
    ) -> None:
        super().__init__(plan.itemsize, plan.tile_size, 1, plan.kept, plan.gives_back)
        self.tile_values = plan.tile_values  # so tiles are cut as planned, whatever that width was
        self.scratch, self.device, self.bar, self.by_kernels = scratch, device, bar, by_kernels

    def attend(self, name: str, attention: torch.nn.Module, source: Stored) -> None:
        super().attend(name, attention, source)
        tensor = source.whole()  # (1, C, h, w); the result replaces it
        # a copy, because hooks and processors may keep what they are given
        tensor.copy_(attention(tensor.to(self.device, copy=True), temb=None))
        source.statistics = Statistics()
        source.statistics.add(tensor, self.by_kernels)
        self._finish(name, source.statistics)
        self.bar.update(self.stages[-1].flops / 1e12)

    def _new(self, node: Map) -> Stored:
        shape = node.channels, node.height, node.width
        tensor, pages = self.scratch.empty(*shape)
        return Stored(node.name, shape, tensor, self.device, pages)

    def _compute(
        self, node: Map, target: Stored | None, done: Set[Stored], boxes: list[list[Box]]
    ) -> Statistics:
        statistics, step = Statistics(), self.stages[-1].flops / self.stages[-1].tiles / 1e12
        for row in boxes:
            for source in done:
                source.give_back(node.first_row(source, row[0].top))
            if target is not None:
                target.start_row(row[0])
            for box in row:
                tile = node.read(box)
                statistics.add(tile, self.by_kernels)
                if target is not None:
                    target.write(box, tile)
                del tile  # or it would lie in memory beside the next
                self.bar.update(step)
        self._finish(node.name, statistics)
        return statistics

    def _finish(self, name: str, statistics: Statistics) -> None:
        if statistics.are_finite():
            return
        raise LatentVAEError(
            f"the activations became NaN or infinite in {name}, computed in {self.scratch.dtype}. "
            "Use bfloat16 or float32 in place of float16; if it is float32 already, the weights are at fault."
        )


def decoder_stages(walk: Walk, decoder: Any, latents: Stored, result: Stored | None = None) -> None:
    """The stages of a decoder, from latents (after post_quant_conv) to images."""
    # kept: at latent size a map is the smallest there is, and attention needs it whole
    x: Map = walk.store(Conv("conv_in", latents, decoder.conv_in))
    x = _middle(walk, decoder.mid_block, x)
    for number, block in enumerate(decoder.up_blocks):
        for index, resnet in enumerate(block.resnets):
            x = _finished(walk, _resnet(walk, f"up_blocks.{number}.resnets.{index}", resnet, x))
        if block.upsamplers:  # four times the pixels: kept only where memory allows
            x = _kept(walk, Up(f"up_blocks.{number}.upsamplers.0", x, block.upsamplers[0]))
    _output(walk, decoder, x, result)


def encoder_stages(walk: Walk, encoder: Any, images: Stored, result: Stored | None = None) -> None:
    """The stages of an encoder, from images to moments (before quant_conv)."""
    x: Map = _kept(walk, Conv("conv_in", images, encoder.conv_in))
    for number, block in enumerate(encoder.down_blocks):
        last = len(block.resnets) - 1 if block.downsamplers else -1
        for index, resnet in enumerate(block.resnets):
            y = _resnet(walk, f"down_blocks.{number}.resnets.{index}", resnet, x)
            if index == last:  # its result is never stored at this size
                down = Down(f"down_blocks.{number}.downsamplers.0", y, block.downsamplers[0])
                x = walk.store(down, frees=True)
            else:
                x = _finished(walk, y)
    x = _middle(walk, encoder.mid_block, x)
    _output(walk, encoder, x, result)


def _middle(walk: Walk, block: Any, x: Map) -> Stored:
    attentions = [None, *block.attentions]  # a resnet, then attention and a resnet, as stock has them
    for index, (attention, resnet) in enumerate(zip(attentions, block.resnets, strict=True)):
        if attention is not None:
            assert isinstance(x, Stored)
            walk.attend(f"mid_block.attentions.{index - 1}", attention, x)
        x = _finished(walk, _resnet(walk, f"mid_block.resnets.{index}", resnet, x))
    assert isinstance(x, Stored)
    return x


def _resnet(walk: Walk, name: str, block: Any, x: Map) -> Residual:
    """The first half of a resnet is measured, and kept or computed again; the second half is to be read."""
    if x.statistics is None:  # a map that was not kept: read once more, for its norm
        walk.measure(x)
    hidden: Map = Conv(f"{name}.conv1", x, block.conv1, Norm(block.norm1, block.nonlinearity, x.statistics))
    if walk.keeps(hidden):
        hidden = walk.store(hidden)
    else:
        walk.measure(hidden)
    return Residual(name, block, x, hidden)


def _finished(walk: Walk, y: Residual) -> Stored:
    """Store a resnet's result, in place of its source or else of its first half where one has its size."""
    for over in y.sources:
        if isinstance(over, Stored) and y.may_replace(over):
            return walk.store(y, over, y.reaches(over), frees=True)
    return walk.store(y, frees=True)


def _kept(walk: Walk, x: Map) -> Map:
    """Store a map and give back its sources, or leave it to be computed whenever it is read."""
    return walk.store(x, frees=True) if walk.keeps(x) else x


def _output(walk: Walk, model: Any, x: Map, result: Stored | None) -> None:
    assert x.statistics is not None
    norm = Norm(model.conv_norm_out, model.conv_act, x.statistics)
    out = Conv("conv_out", x, model.conv_out, norm)
    walk.store(out, result if result is not None else Stored("result", (1, 1, 1)), frees=True)


def choose(walk: Callable[[frozenset[str]], Walk], memory: float) -> Walk:
    """The walk that computes least again within `memory` bytes or, if none fits, at the lowest peak there is.

    Maps are kept in the order of the computation that it saves, as long as the peak allows.

    Args:
        walk: plans all stages, given the names of the maps to keep.
        memory: what the scratch and a tile may take together.
    """
    best = walk(frozenset())  # computes most again: the lowest peak there is
    limit = max(memory, best.peak_bytes * ABOVE_LOWEST)
    for name in sorted(best.skipped, key=lambda name: -best.skipped[name]):
        trial = walk(best.kept | {name})
        if trial.peak_bytes <= limit:
            best = trial
    return best
