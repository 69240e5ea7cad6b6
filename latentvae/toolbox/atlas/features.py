"""Features of images as a table for other tools: pooled latents by row, written as .npy or .parquet."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentvae.base.errors import LatentVAEError
from latentvae.base.files import whole_file
from latentvae.base.optional import need

FORMATS = (".npy", ".parquet")  # what numpy, and what pandas, polars and DuckDB read


def column_names(channels: int, grid: int = 0) -> list[str]:
    """What each column of `pool_latents` is: mean_0, std_0, cell_CHANNEL_ROW_COLUMN."""
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
        grid: what `pool_latents` was called with.
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
        # of C channels there are 2C + C * grid^2 columns
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
        names = path.with_suffix(".json")  # .npy has no place for names
        rows = {**self.about(), "columns": self.columns, "keys": self.keys, "labels": self.labels}
        with whole_file(names, durable=True) as partial:  # in ASCII: names need not be UTF-8
            partial.write_text(json.dumps(rows) + "\n", encoding="ascii")
        # opened, because a name alone would get another suffix
        with whole_file(path, durable=True) as partial, partial.open("wb") as file:
            np.save(file, self.values, allow_pickle=False)
        return [path, names]

    def _save_parquet(self, path: Path) -> Path:
        arrow, parquet = need("pyarrow"), need("pyarrow.parquet")
        # parquet holds UTF-8 alone, and file names need not be
        keys = [key.encode("utf-8", "replace").decode() for key in self.keys]
        columns = {"key": keys, "label": [label or None for label in self.labels]}
        types = {"key": arrow.string(), "label": arrow.string()}
        arrays = [arrow.array(column, types[name]) for name, column in columns.items()]
        arrays += [arrow.array(column) for column in self.values.T]
        table = arrow.Table.from_arrays(arrays, names=[*columns, *self.columns])
        # by this name `_is_features` knows an earlier table again
        table = table.replace_schema_metadata({"latentvae": json.dumps(self.about())})
        with whole_file(path, durable=True) as partial:
            parquet.write_table(table, partial)
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
        need("pyarrow")  # said before minutes of encoding
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
