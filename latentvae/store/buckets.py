"""Batches of latents of one size each, for stores that hold several."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from latentvae.base.errors import StoreError
from latentvae.store.dataset import LatentDataset
from latentvae.store.format import latent_size


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of image numbers, all of one latent size each; a DataLoader's `batch_sampler`.

    All ranks get equally many batches, and no image twice in an epoch. Batches are full but for the last of
    each size, and for a few that are halved so that the ranks come out even; where that cannot be, fewer than
    `world` batches are left out of an epoch, others in each.

    The sizes come from the shards' headers, and from the indexes of shards that hold several sizes, once,
    when the first batch is wanted; then 4 bytes per image stay in memory, and 8 more while an epoch runs.

    Args:
        dataset: over the store.
        batch_size: images of one batch.
        seed: of the order, with the epoch.
        shuffle: False: in the store's order, size by size.
        drop_last: leave out batches that are not full.
        rank: of this process.
        world: how many processes share the batches. With Accelerate's `prepare`, which divides batches
            itself, leave it at 1 and pass `drop_last=True`.

    Raises:
        StoreError: an option that is out of range; on use, a shard that is gone or damaged.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or seed < 0 or not 0 <= rank < world:
            raise StoreError(
                f"batch_size={batch_size}, seed={seed}, rank={rank}, world={world} came; wanted a batch size "
                "of 1 or more, a seed that is not negative, and a rank from 0 to world - 1."
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.rank, self.world, self.epoch = rank, world, 0
        self._buckets: np.ndarray | None = None  # (images,), found when they are first wanted
        self._sizes: list[tuple[int, int]] = []

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew from the next pass on; the dataset's draws have a `set_epoch` of their own."""
        self.epoch = epoch

    @property
    def sizes(self) -> dict[tuple[int, int], int]:
        """How many images there are of each latent size (h, w)."""
        counts = np.bincount(self._bucket_of_each(), minlength=len(self._sizes))
        return dict(zip(self._sizes, counts.tolist(), strict=True))

    def __len__(self) -> int:
        counts = np.array(list(self.sizes.values()))
        whole, rest = counts // self.batch_size, counts % self.batch_size
        if self.drop_last:
            return int(whole.sum()) // self.world
        # counted without planning: as many as `_plan` makes, and those of two images or more can be halved
        batches = int(whole.sum() + (rest > 0).sum())
        divisible = int((rest > 1).sum()) + (int(whole.sum()) if self.batch_size > 1 else 0)
        return batches // self.world + (0 < -batches % self.world <= divisible)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._plan()
        for number in range(len(self)):
            yield batches[number * self.world + self.rank].tolist()  # every rank plans all, and takes its own

    def _plan(self) -> list[np.ndarray]:
        """The batches of this epoch for all ranks, the same on each."""
        random = np.random.default_rng((self.seed, self.epoch))  # no rank's own: they must agree
        buckets, batches = self._bucket_of_each(), []
        for bucket in range(len(self._sizes)):
            images = np.flatnonzero(buckets == bucket)
            if self.shuffle:
                random.shuffle(images)
            batches += [images[at : at + self.batch_size] for at in range(0, len(images), self.batch_size)]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        if self.shuffle:
            batches = [batches[at] for at in random.permutation(len(batches))]
        return batches if self.drop_last else _divide(batches, -len(batches) % self.world)

    def _bucket_of_each(self) -> np.ndarray:
        """Which of the sizes each image has, (images,) int32."""
        if self._buckets is None:
            reader, numbers = self.dataset.reader, dict[str, int]()
            parts = [
                np.array(
                    [numbers.setdefault(name, len(numbers)) for name in reader.tensor_names(shard)], np.int32
                )
                for shard in reader.manifest.shards
            ]
            self._buckets, self._sizes = np.concatenate(parts), [latent_size(name) for name in numbers]
        return self._buckets


def _divide(batches: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Halve `count` batches, the last that can be, in place; none where there are too few of them."""
    able = [at for at, batch in enumerate(batches) if len(batch) > 1][-count:] if count else []
    if len(able) < count:
        return batches
    for at in reversed(able):  # from the end: halving one moves those after it
        middle = len(batches[at]) // 2
        batches[at : at + 1] = [batches[at][:middle], batches[at][middle:]]
    return batches
