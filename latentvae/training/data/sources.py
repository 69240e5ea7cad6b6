"""Where training images come from: files, Hugging Face datasets or WebDataset shards, all by number."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from latentvae.base.errors import ConfigError, ImageError
from latentvae.images import scans
from latentvae.images.kinds import is_image_name
from latentvae.images.reading import list_files
from latentvae.images.scans import Window
from latentvae.training.config import DataConfig
from latentvae.training.data.datasets import open_parquet, open_saved
from latentvae.training.data.listing import ARCHIVES, Listing, scan
from latentvae.training.data.tars import BRACES, TarSource, expand_braces

logger = logging.getLogger(__name__)

MEASURED = 200  # images whose samples say where percentiles are
WANTED = (
    "a folder of images, .tar shards or .parquet files, one such file, a dataset saved with save_to_disk, "
    "or a pattern such as shards/{000..011}.tar"
)


class ImageSource(Protocol):
    """Images by number; the same number is the same image in every process and every run."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What reports call an image, for example "shards/000.tar:cat.jpg"."""

    def place(self, index: int) -> tuple[Path, int]:
        """The file, links resolved, and the place in it: the same for one image under two names."""

    def load(self, index: int, channels: int = 3) -> torch.Tensor:
        """Load an image as float32 (channels, H, W) in [-1, 1].

        Raises:
            ImageError: this image cannot be read; others can.
            SourceError: the source itself is gone.
        """


@dataclass(frozen=True)
class FolderSource:
    """Image files; with a window the samples of one channel, which it scales."""

    paths: Sequence[Path]
    window: Window | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path."""
        return str(self.paths[index])

    def place(self, index: int) -> tuple[Path, int]:
        """The path, links resolved."""
        return self.paths[index].resolve(), 0

    def load(self, index: int, channels: int = 3) -> torch.Tensor:
        """Load an image as float32 (channels, H, W) in [-1, 1]; raises ImageError."""
        return scans.load(self.paths[index], channels, self.window)[0]


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

    def place(self, index: int) -> tuple[Path, int]:
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


def open_source(
    spec: str | Path, column: str | None = None, scan: Callable[[Path], Listing] = scan
) -> ImageSource:
    """Open image files, a Hugging Face dataset on disk or WebDataset shards, told apart by what is there.

    Args:
        spec: a folder, a file, or several of them as a pattern such as shards/{000..011}.tar.
        column: of a dataset: the column with the images, None to find it; of tars: the extension of the
            members, None for all images; of image files: not used.
        scan: lists a folder.

    Raises:
        ImageError: something that is missing or damaged, or no image there.
        ConfigError: no image column or several, files of several kinds, or `datasets` is not installed.
    """
    path = Path(spec)
    try:
        # what save_to_disk leaves in a folder: several splits, or one
        saved = ("dataset_dict.json",), ("dataset_info.json", "state.json")
        if any(all((path / name).is_file() for name in names) for names in saved):
            return open_saved(path, column)
        if path.is_dir():
            return _open_folder(path, column, scan(path))
        files = [
            file for part in parts(spec) for file in _files(part, "" if part == path else f" ({spec})", scan)
        ]
    except OSError as error:
        raise ImageError(
            f"{error.filename} cannot be read ({error.strerror}): check its name and permissions"
        ) from error
    # each file once, however many parts of the pattern name it
    return _open_files(str(spec), list(dict.fromkeys(files)), column)


def _open_folder(folder: Path, column: str | None, found: Listing) -> ImageSource:
    if found.archives:
        return _open_files(str(folder), found.everything(), column)
    if not found.images:
        raise ImageError(f"no image in the folder {folder}. Wanted: {WANTED}.")
    return FolderSource(found.images)


def left_out(*specs: str | Path | None) -> Counter[str]:
    """Files in the named folders that are neither images that can be read nor packed ones, by suffix."""
    counted = Counter[str]()
    for folder in {part.resolve() for spec in specs if spec is not None for part in parts(spec)}:
        if folder.is_dir():
            list_files(folder, (*ARCHIVES, ".arrow"), counted)
    return counted


def parts(spec: str | Path) -> list[Path]:
    """The files or folders that a pattern names; braces in a name that exists are no pattern."""
    return [Path(spec)] if Path(spec).exists() else [Path(part) for part in expand_braces(str(spec))]


def root(spec: str | Path) -> Path:
    """The file or folder, links resolved, that everything `spec` names lies in."""
    path = Path(spec)
    if not path.exists() and (match := BRACES.search(str(spec))):
        # the braces may begin in the middle of a name: any letter in their place keeps the parent right
        path = Path(str(spec)[: match.start()] + "-").parent
    return path.resolve()


def _files(path: Path, context: str, scan: Callable[[Path], Listing]) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise ImageError(f"{path} does not exist{context}. Wanted: {WANTED}.")
    found = scan(path)
    if not (files := found.everything()):
        raise ImageError(f"no image in the folder {path}. Wanted: {WANTED}.")
    return files


def _open_files(spec: str, files: list[Path], column: str | None) -> ImageSource:
    kinds: dict[str, list[Path]] = {}
    for file in files:
        suffix = file.suffix.lower()
        kinds.setdefault("image" if is_image_name(suffix) else suffix, []).append(file)
    match list(kinds):
        case ["image"]:
            return FolderSource(files)
        case [".tar"]:
            return TarSource(files, column)
        case [".parquet"]:
            return open_parquet(files, column)
        case [suffix]:
            raise ImageError(f"{files[0]} ends in {suffix!r}. Wanted: {WANTED}; unpack other archives first.")
        case _:
            counts = " and ".join(f"{len(found)} {kind} files" for kind, found in kinds.items())
            raise ConfigError(
                f"{spec} holds {counts}: which are to be used? Name a subfolder, one file, or a pattern "
                "such as shards/{000..011}.tar."
            )


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
                yield scans.read_samples(source.paths[index])[0]
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
