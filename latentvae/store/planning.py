"""Which image is in which shard and which batch: from the sorted keys and the images' sizes, nothing else."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

from latentvae.store.geometry import Size
from latentvae.store.manifest import ShardRecord
from latentvae.store.salvage import Loss, Remains, find_losses, read_remains
from latentvae.store.shard import damage, read_entries, read_failures, shard_name, shard_number

BATCH_PIXELS = 512 * 512  # a batch size is meant for images of so many; of larger ones fewer make a batch
LARGE = 1024 * 1024  # pixels above which an image is a batch of its own, and may be tiled


@dataclass(frozen=True)
class PlannedShard:
    """A shard as it is to be.

    Attributes:
        keys: of its images whose files are there, sorted.
        vanished: keys of those whose files are gone, sorted; they stay in the shard.
        record: of the shard as it is, None where it is new or its index is damaged.
        pruned: whether images are taken out.
    """

    name: str
    keys: tuple[str, ...]
    vanished: tuple[str, ...] = ()
    record: ShardRecord | None = None
    pruned: bool = False


@dataclass(frozen=True)
class Plan:
    """All shards in the order of their numbers, and the keys that were taken out."""

    shards: list[PlannedShard]
    dropped: list[str]
    damaged: list[str]  # what was wrong with indexes that had to be given up
    losses: list[Loss]  # images in those that are not among the images that are there


def plan_shards(
    store: Path, records: dict[str, ShardRecord], keys: Sequence[str], shard_size: int, prune: bool
) -> Plan:
    """Keep the shards that are there, and put new images, sorted, into new ones of `shard_size`.

    What a killed run has finished stays, and what remains is divided as it would have been: all shards of new
    images but the last are full, and the sorted images go to the free numbers in their order.

    Args:
        keys: of all images that are there, sorted.
        prune: take images out whose files are gone.
    """
    present, known = set(keys), set[str]()
    shards, dropped, damaged = list[PlannedShard](), list[str](), list[Remains]()
    for name, record in records.items():
        problem = damage(store, record, tensors=False)
        if problem is not None:
            damaged.append(read_remains(store, record, problem))
            continue
        members = sorted(
            [entry.key for entry in read_entries(store, name)]
            + [failure.key for failure in read_failures(store, name)]
        )
        known.update(members)
        gone = tuple(key for key in members if key not in present)
        there = tuple(key for key in members if key in present)
        if prune:
            dropped += gone
            if not there:
                continue
        shards.append(PlannedShard(name, there, () if prune else gone, record, prune and bool(gone)))
    losses = find_losses(damaged, present, known)
    if prune:
        dropped += [key for loss in losses for key in loss.keys]
    taken = {shard_number(shard.name) for shard in shards}
    free = (number for number in count() if number not in taken)
    new = _chunks((key for key in keys if key not in known), shard_size)
    shards += [PlannedShard(shard_name(number), chunk) for chunk, number in zip(new, free, strict=False)]
    shards.sort(key=lambda shard: shard_number(shard.name))
    return Plan(shards, dropped, [remains.problem for remains in damaged], losses)


class PlannedBatch(NamedTuple):
    """Images of one padded size."""

    keys: list[str]
    pixels: int  # of all of them


def plan_batches(sizes: dict[str, Size], ratio: int, batch_size: int) -> list[PlannedBatch]:
    """Batches of images that are of one size when padded; large images in smaller batches.

    Args:
        sizes: width and height by key, of what is to be encoded.
        ratio: sizes are padded to multiples of.
        batch_size: of images up to 512 x 512 pixels.

    Returns:
        The batches, those of large images first, so that memory runs out early if it does.
    """
    groups: dict[Size, list[str]] = {}
    for key in sorted(sizes):
        width, height = sizes[key]
        groups.setdefault((-(-width // ratio), -(-height // ratio)), []).append(key)
    batches = []
    for width, height in sorted(groups, key=lambda size: (-size[0] * size[1], size)):
        pixels = width * height * ratio**2
        for keys in _chunks(groups[width, height], batch_limit(pixels, batch_size)):
            batches.append(PlannedBatch(list(keys), pixels * len(keys)))
    return batches


def batch_limit(pixels: int, batch_size: int) -> int:
    """How many images of so many pixels make a batch."""
    if pixels > LARGE:
        return 1
    return max(1, min(batch_size, batch_size * BATCH_PIXELS // max(pixels, 1)))


def _chunks(keys: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    rest = iter(keys)
    while chunk := tuple(islice(rest, size)):
        yield chunk
