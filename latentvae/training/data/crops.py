"""Training images: an endless, seekable sequence of crops in which item k is the same in every run."""

import atexit
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import PurePath

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from latentvae.base.errors import ConfigError, ImageError, LatentVAEError
from latentvae.images.resizing import resize_short_side
from latentvae.images.tensors import from_uint8, to_uint8
from latentvae.training.config import Config, DataConfig
from latentvae.training.data import sources
from latentvae.training.data.sources import ImageSource
from latentvae.training.data.teacher_cache import TeacherCache, TeacherCrop

logger = logging.getLogger(__name__)

# (C, H, W), position, skipped; and what a teacher made of the crop, where a teacher's are kept
Item = tuple[torch.Tensor, int, list[str]] | tuple[torch.Tensor, int, list[str], TeacherCrop]


@dataclass
class CropBatch:
    """Crops of consecutive positions, and the files that had to be passed over on the way."""

    pixel_values: torch.Tensor  # (B, C, H, W) in [-1, 1]
    positions: torch.Tensor  # (B,) int64: global sample index, counted from the run's start
    skipped: list[str]  # "name: reason"
    teacher: TeacherCrop | None = None  # (B, 2c, h, w) and (B, C, H, W), where a teacher's are kept

    def pin_memory(self) -> "CropBatch":
        """In memory that a GPU reads while it computes; DataLoader calls it."""
        pinned = None if self.teacher is None else TeacherCrop(*(each.pin_memory() for each in self.teacher))
        return CropBatch(self.pixel_values.pin_memory(), self.positions, self.skipped, pinned)


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
        self.memory: list[torch.Tensor | str] | None = None
        if config.in_memory and _fits_in_memory(self):
            self.memory = _decode_all(self)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Item:
        count = len(self.source)
        epoch, offset = divmod(position, count)  # epochs follow one another without a gap, also in a batch
        order = epoch_order(self.seed, epoch, count)
        skipped: list[str] = []
        for attempt in range(count):
            index = int(order[(offset + attempt) % count])
            image = self.image(index)
            if isinstance(image, torch.Tensor):
                crop, teacher = self._crop(image, index, position)
                found = (crop, position, skipped)
                return found if teacher is None else (*found, teacher)
            skipped.append(f"{self.source.name(index)}: {image}")
        raise ImageError(f"none of the {count} training images can be used; the first: {skipped[0]}")

    def __getitems__(self, positions: list[int]) -> list[Item] | LatentVAEError:
        """What a DataLoader collates: the items, or the error to raise in the main process."""
        try:
            return [self[position] for position in positions]
        except LatentVAEError as error:
            return error

    def image(self, index: int) -> torch.Tensor | str:
        """One image as `decode` gives it, from memory where all are there."""
        return self.memory[index] if self.memory is not None else self.decode(index)

    def decode(self, index: int) -> torch.Tensor | str:
        """One image (C, H, W), at least as large as a crop; or the reason why it cannot be used.

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
            return f"{width}x{height} px is smaller than data.crop={self.config.crop}"
        return to_uint8(image) if self.config.range is None else image

    def _crop(
        self, image: torch.Tensor, index: int, position: int
    ) -> tuple[torch.Tensor, TeacherCrop | None]:
        random = np.random.default_rng((self.seed, position))  # no state: any process draws the same crop
        size, step = self.config.crop, self.cache.ratio if self.cache is not None else 1
        top = step * int(random.integers((image.shape[-2] - size) // step + 1))
        left = step * int(random.integers((image.shape[-1] - size) // step + 1))
        crop = image[:, top : top + size, left : left + size]
        if self.config.horizontal_flip and random.random() < 0.5:
            crop = crop.flip(-1)
        teacher = None if self.cache is None else self.cache.crop(index, top, left, size)
        return (from_uint8(crop) if crop.dtype == torch.uint8 else crop.contiguous()), teacher


@lru_cache(maxsize=2)  # the epoch being read, and the next while a batch spans both
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which one epoch visits `count` images; every image once."""
    return np.random.default_rng((seed, epoch, count)).permutation(count)


