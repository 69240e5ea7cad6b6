"""Hugging Face datasets on disk, saved or parquet, as a source: their rows, our decoder."""

import glob
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentvae.base.errors import ConfigError, ImageError, SourceError
from latentvae.base.optional import need
from latentvae.images.reading import load_image

FILES = ("binary", "large_binary", "string", "large_string")  # the bytes of an image file, or its path


class DatasetSource:
    """One column of a Hugging Face dataset, read by row.

    Args:
        rows: a `datasets.Dataset`.
        column: its column of image files: an Image feature, {bytes, path}, bytes, or paths.
        files: where the rows come from, in order, with the number of rows of each.
    """

    def __init__(self, rows: Any, column: str, files: list[tuple[Path, int]]) -> None:
        from datasets import Image

        self.rows = rows.select_columns([column])
        if isinstance(rows.features[column], Image):
            self.rows = self.rows.cast_column(column, Image(decode=False))
        self.column = column
        self.files = [file for file, _ in files]
        self.ends = np.cumsum([count for _, count in files])

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Name the file and the row in it, for example "train.parquet[17]"."""
        file, row = self._row(index)
        return f"{file}[{row}]"

    def place(self, index: int) -> tuple[Path, int]:
        """The file, links resolved, and the row in it."""
        file, row = self._row(index)
        return file.resolve(), row

    def load(self, index: int, channels: int = 3) -> torch.Tensor:
        """Load an image as float32 (channels, H, W) in [-1, 1].

        Raises:
            ImageError: the row holds no image that can be read.
            SourceError: the dataset's files are gone or damaged.
        """
        name = self.name(index)
        try:
            cell = self.rows[index][self.column]
        except Exception as error:  # what Arrow raises depends on where the file is damaged
            raise SourceError(
                f"{name} can no longer be read ({error}). Restore the dataset, and add --resume latest."
            ) from error
        if isinstance(cell, dict):
            cell = cell["path"] if cell["bytes"] is None else cell["bytes"]
        if cell is None:
            raise ImageError(f"{name} is empty, but an image was wanted in the column {self.column!r}")
        return load_image(cell, name=name, channels=channels)

    def _row(self, index: int) -> tuple[Path, int]:
        file = int(np.searchsorted(self.ends, index, side="right"))
        return self.files[file], index - int(self.ends[file - 1] if file else 0)


def open_saved(folder: Path, column: str | None) -> DatasetSource:
    """Open a dataset that was written with `save_to_disk`.

    Raises:
        ImageError: it cannot be opened, or has no row.
        ConfigError: no image column, several splits, or `datasets` is not installed.
    """
    datasets = _datasets(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if len(splits) != 1:
            raise ConfigError(
                f"{folder} holds the splits {', '.join(splits)}: name one, for example {folder / splits[0]}."
            )
        folder = folder / splits[0]
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # Arrow's, JSON's and the system's
        raise ImageError(f"{folder} cannot be opened as a saved dataset: {error}. Save it again.") from error
    if not len(rows):
        raise ImageError(f"{folder} has no row, but images were wanted: name another dataset.")
    return DatasetSource(rows, image_column(rows.features, column, str(folder)), [(folder, len(rows))])


def open_parquet(files: list[Path], column: str | None) -> DatasetSource:
    """Open parquet files, which `datasets` first turns into Arrow files in its cache, once.

    Raises:
        ImageError: a file cannot be read, or there is no row.
        ConfigError: no image column, or `datasets` is not installed.
    """
    datasets = _datasets(files[0])
    counts, chosen = [], ""
    for file in files:
        count, features = _footer(file)
        counts.append((file, count))
        chosen = image_column(features, column, str(file))  # before minutes of conversion
    total = sum(count for _, count in counts)
    if not total:
        raise ImageError(f"{files[0]} has no row, but images were wanted: name another dataset.")
    place = f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    try:
        rows = datasets.Dataset.from_parquet([glob.escape(str(file)) for file in files], columns=[chosen])
    except Exception as error:  # Arrow's, wrapped or not
        reason = error.__cause__ or error
        raise ImageError(f"{place} cannot be read as parquet: {reason}. Fetch it again.") from error
    if len(rows) != total:  # or names would be wrong
        raise ImageError(f"{place} gave {len(rows)} rows, but {total} were wanted: did they just change?")
    return DatasetSource(rows, chosen, counts)


def _footer(file: Path) -> tuple[int, dict[str, Any]]:
    """Rows and features of a parquet file, from its last bytes."""
    import pyarrow
    from datasets import Features
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as parquet:
            return parquet.metadata.num_rows, Features.from_arrow_schema(parquet.schema_arrow)
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        raise ImageError(f"{file} cannot be read as parquet: {error}. Fetch it again.") from error


def image_column(features: dict[str, Any], wanted: str | None, place: str) -> str:
    """Choose the column with the images: the one asked for, else the one of an image type.

    Raises:
        ConfigError: it is not there or of another type, or none or several are.
    """
    listing = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    if wanted is not None:
        if wanted in features and (_kind(features[wanted]) in ("image", *FILES)):
            return wanted
        came = f"is of the type {_kind(features[wanted])}" if wanted in features else "is not there"
        raise ConfigError(
            f"data.column={wanted!r} {came} in {place}, which has {listing}. "
            "Name a column of images, of their files' bytes, or of their paths."
        )
    found = [name for name, feature in features.items() if _kind(feature) == "image"]
    if not found and _kind(features.get("image")) in FILES:
        return "image"
    if len(found) == 1 or "image" in found:
        return "image" if "image" in found else found[0]
    count = "several image columns" if found else "no image column"
    raise ConfigError(f"{place} has {count}: {listing}. Name the one to train on with data.column.")


def _kind(feature: Any) -> str:
    """ "image" for what holds image files, else the type's name."""
    from datasets import Image

    if isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
        return "image"
    return str(getattr(feature, "dtype", type(feature).__name__))


def _datasets(place: Path) -> Any:
    message = "{what} is read with the package `{package}`, which is missing: {install}"
    return need("datasets", ConfigError, message, place)
