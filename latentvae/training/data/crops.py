"""Training images: an endless, seekable sequence of crops in which item k is the same in every run."""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePath

import numpy as np
import torch
from torch.utils.data import Dataset

from latentvae.base.addresses import is_below
from latentvae.base.errors import ConfigError, ImageError, LatentVAEError
from latentvae.images.listing import Listing, scan
from latentvae.images.resizing import resize_short_side
from latentvae.images.sources import ImageSource, open_source, root
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

    Attributes:
        cache: of a teacher, cut as the images are, if one is set; crops then begin at multiples of its ratio.
    """

    def __init__(
        self,
        source: ImageSource,
        config: DataConfig,
        channels: int,
        seed: int,
    ) -> None:
        self.cache: TeacherCache | None = None
        self.source = source
        self.config = config
        self.channels = channels
        self.seed = seed
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
        order = EpochOrder(self.seed, epoch, count)
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
        if min(height, width) < self.config.crop:
            name = self.source.name(index)
            return f"{name} of {width}x{height} px is smaller than data.crop={self.config.crop}"
        return to_uint8(image) if self.config.range is None else image

    def _crop(
        self, image: torch.Tensor, index: int, position: int
    ) -> tuple[torch.Tensor, TeacherCrop | None]:
        random = np.random.default_rng((self.seed, position))  # no state: any process draws the same crop
        size, step = self.config.crop, self.cache.ratio if self.cache is not None else 1
        side = size  # of what is cut out
        if self.config.zoom is not None:
            short, (least, most) = min(image.shape[-2:]), np.log(self.config.zoom)
            side = max(size, round(short * float(np.exp(random.uniform(least, most)))))
        top = step * int(random.integers((image.shape[-2] - side) // step + 1))
        left = step * int(random.integers((image.shape[-1] - side) // step + 1))
        crop = image[:, top : top + side, left : left + side]
        if side > size:
            scaled = resize_short_side(as_floats(crop), size)
            crop = to_uint8(scaled) if crop.dtype == torch.uint8 else scaled
        if self.config.horizontal_flip and random.random() < 0.5:
            crop = crop.flip(-1)
        teacher = None if self.cache is None else self.cache.crop(index, top, left, size)
        return crop.contiguous(), teacher


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
        ConfigError: no training data given, too few images to hold any out, or what `open_source` raises.
        ImageError: data that is missing or damaged, or holds no image.
    """
    if config.train is None:
        raise ConfigError(
            "data.train is not set: which images? Add `--set data.train=FOLDER`, or set it in the config."
        )
    train = sources.with_range(open_source(config.train, config.column, scan), config, "data.train")
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
