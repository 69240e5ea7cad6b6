"""What a run has finished so far: a killed one goes on from it, and several processes make one store by it.

A shard is written under temporary names, then its record here, then its files get their names: after a kill
either the old shard is whole, or the record says how to complete the new one. One run at a time: `locked`.
"""

import errno
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from pydantic import ValidationError

from latentvae.base.errors import StoreError
from latentvae.base.files import explained, partial_path, whole_file
from latentvae.store import format as layout
from latentvae.store import statistics
from latentvae.store.format import MANIFEST, Entry, Failure, Manifest, ShardRecord, read_manifest

LOCK = ".lock"
OTHERS = ".lock-others"  # a folder: the lock of each process of the run, whose name says whose it is
FOLDER, DONE = ".run", ".run-done"  # renamed before it is deleted, so that it is never there in part
CANNOT_MAKE = "{path} cannot be made ({reason}): choose another folder."
PATIENCE = 0.3  # seconds: a run that starts just as another lets go is not refused
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of the file system


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Hold a store's lock, as the first or only process of a run; its folder is made where it is missing.

    The lock is the system's, on an open file: it ends with its process, however that ends, so that what a
    killed run leaves behind is taken over.

    Raises:
        StoreError: another process holds it, or is left of a run whose first process is gone; it is named. Or
            the folder holds something else, cannot be made, or has no locks.
    """
    _make(store)
    lock = _take(store / LOCK)
    if lock is None:
        who = ", ".join(_holders(store)) or "another process"  # which has only just taken it
        raise StoreError(
            f"{store} is being written by {who}: wait until that is done, or choose another folder."
        )
    try:
        _check_left(store)
        with joined(store):
            yield
    finally:
        with suppress(StoreError):  # another process is still at it: the next run has to wait for that
            _check_left(store)
        _drop(lock)


@contextmanager
def joined(store: Path, rank: int = 0) -> Iterator[None]:
    """Have runs to come wait for this process too, even if the first one dies.

    Args:
        rank: of this process in its run.

    Raises:
        StoreError: the lock cannot be written.
    """
    # the rank tells apart what runs in containers of one host name, which number their processes alike
    path = store / OTHERS / f"process {os.getpid()} on {platform.node()} as rank {rank}"
    with suppress(FileExistsError):
        path.parent.mkdir()
    lock = _take(path, is_singleton=True)
    if lock is None:
        raise StoreError(f"{store} is being written by {path.name} already: wait until that is done.")
    try:
        yield
    finally:
        _drop(lock)


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


def _check_left(store: Path) -> None:
    """Delete the locks of processes that are gone.

    Raises:
        StoreError: one is not.
    """
    folder = store / OTHERS
    if folder.is_file():  # what a killed run of an earlier version left
        folder.unlink()
    held = list[str]()
    for name in _holders(store):
        lock = _take(folder / name, patience=0 if held else PATIENCE)  # once is enough for all of them
        if lock is None:
            held.append(name)
        else:
            _drop(lock)
    if held:
        raise StoreError(
            f"{store} is still being written by a process of a run whose first process is gone (of "
            f"{', '.join(held)}): wait until it has ended, or end it."
        )
    with suppress(OSError):  # there is none, or a process has joined just now
        folder.rmdir()


def _holders(store: Path) -> list[str]:
    """Processes that hold a lock of their own, and those that died with it."""
    folder = store / OTHERS
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _take(path: Path, *, is_singleton: bool = False, patience: float = PATIENCE) -> FileLock | None:
    """Lock a file; None where another keeps it, which a singleton's own process is not."""
    # no fallback: where the system has no locks, a file that stands for one would outlive a kill
    lock = FileLock(path, is_singleton=is_singleton, fallback_to_soft=False)
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


class Journal:
    """The unfinished business of a store.

    Args:
        store: its folder, which exists.
    """

    def __init__(self, store: Path) -> None:
        self.store, self.folder = store, store / FOLDER

    def settings(self) -> Manifest | None:
        """The manifest of the store, or of a first run that was not finished; None: a new store."""
        for folder in (self.folder, self.store):
            if (folder / MANIFEST).exists():
                return read_manifest(folder)
        return None

    def begin(self, settings: Manifest) -> None:
        """Complete what a killed run left, and write down what this one is about."""
        with explained(self.folder, StoreError, CANNOT_MAKE):
            self.folder.mkdir(exist_ok=True)
        shutil.rmtree(self.store / DONE, ignore_errors=True)
        # Forward first: a record promises its staged files. Those that no record names were never finished.
        for record in self._written():
            if any(partial_path(path).exists() for path, _ in layout.shard_files(self.store, record)):
                layout.place_shard(self.store, record)
        for partial in [*self.store.glob(".*.partial"), *self.folder.glob(".*.partial")]:
            partial.unlink()
        layout.write_manifest(self.folder, settings.model_copy(update={"shards": [], "statistics": None}))

    def records(self) -> dict[str, ShardRecord]:
        """The newest record of each shard by name, in the order of their numbers."""
        old = read_manifest(self.store).shards if (self.store / MANIFEST).exists() else []
        records = {record.name: record for record in [*old, *self._written()]}
        return {name: records[name] for name in sorted(records, key=layout.shard_number)}

    def write(
        self,
        name: str,
        tensors: dict[str, torch.Tensor] | str,
        entries: Sequence[Entry],
        failures: Sequence[Failure],
    ) -> ShardRecord:
        """Put a shard, or with a sha256 for tensors its lists alone, in place of the old one.

        Raises:
            StoreError: it cannot be written; the old one stays.
        """
        try:
            # Two phases: killed before the record is there, the old shard is whole; after it, `begin` goes on
            record = layout.stage_shard(self.store, name, tensors, entries, failures)
            own = self.folder / f"{name}.json"
            with whole_file(own, StoreError, layout.CANNOT_WRITE, durable=True) as path:
                path.write_text(record.model_dump_json() + "\n", newline="\n")
            layout.place_shard(self.store, record)
        except OSError as error:
            raise StoreError(
                f"{name} cannot be written to {self.store} ({error.strerror or error}). Finished shards are "
                "intact: run the same command again when that is mended."
            ) from error
        return record

    def finish(self, settings: Manifest, names: Sequence[str]) -> Manifest:
        """Write the manifest with these shards, delete all others, and end the journal."""
        records = self.records()
        shards = [records[name] for name in names]
        figures = statistics.of_store(self.store, shards)
        manifest = settings.model_copy(update={"shards": shards, "statistics": figures})
        path = self.store / MANIFEST
        # a run that had nothing to do leaves even the time of the manifest as it was
        if not path.exists() or path.read_bytes() != layout.to_bytes(manifest):
            layout.write_manifest(self.store, manifest)
        # only now: until the manifest is in place, a kill would leave one that names what is gone
        found = {path.name.split(".")[0] for path in self.store.glob("latents-*.*")}
        for name in found - set(names):
            layout.remove_shard(self.store, name)
        self._end()
        return manifest

    def withdraw(self) -> None:
        """End the journal if nothing has been written, by this run or a killed one before it."""
        if (self.store / MANIFEST).exists() and not self._written():
            self._end()

    def _end(self) -> None:
        self.folder.rename(self.store / DONE)
        shutil.rmtree(self.store / DONE)

    def _written(self) -> list[ShardRecord]:
        found = []
        for path in sorted(self.folder.glob("latents-*.json")):
            try:
                found.append(ShardRecord.model_validate_json(path.read_bytes()))
            except ValidationError:  # written whole, so someone else's doing: the shard is encoded again
                path.unlink()
        return found
