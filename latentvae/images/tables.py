"""Hugging Face datasets on disk, saved or parquet, as a source: their rows, our decoder."""

import glob
import io
import json
import math
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from latentvae.base.addresses import Address, Place
from latentvae.base.errors import ConfigError, ImageError, SourceError
from latentvae.base.files import portable
from latentvae.base.optional import need
from latentvae.images.captions import Caption
from latentvae.images.reading import load_image
from latentvae.images.tars import BLOCK, COLUMN, GO_ON, below_root

FILES = ("binary", "large_binary", "string", "large_string")  # the bytes of an image file, or its path
KEPT = 1 << 30  # bytes of rows: those of the images of two shards of a store, mostly
DIGITS = 8  # of a row's number in its key, so that keys sort as rows do


class DatasetSource:
    """One column of a Hugging Face dataset, read by row.

    Args:
        rows: a `datasets.Dataset`.
        column: its column of image files: an Image feature, {bytes, path}, bytes, or paths.
        files: where the rows come from, in order, with the number of rows of each.
        root: the folder that keys are relative to; None: each file's own.
        texts: take captions and labels from the other columns.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        files: Sequence[tuple[Place, int]],
        root: Place | None = None,
        texts: bool = False,
    ) -> None:
        from datasets import Image

        said = [name for name, feature in rows.features.items() if name != column and _is_said(feature)]
        self.said = rows.select_columns(said) if texts and said else None
        self.rows = rows.select_columns([column])
        if isinstance(rows.features[column], Image):
            self.rows = self.rows.cast_column(column, Image(decode=False))
        self.column, self.root = column, root
        self.files = [file for file, _ in files]
        self.ends = np.cumsum([count for _, count in files])
        self.times = [_changed(file) for file in self.files]
        # an image file that a row names has a size and a time of its own
        self.names_files = texts and isinstance(self._file(self._cells(self.rows, 0)[column]), str)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Name the file and the row in it, for example "train.parquet[17]"."""
        file, row = self._row(index)
        return f"{file}[{row}]"

    def place(self, index: int) -> tuple[Place, int]:
        """The file, links resolved, and the row in it."""
        file, row = self._row(index)
        return file.resolve(), row

    def load(self, index: int, channels: int = 3) -> torch.Tensor:
        """Load an image as float32 (channels, H, W) in [-1, 1].

        Raises:
            ImageError: the row holds no image that can be read.
            SourceError: the dataset's files are gone or damaged.
        """
        return load_image(self._image(index), name=self.name(index), channels=channels)

    def read(self, index: int) -> bytes:
        """The row's image file; raises ImageError where it has none, SourceError where it cannot be read."""
        image = self._image(index)
        return Path(image).read_bytes() if isinstance(image, str) else image

    def open(self, index: int) -> IO[bytes]:
        """The row's image file."""
        image = self._image(index)
        return Path(image).open("rb") if isinstance(image, str) else io.BytesIO(image)

    def state(self, index: int) -> tuple[int | None, int]:
        """The image file's bytes, None where only reading would tell; and when it was changed, in ns."""
        if self.names_files and isinstance(image := self._image(index), str):
            found = Path(image).stat()
            return found.st_size, found.st_mtime_ns
        return None, self.times[int(np.searchsorted(self.ends, index, side="right"))]

    def key(self, index: int) -> str:
        """The file below the root without its suffix, and the row: "train/00000017"."""
        file, row = self._row(index)
        path = PurePosixPath(below_root(file, self.root))
        path = path.with_suffix("") if path.suffix == ".parquet" else path
        return f"{portable(path.as_posix())}/{row:0{DIGITS}d}"

    def origin(self, index: int) -> str:
        """What a store notes of where an image came from."""
        return portable(self.name(index))

    def caption(self, index: int) -> tuple[Caption, list[str]]:
        """What the row's other columns say, as far as JSON has words for it."""
        row = {} if self.said is None else self._cells(self.said, index)
        return {name: value for name, value in row.items() if _is_plain(value)} or None, []

    def _image(self, index: int) -> bytes | str:
        found = self._file(self._cells(self.rows, index)[self.column])
        if found is None:
            raise ImageError(
                f"{self.name(index)} is empty, but an image was wanted in the column {self.column!r}"
            )
        return found

    @staticmethod
    def _file(cell: Any) -> bytes | str | None:
        """The bytes of an image file, or its path."""
        if isinstance(cell, dict):
            cell = cell["path"] if cell["bytes"] is None else cell["bytes"]
        return cell

    def _cells(self, rows: Any, index: int) -> dict[str, Any]:
        try:
            return rows[index]
        except Exception as error:  # what Arrow raises depends on where the file is damaged
            raise SourceError(f"{self.name(index)} can no longer be read ({error}). {GO_ON}") from error

    def _row(self, index: int) -> tuple[Place, int]:
        file = int(np.searchsorted(self.ends, index, side="right"))
        return self.files[file], index - int(self.ends[file - 1] if file else 0)


