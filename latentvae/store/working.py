"""One process's part of encoding: examine its shards, encode those that need it, write them."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from latentvae.errors import ImageError
from latentvae.model import spatial_compression_ratio
from latentvae.store.assembling import Assembly, Row
from latentvae.store.computing import Computer, Moments
from latentvae.store.examining import examine
from latentvae.store.feeding import Batch, feed
from latentvae.store.journal import Journal
from latentvae.store.loading import Loaded, Loader
from latentvae.store.manifest import Manifest
from latentvae.store.planning import LARGE, PlannedShard
from latentvae.store.processes import Processes
from latentvae.store.salvage import Loss
from latentvae.store.shard import Failure, damage, read_entries, read_failures, shard_number
from latentvae.store.sources import Source

NOT_FINITE = "{} gives moments that are NaN or infinite: encode in a precision of wider range (fp32, bf16)"
UNWRITTEN = 2  # shards whose moments may be in memory besides the one that is being encoded

Room = Callable[[Path, int, int], AbstractContextManager[object] | None]


@dataclass(frozen=True)
class Workload:
    """How a run works; nothing here changes what it makes.

    Attributes:
        threads: batches the model works on at once, on a CPU; None: as many as torch has threads.
        workers: threads that load images; None: as many as there are cores, up to 16.
        room: called with path, height and width of an image above 1024 x 1024 pixels. Gives the context in
            which to encode it while nothing else is, or None where there is room enough; that, or entering
            the context, may raise ImageError.
        progress: show a bar.
    """

    threads: int | None = None
    workers: int | None = None
    room: Room | None = None
    progress: bool = False


class Worker:
    """One process's part of a run."""

    def __init__(
        self,
        vae: AutoencoderKL,
        journal: Journal,
        settings: Manifest,
        sources: dict[str, Source],
        work: Workload,
        processes: Processes,
    ) -> None:
        self.vae, self.journal, self.settings, self.sources = vae, journal, settings, sources
        self.work, self.processes = work, processes
        self.quiet = not (work.progress and processes.is_main)
        self.damaged: dict[str, str] = {}  # what is wrong, by name of the shard
        self.loader = Loader(
            sources,
            settings.preprocessing,
            spatial_compression_ratio(vae),
            settings.batch_size,
            settings.flips,
        )

    def check(self, shards: list[PlannedShard]) -> list[Loss]:
        """Compare this process's shards with their hashes; what repairing the damaged ones would lose."""
        losses = []
        for shard in self._bar(self._own(shards), "checking"):
            problem = damage(self.journal.store, shard.record) if shard.record else None
            if problem is None:
                continue
            self.damaged[shard.name] = problem
            gone = set(shard.vanished)
            keys = [entry.key for entry in read_entries(self.journal.store, shard.name) if entry.key in gone]
            if keys:
                losses.append(Loss(problem, keys))
        return losses

    def encode(self, shards: list[PlannedShard], retry_failed: bool) -> dict[str, Any]:
        """Do this process's shards, which `check` has seen; what it did, as JSON values."""
        wanted: list[PlannedShard] = []
        for shard in self._bar(self._own(shards), "examining"):
            damaged = shard.name in self.damaged
            finding = examine(self.journal.store, shard, self.sources, retry_failed, damaged)
            if finding.encode:
                wanted.append(shard)
            elif finding.lists is not None and shard.record is not None:
                self.journal.write(shard.name, shard.record.sha256, *finding.lists)
        waiting = self._encode(wanted) if wanted else 0.0
        return {
            "encoded": sum(len(shard.keys) for shard in wanted),
            "repaired": list(self.damaged.values()),
            "waiting": waiting,
        }

    def _own(self, shards: list[PlannedShard]) -> list[PlannedShard]:
        rank, world = self.processes.rank, self.processes.world
        return [shard for shard in shards if shard_number(shard.name) % world == rank]

    def _bar(self, shards: list[PlannedShard], doing: str) -> "tqdm[PlannedShard]":
        return tqdm(shards, doing, unit="shard", disable=self.quiet, delay=2, leave=False)

    def _encode(self, shards: list[PlannedShard]) -> float:
        """Encode shards one after the other, and return the share of time that the model waited."""
        threads = self.work.threads or torch.get_num_threads()
        workers = self.work.workers or min(16, os.cpu_count() or 1)
        total = sum(len(shard.keys) for shard in shards)
        with (
            Computer(self.vae, self.settings.torch_dtype, threads) as computer,
            tqdm(total=total, desc="encoding", unit="image", disable=self.quiet) as bar,
            Writer(self.journal) as writer,
        ):
            current: Pending | None = None
            failed = 0

            def show() -> None:
                bar.set_postfix({"waiting for data": f"{computer.waiting:.0%}"}, refresh=False)
                bar.update(computer.encoded + failed - bar.n)

            for batch in feed(self.loader, shards, workers):
                if current is None:
                    current = Pending(batch.shard)
                    self._keep(current)
                self._add(batch, current, computer)
                failed += len(batch.failures)
                show()
                if batch.last:
                    writer.write(current)
                    current = None
            writer.finish()
            waiting = computer.waiting
            show()
            return waiting

    def _keep(self, pending: "Pending") -> None:
        """Carry over what has no file any more; of a damaged shard, `check` made sure, that is no image."""
        shard, store = pending.shard, self.journal.store
        if not shard.vanished:
            return
        if shard.name in self.damaged:
            pending.assembly.failures += [
                failure for failure in read_failures(store, shard.name) if failure.key in shard.vanished
            ]
        else:
            pending.assembly.keep(store, shard)

    def _add(self, batch: Batch, pending: "Pending", computer: Computer) -> None:
        pending.assembly.failures += batch.failures
        if not batch.images:
            return
        one, room = batch.images[0], self.work.room
        try:
            alone = room and batch.pixels > LARGE and room(Path(one.entry.source), *one.image.shape[-2:])
            submitted = computer.alone(batch.images, alone) if alone else computer.submit(batch.images)
            pending.computing.append((batch.images, submitted))
        except ImageError as error:
            pending.assembly.failures.append(_failure(one, str(error)))


