"""Encoding folders of images to a store, as far as that is not done yet.

`encode_folder` is the whole story: images are found, the store is taken hold of, shards are planned and
compared with what is there (`planning`), encoded (`pipeline`) and put in place (`journal`). Several parts
make one store (`parts`), together or one after the other: each does the shards of its own, and who ends last,
or `finish_store`, writes the list of them.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from latentvae.base.addresses import place
from latentvae.base.errors import ImageError, StoreError
from latentvae.base.files import check_local, partial_path
from latentvae.base.repeatable import same_bits
from latentvae.images import captions
from latentvae.images.reading import PathLike
from latentvae.images.sources import Spec
from latentvae.models.fingerprint import weight_hash
from latentvae.models.latents import Scaling
from latentvae.models.loading import spatial_compression_ratio
from latentvae.store import format as layout
from latentvae.store import parts, planning, remote, statistics
from latentvae.store.format import DtypeName, Entry, Failure, Manifest, Row, StoredShard
from latentvae.store.journal import Claim, Hold, Journal, alive, locked, moment
from latentvae.store.parts import WHOLE, Part
from latentvae.store.pipeline import Batch, Computer, Loader, Pending, begun, failure_of, feed
from latentvae.store.planning import Loss, Plan, PlannedShard, ShardWork, Source
from latentvae.store.settings import preprocessing, settle

UNWRITTEN = 2  # shards whose moments may be in memory besides the one that is being encoded

Room = Callable[[str, int, int], AbstractContextManager[object] | None]
Moments = tuple[ShardWork, list[Row], list[Failure]]
# takes the store's settings, the images by key and the shards; gives each one's images in any order
Engine = Callable[[Manifest, dict[str, Source], list[ShardWork]], Iterator[Moments]]


@dataclass(frozen=True)
class Workload:
    """How a run works; nothing here changes what it makes.

    Attributes:
        threads: batches the model works on at once, on a CPU; None: as many as torch has threads.
        workers: threads that load images; None: as many as there are cores, up to 16.
        room: called with name, height and width of an image above 1024 x 1024 pixels. Gives the context in
            which to encode it while nothing else is, or None where there is room enough; that, or entering
            the context, may raise ImageError.
        progress: show a bar.
        part: of several; None: as torchrun, accelerate or a Slurm array says, else the whole.
        engine: encodes shards elsewhere, such as `cluster.Ray`; None: this process.
    """

    threads: int | None = None
    workers: int | None = None
    room: Room | None = None
    progress: bool = False
    part: Part | None = None
    engine: Engine | None = None


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
        part: which this was, "0/1" of a run in one.
        missing: parts that have shards to do still, each with its count; empty once `store.json` is written.
        others: processes that are still at it, the last of which will write `store.json`.
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
    part: str = str(WHOLE)
    missing: dict[str, int] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Of what was encoded."""
        return self.encoded / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self) | {"images_per_second": self.images_per_second}


def encode_folder(
    vae: AutoencoderKL,
    sources: Spec | Sequence[Spec],
    store: Spec,
    *,
    dtype: DtypeName = "bf16",
    size: int | None = None,
    crop: bool = False,
    no_upscale: bool = False,
    flips: bool = False,
    column: str | None = None,
    batch_size: int | None = None,
    shard_size: int | None = None,
    prune: bool = False,
    retry_failed: bool = False,
    rehash: bool = False,
    weights_sha256: str | None = None,
    workload: Workload | None = None,
) -> EncodeReport:
    """Encode images to a store of latents, or bring one up to date; a killed run goes on where it was.

    Of several parts (`Workload.part`) each does its shards. The bytes depend on the images, the model and the
    options down to `shard_size`, but not on parts, threads or interruptions.

    Args:
        vae: the model, in eval mode.
        sources: files, folders, shards, tables, lists, patterns: see `latentvae.images.sources.open_source`.
        store: a folder or an address (see `remote`); new, empty, or a store of the same model and options.
        dtype: of the moments in it.
        size: None: images as they are. Pixels: scale and crop them to aspect ratios of about size x size.
        crop, no_upscale: with a size: to squares of it; or leave smaller images as large as they are.
        flips: store mirror images too. column: where images are, of tables, lists and shards; None: found.
        batch_size, shard_size: images (in a batch of up to 512 x 512 each). None: as the store; 8 and 1024.
        prune: take images out whose files are gone. retry_failed: try those again that could not be encoded.
        rehash: read all files again: one that was replaced by another of the same size and time is noticed.
        weights_sha256: `weight_hash` of the weights in float32, where `vae` was rounded. workload: threads.

    Raises:
        StoreError: another store, or one in use; a damaged shard with images that cannot be encoded again,
            without `prune`; a full disk; other images than a part that is at it has; a part at an address.
        ImageError: no image. SourceError: an address that cannot be read, or written.
    """
    where, work = place(store), workload or Workload()
    part = work.part or parts.of_environment()
    policy, weights = preprocessing(vae, size, crop, no_upscale), weights_sha256 or weight_hash(vae)
    wanted = (dtype, policy, flips, batch_size, shard_size)
    left_out = Counter[str]()
    # 1. the images: where there are none, nothing is made
    files = planning.find_sources(sources, where, left_out, column)
    with remote.here(where, part, rehash) as journal, locked(journal.store, part) as hold:
        # 2. the store, once it is held: another run may have made it till then
        with moment(journal.store):
            journal.recover()
            settings = settle(vae, journal.store, journal.settings(), *wanted, weights_sha256=weights)
            _begin(journal, settings, hold, Claim.of(list(files), prune, part))
        with same_bits():
            report = _run(
                Worker(vae, journal, settings, files, work, part), hold, prune, retry_failed, rehash
            )
    return replace(report, left_out=dict(left_out))


