"""Stores of random moments, written shard by shard without a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latentvae.images.resizing import Preprocessing
from latentvae.store.format import (
    DTYPES,
    Entry,
    Failure,
    Manifest,
    ShardRecord,
    flipped_name,
    place_shard,
    shard_name,
    stage_shard,
    tensor_name,
    write_manifest,
)

Size = tuple[int, int]  # of latents: height, width
RATIO = 8  # pixels of one latent


def write_store(folder: Path, shards: Sequence[Sequence[Size]], **options: Any) -> Path:
    """A store whose image number n has latents of the n-th size given; see `manifest` for the options."""
    captions = options.pop("captions", {})
    keys = options.pop("keys", {})
    details = options.pop("details", {})
    common = manifest(**options)
    folder.mkdir(parents=True, exist_ok=True)
    records: list[ShardRecord] = []
    first = 0
    for sizes in shards:
        numbers = range(first, first + len(sizes))
        tensors = _tensors(common, dict(zip(numbers, sizes, strict=True)))
        rows: dict[Size, int] = {}
        entries = []
        for number, size in zip(numbers, sizes, strict=True):
            rows[size] = rows.get(size, -1) + 1
            line = {"caption": captions.get(number), **details.get(number, {})}
            entries.append(_entry(keys.get(number, f"image{number:05d}.png"), size, rows[size], line))
        records.append(write_shard(folder, shard_name(len(records)), tensors, entries))
        first += len(sizes)
    write_manifest(folder, common.model_copy(update={"shards": records}))
    return folder


def write_shard(
    store: Path,
    name: str,
    tensors: dict[str, torch.Tensor],
    entries: Sequence[Entry],
    failures: Sequence[Failure] = (),
) -> ShardRecord:
    """Put a shard in place, as a run does but for its journal."""
    record = stage_shard(store, name, tensors, entries, failures)
    place_shard(store, record)
    return record


def manifest(**options: Any) -> Manifest:
    """Latents of 4 channels with a scaling and a shift, in float32 unless asked otherwise."""
    values: dict[str, Any] = {
        "weights_sha256": "0" * 64,
        "config": {"latent_channels": 4},
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
        "preprocessing": Preprocessing(),
        "dtype": "fp32",
        "precision": "fp32",
        "flips": False,
        "batch_size": 8,
        "shard_size": 100,
    }
    return Manifest(**{**values, **options})


def moments_of(number: int, size: Size, *, flipped: bool = False) -> torch.Tensor:
    """What `write_store` stores for an image: (8, h, w), different for every number."""
    generator = torch.Generator().manual_seed(2 * number + flipped)
    moments = torch.randn(8, *size, generator=generator)
    moments[4:] -= 3
    return moments


def _tensors(common: Manifest, sizes: dict[int, Size]) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {}
    for number, size in sizes.items():
        name = tensor_name(*size)
        found.setdefault(name, []).append(moments_of(number, size))
        if common.flips:
            found.setdefault(flipped_name(name), []).append(moments_of(number, size, flipped=True))
    return {name: torch.stack(rows).to(DTYPES[common.dtype]) for name, rows in found.items()}


def _entry(key: str, size: Size, row: int, line: dict[str, Any]) -> Entry:
    values: dict[str, Any] = {
        "key": key,
        "source": f"photos/{key}",
        "sha256": "1" * 64,
        "size_bytes": 1000,
        "mtime_ns": 1,
        "width": RATIO * size[1] - 3,
        "height": RATIO * size[0] - 1,
        "resized": None,
        "cropped": None,
        "padding": (0, 0, 3, 1),
        "tensor": tensor_name(*size),
        "offset": row,
    }
    return Entry(**{**values, **line})
