"""Features of images for other tools: latents pooled to one row of numbers each, and the images' labels."""

import csv
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from latentvae.base.errors import LatentVAEError
from latentvae.base.files import write_whole
from latentvae.base.optional import need
from latentvae.models.latents import Posterior
from latentvae.store.dataset import StoreReader

LABEL_KEY = "label"  # of caption records, as LatentDataset has it
HEADER = ["name", "label"]
SHARED = 2  # images: a subfolder with fewer is no class


def label_of(caption: Mapping[str, Any] | None) -> str:
    """The label in an image's caption record, a text or a number; "" where there is none."""
    found = (caption or {}).get(LABEL_KEY)
    return str(found).strip() if isinstance(found, str | int | float) else ""


def folder_labels(keys: Sequence[str]) -> list[str]:
    """The folder that each image lies in, below the one that was named; "" for those in that one itself.

    All "" where that would tell nothing: one folder holds them all, or hardly two share one.
    """
    found = [PurePosixPath(key).parent.as_posix() for key in keys]
    folders = ["" if name == "." else name for name in found]
    counts = Counter(folders)
    if len(counts) < 2 or max(counts.values()) < SHARED:
        return [""] * len(keys)
    return folders


def read_table(path: Path) -> dict[str, str]:
    """The label of each name in a CSV of name,label, with or without that header.

    Raises:
        LatentVAEError: it cannot be read, a line is no name,label, or a name comes twice.
    """
    try:
        lines = [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise LatentVAEError(f"{path} cannot be read ({reason}): wanted a CSV of name,label.") from error
    if lines and [cell.strip().lower() for cell in lines[0]] == HEADER:
        lines = lines[1:]
    found: dict[str, str] = {}
    for row in lines:
        name = row[0].strip()
        if len(row) != 2 or not row[1].strip() or name in found:
            raise LatentVAEError(f"{path} has the line {','.join(row)!r}; wanted NAME,LABEL, each name once.")
        found[name] = row[1].strip()
    return found


def match(path: Path, labels: Mapping[str, str], names: Collection[str], *, whole: bool) -> None:
    """Check that a table's labels are those of these images.

    Args:
        path: of the table, for the message.
        names: of the images.
        whole: each image must have one; otherwise some may have none.

    Raises:
        LatentVAEError: a label for no image; or none at all, or with `whole` one missing.
    """
    missing, extra = sorted(set(names) - labels.keys()), sorted(labels.keys() - set(names))
    if not extra and labels and not (whole and missing):
        return
    first = f"{extra[0]!r} is no image here" if extra else f"{missing[0]!r} has none"
    raise LatentVAEError(
        f"{path} does not label these images: images without a label: {len(missing)}, labels without an "
        f"image: {len(extra)}; {first}. Names are paths below the folder that was named, with suffixes."
    )


FORMATS = (".npy", ".parquet")
LARGEST_GRID = 64  # a side; more numbers than most images have latents


def pool(latents: torch.Tensor, grid: int = 0) -> np.ndarray:
    """Reduce latents of any size to one row an image.

    Mean and standard deviation over the whole image of each channel; and with a grid, the mean of each
    channel in each of grid x grid equal cells, which keeps where in the image things are. Images of other
    shapes have cells of other shapes; where there are fewer latents than cells, cells share them.

    Args:
        latents: (B, C, h, w), unscaled.
        grid: cells along a side, 0 for none.

    Returns:
        float64 (B, 2C + C * grid^2): means, standard deviations, then cells by channel, row and column.

    Raises:
        LatentVAEError: a grid below 0 or above 64, or latents that are not finite.
    """
    if not 0 <= grid <= LARGEST_GRID:
        raise LatentVAEError(f"grid {grid} came; wanted 0 (no cells) to {LARGEST_GRID} cells along a side.")
    if not torch.isfinite(latents).all():
        raise LatentVAEError(
            "the latents hold NaN or infinity: compute in float32 (half precision overflows)."
        )
    values = latents.detach().cpu().double()  # in this order, because MPS has no float64
    flat = values.flatten(2)
    parts = [flat.mean(2), flat.std(2, correction=0)]
    if grid:
        parts.append(adaptive_avg_pool2d(values, grid).flatten(1))
    pooled: np.ndarray = torch.cat(parts, 1).numpy()
    return pooled


def column_names(channels: int, grid: int = 0) -> list[str]:
    """What each column of `pool` is: mean_0, std_0, cell_CHANNEL_ROW_COLUMN."""
    every = range(channels)
    cells = [f"cell_{c}_{y}_{x}" for c in every for y in range(grid) for x in range(grid)]
    return [f"mean_{c}" for c in every] + [f"std_{c}" for c in every] + cells


@dataclass(frozen=True)
class Features:
    """Pooled latents of a set of images, by row.

    Attributes:
        keys: of the images: their paths below their folder.
        labels: of the images, "" where there is none.
        values: float32 (N, D).
        grid: what `pool` was called with.
        weights_sha256: of the VAE.
    """

    keys: list[str]
    labels: list[str]
    values: np.ndarray
    grid: int
    weights_sha256: str

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.labels) == len(self.values):
            raise LatentVAEError(
                f"{len(self.keys)} keys and {len(self.labels)} labels came for {len(self.values)} rows of "
                "features; each row needs one of both."
            )

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return column_names(self.values.shape[1] // (2 + self.grid**2), self.grid)

    def about(self) -> dict[str, Any]:
        """What other tools should know, as JSON values."""
        pooling = "mean and std per channel" + (
            f", means of {self.grid} x {self.grid} cells" * bool(self.grid)
        )
        return {"pooling": pooling, "grid": self.grid, "weights_sha256": self.weights_sha256}

    def save(self, path: Path) -> list[Path]:
        """Write them whole or not at all, and say which files were written.

        `.npy`: float32 (N, D), and beside it NAME.json with keys, labels and columns by row. `.parquet`: a
        table with the columns key, label (null where there is none) and one for each feature; `about` is in
        its metadata under "latentvae".

        Raises:
            LatentVAEError: another suffix, pyarrow is not installed, or a place that cannot be written.
        """
        check_format(path)
        if path.suffix.lower() == ".parquet":
            return [self._save_parquet(path)]
        names = path.with_suffix(".json")
        rows = {**self.about(), "columns": self.columns, "keys": self.keys, "labels": self.labels}
        write_whole(names, lambda partial: partial.write_text(json.dumps(rows) + "\n", encoding="ascii"))
        write_whole(path, self._save_array)
        return [path, names]

    def _save_array(self, path: Path) -> None:
        with path.open("wb") as file:  # a name alone would get another suffix
            np.save(file, self.values, allow_pickle=False)

    def _save_parquet(self, path: Path) -> Path:
        arrow, parquet = need("pyarrow"), need("pyarrow.parquet")
        # parquet holds UTF-8 alone, and file names need not be
        keys = [key.encode("utf-8", "replace").decode() for key in self.keys]
        columns = {"key": keys, "label": [label or None for label in self.labels]}
        types = {"key": arrow.string(), "label": arrow.string()}
        arrays = [arrow.array(column, types[name]) for name, column in columns.items()]
        arrays += [arrow.array(column) for column in self.values.T]
        table = arrow.Table.from_arrays(arrays, names=[*columns, *self.columns])
        table = table.replace_schema_metadata({"latentvae": json.dumps(self.about())})
        write_whole(path, lambda partial: parquet.write_table(table, partial))
        return path


def check_format(path: Path) -> None:
    """Refuse a file of features that ends in something else.

    Raises:
        LatentVAEError: with the formats there are.
    """
    if path.suffix.lower() not in FORMATS:
        raise LatentVAEError(
            f"{path} ends in '{path.suffix}'; features are written as {' or '.join(FORMATS)}."
        )
    if path.exists() and not _is_features(path):
        raise LatentVAEError(
            f"{path} came as the file to write, which is named last, but it is there and no earlier table of "
            "features: choose another name. Nothing was written."
        )
    if path.suffix.lower() == ".parquet":
        need("pyarrow")
    elif (names := path.with_suffix(".json")).exists() and not _is_ours(names):
        raise LatentVAEError(
            f"{names} would hold the keys of {path.name}, but another file of that name is there (a caption "
            "record, say): choose another name or folder."
        )


def _is_features(path: Path) -> bool:
    """Whether a table was written by `Features.save`."""
    if path.suffix.lower() != ".parquet":
        return _is_ours(path.with_suffix(".json"))
    try:
        return b"latentvae" in (need("pyarrow.parquet").read_schema(path).metadata or {})
    except (OSError, ValueError):  # pyarrow's own errors are some of these
        return False


def _is_ours(path: Path) -> bool:
    """Whether a JSON file was written by `Features.save`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"columns", "keys", "weights_sha256"} <= found.keys()


@dataclass(frozen=True)
class StoredImage:
    """An image of a latent store: its number, key, label ("" where there is none) and unscaled latents."""

    index: int
    key: str
    label: str
    latents: torch.Tensor  # (1, C, h, w), the posterior's mode


def stored_images(reader: StoreReader, numbers: range | None = None) -> Iterator[StoredImage]:
    """Images of a store in its order.

    Raises:
        StoreError: a shard that is gone or damaged.
    """
    for index in numbers or range(len(reader)):
        entry = reader.entry(index)
        latents = Posterior(reader.moments(index, entry)[None].float()).mode()
        yield StoredImage(index, entry.key, label_of(entry.caption), latents)