def finish_store(
    sources: Spec | Sequence[Spec], store: PathLike, *, column: str | None = None
) -> EncodeReport:
    """Write `store.json` once all parts are done; it is done already where the last of them saw to it.

    Args:
        sources, column: as the parts had them.

    Raises:
        StoreError: parts are missing, which are named; or a process is still at it.
    """
    check_local(store, StoreError)
    folder, journal, left_out = Path(store), Journal(Path(store)), Counter[str]()
    files = planning.find_sources(sources, folder, left_out, column)
    if (settings := journal.settings()) is None:
        raise StoreError(f"no part of {store} has been encoded: run the parts first, --part 0/N and so on.")
    with moment(folder):
        if others := alive(folder):
            raise StoreError(
                f"{store} is still being written by {', '.join(others)}: wait until that is done."
            )
        journal.recover()
        claim, keys = journal.claimed(), list(files)
        world, prune = (claim.world, claim.prune) if claim else (1, False)
        plan = planning.plan_shards(journal.found(), keys, settings.shard_size, prune)
        generation = journal.generation(plan.keys)
        plan = planning.plan_shards(journal.found(generation), keys, settings.shard_size, prune)
        report = replace(_report(plan, {}), missing=_missing(plan, world))
        if report.missing:
            raise StoreError(
                f"{store} is not whole: {describe(report.missing)} Run these, then --finish again."
            )
        if claim is not None:
            _finish(journal, settings, plan, files, report)
    return replace(report, left_out=dict(left_out))


def describe(missing: dict[str, int]) -> str:
    """Which parts are missing, for people."""
    total = sum(missing.values())
    named = ", ".join(f"--part {part} ({count})" for part, count in missing.items())
    return f"{total} {'shards of it are' if total > 1 else 'shard of it is'} still to be encoded: {named}."


def _begin(journal: Journal, settings: Manifest, hold: Hold, claim: Claim) -> None:
    """Write down what the run is about, and complete what a killed one left."""
    others = hold.others()
    if not others:
        for stray in journal.store.glob(".tmp??????"):  # safetensors' own, of a write that was killed
            stray.unlink(missing_ok=True)
    journal.begin(settings, hold.part, others)
    journal.claim(claim, others)


def _run(worker: "Worker", hold: Hold, prune: bool, retry_failed: bool, rehash: bool) -> EncodeReport:
    """Plan, examine what is there, encode the rest, and report; the last part writes `store.json`.

    Raises:
        StoreError: images would be lost, and `prune` was not given.
    """
    start, journal = time.perf_counter(), worker.journal
    keys, shard_size = list(worker.sources), worker.settings.shard_size
    # 3. which image belongs into which shard
    plan = planning.plan_shards(journal.found(), keys, shard_size, prune)
    worker.folder = journal.generation(plan.keys)
    # 4. all shards are checked before one is written: a refusal leaves the store as it was
    losses = [*plan.losses, *worker.check(plan.shards)]
    if losses and not prune:
        with moment(journal.store):
            if not hold.others():
                journal.withdraw()
            hold.leave()
        raise planning.refusal(journal.store, losses)
    # 5. what is new, changed or damaged is encoded, and shards are written whose images are others
    done = worker.encode(plan.shards, retry_failed, rehash)
    # 6. store.json, where no other part is missing
    with moment(journal.store):
        if worker.part == WHOLE:
            shards = [replace(shard, whole=worker.done[shard.name]) for shard in plan.shards]
        else:  # what others have written since
            shards = planning.plan_shards(journal.found(worker.folder), keys, shard_size, prune).shards
        plan = replace(plan, shards=shards)
        report = _report(plan, done)
        report.part, report.others = str(worker.part), hold.others()
        report.missing = _missing(plan, worker.part.world)
        if not report.missing and not report.others:
            _finish(journal, worker.settings, plan, worker.sources, report)
        hold.leave()
    report.seconds = time.perf_counter() - start
    return report


