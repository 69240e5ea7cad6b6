"""Batches of a store that is too large, or too far away, to be read at random: shard after shard, shuffled.

The order is drawn from (seed, epoch, rank) before anything is read, so that it does not depend on workers,
and an epoch goes on in its middle without what came before being read again.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from latentvae.base.addresses import Address, Place
from latentvae.base.errors import StoreError
from latentvae.store.dataset import Item, LatentDataset, StoreReader
from latentvae.store.format import ShardRecord

BUFFER = 16 * 1024  # images
FETCHERS = 4  # threads of a worker

State = dict[str, Any]


class Piece(NamedTuple):
    """Images of one shard, numbered as in the store: all, or some where ranks meet."""

    shard: ShardRecord
    numbers: range


class LatentStream(IterableDataset[Item]):
    """Batches of latents in another order in each epoch, for `DataLoader(stream, batch_size=None)`.

    Shards are taken in random order, a share for each rank; as many as hold `buffer` images are shuffled
    together, image by image, while the next ones are fetched. So each shard is read once in an epoch, by one
    rank, or by two where their shares meet.

    A batch holds what `LatentDataset` gives, collated, of one latent size; and `state`, from which
    `load_state_dict` goes on after this batch, with any number of workers. All ranks get `len(stream)`
    batches. They are full but for the last of each size; what has not filled a batch by then is left out,
    fewer than `batch_size` images of a rank where all have one size.

    Args:
        store: the folder that `latentvae encode` wrote, or its address, such as s3://bucket/latents.
        batch_size: images of one batch.
        buffer: images that are shuffled together, at least. Of a store at an address the shards of two
            buffers are on this machine at once, so `cache_bytes` should have room for them.
        shuffle: False: in the store's order, a share for each rank.
        rank: of this process; world: how many there are. Do not let Accelerate's `prepare` divide it again.
        seed: of the order and of all draws.
        options: of `LatentDataset`: mode, flip, scaled, caption_keys, label_key, cache, cache_bytes.

    Raises:
        StoreError: as `LatentDataset`; or more ranks than images.
    """

    def __init__(
        self,
        store: str | Place,
        batch_size: int,
        *,
        buffer: int = BUFFER,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if batch_size < 1 or buffer < 1 or not 0 <= rank < world:
            raise StoreError(
                f"batch_size={batch_size}, buffer={buffer}, rank={rank}, world={world} came; wanted a batch "
                "size and a buffer of 1 or more, and a rank from 0 to world - 1."
            )
        self.dataset = LatentDataset(store, seed=seed, **options)
        if world > len(self.dataset):
            raise StoreError(f"{store} holds {len(self.dataset)} images, too few for {world} ranks.")
        self.batch_size, self.buffer, self.shuffle = batch_size, buffer, shuffle
        self.rank, self.world = rank, world
        self._resumed: State | None = None

    def __len__(self) -> int:
        return max(1, len(self.dataset) // self.world // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Another order and other draws, from the next pass on; a state that was loaded is forgotten."""
        self.dataset.set_epoch(epoch)

    def load_state_dict(self, state: State) -> None:
        """Go on after the batch that a state came with: its epoch's next pass has the batches that are left.

        Call it before a DataLoader starts its workers. Each rank has states of its own.

        Raises:
            StoreError: it is of another store, another rank or other options.
        """
        own = self._identity()
        if not isinstance(state, dict) or state.keys() != {
            "of",
            "epoch",
            "batches",
            "block",
            "within",
            "open",
        }:
            raise StoreError(f"{str(state)[:80]} came; wanted the `state` of a batch of a LatentStream.")
        if differing := [name for name in own if state["of"].get(name) != own[name]]:
            was, now = (
                ", ".join(f"{name} {of.get(name)}" for name in differing) for of in (state["of"], own)
            )
            raise StoreError(f"this state is of a stream with {was}; this one has {now}. Make it alike.")
        self.set_epoch(state["epoch"])
        self._resumed = state

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        state, resumed = self._start(), self._resumed
        if resumed is not None and resumed["epoch"] == self.dataset.epoch:
            state = resumed
        # every worker plans all batches, and makes those that a DataLoader takes from it in its turn
        for turn, (numbers, after) in enumerate(self._batches(state, worker)):
            if turn % workers == worker:
                batch: Item = default_collate([self.dataset[number] for number in numbers])
                yield {**batch, "state": after}

    def _identity(self) -> dict[str, Any]:
        """What a state holds for."""
        shards = "".join(shard.sha256 for shard in self.dataset.manifest.shards)
        store = hashlib.sha256(shards.encode()).hexdigest()[:16]
        names = ("batch_size", "buffer", "shuffle", "rank", "world")
        return {"store": store, "seed": self.dataset.seed, **{name: getattr(self, name) for name in names}}

    def _start(self) -> State:
        epoch = self.dataset.epoch
        return {"of": self._identity(), "epoch": epoch, "batches": 0, "block": 0, "within": 0, "open": {}}

    def _batches(self, state: State, worker: int) -> Iterator[tuple[list[int], State]]:
        """The numbers of each batch's images from a state on, and the state after it."""
        count, blocks = state["batches"], self._blocks()
        # images that have not filled a batch yet, by their tensors' name, when a block begins
        open_ = {name: list(numbers) for name, numbers in state["open"].items()}
        skip = state["within"]
        for block in range(state["block"], len(blocks) + 1):
            before = {name: list(numbers) for name, numbers in open_.items()}
            full = self._fill(blocks, block, open_, worker) if block < len(blocks) else _rest(open_)
            for within, numbers in enumerate(full, 1):
                if within <= skip:
                    continue
                if count == len(self):
                    return
                count += 1
                yield numbers, {**state, "batches": count, "block": block, "within": within, "open": before}
            skip = 0

    def _fill(
        self, blocks: list[list[Piece]], block: int, open_: dict[str, list[int]], worker: int
    ) -> Iterator[list[int]]:
        """Full batches of a block's images; what is left stays in `open_`."""
        reader, names = self.dataset.reader, dict[int, str]()
        with _fetching(reader, _turned(blocks[block], worker)):
            for piece in blocks[block]:
                first, found = reader.first(piece.shard), reader.tensor_names(piece.shard)
                names |= {number: found[number - first] for number in piece.numbers}
        order = np.array(list(names))
        if self.shuffle:
            np.random.default_rng((self.dataset.seed, self.dataset.epoch, self.rank, block)).shuffle(order)
        following = blocks[block + 1] if block + 1 < len(blocks) else []
        with _fetching(reader, _turned(following, worker)):
            for number in order.tolist():
                waiting = open_.setdefault(names[number], [])
                waiting.append(number)
                if len(waiting) == self.batch_size:
                    yield list(waiting)
                    waiting.clear()

    def _blocks(self) -> list[list[Piece]]:
        """This rank's share of the shards, in their order of this epoch, as they are shuffled together."""
        shards = [shard for shard in self.dataset.manifest.shards if shard.count]
        if self.shuffle:  # all ranks must agree
            random = np.random.default_rng((self.dataset.seed, self.dataset.epoch))
            shards = [shards[at] for at in random.permutation(len(shards))]
        share = len(self.dataset) // self.world
        low, high = self.rank * share, (self.rank + 1) * share
        blocks, held = list[list[Piece]](), self.buffer
        for shard, end in zip(shards, accumulate(shard.count for shard in shards), strict=True):
            begin = end - shard.count
            if begin >= high or end <= low:
                continue
            if held >= self.buffer:
                blocks.append([])
                held = 0
            first = self.dataset.reader.first(shard)
            numbers = range(first + max(low - begin, 0), first + min(high, end) - begin)
            blocks[-1].append(Piece(shard, numbers))
            held += len(numbers)
        return blocks


def _rest(waiting: dict[str, list[int]]) -> Iterator[list[int]]:
    """Batches that are not full, the larger ones first."""
    yield from (list(some) for _, some in sorted(waiting.items(), key=lambda e: (-len(e[1]), e[0])) if some)


def _turned(pieces: list[Piece], by: int) -> list[Piece]:
    """Begun elsewhere, so that workers that fetch at once do not wait for each other."""
    return pieces[by % len(pieces) :] + pieces[: by % len(pieces)] if pieces else []


@contextmanager
def _fetching(reader: StoreReader, pieces: Iterable[Piece]) -> Iterator[None]:
    """Bring shards of an address here meanwhile; what cannot be had is named once it is needed."""
    if not isinstance(reader.store, Address):
        yield
        return
    pool = ThreadPoolExecutor(FETCHERS, "latentvae-fetch")
    try:
        for piece in pieces:
            pool.submit(reader.fetch, piece.shard)
        yield
    finally:
        pool.shutdown(cancel_futures=True)