def _fits_in_memory(sequence: CropSequence) -> bool:
    """Whether all images, judged by a few, take less than half of the memory that is free."""
    count = len(sequence)
    # eight of them, as uint8 (C, H, W), which is how they are kept
    some = [sequence.decode(index) for index in range(0, count, max(1, count // 8))]
    sizes = [image.nbytes for image in some if isinstance(image, torch.Tensor)]
    needed = count * sum(sizes) / max(1, len(sizes))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this machine: each holds all images
    if needed * processes < psutil.virtual_memory().available / 2:
        return True
    logger.warning(
        "data.in_memory: %d images would take about %.1f GB, so they are decoded as they are needed. Set "
        "data.workers to the cores that can be spared, or data.short_side to keep them smaller.",
        *(count, needed * processes / 1e9),
    )
    return False


def _decode_all(sequence: CropSequence) -> list[torch.Tensor | str]:
    count, first = len(sequence), sequence.source.name(0)
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(sequence.decode, range(count))
        images = list(tqdm(decoded, total=count, desc="decoding", leave=False))
    if not any(isinstance(image, torch.Tensor) for image in images):
        raise ImageError(f"none of the {count} training images can be used; {first}: {images[0]}")
    return images


class PositionSampler(Sampler[list[int]]):
    """Batches of positions for one process: its share of every optimizer step's global batch, in order.

    Step s, forward pass a, process r and place j stand for position ((s * A + a) * R + r) * B + j, so N
    processes with batches of B / N see what one process with batches of B sees.
    """

    def __init__(self, batch_size: int, passes: range, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.passes, self.rank, self.world = batch_size, passes, rank, world

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[list[int]]:
        for forward_pass in self.passes:
            start = (forward_pass * self.world + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


class BatchLoader(DataLoader):
    """A DataLoader whose workers' errors arrive as they were, not as a stack trace in a message."""

    def __iter__(self) -> Iterator[CropBatch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, LatentVAEError):
                # A new one: raising `batch` itself ties a cycle with this frame, which only gc undoes.
                raise type(batch)(*batch.args) from batch
            yield batch


def training_batches(
    config: Config, sequence: CropSequence, first_step: int, rank: int, world: int
) -> BatchLoader:
    """Batches from an optimizer step to the end of the run, `accumulation` of them per step."""
    # forward passes, not steps: a resumed run goes on with the pass after the checkpoint's last
    passes = range(first_step * config.train.accumulation, config.train.max_steps * config.train.accumulation)
    return BatchLoader(
        sequence,
        batch_sampler=PositionSampler(config.train.batch_size, passes, rank, world),
        collate_fn=_collate,
        num_workers=config.data.workers,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # it draws a seed for its workers: not from the run's generator
        pin_memory=torch.cuda.is_available(),
    )


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Go on when the whole process group is asked to stop: the main process saves first, and then ends us."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # after multiprocessing's own, hence run before it
def _end_workers() -> None:
    """Kill the workers that are left at exit: multiprocessing would ask with SIGTERM, and wait for ever."""
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler calls a killed worker an error
    for child in children:
        child.kill()


def _collate(items: list[Item] | LatentVAEError) -> CropBatch | LatentVAEError:
    if isinstance(items, LatentVAEError):
        return items
    crops, positions, skipped, *given = zip(*items, strict=True)
    teacher = TeacherCrop(*map(torch.stack, zip(*given[0], strict=True))) if given else None
    names = [*chain.from_iterable(skipped)]
    return CropBatch(torch.stack(crops), torch.tensor(positions), names, teacher)


def split_sources(config: DataConfig) -> tuple[ImageSource, ImageSource]:
    """Training and validation images, none in both; without `data.val`, some are held out evenly.

    Raises:
        ConfigError: no training data given, too few images to hold any out, or what `open_source` raises.
        ImageError: data that is missing or damaged, or holds no image.
    """
    if config.train is None:
        raise ConfigError(
            "data.train is not set: which images? Add `--set data.train=FOLDER`, or set it in the config."
        )
    train = sources.with_range(sources.open_source(config.train, config.column), config, "data.train")
    if config.val is None:
        if len(train) < 2:
            raise ConfigError(
                f"{config.train} holds one image, none is left for validation. Add images, or set data.val."
            )
        return sources.hold_out(train, config.val_images)
    # one range for both: measured, it is that of the training images
    val = sources.with_range(sources.open_source(config.val, config.column), config, "data.val")
    held_out = sources.Selection(val, sources.evenly(len(val), config.val_images))
    one, other = sources.root(config.train), sources.root(config.val)
    # one within the other may hold the same files; elsewhere nothing needs to be compared
    if not (one.is_relative_to(other) or other.is_relative_to(one)):
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
    """Centre crops of `val_size` (smaller images whole), as (name, (C, H, W) in [-1, 1])."""
    images = []
    for index in range(len(source)):
        try:
            image = source.load(index, channels)
        except ImageError as error:
            logger.warning("validation image left out: %s", error)
            continue
        if config.short_side is not None:
            image = resize_short_side(image, config.short_side)
        height, width = (min(side, config.val_size) for side in image.shape[-2:])
        top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
        name = PurePath(source.name(index)).name
        images.append((name, image[:, top : top + height, left : left + width].contiguous()))
    if not images:
        raise ImageError(
            f"none of the {len(source)} validation images can be read; the first is {source.name(0)}"
        )
    return images
