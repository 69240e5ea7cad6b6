"""Encoding folders of images to a store, as far as that is not done yet.

`encode_folder` is the whole story: images are found, the store is taken hold of, shards are planned and
compared with what is there (`planning`), encoded (`pipeline`) and put in place (`journal`). Several processes
do it together: each the shards whose number, modulo the count of processes, is its own.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from latentvae.base.errors import ImageError, NoMemoryError
from latentvae.images import captions
from latentvae.images.reading import PathLike
from latentvae.models.fingerprint import weight_hash
from latentvae.models.latents import Scaling
from latentvae.models.loading import spatial_compression_ratio
from latentvae.store import format as layout
from latentvae.store import planning, statistics
from latentvae.store.format import DtypeName, Entry, Failure, Manifest, Row
from latentvae.store.journal import Journal, joined, locked
from latentvae.store.pipeline import Batch, Computer, Loader, feed
from latentvae.store.planning import Loss, Plan, PlannedShard, Source
from latentvae.store.processes import Processes

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


@dataclass
class EncodeReport:
    """What a run did.

    Attributes:
        images: in the store now.
        encoded: by this run, failures included.
        failures: every image that could not be encoded, by this run or an earlier one.
        vanished: keys in the store whose files are gone.
        left_out: files of the folders that are no images that can be read, by suffix.
        dropped: keys that were taken out: their files are gone, and pruning was asked for.
        repaired: what was damaged.
        captions: of images whose captions could not be read, or only in an encoding that was guessed.
        unclaimed: caption files beside the images that belong to none of them.
        seconds: of examining, encoding and writing.
        waiting: share of the model's time in which it had nothing to do.
    """

    images: int = 0
    encoded: int = 0
    failures: list[Failure] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    unclaimed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    waiting: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Of what was encoded."""
        return self.encoded / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self) | {"images_per_second": self.images_per_second}


def encode_folder(
    vae: AutoencoderKL,
    sources: PathLike | Sequence[PathLike],
    store: PathLike,
    *,
    dtype: DtypeName = "bf16",
    size: int | None = None,
    crop: bool = False,
    no_upscale: bool = False,
    flips: bool = False,
    batch_size: int | None = None,
    shard_size: int | None = None,
    prune: bool = False,
    retry_failed: bool = False,
    rehash: bool = False,
    weights_sha256: str | None = None,
    workload: Workload | None = None,
) -> EncodeReport:
    """Encode images to a folder of latents, or bring one up to date; a killed run goes on where it was.

    Processes of `torchrun` and `accelerate launch` share the shards. The bytes depend on the images, the
    model and the options down to `shard_size`, but not on processes, threads or interruptions.

    Args:
        vae: the model, in eval mode.
        sources: image files and folders.
        store: the folder; new, empty, or a store of the same model and options.
        dtype: of the stored moments.
        size: None: images as they are. Pixels: scale and crop them to aspect ratios of about size x size.
        crop, no_upscale: with a size: to squares of it; or leave smaller images as large as they are.
        flips: store mirror images too.
        batch_size, shard_size: images (in a batch of up to 512 x 512 each). None: as the store; 8 and 1024.
        prune: take images out whose files are gone. retry_failed: try those again that could not be encoded.
        rehash: read all files again: one that was replaced by another of the same size and time is noticed.
        weights_sha256: `weight_hash` of the weights in float32, where `vae` was rounded. workload: threads.

    Raises:
        StoreError: another store, or one in use; a damaged shard with images that cannot be encoded again,
            without `prune`; a full disk; a process that is gone.
        ImageError: no image.
    """
    processes, folder, journal = Processes(), Path(store), Journal(Path(store))
    policy, weights = planning.preprocessing(vae, size, crop, no_upscale), weights_sha256 or weight_hash(vae)
    wanted = (dtype, policy, flips, batch_size, shard_size)

    def settings() -> Manifest:  # once the store is held: another run may have made it till then
        return planning.settle(vae, folder, journal.settings(), *wanted, weights_sha256=weights)

    try:
        left_out = Counter[str]()
        # 1. the images: where there are none, nothing is made
        files = planning.find_sources(sources, folder, left_out)
        with ExitStack() as held:
            # 2. the store: locked, and what a killed run left completed
            _begin(journal, settings, processes, held)
            worker = Worker(vae, journal, settings(), files, workload or Workload(), processes)
            return replace(_run(worker, prune, retry_failed, rehash, held), left_out=dict(left_out))
    except BaseException as error:  # Ctrl-C too: the others would wait for this process
        processes.fail(error)
        raise


def _begin(journal: Journal, settings: Callable[[], Manifest], processes: Processes, held: ExitStack) -> None:
    """Take hold of the store: the first process locks it and writes down what the run is about."""
    if processes.is_main:
        held.enter_context(locked(journal.store))
        for stray in journal.store.glob(".tmp??????"):  # safetensors' own, of a write that was killed
            stray.unlink(missing_ok=True)
        journal.begin(settings())
    processes.share("begun", None)  # the others need the lock to be held, and the journal to be there
    if not processes.is_main:
        held.enter_context(joined(journal.store, processes.rank))


