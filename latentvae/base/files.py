"""Files on disk: written whole or not at all, made durable, hashed."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from latentvae.base.errors import LatentVAEError, StoreError


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Have `write` fill a temporary file beside `path` and give it its name; whole or not at all.

    Raises:
        LatentVAEError: it cannot be written.
    """
    try:
        write_atomically(path, write)
    except (StoreError, OSError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error.__cause__ or error
        raise LatentVAEError(
            f"{path} cannot be written ({reason}): name a place in a folder of yours."
        ) from error
    return path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, make it durable, and give it its name.

    Raises:
        StoreError: it cannot be written; what was at `path` stays.
    """
    stage(path, write)
    partial_path(path).replace(path)
    fsync(path.parent)


def stage(path: Path, write: Callable[[Path], object]) -> None:
    """The first half of `write_atomically`: a durable file that only needs to be renamed.

    Raises:
        StoreError: it cannot be written.
    """
    partial = partial_path(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)  # safetensors lets nobody else read what it writes
        fsync(partial)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        with suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or error
        raise StoreError(
            f"{path} cannot be written ({reason}). Finished shards are intact: make room, or check the "
            "folder's permissions, and run the same command again."
        ) from error


def partial_path(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.name}.partial")


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows has no handle to a folder
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
