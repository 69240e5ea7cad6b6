"""Any image of a store by its number: its index line and its moments, without reading a whole shard."""

import re
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from latentvae.errors import StoreError
from latentvae.store.manifest import ShardRecord, read_manifest
from latentvae.store.shard import (
    Entry,
    flipped_name,
    index_path,
    latent_size,
    line_starts,
    parse_entry,
    tensors_path,
)

SHARDS_KEPT = 1024  # mapped files hold no descriptor, so the limit is the memory of their indexes
LINES_KEPT = 4_000_000  # of all indexes kept, 8 bytes each

_TENSOR = re.compile(rb'"tensor":"(moments\.\d+x\d+)"')


class StoreReader:
    """Reads images of a store by number, in the order of its shards and their indexes.

    Opening reads `store.json` alone. A shard's tensors are mapped when one of its images is first read, and
    its index is scanned for line ends, not parsed; both are kept for the shards that were used last. No file
    stays open, so readers may be pickled and forked.

    Args:
        store: the folder.

    Raises:
        StoreError: no store, a damaged one, one of a later version, or one without images.
    """

    def __init__(self, store: str | Path) -> None:
        self.store = Path(store).absolute()
        self.manifest = read_manifest(self.store)
        if not self.manifest.count:
            raise StoreError(
                f"the store {store} holds no image: run `latentvae encode` with images that can be read."
            )
        if not isinstance(self.manifest.config.get("latent_channels"), int):
            raise StoreError(
                f"store.json of {store} does not say how many latent_channels its VAE has: encode again."
            )
        self._ends = list(accumulate(shard.count for shard in self.manifest.shards))
        self._remember()

    def _remember(self) -> None:
        """Start with no shard kept."""
        longest = max(shard.count for shard in self.manifest.shards)
        kept = max(1, min(SHARDS_KEPT, LINES_KEPT // longest))
        self._line_starts = lru_cache(kept)(self._scan)
        self._tensors = lru_cache(kept)(self._map)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_line_starts", "_tensors")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[ShardRecord, int]:
        """The shard of an image and its line there; IndexError where there is no such image."""
        position = range(len(self))[index]
        number = bisect_right(self._ends, position)
        shard = self.manifest.shards[number]
        return shard, position - (self._ends[number] - shard.count)

    def entry(self, index: int) -> Entry:
        """The index line of an image.

        Raises:
            StoreError: its shard is gone, damaged, or was replaced since this reader opened the store.
        """
        shard, line = self.locate(index)
        starts = self._line_starts(shard)
        start, end = int(starts[line]), int(starts[line + 1])
        try:
            with index_path(self.store, shard.name).open("rb") as file:
                file.seek(start)
                text = file.read(end - start)
        except OSError as error:
            raise self._unusable(shard, error.strerror or str(error)) from error
        if not text.startswith(b"{") or text.find(b"\n") != len(text) - 1:
            raise self._unusable(shard, "its index has changed since the store was opened")
        try:
            return parse_entry(text)
        except StoreError as error:
            raise self._unusable(shard, f"line {line + 1} of its index is damaged") from error

    def moments(self, index: int, entry: Entry, flipped: bool = False) -> torch.Tensor:
        """The moments of an image, (2C, h, w), as stored; a view of the mapped file: not to be written to.

        Args:
            index: the image's number.
            entry: its `entry(index)`.
            flipped: those of its mirror image, which must have been stored.

        Raises:
            StoreError: as `entry`; or the tensors lack this row.
        """
        shard, _ = self.locate(index)
        name = flipped_name(entry.tensor) if flipped else entry.tensor
        try:
            row = self._tensors(shard).get_slice(name)[entry.offset : entry.offset + 1]
        except (SafetensorError, TypeError) as error:
            raise self._unusable(shard, str(error)) from error
        channels = 2 * self.manifest.config["latent_channels"]
        if entry.offset < 0 or row.shape != (1, channels, *latent_size(entry.tensor)):
            raise self._unusable(shard, f"{name} has no row {entry.offset} of the wanted shape")
        return row[0]

    def tensor_names(self, shard: ShardRecord) -> list[str]:
        """The tensor of each image of a shard, in order; the index is read only where there are several."""
        if not shard.count:
            return []
        stored: list[str] = self._tensors(shard).keys()
        names = [name for name in stored if name.startswith("moments.")]
        if len(names) == 1:
            return names * shard.count
        with self._open_index(shard) as file:
            found = [_tensor_of(line) for line in file]
        if len(found) != shard.count:
            raise self._unusable(shard, f"its index has {len(found)} lines instead of {shard.count}")
        return found

    def _scan(self, shard: ShardRecord) -> np.ndarray:
        try:
            starts = line_starts(index_path(self.store, shard.name))
        except OSError as error:
            raise self._unusable(shard, error.strerror or str(error)) from error
        if len(starts) != shard.count + 1:
            raise self._unusable(shard, f"its index has {len(starts) - 1} lines instead of {shard.count}")
        return starts

    def _map(self, shard: ShardRecord) -> Any:
        path = tensors_path(self.store, shard.name)
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise self._unusable(shard, getattr(error, "strerror", None) or str(error)) from error

    def _open_index(self, shard: ShardRecord) -> Any:
        try:
            return index_path(self.store, shard.name).open("rb")
        except OSError as error:
            raise self._unusable(shard, error.strerror or str(error)) from error

    def _unusable(self, shard: ShardRecord, reason: str) -> StoreError:
        return StoreError(
            f"the shard {shard.name} of {self.store} cannot be used: {reason}. Run `latentvae verify` to see "
            "what is damaged, and `latentvae encode` with the images to repair it; then open the store again."
        )


def _tensor_of(line: bytes) -> str:
    """The tensor that an index line names: found without parsing, ten times as fast."""
    match = _TENSOR.search(line)  # the first: captions come later in the line
    return match[1].decode() if match else parse_entry(line).tensor
