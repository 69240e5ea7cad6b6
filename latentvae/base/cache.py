"""Files of shards that lie at an address, on this machine as long as they are used: a cache of bounded size.

Files are called by their hashes, or by where and when they were found, so that stores, datasets, workers and
ranks of a machine share them, and what is written again is not mistaken for what was there before.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from latentvae.base.addresses import Address
from latentvae.base.errors import StoreError
from latentvae.base.files import cache_folder, explained, file_sha256, whole_file

BYTES = 32 * 10**9
KEPT = (".safetensors", ".jsonl", ".tar")
STALE = 3600.0  # seconds after which what a killed download left is deleted
Answer = TypeVar("Answer")
CANNOT_KEEP = "{path} cannot be written ({reason}): name another folder as `cache`, or by LATENTVAE_CACHE."


def default_folder() -> Path:
    """$LATENTVAE_CACHE, or shards in the user's folder of caches."""
    named = os.environ.get("LATENTVAE_CACHE")
    return Path(named) if named else cache_folder() / "shards"


class Cache:
    """What has been fetched; of more than `limit` bytes those files go that were used longest ago.

    A file that some process has mapped stays on the disk until it lets go, though it is gone from the folder.

    Args:
        folder: of the files; made when the first one is fetched.
        limit: bytes; the file that is wanted stays, however large it is.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if limit < 0:
            raise StoreError(f"cache_bytes={limit} came; wanted a number that is not negative.")
        self.folder, self.limit = folder.absolute(), limit

    def fetch(self, address: Address, sha256: str) -> Path:
        """The file of an address here, where it need not stay; raises as `use`."""
        return self.use(address, sha256, lambda path: path)

    def use(self, address: Address, name: str, do: Callable[[Path], Answer], is_hash: bool = True) -> Answer:
        """Do something with the file of an address, here: it is whole, and is what its hash says.

        Args:
            address: of the file.
            name: its sha256; or, if not `is_hash`, what `found_now` calls it.
            do: takes the file, which may be gone afterwards.

        Raises:
            SourceError: it cannot be had. StoreError: it is another file, or there is no room for it here.
        """
        path = self.folder / f"{name}{address.suffix}"
        if _used(path):
            with suppress(FileNotFoundError):  # others needed the room in between
                return do(path)
        with explained(self.folder, StoreError, CANNOT_KEEP):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(name):  # as long as it is, nobody removes it
            if not _used(path):
                with whole_file(path, StoreError, CANNOT_KEEP) as partial:
                    address.ask(lambda files, at: files.get_file(at, str(partial)))
                    if is_hash and (found := file_sha256(partial)) != name:
                        raise StoreError(
                            f"{address} is not the file that store.json names (sha256 {found[:12]}..., not "
                            f"{name[:12]}...): it is damaged, or was replaced since the store was opened. "
                            "Open the store again; if that does not help, encode or copy it there again."
                        )
            answer = do(path)
        self._make_room(path)
        return answer

    def _make_room(self, keep: Path) -> None:
        with self._locked("room"):
            found, total = list[tuple[float, int, Path]](), 0
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    state = path.stat()
                    if path.suffix == ".partial" and time.time() - state.st_mtime > STALE:
                        path.unlink()
                    elif path.suffix in KEPT:
                        total += state.st_size
                        found.append((state.st_mtime, state.st_size, path))
            for _, size, path in sorted(found):
                if total <= self.limit:
                    break
                if path != keep:
                    # in use, or on Windows open
                    with suppress(OSError), self._locked(path.name, 0):
                        path.unlink()
                        total -= size

    @contextmanager
    def _locked(self, name: str, timeout: float = -1) -> Iterator[None]:
        """One process and thread at a time; the file of the lock stays, as others may be waiting for it."""
        # no fallback: where the system has no locks, a file that stands for one would outlive a kill
        lock = FileLock(self.folder / f"{name[:2]}.lock", timeout, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise StoreError(CANNOT_KEEP.format(path=self.folder, reason=reason)) from error
        try:
            yield
        finally:
            lock.release()


def found_now(address: Address) -> str:
    """What to call the file at an address, of whose bytes nobody knows the hash; raises SourceError."""
    state = address.stat()
    return hashlib.sha256(f"{address} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()


def _used(path: Path) -> bool:
    """Whether it is there; from now on it counts as used last."""
    with suppress(OSError):
        os.utime(path)
        return True
    return False
