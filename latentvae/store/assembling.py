"""The shard that a run is making: moments and lines as they come, in any order, then tensors and lists."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open

from latentvae.store.planning import PlannedShard
from latentvae.store.shard import (
    Entry,
    Failure,
    flipped_name,
    read_entries,
    read_failures,
    tensor_name,
    tensors_path,
)


@dataclass(frozen=True)
class Row:
    """One image: its line, and its moments (2C, h, w) as they are stored."""

    entry: Entry
    moments: torch.Tensor
    flipped: torch.Tensor | None

    @property
    def is_finite(self) -> bool:
        """Whether the precision was enough."""
        both = [self.moments] if self.flipped is None else [self.moments, self.flipped]
        return all(bool(torch.isfinite(moments).all()) for moments in both)


@dataclass
class Assembly:
    """Rows and failures of one shard."""

    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def keep(self, store: Path, shard: PlannedShard) -> None:
        """Take over the images whose files are gone from the shard as it is."""
        gone = set(shard.vanished)
        self.failures += [failure for failure in read_failures(store, shard.name) if failure.key in gone]
        with safe_open(tensors_path(store, shard.name), framework="pt") as tensors:
            for entry in read_entries(store, shard.name):
                if entry.key in gone:
                    moments = tensors.get_slice(entry.tensor)[entry.offset : entry.offset + 1][0]
                    name = flipped_name(entry.tensor)
                    flipped = (
                        tensors.get_slice(name)[entry.offset : entry.offset + 1][0]
                        if name in tensors.keys()  # noqa: SIM118  safe_open is no dict
                        else None
                    )
                    self.rows.append(Row(entry, moments, flipped))

    def tensors(self) -> tuple[dict[str, torch.Tensor], list[Entry]]:
        """One tensor (N, 2C, h, w) for each size, its rows sorted by key; and the lines, which say where."""
        groups: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.entry.key):
            groups.setdefault(tensor_name(*row.moments.shape[-2:]), []).append(row)
        tensors: dict[str, torch.Tensor] = {}
        entries: list[Entry] = []
        for name, rows in groups.items():
            tensors[name] = torch.stack([row.moments for row in rows])
            if rows[0].flipped is not None:
                tensors[flipped_name(name)] = _stack([row.flipped for row in rows])
            entries += [replace(row.entry, tensor=name, offset=at) for at, row in enumerate(rows)]
        return tensors, entries


def _stack(rows: Sequence[torch.Tensor | None]) -> torch.Tensor:
    return torch.stack([row for row in rows if row is not None])
