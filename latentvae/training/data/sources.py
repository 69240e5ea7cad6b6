"""Training images: which of a source are trained on, which are held out, and how their samples are scaled."""

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from latentvae.base.addresses import Place
from latentvae.base.cache import BYTES, Cache, default_folder
from latentvae.base.errors import ConfigError, ImageError
from latentvae.images import scans
from latentvae.images.listing import ARCHIVES, list_files
from latentvae.images.scans import Window
from latentvae.images.sources import FolderSource, ImageSource, parts
from latentvae.images.tars import TarSource
from latentvae.training.config import DataConfig

logger = logging.getLogger(__name__)

MEASURED = 200  # images whose samples say where percentiles are


@dataclass(frozen=True)
class Selection:
    """Some images of a source, in the order of `indices`."""

    source: ImageSource
    indices: "np.ndarray | Rest"

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """As the source names it."""
        return self.source.name(int(self.indices[index]))

    def place(self, index: int) -> tuple[Place, int]:
        """As in the source."""
        return self.source.place(int(self.indices[index]))

    def load(self, index: int, channels: int = 3) -> torch.Tensor:
        """As the source loads it."""
        return self.source.load(int(self.indices[index]), channels)


@dataclass(frozen=True)
class Rest:
    """The numbers below `count` without some, of which only those left out are kept."""

    count: int
    without: np.ndarray  # ascending

    def __len__(self) -> int:
        return self.count - len(self.without)

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < len(self):
            raise IndexError(place)
        # how many were left out before it: those before which at most `place` numbers stay
        before = np.searchsorted(self.without - np.arange(len(self.without)), place, side="right")
        return place + int(before)


def with_whole_shards(source: ImageSource) -> ImageSource:
    """A source in .tar shards: those at addresses are fetched as a whole, to the folder of caches."""
    if isinstance(source, Selection):
        return replace(source, source=with_whole_shards(source.source))
    assert isinstance(source, TarSource)  # as `split_sources` checks
    source = copy.copy(source)  # validation goes on asking for its few images alone
    source.cache = Cache(default_folder(), BYTES)
    return source


def packed(source: ImageSource) -> tuple[TarSource, np.ndarray]:
    """What `with_whole_shards` gave: its shards, and which of them each image lies in, (N,), ascending."""
    if not isinstance(source, Selection):
        assert isinstance(source, TarSource)
        return source, source.members.shard_of
    shards, numbers = packed(source.source)
    kept = source.indices
    return shards, np.delete(numbers, kept.without) if isinstance(kept, Rest) else numbers[kept]


def left_out(*specs: str | Path | None) -> Counter[str]:
    """Files in the named folders that are neither images that can be read nor packed ones, by suffix."""
    counted = Counter[str]()
    for folder in {part.resolve() for spec in specs if spec is not None for part in parts(spec)}:
        if isinstance(folder, Path) and folder.is_dir():
            list_files(folder, (*ARCHIVES, ".arrow"), counted)
    return counted


def with_range(source: ImageSource, config: DataConfig, setting: str) -> ImageSource:
    """A source whose samples are scaled by `data.range`, where there is one.

    Raises:
        ConfigError: images in shards or datasets, which are read as photographs.
    """
    if config.range is None and config.percentiles is None:
        return source
    if not isinstance(source, FolderSource):
        raise ConfigError(
            f"data.range and data.percentiles are of image files, and {setting} is a "
            f"{type(source).__name__}; unpack it into a folder"
        )
    limits = config.range or measured_range(source, config.percentiles or (0, 100))
    return replace(source, window=Window(*limits))


def measured_range(source: FolderSource, percentiles: tuple[float, float]) -> tuple[float, float]:
    """What lies at these percentiles of the samples of some images, from all over the source."""

    def samples() -> Iterator[np.ndarray]:
        for index in evenly(len(source), MEASURED):
            try:
                yield scans.read_samples(source.read(index), source.name(index))[0]
            except ImageError as error:
                logger.warning("not measured: %s", error)

    window = scans.measure_window(samples(), percentiles)
    return window.low, window.high


def evenly(total: int, count: int) -> np.ndarray:
    """Numbers of `count` of `total` things, or of all that there are, from the first to the last."""
    return np.linspace(0, total - 1, min(total, count)).astype(int)


def hold_out(source: ImageSource, count: int) -> tuple[Selection, Selection]:
    """Split off up to `count` images, evenly spaced, at most a tenth: (the rest, those).

    Of fewer than twenty images two, as far as that is no more than half.
    """
    most = min(count, max(2, len(source) // 10), len(source) // 2)
    held_out = evenly(len(source), most)
    return Selection(source, Rest(len(source), held_out)), Selection(source, held_out)


def without(source: ImageSource, other: ImageSource) -> Selection:
    """The images of `source` that are not in `other`, however either is spelled."""
    # by place, not by name: links and `..` give one image several names
    places = {other.place(index) for index in range(len(other))}
    rest = [index for index in range(len(source)) if source.place(index) not in places]
    return Selection(source, np.array(rest, dtype=np.int64))
