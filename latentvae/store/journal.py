"""What a run has finished so far: a killed one goes on from it, and several parts make one store by it.

Shards that a run writes gather in a folder of their own in `.run`, one for each set of images that a run was
about. The store stays as it was until all of them are there. Then a list of what moves where is written, the
files get their places, and store.json comes last: after a kill the next run goes on with that list.

A shard is written under temporary names, then its record, then its files get their names: after a kill either
the old shard is whole, or the record says how to complete the new one. One run at a time, of one part or of
several: `locked`.

    .run/store.json              what the store is like, without shards
    .run/parts.json              `Claim`
    .run/0123456789abcdef/       shards, and latents-00000.json, the record of each
    .run/finished.json           `Finished`
"""

import errno
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from latentvae.base.errors import StoreError
from latentvae.base.files import explained, fsync, partial_path, whole_file
from latentvae.store import format as layout
from latentvae.store import statistics
from latentvae.store.format import (
    MANIFEST,
    Entry,
    Failure,
    Manifest,
    ShardRecord,
    StoredShard,
    read_manifest,
)
from latentvae.store.parts import WHOLE, Part

LOCK = ".lock"
OTHERS = ".lock-others"  # a folder: the lock of each process of the run, whose name says whose it is
CLAIM, FINISHED = "parts.json", "finished.json"  # in FOLDER
FOLDER, DONE = ".run", ".run-done"  # renamed before it is deleted, so that it is never there in part
CANNOT_MAKE = "{path} cannot be made ({reason}): choose another folder."
PATIENCE = 0.3  # seconds: a run that starts just as another lets go is not refused
MOMENT = 300.0  # seconds: to finish takes a look at every shard
_PART = re.compile(r" as part (\d+) of (\d+)$")
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of the file system


class Hold:
    """One part's hold on a store, as long as `locked` lasts."""

    def __init__(self, store: Path, part: Part, lock: FileLock) -> None:
        self.store, self.part, self.lock = store, part, lock

    def others(self) -> list[str]:
        """The other processes that are writing the store now."""
        return alive(self.store, besides=Path(self.lock.lock_file).name)

    def leave(self) -> None:
        """Let go, in a moment: from then on the other parts do not count this one."""
        if self.lock.is_locked:
            _drop(self.lock)
            with suppress(OSError):  # another part is there
                (self.store / OTHERS).rmdir()

    def abandon(self) -> None:
        """Let go after a failure, which need not wait for another part's moment."""
        lock = _take(self.store / LOCK, PATIENCE) if self.lock.is_locked else None
        if lock is not None:
            self.leave()
            _drop(lock)
        elif self.lock.is_locked:
            _drop(self.lock)


@contextmanager
def locked(store: Path, part: Part = WHOLE) -> Iterator[Hold]:
    """Hold a store as a part of a run, by default as the whole; its folder is made where it is missing.

    The lock is the system's, on an open file: it ends with its process, however that ends, so that what a
    killed run leaves behind is taken over.

    Raises:
        StoreError: the same part, or one of another number of parts, is at it; it is named. Or the folder
            holds something else, cannot be made, or has no locks.
    """
    _make(store)
    hold = _join(store, part)
    try:
        yield hold
    finally:
        hold.abandon()


@contextmanager
def moment(store: Path) -> Iterator[None]:
    """What parts do to all of a store they do one after the other: each begins and ends in such a moment.

    Raises:
        StoreError: another process takes very long over it.
    """
    lock = _take(store / LOCK, MOMENT)
    if lock is None:
        raise StoreError(f"{store} is being finished by another process: wait until that is done.")
    try:
        yield
    finally:
        _drop(lock)


def _join(store: Path, part: Part) -> Hold:
    # the part tells apart what runs in containers of one host name, which number their processes alike
    path = store / OTHERS / f"process {os.getpid()} on {platform.node()} as part {part.rank} of {part.world}"
    until = time.monotonic() + PATIENCE
    while True:
        with moment(store):
            if (store / OTHERS).is_file():  # what a killed run of an earlier version left
                (store / OTHERS).unlink()
            held = [name for name in alive(store) if not _is_beside(name, part)]
            if not held:
                path.parent.mkdir(exist_ok=True)
                lock = _take(path, 0)
                if lock is not None:
                    return Hold(store, part, lock)
        if time.monotonic() > until:
            raise StoreError(
                f"{store} is being written by {', '.join(held) or path.name}: wait until that is done, or "
                "choose another folder."
            )
        time.sleep(PATIENCE / 10)


def _is_beside(name: str, part: Part) -> bool:
    """Whether a process of that name may write while this part does: another part of as many."""
    match = _PART.search(name)
    return match is not None and int(match[2]) == part.world and int(match[1]) != part.rank


