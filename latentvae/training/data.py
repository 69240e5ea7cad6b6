"""Training images: an endless, seekable sequence of crops in which item k is the same in every run."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from latentvae.errors import ConfigError, ImageError
from latentvae.images import find_images, from_uint8, load_image, to_uint8
from latentvae.training.config import Config, DataConfig

logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """Crops of consecutive positions, and the files that had to be passed over on the way."""

    pixel_values: torch.Tensor  # (B, C, H, W) in [-1, 1]
    positions: torch.Tensor  # (B,) int64: global sample index, counted from the run's start
    skipped: list[str]  # "path: reason"


class CropSequence(Dataset[tuple[torch.Tensor, int, list[str]]]):
    """Item k of an endless sequence: a random crop of image `order(k // N)[k % N]`, drawn from (seed, k).

    Nothing is remembered between items, so any process can make any item and a run resumes at any position.
    An image that cannot be used is replaced by the next one in the same epoch's order, and reported.

    Args:
        paths: image files.
        config: crop, resize and flip.
        channels: of the model; 3 or 1.
        seed: of the run.
    """

    def __init__(self, paths: list[Path], config: DataConfig, channels: int, seed: int) -> None:
        self.paths = paths
        self.config = config
        self.channels = channels
        self.seed = seed
        self.memory: list[torch.Tensor | str] | None = None
        if config.in_memory:
            self.memory = _decode_all(self, paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int, list[str]]:
        count = len(self.paths)
        epoch, offset = divmod(position, count)
        order = epoch_order(self.seed, epoch, count)
        skipped: list[str] = []
        for attempt in range(count):
            index = order[(offset + attempt) % count]
            image = self.memory[index] if self.memory is not None else self.decode(self.paths[index])
            if isinstance(image, torch.Tensor):
                return self._crop(image, position), position, skipped
            skipped.append(f"{self.paths[index]}: {image}")
        raise ImageError(f"none of the {count} training images can be used; the first: {skipped[0]}")

    def decode(self, path: Path) -> torch.Tensor | str:
        """One image as uint8 (C, H, W), at least as large as a crop; or the reason why it cannot be used."""
        try:
            image = load_image(path, channels=self.channels)
        except ImageError as error:
            return str(error)
        if self.config.short_side is not None:
            image = resize_short_side(image, self.config.short_side)
        height, width = image.shape[-2:]
        if min(height, width) < self.config.crop:
            return f"{width}x{height} px is smaller than data.crop={self.config.crop}"
        return to_uint8(image)

    def _crop(self, image: torch.Tensor, position: int) -> torch.Tensor:
        random = np.random.default_rng((self.seed, position))
        size = self.config.crop
        top = int(random.integers(image.shape[-2] - size + 1))
        left = int(random.integers(image.shape[-1] - size + 1))
        crop = image[:, top : top + size, left : left + size]
        if self.config.horizontal_flip and random.random() < 0.5:
            crop = crop.flip(-1)
        return from_uint8(crop)


@lru_cache(maxsize=2)  # the epoch being read, and the next while a batch spans both
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which one epoch visits `count` images; every image once."""
    return np.random.default_rng((seed, epoch, count)).permutation(count)


def resize_short_side(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize (C, H, W) so that the shorter side is `size`, antialiased bicubic, clamped to [-1, 1]."""
    height, width = image.shape[-2:]
    ratio = size / min(height, width)
    shape = (max(size, round(height * ratio)), max(size, round(width * ratio)))
    return interpolate(image[None], shape, mode="bicubic", antialias=True, align_corners=False)[0].clamp(
        -1, 1
    )


def _decode_all(sequence: CropSequence, paths: list[Path]) -> list[torch.Tensor | str]:
    with ThreadPoolExecutor() as pool:
        images = list(tqdm(pool.map(sequence.decode, paths), total=len(paths), desc="decoding", leave=False))
    if not any(isinstance(image, torch.Tensor) for image in images):
        raise ImageError(f"none of the {len(paths)} training images can be used; {paths[0]}: {images[0]}")
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


def training_batches(
    config: Config, sequence: CropSequence, first_step: int, rank: int, world: int
) -> DataLoader:
    """Batches from an optimizer step to the end of the run, `accumulation` of them per step."""
    passes = range(first_step * config.train.accumulation, config.train.max_steps * config.train.accumulation)
    return DataLoader(
        sequence,
        batch_sampler=PositionSampler(config.train.batch_size, passes, rank, world),
        collate_fn=_collate,
        generator=torch.Generator(),  # or its seed would be drawn from torch's own state, one more per resume
        num_workers=config.data.workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.data.workers > 0,
    )


def _collate(items: list[tuple[torch.Tensor, int, list[str]]]) -> Batch:
    crops, positions, skipped = zip(*items, strict=True)
    return Batch(torch.stack(crops), torch.tensor(positions), [name for names in skipped for name in names])


def split_paths(config: DataConfig) -> tuple[list[Path], list[Path]]:
    """Training and validation files, none in both; without a validation folder, some are held out evenly.

    Raises:
        ConfigError: no training folder given, or too few images to hold any out.
        ImageError: a folder that is missing or holds no image.
    """
    if config.train is None:
        raise ConfigError(
            "data.train is not set: which images? Add `--set data.train=FOLDER`, or set it in the config."
        )
    train = find_images(config.train)
    if config.val is not None:
        held_out = find_images(config.val)[: config.val_images]
        if _nested(Path(config.train).resolve(), Path(config.val).resolve()):
            train = _without(train, held_out)
        return train, held_out
    if len(train) < 2:
        raise ConfigError(
            f"{config.train} holds one image, none is left for validation. Add images, or set data.val."
        )
    every = max(2, len(train) // min(config.val_images, len(train) // 2))
    held_out = train[::every][: config.val_images]
    chosen = set(held_out)
    return [path for path in train if path not in chosen], held_out


def _nested(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _without(train: list[Path], measured: list[Path]) -> list[Path]:
    """The training files that are not measured, however their folders are spelled."""
    places = {path.resolve() for path in measured}
    rest = [path for path in train if path.resolve() not in places]
    if not rest:
        raise ConfigError(
            f"all {len(train)} images of data.train are also in data.val. Use other folders, or lower "
            "data.val_images."
        )
    return rest


def validation_images(paths: list[Path], config: DataConfig, channels: int) -> list[tuple[str, torch.Tensor]]:
    """Centre crops of `val_size` (smaller images whole), as (name, (C, H, W) in [-1, 1])."""
    images = []
    for path in paths:
        try:
            image = load_image(path, channels=channels)
        except ImageError as error:
            logger.warning("validation image left out: %s", error)
            continue
        if config.short_side is not None:
            image = resize_short_side(image, config.short_side)
        height, width = (min(side, config.val_size) for side in image.shape[-2:])
        top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
        images.append((path.name, image[:, top : top + height, left : left + width].contiguous()))
    if not images:
        raise ImageError(f"none of the {len(paths)} validation images can be read; the first is {paths[0]}")
    return images
