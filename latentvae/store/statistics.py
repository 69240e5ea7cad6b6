"""What the scaled latents of a store are like, channel by channel: a by-product of encoding.

Each shard holds, as one more tensor, sums and a histogram of its images; the manifest
holds what they come to. Both depend on the images alone, because shards are added up in
their order, whoever encoded them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from latentvae.base.errors import StoreError
from latentvae.models.latents import Posterior, Scaling, seeded_noise
from latentvae.store import format as layout
from latentvae.store.format import STATISTICS, Entry, Manifest, ShardRecord, Statistics, StoredShard

PERCENTILES = (0.1, 1, 5, 25, 50, 75, 95, 99, 99.9)
# A bin is what float32 numbers of one sign, one exponent and the same first four bits have in common: 16 bins
# an octave. Scaled latents are of unit size; smaller and larger ones go into the first and the last.
_SHIFT = 23 - 4
_LEAST, _LAST = (127 - 10) << 4, ((127 + 10) << 4) - 1  # from 2^-10 to 2^10
_BINS = _LAST - _LEAST + 1  # of one sign
_UPPER = ((np.arange(_LEAST + 1, _LAST + 2, dtype=np.int32)) << _SHIFT).view(np.float32).astype(np.float64)
_EDGES = np.concatenate([-_UPPER[::-1], [0.0], _UPPER])  # (2 bins + 1,), ascending


def summarize(
    tensors: Mapping[str, torch.Tensor], entries: Sequence[Entry], scaling: Scaling
) -> dict[str, torch.Tensor]:
    """A shard's tensor of statistics by its name; {} where there is no image.

    For each channel the sum and the sum of squares of scaled samples, expected over all draws of the
    posterior, then how many values of one draw, that of the image's key, fall into each bin: float64
    (C, 2 + bins).

    Args:
        tensors: moments as `assemble` returns them. Mirror images do not count.
        entries: where in them the images are.
        scaling: of the store's VAE.
    """
    total: np.ndarray | None = None
    for entry in sorted(entries, key=lambda entry: entry.key):
        part = _of_image(tensors[entry.tensor][entry.offset], entry.key, scaling)
        total = part if total is None else total + part
    return {} if total is None else {STATISTICS: torch.from_numpy(total)}


def _of_image(moments: torch.Tensor, key: str, scaling: Scaling) -> np.ndarray:
    """An image's part, from its moments (2C, h, w)."""
    posterior = Posterior(scaling.scale_moments(moments.float())[None])
    noise = seeded_noise(tuple(posterior.mean.shape[1:]), 0, key, 0)
    # NumPy's from here: torch divides its work by threads, whose number must not change a bit
    mean, logvar = (each[0].flatten(1).numpy() for each in (posterior.mean, posterior.logvar))  # (C, h w)
    sample = mean + np.exp(0.5 * logvar) * noise.flatten(1).numpy()
    squares = np.square(mean, dtype=np.float64) + np.exp(logvar, dtype=np.float64)  # E x^2 = mean^2 + var
    sums = [mean.sum(1, dtype=np.float64)[:, None], squares.sum(1)[:, None]]
    return np.concatenate([*sums, np.stack([_histogram(channel) for channel in sample])], axis=1)


def _histogram(values: np.ndarray) -> np.ndarray:
    """How many of the values (n,) fall between each two `_EDGES`."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.int32)
    size = np.clip((bits & 0x7FFFFFFF) >> _SHIFT, _LEAST, _LAST) - _LEAST
    return np.bincount(np.where(bits < 0, _BINS - 1 - size, _BINS + size), minlength=2 * _BINS).astype(float)


def of_store(shards: Sequence[StoredShard]) -> Statistics | None:
    """Add up what the shards hold; None where one of them, of an earlier version, holds none.

    Raises:
        StoreError: a shard cannot be read.
    """
    total: Any = 0.0
    for shard in (shard for shard in shards if shard.record.count):
        part = _read(*shard)
        if part is None:
            return None
        total = total + part
    return _conclude(total, sum(shard.record.count for shard in shards))


def compute(store: str | Path, manifest: Manifest) -> Statistics | None:
    """The same from the moments themselves, for stores of earlier versions; reads all of them.

    Raises:
        StoreError: a shard cannot be read.
    """
    total: Any = 0.0
    for record in (record for record in manifest.shards if record.count):
        entries = layout.read_entries(store, record.name)
        with _opened(store, record) as file:
            tensors = {name: file.get_tensor(name) for name in {entry.tensor for entry in entries}}
        total = total + summarize(tensors, entries, Scaling.of(manifest))[STATISTICS].numpy()
    return _conclude(total, manifest.count)


def unscaled(statistics: Statistics, manifest: Manifest) -> dict[str, list[float]]:
    """`latents_mean` and `latents_std` as diffusers has them in a VAE's config: of unscaled latents."""
    shift, factor = manifest.shift_factor or 0.0, manifest.scaling_factor
    return {
        "latents_mean": [mean / factor + shift for mean in statistics.mean],
        "latents_std": [std / abs(factor) for std in statistics.std],
    }


def _conclude(total: Any, images: int) -> Statistics | None:
    """Statistics from added-up parts (C, 2 + bins)."""
    if not images:
        return None
    counts = total[:, 2:]
    values = counts.sum(1)
    mean = total[:, 0] / values
    variance = np.maximum(total[:, 1] / values - np.square(mean), 0)
    return Statistics(
        images=images,
        values=int(values[0]),
        mean=mean.tolist(),
        std=np.sqrt(variance).tolist(),
        percentiles={f"{q:g}": [_percentile(channel, q) for channel in counts] for q in PERCENTILES},
    )


def _percentile(counts: np.ndarray, q: float) -> float:
    """Below which `q` percent lie; within its bin values are taken to be spread evenly."""
    reached = np.cumsum(counts)
    wanted = reached[-1] * q / 100
    number = int(np.searchsorted(reached, wanted))  # the first bin that gets there: never an empty one
    share = 1 - (reached[number] - wanted) / counts[number]
    return float(_EDGES[number] + share * (_EDGES[number + 1] - _EDGES[number]))


def _read(store: str | Path, record: ShardRecord) -> np.ndarray | None:
    with _opened(store, record) as file:
        if STATISTICS not in file.keys():  # noqa: SIM118
            return None
        found: np.ndarray = file.get_tensor(STATISTICS).numpy()
    return found if found.ndim == 2 and found.shape[1] == 2 + 2 * _BINS else None


def _opened(store: str | Path, record: ShardRecord) -> Any:
    path = layout.tensors_path(store, record.name)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}): run `latentvae verify`, and `latentvae encode` to repair it."
        ) from error