def alive(store: Path, besides: str = "") -> list[str]:
    """The processes that hold a lock of their own; the locks of those that died are deleted."""
    folder, found = store / OTHERS, list[str]()
    for name in sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []:
        if name == besides:
            continue
        lock = _take(folder / name, 0)
        if lock is None:
            found.append(name)
        else:
            _drop(lock)
    return found


def _make(store: Path) -> None:
    """Create a store's folder where it is missing, and refuse one of other files."""
    with explained(store, StoreError, CANNOT_MAKE):
        store.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in store.iterdir()}
    if found - {LOCK, OTHERS, DONE} and not found & {MANIFEST, FOLDER}:
        raise StoreError(
            f"{store} is a folder of other files ({sorted(found)[0]} and so on), no store. The last argument "
            "names the store: give a new or an empty folder."
        )


def _take(path: Path, patience: float) -> FileLock | None:
    """Lock a file; None where another keeps it."""
    # no fallback: where the system has no locks, a file that stands for one would outlive a kill
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        return None
    except OSError as error:
        if error.errno in NO_LOCKS:  # some network disks
            raise StoreError(
                f"this folder's file system has no locks ({error.strerror}): encode to another disk, then "
                "copy."
            ) from error
        raise StoreError(f"{path} cannot be written ({error.strerror}): choose another folder.") from error
    return lock


def _drop(lock: FileLock) -> None:
    """Let go of a lock, and delete its file first: who has opened it to wait notices, and makes a new one."""
    if lock.lock_counter == 1:
        with suppress(OSError):  # Windows deletes no open file; there, letting go of the lock does
            Path(lock.lock_file).unlink()
    lock.release()


class Claim(BaseModel):
    """What parts have to agree on: the images, and what becomes of those whose files are gone."""

    model_config = ConfigDict(frozen=True)

    images: int
    keys_sha256: str
    prune: bool
    world: int

    @classmethod
    def of(cls, keys: Sequence[str], prune: bool, part: Part) -> "Claim":
        """Of sorted keys."""
        digest = hashlib.sha256("\0".join(keys).encode("utf-8", "surrogateescape")).hexdigest()
        return cls(images=len(keys), keys_sha256=digest, prune=prune, world=part.world)


class Finished(BaseModel):
    """A store that is whole but for the places of its files."""

    manifest: Manifest
    moves: dict[str, str]  # by the shard's name the folder in FOLDER that its files come from