def _run(worker: "Worker", prune: bool, retry_failed: bool, rehash: bool, held: ExitStack) -> EncodeReport:
    """Plan, examine what is there, encode the rest, and put the reports together.

    Raises:
        StoreError: images would be lost, and `prune` was not given.
    """
    start, journal, processes = time.perf_counter(), worker.journal, worker.processes
    keys, shard_size = list(worker.sources), worker.settings.shard_size
    # 3. which image belongs into which shard; each process plans for itself, and they must agree
    plan = planning.plan_shards(journal.store, journal.records(), keys, shard_size, prune)
    processes.share_same("files", repr(plan))
    # 4. all shards are checked before one is written: a refusal leaves the store as it was
    found = processes.share("checked", worker.check(plan.shards))
    losses = [*plan.losses, *(Loss(*loss) for part in found for loss in part)]
    if losses and not prune:
        if processes.is_main:
            journal.withdraw()
        _leave(processes, held)
        raise planning.refusal(journal.store, losses)
    # 5. what is new, changed or damaged is encoded
    mine = worker.encode(plan.shards, retry_failed, rehash)
    # 6. store.json
    report = _report(journal, plan, processes.share("done", mine))
    processes.share("reported", None)  # finishing deletes what the reports are made from
    if processes.is_main:
        journal.finish(worker.settings, [shard.name for shard in plan.shards])
        sources = worker.sources.values()
        report.unclaimed = captions.unclaimed(
            [each.path for each in sources], [each.root for each in sources]
        )
    report.seconds = time.perf_counter() - start
    _leave(processes, held)
    return report


def _leave(processes: Processes, held: ExitStack) -> None:
    """End together; the first process, whose lock is the last, then finds no other's."""
    if not processes.is_main:
        held.close()
    processes.leave()


def _report(journal: Journal, plan: Plan, parts: list[dict[str, Any]]) -> EncodeReport:
    """Put together what all processes did."""
    records = journal.records()  # what all processes wrote, not this one alone
    done = [records[shard.name] for shard in plan.shards]
    failed = [record.name for record in done if record.failed]
    unread = [str(loss) for loss in plan.losses if loss.unread]
    return EncodeReport(
        images=sum(record.count for record in done),
        encoded=sum(part["encoded"] for part in parts),
        failures=[failure for name in failed for failure in layout.read_failures(journal.store, name)],
        vanished=sorted({key for shard in plan.shards for key in shard.vanished}),
        dropped=plan.dropped,
        repaired=[*plan.damaged, *unread, *(problem for part in parts for problem in part["repaired"])],
        captions=[note for part in parts for note in part["captions"]],
        waiting=max(part["waiting"] for part in parts),
    )


