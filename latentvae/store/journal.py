"""What a run has finished so far: a killed one goes on from it, and several processes make one store by it.

A shard is written under temporary names, then its record here, then its files get their names: after a kill
either the old shard is whole, or the record says how to complete the new one.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError

from latentvae.base.errors import StoreError
from latentvae.base.files import partial_path, write_atomically
from latentvae.store.format import (
    MANIFEST,
    Entry,
    Failure,
    Manifest,
    ShardRecord,
    place_shard,
    read_manifest,
    remove_shard,
    shard_files,
    shard_number,
    stage_shard,
    to_bytes,
    write_manifest,
)

FOLDER, DONE = ".run", ".run-done"  # renamed before it is deleted, so that it is never there in part


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
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self.folder} cannot be made ({error.strerror}): choose another folder."
            ) from error
        shutil.rmtree(self.store / DONE, ignore_errors=True)
        for record in self._written():
            if any(partial_path(path).exists() for path, _ in shard_files(self.store, record)):
                place_shard(self.store, record)
        for partial in [*self.store.glob(".*.partial"), *self.folder.glob(".*.partial")]:
            partial.unlink()
        write_manifest(self.folder, settings.model_copy(update={"shards": []}))

    def records(self) -> dict[str, ShardRecord]:
        """The newest record of each shard by name, in the order of their numbers."""
        old = read_manifest(self.store).shards if (self.store / MANIFEST).exists() else []
        records = {record.name: record for record in [*old, *self._written()]}
        return {name: records[name] for name in sorted(records, key=shard_number)}

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
            record = stage_shard(self.store, name, tensors, entries, failures)
            text = record.model_dump_json() + "\n"
            write_atomically(self.folder / f"{name}.json", lambda path: path.write_bytes(text.encode()))
            place_shard(self.store, record)
        except OSError as error:
            raise StoreError(
                f"{name} cannot be written to {self.store} ({error.strerror}). Finished shards are intact: "
                "run the same command again when that is mended."
            ) from error
        return record

    def finish(self, settings: Manifest, names: Sequence[str]) -> Manifest:
        """Write the manifest with these shards, delete all others, and end the journal."""
        records = self.records()
        manifest = settings.model_copy(update={"shards": [records[name] for name in names]})
        path = self.store / MANIFEST
        if not path.exists() or path.read_bytes() != to_bytes(manifest):
            write_manifest(self.store, manifest)
        kept = set(names)
        found = {path.name.split(".")[0] for path in self.store.glob("latents-*.*")}
        for name in found - kept:
            remove_shard(self.store, name)
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
