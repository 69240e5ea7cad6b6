"""A store at an address: made in a folder of this machine, and put there shard by shard.

Object stores know no locks, and rename nothing. So a run works on a folder here, which is a store like any
other, and puts each shard into ADDRESS/.run when it is finished. When all are there a list says which file
each is to be; the object store copies them to their places, and store.json comes last. The store is read as
it was until then. A run that was killed goes on from the folder; once that list is there, from anywhere.

    .run/SHA256            a file of a shard, by its content
    .run/finished.json     `Finished`

The folder stays, so that the next run need not fetch the store; without it, or where the store is another one
by now, the run begins with what is at the address.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel

from latentvae.base.addresses import Address, Place, forget
from latentvae.base.errors import SourceError, StoreError
from latentvae.base.files import cache_folder, explained, file_sha256, partial_path, whole_file
from latentvae.store import format as layout
from latentvae.store.format import MANIFEST, Manifest, StoredShard
from latentvae.store.journal import FINISHED, FOLDER, PATIENCE, Journal, moment
from latentvae.store.parts import WHOLE, Part

AT_ONCE = 8  # files that are on their way
CANNOT_KEEP = "{path} cannot be written ({reason}): name another folder in $LATENTVAE_CACHE."


class Finished(BaseModel):
    """A store that is whole but for the places of its files."""

    manifest: str  # the content of store.json
    moves: dict[str, str]  # by name of a file what it is called in .run


@contextmanager
def here(store: Place, part: Part = WHOLE, rehash: bool = False) -> Iterator[Journal]:
    """The journal of a store in a folder of this machine; what the block makes of it goes to the address.

    Args:
        rehash: compare all files at an address with their hashes.

    Raises:
        StoreError: a part of several for an address, or another run has written it meanwhile.
        SourceError: the address cannot be read or written; what is done stays here.
    """
    if isinstance(store, Path):
        yield Journal(store)
        return
    if part != WHOLE:
        raise StoreError(
            f"part {part} came for the address {store}: parts meet in a folder that they share, so name one, "
            "and copy the store there when it is whole. Or have --engine ray divide the work."
        )
    at = Remote(Address(store.bare))
    with at.locked():
        at.begin(rehash)
        try:
            yield Journal(at.folder, at.upload_early)
        except StoreError as error:
            raise at.named(error) from error
        at.push()


def settings(store: Place) -> Manifest | None:
    """The manifest of the store, or of a first run that was not finished; None: a new store."""
    if isinstance(store, Path):
        return Journal(store).settings()
    if (store / MANIFEST).exists():
        return layout.read_manifest(store)
    return Journal(Remote(Address(store.bare)).folder).settings()


class Remote:
    """The store at an address, and its folder here."""

    def __init__(self, address: Address) -> None:
        named = os.environ.get("LATENTVAE_CACHE")
        name = hashlib.sha256(address.url.encode()).hexdigest()[:16]
        self.address, self.run = address, address / FOLDER
        self.folder = (Path(named) if named else cache_folder()) / "stores" / name
        self.seen = self.folder / "left.json"  # store.json as this machine has left it at the address
        self.known: bytes | None = None  # the same at the address
        self.damaged = set[str]()  # files at the address, by name
        self.uploaded = dict[str, int]()  # bytes of what is in `run`

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process of this machine at a time."""
        with explained(self.folder.parent, StoreError, CANNOT_KEEP):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder.with_suffix(".lock"), PATIENCE, fallback_to_soft=False)
            try:
                lock.acquire()
            except Timeout:
                raise StoreError(
                    f"{self.address} is being written by another process of this machine: wait until that is "
                    "done, or choose another place."
                ) from None
        try:
            yield
        finally:
            lock.release()

    def begin(self, rehash: bool) -> None:
        """See that it can be written, complete what a killed run left there, and have the store here."""
        forget()
        (self.run / "begun").write_bytes(b"")  # hours before anything has to be put there
        (self.run / "begun").unlink()
        self.uploaded = self.run.sizes()
        if FINISHED in self.uploaded:
            self._place(Finished.model_validate_json((self.run / FINISHED).read_bytes()))
        elif not self.uploaded:
            self.run.rmdir()
        self.known = self._manifest()
        others = self.address.sizes().keys() - {FOLDER}
        if self.known is None and others and not self.uploaded:
            raise StoreError(
                f"{self.address} is a folder of other files ({min(others)} and so on), no store. The last "
                "argument names the store: give a new or an empty one."
            )
        seen = self.seen.read_bytes() if self.seen.exists() else None
        if self.known != seen or (rehash and self.known is not None):
            self._fetch(rehash)

    def named(self, error: StoreError) -> StoreError:
        """An error of the folder as one of the address."""
        said = str(error).replace(str(self.folder), str(self.address))
        if self.known is None and (self.folder / FOLDER).exists():
            said += f" What is done of it lies in {self.folder}: to begin anew, delete that."
        renamed = StoreError(said)
        renamed.ends_run = error.ends_run
        return renamed

    def upload_early(self, shard: StoredShard) -> None:
        """`upload` while others are encoded: what a broken connection holds up is left to `push`."""
        with suppress(SourceError):
            self.upload(shard)

    def upload(self, shard: StoredShard) -> None:
        """Put the files of a shard into .run, as far as they are not there."""
        for path, sha256 in layout.shard_files(*shard):
            if sha256 is not None and self.uploaded.get(sha256) != (size := path.stat().st_size):
                (self.run / sha256).put(path)
                self.uploaded[sha256] = size

    def push(self) -> None:
        """Make the store at the address what the folder is."""
        wanted = layout.read_manifest(self.folder)
        content = (self.folder / MANIFEST).read_bytes()
        if self._manifest() != self.known:
            raise StoreError(
                f"{self.address} was written by another run since this one began. Run the same command "
                "again, which adds to that what it lacks."
            )
        before = {} if self.known is None else _files(Manifest.model_validate_json(self.known))
        there, moves = self.address.sizes(), dict[str, str]()
        for name, sha256 in _files(wanted).items():
            size = (self.folder / name).stat().st_size
            if before.get(name) != sha256 or there.get(name) != size or name in self.damaged:
                moves[name] = sha256
        changed = [
            StoredShard(self.folder, record)
            for record in wanted.shards
            if any(path.name in moves for path, _ in layout.shard_files(self.folder, record))
        ]
        _all(self.upload, changed)
        if moves or content != self.known:
            finished = Finished(manifest=content.decode(), moves=moves)
            (self.run / FINISHED).write_bytes(finished.model_dump_json().encode())
            self._place(finished)
        self._end()
        self._saw(content)
        forget()

    def _manifest(self) -> bytes | None:
        return (self.address / MANIFEST).read_bytes() if MANIFEST in self.address.sizes() else None

    def _place(self, finished: Finished) -> None:
        """Copy files to their places, store.json last; again after a kill."""
        content, there = finished.manifest.encode(), self.run.sizes()
        done = self._manifest() == content  # then those that are gone from .run have their places
        moves = {name: sha256 for name, sha256 in finished.moves.items() if sha256 in there or not done}
        _all(lambda name: (self.run / moves[name]).copy_to(self.address / name), moves)
        (self.address / MANIFEST).write_bytes(content)
        kept = _files(Manifest.model_validate_json(finished.manifest))
        for name in self.address.sizes():
            if name.startswith("latents-") and name not in kept:
                (self.address / name).unlink()
        self._end()

    def _end(self) -> None:
        for name in sorted(self.run.sizes(), key=lambda name: name == FINISHED):  # the list goes last
            (self.run / name).unlink()
        self.run.rmdir()
        self.uploaded = {}

    def _fetch(self, rehash: bool) -> None:
        """Make the folder what is at the address; what a killed run had finished in it stays for the next."""
        if self.known is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        manifest = layout.read_manifest(self.address)
        self.folder.mkdir(exist_ok=True)
        with moment(self.folder):
            Journal(self.folder).recover()
            files, there = _files(manifest), self.address.sizes()
            self.damaged = files.keys() - there.keys()
            _all(lambda name: self._get(name, files[name], rehash), files.keys() & there.keys())
            for path in self.folder.glob("latents-*.*"):
                if path.name not in files:
                    path.unlink()
            with whole_file(self.folder / MANIFEST, StoreError, CANNOT_KEEP, durable=True) as partial:
                partial.write_bytes(self.known)
        self._saw(self.known)

    def _get(self, name: str, sha256: str, rehash: bool) -> None:
        """Have a file here; of one that is damaged there, what is here stays, if that is whole."""
        path = self.folder / name
        whole = path.is_file() and file_sha256(path) == sha256
        if whole and not rehash:
            return
        partial = partial_path(path)  # what a kill leaves, the journal deletes
        (self.address / name).ask(lambda files, at: files.get_file(at, str(partial)))
        if file_sha256(partial) != sha256:
            self.damaged.add(name)
        if whole:
            partial.unlink()
        else:
            partial.replace(path)

    def _saw(self, content: bytes) -> None:
        with whole_file(self.seen, StoreError, CANNOT_KEEP, durable=True) as partial:
            partial.write_bytes(content)


def _files(manifest: Manifest) -> dict[str, str]:
    """The hashes of a store's shards' files, by name."""
    return {
        path.name: sha256
        for record in manifest.shards
        for path, sha256 in layout.shard_files(Path(), record)
        if sha256 is not None
    }


def _all(do: Callable[[Any], None], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(do, items):
            pass
