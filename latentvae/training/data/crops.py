"""Training images: an endless, seekable sequence of crops in which item k is the same in every run."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePath
from threading import Thread

import numpy as np
import torch
from torch.utils.data import Dataset

from latentvae.base.addresses import is_below
from latentvae.base.errors import ConfigError, ImageError, LatentVAEError
from latentvae.images.listing import Listing, scan
from latentvae.images.resizing import Geometry, Size, buckets, resize_short_side
from latentvae.images.sources import ImageSource, open_source, root
from latentvae.images.tars import TarSource
from latentvae.images.tensors import as_floats, to_uint8
from latentvae.training.config import DataConfig
from latentvae.training.data import sources
from latentvae.training.data.listing import LISTED, ROUNDS, shuffled
from latentvae.training.data.memory import Decoded, ImageMemory, decode_all, fits_in_memory
from latentvae.training.data.teacher_cache import TeacherCache, TeacherCrop

logger = logging.getLogger(__name__)

# uint8 or float32 (C, H, W), position, skipped; and what a teacher made of the crop, where it is kept
Item = tuple[torch.Tensor, int, list[str]] | tuple[torch.Tensor, int, list[str], TeacherCrop]


class CropSequence(Dataset[Item]):
    """Item k of an endless sequence: a random crop of image `order(k // N)[k % N]`, drawn from (seed, k).

    Nothing is remembered between items, so any process can make any item and a run resumes at any position.
    An image that cannot be used is replaced by the next one in the same epoch's order, and reported.

    Args:
        source: of the images.
        config: crop, resize and flip.
        channels: of the model; 3 or 1.
        seed: of the run.
        ratio: the model's compression, which divides the sides of crops.
        step_images: of one optimizer step over all processes; they share a shape.

    Attributes:
        shapes: widths and heights that crops have.
        cache: of a teacher, cut as the images are, if one is set; crops then begin at multiples of its ratio.
    """

    def __init__(
        self,
        source: ImageSource,
        config: DataConfig,
        channels: int,
        seed: int,
        ratio: int = 1,
        step_images: int = 1,
    ) -> None:
        self.shapes = crop_shapes(config, ratio)
        self.step_images = step_images
        self.cache: TeacherCache | None = None
        self.source = sources.with_whole_shards(source) if config.shuffle_shards else source
        self.config = config
        self.channels = channels
        self.seed = seed
        self.packed = sources.packed(self.source) if config.shuffle_shards else None
        self.orders: dict[int, ShardOrder] = {}
        self.memory: ImageMemory | None = None
        if config.in_memory and fits_in_memory(len(source), self.decode):
            self.memory = decode_all(len(source), self.decode)
            if len(self.memory.reasons) == len(source):
                first = f"{source.name(0)}: {self.memory[0]}"
                raise ImageError(f"none of the {len(source)} training images can be used; {first}")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Item:
        count = len(self.source)
        epoch, offset = divmod(position, count)  # epochs follow one another without a gap, also in a batch
        order = self.order(epoch, offset)
        skipped: list[str] = []
        for attempt in range(count):
            index = order[(offset + attempt) % count]
            image = self.image(index)
            if isinstance(image, torch.Tensor):
                crop, teacher = self._crop(image, index, position)
                found = (crop, position, skipped)
                return found if teacher is None else (*found, teacher)
            skipped.append(image)
        raise ImageError(f"none of the {count} training images can be used; the first: {skipped[0]}")

    def order(self, epoch: int, offset: int) -> "EpochOrder | ShardOrder":
        """The order of an epoch; where that is by shards, those of the next turn are fetched meanwhile."""
        if self.packed is None or self.config.shuffle_shards is None:
            return EpochOrder(self.seed, epoch, len(self.source))
        shards, numbers = self.packed
        if epoch not in self.orders:  # the epoch being read, and the one before while a batch spans both
            self.orders = {number: order for number, order in self.orders.items() if number == epoch - 1}
            self.orders[epoch] = ShardOrder(self.seed, epoch, numbers, self.config.shuffle_shards)
        order = self.orders[epoch]
        turn = order.turn(offset)
        if turn > order.fetched and self.memory is None:
            order.fetched = turn
            following = order.shards(turn + 1)
            Thread(target=_fetch, args=(shards, following), name="fetch shards", daemon=True).start()
        return order

    def __getitems__(self, positions: list[int]) -> list[Item] | LatentVAEError:
        """What a DataLoader collates: the items, or the error to raise in the main process."""
        try:
            return [self[position] for position in positions]
        except LatentVAEError as error:
            return error

    def image(self, index: int) -> Decoded:
        """One image as `decode` gives it, from memory where all are there."""
        return self.memory[index] if self.memory is not None else self.decode(index)

    def decode(self, index: int) -> Decoded:
        """One image (C, H, W), at least as large as a crop; or why which one cannot be used.

        As uint8, which is what photographs are; with a range float32, as 8 bits would cut a scan's depth.
        """
        try:
            image = self.source.load(index, self.channels)
        except ImageError as error:
            return str(error)
        if self.config.short_side is not None:
            image = resize_short_side(image, self.config.short_side)
        height, width = image.shape[-2:]
        least = max(map(max, self.shapes))  # whichever shape its step has
        if min(height, width) < least:
            crops = f"data.crop={self.config.crop}"
            crops += (
                f" with data.max_aspect={self.config.max_aspect:g} ({least} px)" if self.shapes[1:] else ""
            )
            return f"{self.source.name(index)} of {width}x{height} px is smaller than {crops}"
        return to_uint8(image) if self.config.range is None else image

    def _crop(
        self, image: torch.Tensor, index: int, position: int
    ) -> tuple[torch.Tensor, TeacherCrop | None]:
        random = np.random.default_rng((self.seed, position))  # no state: any process draws the same crop
        size, step = self.shape(position), self.cache.ratio if self.cache is not None else 1
        width, height = size  # of what is cut out
        if self.config.zoom is not None:
            short, (least, most) = min(image.shape[-2:]), np.log(self.config.zoom)
            larger = short * float(np.exp(random.uniform(least, most))) / min(size)
            larger = min(larger, image.shape[-1] / width, image.shape[-2] / height)
            width, height = max(width, round(width * larger)), max(height, round(height * larger))
        top = step * int(random.integers((image.shape[-2] - height) // step + 1))
        left = step * int(random.integers((image.shape[-1] - width) // step + 1))
        crop = image[:, top : top + height, left : left + width]
        if (width, height) != size:
            scaled = Geometry(size).apply(as_floats(crop))
            crop = to_uint8(scaled) if crop.dtype == torch.uint8 else scaled
        if self.config.horizontal_flip and random.random() < 0.5:
            crop = crop.flip(-1)
        teacher = None if self.cache is None else self.cache.crop(index, top, left, width)
        return crop.contiguous(), teacher

    def shape(self, position: int) -> Size:
        """Width and height of the crop at a position; the same for all of a step."""
        if len(self.shapes) == 1:
            return self.shapes[0]
        random = np.random.default_rng((self.seed, position // self.step_images, len(self.shapes)))
        return self.shapes[int(random.integers(len(self.shapes)))]


def crop_shapes(config: DataConfig, ratio: int) -> list[Size]:
    """Widths and heights of crops: the square of data.crop, and others about as large to data.max_aspect.

    Raises:
        ConfigError: data.max_aspect is above 1, and allows no other.
    """
    square = (config.crop, config.crop)
    if config.max_aspect == 1:
        return [square]
    others = {each: max(each) / min(each) for each in buckets(config.crop, ratio) if min(each) < max(each)}
    found = [each for each, aspect in others.items() if aspect <= config.max_aspect]
    if not found:
        remedy = f"use {math.ceil(100 * min(others.values())) / 100:g} or more, or " if others else ""
        raise ConfigError(
            f"data.max_aspect={config.max_aspect:g} allows no shape but the square of data.crop="
            f"{config.crop}, as sides are multiples of {ratio} px; {remedy}{'' if others else 'use '}"
            "larger crops, or leave it out"
        )
    return [square, *found]


class EpochOrder:
    """The order in which one epoch visits `count` images; every image once."""

    def __init__(self, seed: int, epoch: int, count: int) -> None:
        self.drawn = (seed, epoch, count)

    def __getitem__(self, place: int) -> int:
        count = self.drawn[-1]
        return (
            int(_whole_order(*self.drawn)[place]) if count <= LISTED else shuffled(place, count, self._keys)
        )

    @property
    def _keys(self) -> tuple[int, ...]:
        return _round_keys(*self.drawn)


class ShardOrder:
    """The order in which one epoch visits images in shards: some shards at a time, each in one turn.

    Args:
        seed: of the run.
        epoch: its number.
        numbers: (N,), ascending: each image's shard.
        at_once: shards of a turn, whose images are shuffled together.

    Attributes:
        fetched: the last turn whose successor was asked for.
    """

    def __init__(self, seed: int, epoch: int, numbers: np.ndarray, at_once: int) -> None:
        self.names, firsts, counts = np.unique(numbers, return_index=True, return_counts=True)
        self.drawn, self.firsts, self.counts = (seed, epoch, len(numbers)), firsts, counts
        order = np.random.default_rng(self.drawn).permutation(len(counts))
        self.turns = [order[start : start + at_once] for start in range(0, len(order), at_once)]
        self.ends = np.cumsum([counts[turn].sum() for turn in self.turns])
        self.fetched = -1
        self._shuffled: tuple[int, np.ndarray] | None = None

    def turn(self, place: int) -> int:
        """The number of the turn that a place belongs to."""
        return int(np.searchsorted(self.ends, place, side="right"))

    def shards(self, turn: int) -> list[int]:
        """The shards of a turn; none after the last."""
        return self.names[self.turns[turn]].tolist() if turn < len(self.turns) else []

    def __getitem__(self, place: int) -> int:
        turn = self.turn(place)
        if self._shuffled is None or self._shuffled[0] != turn:
            images = [np.arange(self.counts[shard]) + self.firsts[shard] for shard in self.turns[turn]]
            random = np.random.default_rng((*self.drawn, turn))
            self._shuffled = turn, random.permutation(np.concatenate(images))
        return int(self._shuffled[1][place - self.ends[turn]])  # counted from the turn's end


def _fetch(shards: TarSource, numbers: list[int]) -> None:
    with suppress(LatentVAEError):  # whoever reads an image meets it too, and says so
        shards.fetch(numbers)


@lru_cache(maxsize=2)  # the epoch being read, and the next while a batch spans both
def _whole_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, count)).permutation(count)


@lru_cache(maxsize=2)  # likewise
def _round_keys(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng((seed, epoch, count)).integers(0, 2**63, ROUNDS).tolist())


def split_sources(
    config: DataConfig, scan: Callable[[Path], Listing] = scan
) -> tuple[ImageSource, ImageSource]:
    """Training and validation images, none in both; without `data.val`, some are held out evenly.

    Args:
        config: data.
        scan: how a folder is listed: `scan_together` where there are several processes.

    Raises:
        ConfigError: no training data given, too few images to hold any out, shards wanted where there are
            none, or what `open_source` raises.
        ImageError: data that is missing or damaged, or holds no image.
    """
    if config.train is None:
        raise ConfigError(
            "data.train is not set: which images? Add `--set data.train=FOLDER`, or set it in the config."
        )
    train = sources.with_range(open_source(config.train, config.column, scan), config, "data.train")
    if config.shuffle_shards and not isinstance(train, TarSource):
        raise ConfigError(
            f"data.shuffle_shards is of .tar shards, and data.train is a {type(train).__name__}: leave it out"
        )
    if config.val is None:
        if len(train) < 2:
            raise ConfigError(
                f"{config.train} holds one image, none is left for validation. Add images, or set data.val."
            )
        return sources.hold_out(train, config.val_images)
    # one range for both: measured, it is that of the training images
    val = sources.with_range(open_source(config.val, config.column, scan), config, "data.val")
    held_out = sources.Selection(val, sources.evenly(len(val), config.val_images))
    one, other = root(config.train), root(config.val)
    # one within the other may hold the same files; elsewhere nothing needs to be compared
    if not (is_below(one, other) or is_below(other, one)):
        return train, held_out
    rest = sources.without(train, held_out)
    if not len(rest):
        raise ConfigError(
            f"all {len(train)} images of data.train are also in data.val. Use other folders, or lower "
            "data.val_images."
        )
    return rest, held_out


def validation_images(
    source: ImageSource, config: DataConfig, channels: int
) -> list[tuple[str, torch.Tensor]]:
    """Centre crops of `val_size` (smaller images whole), as (name, (C, H, W) in [-1, 1]).

    Raises:
        ImageError: none of them can be read.
    """
    images = [*centre_crops(source, range(len(source)), config, channels)]
    if not images:
        raise ImageError(
            f"none of the {len(source)} validation images can be read; the first is {source.name(0)}"
        )
    return images


def centre_crops(
    source: ImageSource, indices: Iterable[int], config: DataConfig, channels: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Of those that can be read of some images, as `validation_images`; the others are named."""
    for index in indices:
        try:
            image = source.load(index, channels)
        except ImageError as error:
            logger.warning("image left out: %s", error)
            continue
        if config.short_side is not None:
            image = resize_short_side(image, config.short_side)
        height, width = (min(side, config.val_size) for side in image.shape[-2:])
        top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
        name = PurePath(source.name(index)).name
        yield name, image[:, top : top + height, left : left + width].contiguous()
