"""Encoding folders of images to a store, as far as that is not done yet."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from latentvae.fingerprint import weight_hash
from latentvae.images import PathLike
from latentvae.store.journal import Journal
from latentvae.store.locking import joined, locked
from latentvae.store.manifest import DtypeName, Manifest, Preprocessing
from latentvae.store.planning import Plan, plan_shards
from latentvae.store.processes import Processes
from latentvae.store.salvage import Loss, refusal
from latentvae.store.settings import (
    BATCH_SIZE,
    SHARD_SIZE,
    check_folder,
    check_same,
    new_settings,
    preprocessing,
)
from latentvae.store.shard import Failure, read_failures
from latentvae.store.sources import Source, find_sources
from latentvae.store.working import Worker, Workload


@dataclass
class EncodeReport:
    """What a run did.

    Attributes:
        images: in the store now.
        encoded: by this run, failures included.
        failures: every image that could not be encoded, by this run or an earlier one.
        vanished: keys in the store whose files are gone.
        dropped: keys that were taken out: their files are gone, and pruning was asked for.
        repaired: what was damaged.
        seconds: of examining, encoding and writing.
        waiting: share of the model's time in which it had nothing to do.
    """

    images: int = 0
    encoded: int = 0
    failures: list[Failure] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
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
    flips: bool = False,
    batch_size: int | None = None,
    shard_size: int | None = None,
    prune: bool = False,
    retry_failed: bool = False,
    weights_sha256: str | None = None,
    workload: Workload | None = None,
) -> EncodeReport:
    """Encode images to a folder of latents, or bring one up to date; a killed run goes on where it was.

    What `torchrun` and `accelerate launch` put into the environment has several processes share the shards.
    The bytes of the store depend on the images, the model and the options down to `shard_size`, but not on
    processes, threads or interruptions.

    Args:
        vae: the model, in eval mode.
        sources: image files and folders.
        store: the folder; new, empty, or a store of the same model and options.
        dtype: of the stored moments.
        size: None: images as they are. Pixels: scale and crop them to aspect ratios of about size x size.
        crop: with a size: to squares of it.
        flips: also store the moments of each mirror image.
        batch_size: of images up to 512 x 512; larger ones are encoded fewer at a time. None: as the store, 8.
        shard_size: images in a shard. None: as the store, 1024.
        prune: take images out whose files are gone.
        retry_failed: try images again that could not be encoded; else only those whose files have changed.
        weights_sha256: `weight_hash` of the weights in float32, where `vae` was rounded.
        workload: threads and progress.

    Raises:
        StoreError: another store is there, or one in use; a shard is damaged and holds images that cannot be
            encoded again, and `prune` was not given; the disk is full; a process is gone.
        ImageError: no image.
    """
    processes, folder = Processes(), Path(store)
    policy, weights = preprocessing(vae, size, crop), weights_sha256 or weight_hash(vae)
    journal = Journal(folder)
    settings = partial(_settings, journal, vae, dtype, policy, flips, batch_size, shard_size, weights)
    try:
        files = find_sources(sources, folder)  # first: where there are none, nothing is made
        with ExitStack() as held:
            run = _begin(vae, journal, settings, files, workload or Workload(), processes, held)
            return _encode(run, prune, retry_failed, held)
    except BaseException as error:
        processes.fail(error)
        raise


def _settings(
    journal: Journal,
    vae: AutoencoderKL,
    dtype: DtypeName,
    policy: Preprocessing,
    flips: bool,
    batch_size: int | None,
    shard_size: int | None,
    weights: str,
) -> Manifest:
    """What the store is to be like; sizes that were not asked for are those that it has.

    Raises:
        StoreError: it is there and made otherwise.
    """
    old = journal.settings()
    batch = batch_size or (old.batch_size if old else BATCH_SIZE)
    shard = shard_size or (old.shard_size if old else SHARD_SIZE)
    new = new_settings(vae, dtype, policy, flips, batch, shard, weights)
    if old is not None:
        check_same(journal.store, old, new)
    return new


def _begin(
    vae: AutoencoderKL,
    journal: Journal,
    settings: Callable[[], Manifest],
    files: dict[str, Source],
    work: Workload,
    processes: Processes,
    held: ExitStack,
) -> Worker:
    """Take hold of the store: the first process locks it and writes down what the run is about."""
    folder = journal.store
    if processes.is_main:
        check_folder(folder)
        held.enter_context(locked(folder))
        journal.begin(settings())
    processes.share("begun", None)
    if not processes.is_main:
        held.enter_context(joined(folder))
    return Worker(vae, journal, settings(), files, work, processes)


def _encode(run: Worker, prune: bool, retry_failed: bool, held: ExitStack) -> EncodeReport:
    """Plan, examine what is there, encode the rest, and put the reports together.

    Raises:
        StoreError: images would be lost, and `prune` was not given.
    """
    start, journal, processes = time.perf_counter(), run.journal, run.processes
    plan = plan_shards(journal.store, journal.records(), list(run.sources), run.settings.shard_size, prune)
    processes.share_same("files", repr(plan))
    found = processes.share("checked", run.check(plan.shards))
    losses = [*plan.losses, *(Loss(*loss) for part in found for loss in part)]
    if losses and not prune:
        if processes.is_main:
            journal.withdraw()
        _leave(processes, held)
        raise refusal(journal.store, losses)
    mine = run.encode(plan.shards, retry_failed)
    report = _report(journal, plan, processes.share("done", mine))
    processes.share("reported", None)  # finishing deletes what the reports are made from
    if processes.is_main:
        journal.finish(run.settings, [shard.name for shard in plan.shards])
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
    records = journal.records()
    done = [records[shard.name] for shard in plan.shards]
    failed = [record.name for record in done if record.failed]
    unread = [str(Loss(loss.problem, (), loss.unread)) for loss in plan.losses if loss.unread]
    return EncodeReport(
        images=sum(record.count for record in done),
        encoded=sum(part["encoded"] for part in parts),
        failures=[failure for name in failed for failure in read_failures(journal.store, name)],
        vanished=sorted({key for shard in plan.shards for key in shard.vanished}),
        dropped=plan.dropped,
        repaired=[*plan.damaged, *unread, *(problem for part in parts for problem in part["repaired"])],
        waiting=max(part["waiting"] for part in parts),
    )