@dataclass
class Pending:
    """A shard whose moments are still being computed."""

    shard: PlannedShard
    assembly: Assembly = field(default_factory=Assembly)
    computing: list[tuple[list[Loaded], Future[Moments]]] = field(default_factory=list)

    def collect(self) -> Assembly:
        """Wait for the moments; images whose moments are not finite have failed."""
        for images, future in self.computing:
            moments = future.result()
            flipped = [None] * len(images) if moments.flipped is None else list(moments.flipped)
            for one, plain, mirrored in zip(images, moments.plain, flipped, strict=True):
                row = Row(one.entry, plain, mirrored)
                if row.is_finite:
                    self.assembly.rows.append(row)
                else:
                    self.assembly.failures.append(_failure(one, NOT_FINITE.format(one.entry.source)))
        return self.assembly


class Writer:
    """Writes shards in a thread of its own, so that the model need not wait for the disk."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._thread = ThreadPoolExecutor(1, "latentvae-write")
        self._writing: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def write(self, pending: Pending) -> None:
        """Write a shard when its moments are there; waits where too many are waiting."""
        self._writing.append(self._thread.submit(self._write, pending))
        while len(self._writing) > UNWRITTEN or (self._writing and self._writing[0].done()):
            self._writing.popleft().result()

    def finish(self) -> None:
        """Wait until all is written."""
        while self._writing:
            self._writing.popleft().result()

    def _write(self, pending: Pending) -> None:
        if self._failed:  # the run is about to end
            return
        try:
            assembly = pending.collect()
            tensors, entries = assembly.tensors()
            self.journal.write(pending.shard.name, tensors, entries, assembly.failures)
        except BaseException:
            self._failed = True
            raise


def _failure(one: Loaded, reason: str) -> Failure:
    entry = one.entry
    return Failure(entry.key, entry.source, entry.sha256, entry.size_bytes, entry.mtime_ns, reason)