class Journal:
    """The unfinished business of a store.

    Args:
        store: its folder, which exists.
        written: called with each shard that `write` has put into a generation's folder.
    """

    def __init__(self, store: Path, written: Callable[[StoredShard], None] | None = None) -> None:
        self.store, self.folder, self.written = store, store / FOLDER, written

    def recover(self) -> None:
        """Put in place what a run had finished that was killed then. No other process may be at it."""
        with suppress(FileNotFoundError):
            self._place(Finished.model_validate_json((self.folder / FINISHED).read_bytes()))

    def settings(self) -> Manifest | None:
        """The manifest of the store, or of a first run that was not finished; None: a new store."""
        for folder in (self.folder, self.store):
            if (folder / MANIFEST).exists():
                return read_manifest(folder)
        return None

    def begin(self, settings: Manifest, part: Part = WHOLE, others: Sequence[str] = ()) -> None:
        """Complete what killed runs left, and write down what this one is about.

        Args:
            others: processes that are at it; of what is not this part's they may be about to place some.
        """
        with explained(self.folder, StoreError, CANNOT_MAKE):
            self.folder.mkdir(exist_ok=True)
        shutil.rmtree(self.store / DONE, ignore_errors=True)
        for folder in self._folders():
            # Forward first: a record promises its staged files. What no record names was never finished.
            for record in _written(folder):
                staged = any(partial_path(path).exists() for path, _ in layout.shard_files(folder, record))
                if staged and (not others or part.owns(record.name)):
                    layout.place_shard(folder, record)
            for partial in folder.glob(".*.partial"):
                if not others or part.owns(partial.name[1:].split(".")[0]):
                    partial.unlink()
        if not others:
            for partial in [*self.store.glob(".*.partial"), *self.folder.glob(".*.partial")]:
                partial.unlink()
        layout.write_manifest(self.folder, settings.model_copy(update={"shards": [], "statistics": None}))

    def claim(self, claim: Claim, others: Sequence[str]) -> None:
        """Write down which images a part has begun with; all that are at it at once must see the same.

        Raises:
            StoreError: they do not.
        """
        before = self.claimed()
        if others and before is not None and before != claim:
            raise StoreError(
                f"{', '.join(others)} began with {before.images} images, and here are {claim.images}"
                f"{'' if before.images != claim.images else ', other ones'}: parts that run at once need the "
                "same files, the same names and the same --prune. Wait until they have ended, or give this "
                "one the same."
            )
        with whole_file(self.folder / CLAIM, StoreError, layout.CANNOT_WRITE, durable=True) as path:
            path.write_text(claim.model_dump_json() + "\n", newline="\n")

    def claimed(self) -> Claim | None:
        """What parts began with, None where none has."""
        try:
            return Claim.model_validate_json((self.folder / CLAIM).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def generation(self, keys: Iterable[str]) -> Path:
        """The folder for the shards of these images: the same images are divided alike, so that each shard in
        it has but one meaning.

        Args:
            keys: of all that is to be in the store, sorted.
        """
        digest = hashlib.sha256()
        for key in keys:
            digest.update(key.encode("utf-8", "surrogateescape") + b"\0")
        return self.folder / digest.hexdigest()[:16]

    def found(self, first: Path | None = None) -> list[StoredShard]:
        """All shards that there are, of the generation `first`, of others, the newest first, of the store."""
        folders = sorted(self._folders(), key=lambda each: (each != first, -each.stat().st_mtime_ns))
        written = [StoredShard(folder, record) for folder in folders for record in _written(folder)]
        old = read_manifest(self.store).shards if (self.store / MANIFEST).exists() else []
        return [*written, *(StoredShard(self.store, record) for record in old)]

    def write(
        self,
        folder: Path,
        name: str,
        tensors: dict[str, torch.Tensor] | StoredShard,
        entries: Sequence[Entry],
        failures: Sequence[Failure],
    ) -> StoredShard:
        """Put a shard into a generation's folder; with another one for its tensors, the lists alone.

        Raises:
            StoreError: it cannot be written; the old one stays.
        """
        try:
            folder.mkdir(exist_ok=True)
            # Two phases: killed before the record is there, the old shard is whole; after it, `begin` goes on
            record = layout.stage_shard(folder, name, tensors, entries, failures)
            own = folder / f"{name}.json"
            with whole_file(own, StoreError, layout.CANNOT_WRITE, durable=True) as path:
                path.write_text(record.model_dump_json() + "\n", newline="\n")
            layout.place_shard(folder, record)
        except OSError as error:
            raise StoreError(
                f"{name} cannot be written to {self.store} ({error.strerror or error}). Finished shards are "
                "intact: run the same command again when that is mended."
            ) from error
        shard = StoredShard(folder, record)
        if self.written is not None:
            self.written(shard)
        return shard

    def finish(self, settings: Manifest, shards: Sequence[StoredShard]) -> None:
        """Give the store these shards, delete all others, write its manifest, and end the journal.

        Raises:
            StoreError: a shard cannot be read, or a file not be put in place: the next run goes on with that.
        """
        figures = statistics.of_store(shards)
        records = [shard.record for shard in shards]
        manifest = settings.model_copy(update={"shards": records, "statistics": figures})
        moves = {shard.record.name: shard.folder.name for shard in shards if shard.folder != self.store}
        finished = Finished(manifest=manifest, moves=moves)
        with whole_file(self.folder / FINISHED, StoreError, layout.CANNOT_WRITE, durable=True) as path:
            path.write_text(finished.model_dump_json() + "\n", newline="\n")
        self._place(finished)

    def _place(self, finished: Finished) -> None:
        """What `finish` does from when its list is there; again after a kill, as far as it is not done."""
        with explained(self.store, StoreError, layout.CANNOT_WRITE):
            for record in finished.manifest.shards:
                if record.name in finished.moves:
                    self._move(self.folder / finished.moves[record.name], record)
            fsync(self.store)
            path = self.store / MANIFEST
            # a run that had nothing to do leaves even the time of the manifest as it was
            if not path.exists() or path.read_bytes() != layout.to_bytes(finished.manifest):
                layout.write_manifest(self.store, finished.manifest)
            found = {path.name.split(".")[0] for path in self.store.glob("latents-*.*")}
            for name in found - {record.name for record in finished.manifest.shards}:
                layout.remove_shard(self.store, name)
            self._end()

    def _move(self, folder: Path, record: ShardRecord) -> None:
        for path, sha256 in layout.shard_files(self.store, record):
            if sha256 is None:
                path.unlink(missing_ok=True)
            elif (source := folder / path.name).exists():  # else it is there already
                source.replace(path)

    def withdraw(self) -> None:
        """End the journal if nothing has been written, by this run or a killed one before it."""
        if (self.store / MANIFEST).exists() and not any(map(_written, self._folders())):
            self._end()

    def _end(self) -> None:
        self.folder.rename(self.store / DONE)
        shutil.rmtree(self.store / DONE)

    def _folders(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()] if self.folder.is_dir() else []


def _written(folder: Path) -> list[ShardRecord]:
    """The records of a generation."""
    found = []
    for path in sorted(folder.glob("latents-*.json")):
        try:
            found.append(ShardRecord.model_validate_json(path.read_bytes()))
        except ValidationError:  # written whole, so someone else's doing: the shard is encoded again
            path.unlink()
    return found
