"""Batches for the model, loaded by threads while it computes: a bounded number of images ahead."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from latentvae.store import threads
from latentvae.store.loading import Loaded, Loader
from latentvae.store.planning import BATCH_PIXELS, PlannedBatch, PlannedShard, batch_limit
from latentvae.store.shard import Failure


class Batch(NamedTuple):
    """Images of one shard and one padded size, and those that could not be loaded."""

    shard: PlannedShard
    images: list[Loaded]
    failures: list[Failure]
    last: bool  # of its shard

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.images[0].image[0].numel() if self.images else 0


class _Ahead(NamedTuple):
    shard: PlannedShard
    planned: PlannedBatch
    loading: list[Future[Loaded | Failure]]
    last: bool


def feed(loader: Loader, shards: Iterable[PlannedShard], workers: int) -> Iterator[Batch]:
    """The images of all shards in batches, shard after shard; the last of each shard says so.

    Args:
        workers: threads that load. About twice as many images, or two batches, are in memory at once.
    """
    pool = threads.pool(workers, "latentvae-load")
    ahead: deque[_Ahead] = deque()
    most = 2 * max(loader.batch_size, workers)
    try:
        for shard, planned, last in _planned(loader, shards, pool):
            loading = [pool.submit(loader.load, key) for key in planned.keys]
            ahead.append(_Ahead(shard, planned, loading, last))
            while _is_enough(ahead, most):
                yield from _loaded(ahead.popleft(), loader.batch_size)
        while ahead:
            yield from _loaded(ahead.popleft(), loader.batch_size)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _is_enough(ahead: deque[_Ahead], most: int) -> bool:
    """Whether more images or pixels are waiting than the model needs."""
    images = sum(len(one.loading) for one in ahead)
    pixels = sum(one.planned.pixels for one in ahead)
    return len(ahead) > 1 and (images > most or pixels > most * BATCH_PIXELS)


def _planned(
    loader: Loader, shards: Iterable[PlannedShard], pool: ThreadPoolExecutor
) -> Iterator[tuple[PlannedShard, PlannedBatch, bool]]:
    """(shard, batch, whether it is the last), each shard planned while the one before it is loaded."""
    waiting: deque[tuple[PlannedShard, Future[list[PlannedBatch]]]] = deque()
    for shard in shards:
        waiting.append((shard, pool.submit(loader.plan, shard)))
        if len(waiting) > 1:
            yield from _each(*waiting.popleft())
    while waiting:
        yield from _each(*waiting.popleft())


def _each(
    shard: PlannedShard, planning: Future[list[PlannedBatch]]
) -> Iterator[tuple[PlannedShard, PlannedBatch, bool]]:
    batches = planning.result() or [PlannedBatch([], 0)]  # a shard of vanished images only still has an end
    for number, batch in enumerate(batches, 1):
        yield shard, batch, number == len(batches)


def _loaded(one: _Ahead, batch_size: int) -> Iterator[Batch]:
    """What was planned as one batch; several where headers were wrong."""
    results = [future.result() for future in one.loading]
    failures = [result for result in results if isinstance(result, Failure)]
    groups: dict[tuple[int, ...], list[Loaded]] = {}
    for result in results:
        if isinstance(result, Loaded):
            groups.setdefault(tuple(result.image.shape), []).append(result)
    parts: list[list[Loaded]] = []
    for shape, images in groups.items():
        most = batch_limit(shape[1] * shape[2], batch_size)
        parts += [images[start : start + most] for start in range(0, len(images), most)]
    for number, images in enumerate(parts or [[]], 1):
        end = number == max(len(parts), 1)
        yield Batch(one.shard, images, failures if end else [], one.last and end)