def _missing(plan: Plan, world: int) -> dict[str, int]:
    """How many shards each part has still to do, by part."""
    counts = Counter[int]()
    for shard in plan.shards:
        files = layout.shard_files(*shard.whole) if shard.whole else []
        if not files or any(partial_path(path).exists() for path, _ in files):  # a kill left it half in place
            counts[layout.shard_number(shard.name) % world] += 1
    return {str(Part(rank, world)): counts[rank] for rank in sorted(counts)}


def _finish(
    journal: Journal, settings: Manifest, plan: Plan, sources: dict[str, Source], report: EncodeReport
) -> None:
    journal.finish(settings, [shard.whole for shard in plan.shards if shard.whole])
    report.unclaimed = planning.unclaimed(sources.values())


def _report(plan: Plan, done: dict[str, Any]) -> EncodeReport:
    """What is in the store, whoever encoded it, and what this part did."""
    there = [shard.whole for shard in plan.shards if shard.whole]
    unread = [str(loss) for loss in plan.losses if loss.unread]
    return EncodeReport(
        images=sum(shard.record.count for shard in there),
        encoded=done.get("encoded", 0),
        failures=[
            failure
            for folder, record in there
            if record.failed
            for failure in layout.read_failures(folder, record.name)
        ],
        vanished=[key for shard in plan.shards for key in shard.vanished],
        dropped=plan.dropped,
        repaired=[*plan.damaged, *unread, *done.get("repaired", [])],
        captions=done.get("captions", []),
        waiting=done.get("waiting", 0.0),
    )


