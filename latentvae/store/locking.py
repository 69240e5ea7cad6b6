"""One run at a time: the lock of a store, that the system itself takes off a process that died."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from latentvae.base.errors import StoreError

LOCK = ".lock"
OTHERS = ".lock-others"  # of the processes besides the first


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Hold a store's lock, as the first or only process of a run.

    The lock is the system's, on an open file: it ends with its process, however that ends, so that what a
    killed run leaves behind is taken over. The file says whose it is.

    Raises:
        StoreError: another process holds it, or is left of a run whose first process is gone; it is named. Or
            the folder has no locks.
    """
    path = store / LOCK
    descriptor = _acquire(path)
    try:
        _clear(store / OTHERS)
        yield
    finally:
        with suppress(StoreError):  # another process is still at it: the next run has to wait for that
            _clear(store / OTHERS)
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def joined(store: Path) -> Iterator[None]:
    """Have runs to come wait for this process, which is not the first, even if the first one dies.

    Raises:
        StoreError: a new run is about to begin.
    """
    if os.name == "nt":  # msvcrt has no shared locks
        yield
        return
    descriptor = _acquire(store / OTHERS, shared=True)
    try:
        yield
    finally:
        os.close(descriptor)


def _clear(path: Path) -> None:
    """Delete the lock of other processes, if none holds it."""
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        if not _try_lock(descriptor):
            raise StoreError(
                f"{path.parent} is still being written by a process of a run whose first process is gone (of "
                f"{', '.join(path.read_text().splitlines())}): wait until it has ended, or end it."
            )
        path.unlink()
    finally:
        os.close(descriptor)


def _acquire(path: Path, *, shared: bool = False) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written ({error.strerror}): choose another folder."
            ) from error
        try:
            taken = _try_lock(descriptor, shared=shared)
            if not taken:
                raise StoreError(_refusal(path, descriptor))
            if _is_at(descriptor, path):  # else its holder deleted it while we waited for nothing
                _add_name(path) if shared else _say_whose(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int, *, shared: bool = False) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise StoreError(
            f"this folder's file system has no locks ({error.strerror}): encode to another disk, then copy."
        ) from error
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _say_whose(descriptor: int) -> None:
    owner = {"pid": os.getpid(), "host": platform.node()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0) if hasattr(os, "pwrite") else os.write(
        descriptor, json.dumps(owner).encode()
    )


def _add_name(path: Path) -> None:
    with path.open("a") as file:
        file.write(f"process {os.getpid()} on {platform.node()}\n")


def _refusal(path: Path, descriptor: int) -> str:
    try:
        owner = json.loads(os.read(descriptor, 1000))
        who = f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just been taken, or Windows hides it
        who = "another process"
    return f"{path.parent} is being written by {who}: wait until that is done, or choose another folder."