def _changed(file: Place) -> int:
    """When a file, or the newest in a saved dataset, was changed, in nanoseconds."""
    inside: Iterable[Place] = file.iterdir() if file.is_dir() else [file]
    return max(path.stat().st_mtime_ns for path in inside)


def _is_said(feature: Any) -> bool:
    """Whether a column may hold what is said of an image: text, numbers, labels, or lists of them."""
    from datasets import ClassLabel, Value

    inner = getattr(feature, "feature", feature)  # of a list
    return isinstance(inner, ClassLabel) or (isinstance(inner, Value) and "binary" not in inner.dtype)


def _is_plain(value: Any) -> bool:
    """Whether JSON has a word for it; nothing is said by what is empty."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def is_saved(folder: Place) -> bool:
    """Whether it is what `save_to_disk` leaves: several splits, or one."""
    kinds = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    return any(all((folder / name).is_file() for name in names) for names in kinds)


def open_saved(folder: Place, column: str | None, texts: bool = False) -> DatasetSource:
    """Open a dataset that was written with `save_to_disk`; its keys begin with the folder's name.

    From an address `datasets` copies it whole to this machine's temporary files.

    Raises:
        ImageError: it cannot be opened, or has no row.
        ConfigError: no image column, several splits, or `datasets` is not installed.
    """
    datasets = _datasets(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        if len(splits) != 1:
            raise ConfigError(
                f"{folder} holds the splits {', '.join(splits)}: name one, for example {folder / splits[0]}."
            )
        folder = folder / splits[0]
    named = str(folder)
    try:
        rows = (
            folder.ask(lambda *_: datasets.load_from_disk(named))
            if isinstance(folder, Address)
            else datasets.load_from_disk(named)
        )
    except SourceError:
        raise
    except Exception as error:  # Arrow's, JSON's and the system's
        raise ImageError(f"{folder} cannot be opened as a saved dataset: {error}. Save it again.") from error
    if not len(rows):
        raise ImageError(f"{folder} has no row, but images were wanted: name another dataset.")
    chosen = image_column(rows.features, column, str(folder))
    return DatasetSource(rows, chosen, [(folder, len(rows))], texts=texts)


def open_parquet(
    files: Sequence[Place], column: str | None, root: Place | None = None, texts: bool = False
) -> DatasetSource:
    """Open parquet files: for encoding where they lie, which goes through them once and in order.

    For training, which reads in any order, `datasets` first makes Arrow files of them in its cache, once; but
    not of files at addresses.

    Raises:
        ImageError: a file cannot be read, or there is no row.
        ConfigError: no image column, or `datasets` is not installed.
    """
    datasets = _datasets(files[0])
    found, chosen, columns = list[Footer](), "", dict[str, Any]()
    for file in files:
        found.append(_footer(file))
        features = found[-1].features
        chosen = image_column(features, column, str(file))  # before minutes of conversion
        said = [name for name, feature in features.items() if name != chosen and texts and _is_said(feature)]
        columns |= {name: features[name] for name in (chosen, *said)}
    counts = [(file, footer.metadata.num_rows) for file, footer in zip(files, found, strict=True)]
    total = sum(count for _, count in counts)
    if not total:
        raise ImageError(f"{files[0]} has no row, but images were wanted: name another dataset.")
    # each image once and in order: no copy on this disk is worth it
    if texts or any(isinstance(file, Address) for file in files):
        rows: Any = ParquetRows(files, [footer.metadata for footer in found], columns)
        return DatasetSource(rows, chosen, counts, root, texts)
    place = f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    try:
        rows = datasets.Dataset.from_parquet([glob.escape(str(file)) for file in files], columns=[*columns])
    except Exception as error:  # Arrow's, wrapped or not
        reason = error.__cause__ or error
        raise ImageError(f"{place} cannot be read as parquet: {reason}. Fetch it again.") from error
    if len(rows) != total:  # or names would be wrong
        raise ImageError(f"{place} gave {len(rows)} rows, but {total} were wanted: did they just change?")
    return DatasetSource(rows, chosen, counts, root, texts)


class ParquetRows:
    """Rows of parquet files where they lie, as `datasets.Dataset` gives them; `KEPT` bytes stay in memory.

    Args:
        files: in order.
        metadata: pyarrow's of each.
        features: of the columns that are read.
    """

    def __init__(self, files: Sequence[Place], metadata: Sequence[Any], features: dict[str, Any]) -> None:
        self.files, self.metadata, self.features = files, metadata, features
        self.groups = [
            (number, group) for number, each in enumerate(metadata) for group in range(each.num_row_groups)
        ]
        self.ends = np.cumsum([metadata[file].row_group(group).num_rows for file, group in self.groups])
        self._forget()

    def _forget(self) -> None:
        self._kept: dict[int, Any] = {}  # tables by group, the one used last at the end
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def select_columns(self, names: Sequence[str]) -> "ParquetRows":
        """The same rows with some columns."""
        return ParquetRows(self.files, self.metadata, {name: self.features[name] for name in names})

    def cast_column(self, column: str, feature: Any) -> "ParquetRows":
        """Itself: images are not decoded here."""
        return self

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        first = int(self.ends[number - 1]) if number else 0
        with self._lock:
            table = self._kept.pop(number, None)
            if table is None:
                table = self._read(*self.groups[number])
            self._kept[number] = table
            while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > KEPT:
                self._kept.pop(next(iter(self._kept)))
        return {name: table[name][index - first].as_py() for name in self.features}

    def _read(self, number: int, group: int) -> Any:
        from pyarrow.parquet import ParquetFile

        file, metadata = self.files[number], self.metadata[number]

        def read(source: Any) -> Any:
            with ParquetFile(source, metadata=metadata) as opened:
                return opened.read_row_group(group, columns=list(self.features))

        if isinstance(file, Path):
            return read(file)
        return file.ask(lambda files, path: read(file.opened(files, path, BLOCK)))


def read_row(file: Place, row: int) -> bytes:
    """The image file in a row of a parquet file or a saved dataset, in the column that is found by its type.

    Raises:
        LatentVAEError: there is none.
    """
    opened = _opened(file, _changed(file))
    if row >= len(opened):
        raise ImageError(f"{file} has {len(opened)} rows, none of the number {row}")
    return opened.read(row)


@lru_cache(maxsize=2)
def _opened(file: Place, changed: int) -> DatasetSource:
    """A table as it was at a time."""
    if file.is_dir():
        return open_saved(file, None)
    return open_parquet([file], None, texts=True)


class Footer(NamedTuple):
    """What the last bytes of a parquet file say of it."""

    metadata: Any
    features: dict[str, Any]


def _footer(file: Place) -> Footer:
    import pyarrow
    from datasets import Features
    from pyarrow.parquet import ParquetFile

    def look(source: Any) -> Footer:
        with ParquetFile(source) as parquet:
            return Footer(parquet.metadata, Features.from_arrow_schema(parquet.schema_arrow))

    try:
        return (
            look(file)
            if isinstance(file, Path)
            else file.ask(lambda files, path: look(file.opened(files, path, BLOCK)))
        )
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        raise ImageError(f"{file} cannot be read as parquet: {error}. Fetch it again.") from error


def image_column(features: dict[str, Any], wanted: str | None, place: str) -> str:
    """Choose the column with the images: the one asked for, else the one of an image type.

    Raises:
        ConfigError: it is not there or of another type, or none or several are.
    """

    def listing(names: Iterable[str]) -> str:
        return ", ".join(f"{name} ({_kind(features[name])})" for name in names)

    if wanted is not None:
        if wanted in features and (_kind(features[wanted]) in ("image", *FILES)):
            return wanted
        came = f"is of the type {_kind(features[wanted])}" if wanted in features else "is not there"
        raise ConfigError(
            f"the column {wanted!r} {came} in {place}, which has {listing(features)}. Name a column of "
            f"images, of their files' bytes, or of their paths: {COLUMN}."
        )
    found = [name for name, feature in features.items() if _kind(feature) == "image"]
    if not found and _kind(features.get("image")) in FILES:
        return "image"
    if len(found) == 1 or "image" in found:
        return "image" if "image" in found else found[0]
    count = "several image columns" if found else "no image column"
    raise ConfigError(f"{place} has {count}: {listing(found or features)}. Name the one to take: {COLUMN}.")


def _kind(feature: Any) -> str:
    """ "image" for what holds image files, else the type's name."""
    from datasets import Image

    if isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
        return "image"
    return str(getattr(feature, "dtype", type(feature).__name__))


def _datasets(place: Place) -> Any:
    message = "{what} is read with the package `{package}`, which is missing: {install}"
    return need("datasets", ConfigError, message, place)