@dataclass
class Worker:
    """One part of a run."""

    vae: AutoencoderKL
    journal: Journal
    settings: Manifest
    sources: dict[str, Source]
    work: Workload
    part: Part
    folder: Path = Path()  # where the shards go that it writes
    done: dict[str, StoredShard] = field(default_factory=dict)  # its own as they are to be, by name
    damaged: dict[StoredShard, str] = field(default_factory=dict)  # what is wrong
    failed: bool = False  # a shard could not be written: the run is about to end

    def check(self, shards: list[PlannedShard]) -> list[Loss]:
        """Compare with their hashes the shards that this part's are made of; what the damaged ones lose."""
        losses, seen = [], set[StoredShard]()
        for shard in self._own(shards, "checking"):
            for holder in shard.holders:
                if holder not in seen and (problem := layout.damage(*holder)) is not None:
                    self.damaged[holder] = problem
                seen.add(holder)
            damaged = [holder for holder in shard.holders if holder in self.damaged]
            if not (damaged and shard.vanished):
                continue
            held = {
                line.key
                for holder in shard.holders
                for line in planning.read_lists(holder) or ()
                if holder not in self.damaged or isinstance(line, Failure)
            }
            if keys := [key for key in shard.vanished if key not in held]:  # their moments stood there alone
                losses.append(Loss(self.damaged[damaged[0]], keys))
        return losses

    def encode(self, shards: list[PlannedShard], retry_failed: bool, rehash: bool) -> dict[str, Any]:
        """Do this part's shards, which `check` has seen; what it did."""
        wanted: list[ShardWork] = []
        for shard in self._own(shards, "examining"):
            work = planning.inspect_shard(shard, self.sources, self.damaged, retry_failed, rehash)
            if not isinstance(work, ShardWork):
                self.done[shard.name] = work
            elif work.tensors:
                entries = [entry for _, some in work.entries for entry in some]
                self._put(work.name, work.tensors, entries, work.failures)
            else:
                wanted.append(work)
        return {
            "encoded": sum(len(work.keys) for work in wanted),
            "repaired": list(self.damaged.values()),
            "waiting": self._run(wanted) if wanted else 0.0,
            "captions": [
                f"{entry.key}: {note}"
                for shard in self._own(shards, "reading captions")
                for entry in layout.read_entries(self.done[shard.name].folder, shard.name, captions.PREFIX)
                for note in entry.notes
                if note.startswith(captions.PREFIX)
            ],
        }

    def _put(
        self,
        name: str,
        tensors: dict[str, torch.Tensor] | StoredShard,
        entries: list[Entry],
        failures: list[Failure],
    ) -> None:
        self.done[name] = self.journal.write(self.folder, name, tensors, entries, failures)

    def _own(self, shards: list[PlannedShard], doing: str) -> "tqdm[PlannedShard]":
        """This part's share, decided by the shards' numbers alone; with a bar where it takes long."""
        own = [shard for shard in shards if self.part.owns(shard.name)]
        return tqdm(own, doing, unit="shard", disable=not self.work.progress, delay=2, leave=False)

    def compute(self, work: ShardWork) -> Moments:
        """The moments of what a shard lacks; nothing is written: all that is done on another machine."""
        found = list[Pending]()

        def keep(pending: Pending) -> None:
            pending.collect()
            found.append(pending)

        self._encode([work], keep)
        return work, found[0].rows, found[0].failures

    def _run(self, shards: list[ShardWork]) -> float:
        """Encode and write shards, here or elsewhere; the share of time that the model here waited."""
        if self.work.engine is None:
            return self._encode(shards, self._write)
        whole = {work.name: work for work in shards}
        total = sum(len(work.keys) for work in shards)
        with tqdm(total=total, desc="encoding", unit="image", disable=not self.work.progress) as bar:
            for work in (work for work in shards if not work.keys):  # what is kept alone is read here
                self._write(begun(work))
            lacking = [replace(work, kept=()) for work in shards if work.keys]
            for work, rows, failures in self.work.engine(self.settings, self.sources, lacking):
                pending = begun(whole[work.name])
                pending.rows += rows
                pending.failures += failures
                self._write(pending)
                bar.update(len(work.keys))
        return 0.0

    def _encode(self, shards: list[ShardWork], finish: Callable[[Pending], None]) -> float:
        """Work on shards one after the other, and return the share of time that the model waited."""
        threads = self.work.threads or torch.get_num_threads()
        workers = self.work.workers or min(16, os.cpu_count() or 1)
        settings = self.settings
        total = sum(len(work.keys) + sum(len(lines) for _, lines in work.kept) for work in shards)
        ratio = spatial_compression_ratio(self.vae)
        loader = Loader(self.sources, settings.preprocessing, ratio, settings.batch_size, settings.flips)
        writing = deque[Future[None]]()
        disk = ThreadPoolExecutor(1, "latentvae-write")  # the model need not wait for it
        with (
            Computer(self.vae, settings.torch_dtype, threads, settings.batch_size) as computer,
            tqdm(total=total, desc="encoding", unit="image", disable=not self.work.progress) as bar,
            ExitStack() as ending,
        ):
            # after Ctrl-C or an error the shard that is being written is finished, and no other begun
            ending.callback(disk.shutdown, cancel_futures=True)
            current: Pending | None = None
            others = 0  # failed, or kept

            def show() -> None:
                bar.set_postfix({"waiting for data": f"{computer.waiting:.0%}"}, refresh=False)
                bar.update(computer.encoded + others - bar.n)

            for batch in feed(loader, shards, workers):
                if current is None:
                    current = begun(batch.shard)
                    others += len(current.rows) + len(current.failures)
                self._add(batch, current, computer)
                others += len(batch.failures)
                show()
                if batch.last:
                    writing.append(disk.submit(finish, current))
                    current = None
                # results of what is done are asked for at once, because a full disk shows there
                while len(writing) > UNWRITTEN or (writing and writing[0].done()):
                    writing.popleft().result()
            for each in writing:
                each.result()
            waiting = computer.waiting
            show()
            return waiting

    def _add(self, batch: Batch, pending: Pending, computer: Computer) -> None:
        pending.failures += batch.failures
        if not batch.images:
            return
        one, room = batch.images[0], self.work.room
        try:
            alone = room(one.entry.source, *one.image.shape[-2:]) if room and batch.is_large else None
            submitted = computer.alone(batch.images, alone) if alone else computer.submit(batch.images)
            pending.computing.append(([each.entry for each in batch.images], submitted))
        except ImageError as error:
            pending.failures.append(failure_of(one.entry, error))

    def _write(self, pending: Pending) -> None:
        """Write a shard when its moments are there; none after one that could not be written."""
        if self.failed:
            return
        try:
            pending.collect()
            tensors, entries = layout.assemble(pending.rows)
            tensors |= statistics.summarize(tensors, entries, Scaling.of(self.settings))
            self._put(pending.name, tensors, entries, pending.failures)
        except BaseException:
            self.failed = True
            raise
