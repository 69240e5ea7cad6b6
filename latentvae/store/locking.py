"""One run at a time: the lock of a store, that the system itself takes off a process that died."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentvae.errors import StoreError

LOCK = ".lock"


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Hold a store's lock.

    The lock is the system's, on an open file: it ends with its process, however that ends, so that what a
    killed run leaves behind is taken over. The file says whose it is.

    Raises:
        StoreError: another process holds it, which is named; or the folder has no locks.
    """
    path = store / LOCK
    descriptor = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written ({error.strerror}): choose another folder."
            ) from error
        try:
            taken = _try_lock(descriptor)
            if not taken:
                raise StoreError(_refusal(path, descriptor))
            if _is_at(descriptor, path):  # else its holder deleted it while we waited for nothing
                _say_whose(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _refusal(path: Path, descriptor: int) -> str:
    try:
        owner = json.loads(os.read(descriptor, 1000))
        who = f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just been taken, or Windows hides it
        who = "another process"
    return f"{path.parent} is being written by {who}: wait until that is done, or choose another folder."