@dataclass
class Worker:
    """One process's part of a run."""

    vae: AutoencoderKL
    journal: Journal
    settings: Manifest
    sources: dict[str, Source]
    work: Workload
    processes: Processes
    damaged: dict[str, str] = field(default_factory=dict)  # what is wrong, by name of the shard
    failed: bool = False  # a shard could not be written: the run is about to end

    def check(self, shards: list[PlannedShard]) -> list[Loss]:
        """Compare this process's shards with their hashes; what repairing the damaged ones would lose."""
        losses = []
        for shard in self._own(shards, "checking"):
            problem = layout.damage(self.journal.store, shard.record) if shard.record else None
            if problem is None:
                continue
            self.damaged[shard.name] = problem
            gone = set(shard.vanished)
            entries = layout.read_entries(self.journal.store, shard.name)
            keys = [entry.key for entry in entries if entry.key in gone]
            if keys:  # their moments stood in this shard alone
                losses.append(Loss(problem, keys))
        return losses

    def encode(self, shards: list[PlannedShard], retry_failed: bool, rehash: bool) -> dict[str, Any]:
        """Do this process's shards, which `check` has seen; what it did, as JSON values."""
        wanted: list[PlannedShard] = []
        for shard in self._own(shards, "examining"):
            damaged = shard.name in self.damaged
            finding = planning.inspect_shard(
                self.journal.store, shard, self.sources, retry_failed, rehash, damaged
            )
            if finding.encode:
                wanted.append(shard)
            elif finding.lists is not None and shard.record is not None:  # the tensors stay as they are
                self.journal.write(shard.name, shard.record.sha256, *finding.lists)
        return {
            "encoded": sum(len(shard.keys) for shard in wanted),
            "repaired": list(self.damaged.values()),
            "waiting": self._encode(wanted) if wanted else 0.0,
            "captions": [
                f"{entry.key}: {note}"
                for shard in self._own(shards, "reading captions")
                for entry in layout.read_entries(self.journal.store, shard.name, captions.PREFIX)
                for note in entry.notes
                if note.startswith(captions.PREFIX)
            ],
        }

    @property
    def _quiet(self) -> bool:
        return not (self.work.progress and self.processes.is_main)

    def _own(self, shards: list[PlannedShard], doing: str) -> "tqdm[PlannedShard]":
        """This process's share, decided by the shards' numbers alone; with a bar where it takes long."""
        rank, world = self.processes.rank, self.processes.world
        own = [shard for shard in shards if layout.shard_number(shard.name) % world == rank]
        return tqdm(own, doing, unit="shard", disable=self._quiet, delay=2, leave=False)

    def _encode(self, shards: list[PlannedShard]) -> float:
        """Encode shards one after the other, and return the share of time that the model waited."""
        threads = self.work.threads or torch.get_num_threads()
        workers = self.work.workers or min(16, os.cpu_count() or 1)
        settings, total = self.settings, sum(len(shard.keys) for shard in shards)
        ratio = spatial_compression_ratio(self.vae)
        loader = Loader(self.sources, settings.preprocessing, ratio, settings.batch_size, settings.flips)
        writing = deque[Future[None]]()
        disk = ThreadPoolExecutor(1, "latentvae-write")  # the model need not wait for it
        with (
            Computer(self.vae, settings.torch_dtype, threads) as computer,
            tqdm(total=total, desc="encoding", unit="image", disable=self._quiet) as bar,
            ExitStack() as ending,
        ):
            # after Ctrl-C or an error the shard that is being written is finished, and no other begun
            ending.callback(disk.shutdown, cancel_futures=True)
            current: Pending | None = None
            failed = 0

            def show() -> None:
                bar.set_postfix({"waiting for data": f"{computer.waiting:.0%}"}, refresh=False)
                bar.update(computer.encoded + failed - bar.n)

            for batch in feed(loader, shards, workers):
                current = current or self._begun(batch.shard)
                self._add(batch, current, computer)
                failed += len(batch.failures)
                show()
                if batch.last:
                    writing.append(disk.submit(self._write, current))
                    current = None
                # results of what is done are asked for at once, because a full disk shows there
                while len(writing) > UNWRITTEN or (writing and writing[0].done()):
                    writing.popleft().result()
            for each in writing:
                each.result()
            waiting = computer.waiting
            show()
            return waiting

    def _begun(self, shard: PlannedShard) -> "Pending":
        """A shard with what has no file any more carried over; of a damaged one, `check` saw, no image is."""
        pending, store, gone = Pending(shard.name), self.journal.store, set(shard.vanished)
        if gone:
            failures = layout.read_failures(store, shard.name)
            pending.failures += [failure for failure in failures if failure.key in gone]
            if shard.name not in self.damaged:
                pending.rows += layout.read_rows(store, shard.name, gone)
        return pending

    def _add(self, batch: Batch, pending: "Pending", computer: Computer) -> None:
        pending.failures += batch.failures
        if not batch.images:
            return
        one, room = batch.images[0], self.work.room
        try:
            alone = room(Path(one.entry.source), *one.image.shape[-2:]) if room and batch.is_large else None
            submitted = computer.alone(batch.images, alone) if alone else computer.submit(batch.images)
            pending.computing.append(([each.entry for each in batch.images], submitted))
        except ImageError as error:
            pending.failures.append(_failure(one.entry, error))

    def _write(self, pending: "Pending") -> None:
        """Write a shard when its moments are there; none after one that could not be written."""
        if self.failed:
            return
        try:
            pending.collect()
            tensors, entries = layout.assemble(pending.rows)
            tensors |= statistics.summarize(tensors, entries, Scaling.of(self.settings))
            self.journal.write(pending.name, tensors, entries, pending.failures)
        except BaseException:
            self.failed = True
            raise


@dataclass
class Pending:
    """A shard whose moments are still being computed."""

    name: str
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    computing: list[tuple[list[Entry], Future[list[Row]]]] = field(default_factory=list)

    def collect(self) -> None:
        """Wait for the moments; images whose moments are not finite have failed."""
        for entries, future in self.computing:
            try:
                rows = future.result()
            except NoMemoryError as error:  # the others go on; a later run tries these again
                self.failures += [_failure(entry, error) for entry in entries]
                continue
            for row in rows:
                if row.is_finite:
                    self.rows.append(row)
                else:
                    self.failures.append(_failure(row.entry, ImageError(NOT_FINITE.format(row.entry.source))))


def _failure(entry: Entry, error: ImageError) -> Failure:
    """An image that could not be encoded; without a hash, so that later runs try it, where memory was why."""
    sha256 = None if isinstance(error, NoMemoryError) else entry.sha256
    return Failure(entry.key, entry.source, sha256, entry.size_bytes, entry.mtime_ns, str(error))
