"""WebDataset shards, tar files of images, as a source: listed by their headers, then read by offset."""

import logging
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from latentvae.base.errors import ImageError, SourceError
from latentvae.images.kinds import SUFFIXES, is_image_name
from latentvae.images.reading import load_image

logger = logging.getLogger(__name__)

BRACES = re.compile(r"\{([^{}]*)\}")


class Member(NamedTuple):
    """Where an image lies in its shard."""

    name: str
    offset: int  # of its first byte
    size: int


class TarSource:
    """Images in tar files, in the order of the shards and of the members in each.

    Only headers are read to list them. A shard is opened anew for every image, so nothing is shared between
    processes. Some 50 bytes are kept per image, for a worker process to be sent the list quickly.

    Args:
        shards: uncompressed tar files.
        extension: take the members of this extension only, counted from the first dot as WebDataset does;
            None: all that are images by their suffix.

    Raises:
        ImageError: a shard that is missing, damaged or cut short, or no image in any.
    """

    def __init__(self, shards: list[Path], extension: str | None = None) -> None:
        self.shards = shards
        with ThreadPoolExecutor() as pool:
            listing = pool.map(partial(list_members, extension=extension), shards)
            bar = tqdm(listing, desc="listing shards", total=len(shards), delay=2, leave=False)
            members = [list(found) for found in bar]  # per shard
        if not any(members):
            wanted = f"with the extension {extension!r} (data.column)" if extension else " ".join(SUFFIXES)
            raise ImageError(
                f"no image in {_named(shards)}: members {wanted} were wanted. Name other shards"
                + (
                    ", or another data.column."
                    if extension
                    else ", or the members' extension as data.column."
                )
            )
        _warn_of_pairs(shards, members)
        counts = [len(found) for found in members]
        # arrays, not objects: they are pickled whole to every worker
        self.shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        self.offsets = np.array([one.offset for found in members for one in found], dtype=np.int64)
        self.sizes = np.array([one.size for found in members for one in found], dtype=np.int64)
        # One string of all names: a million strings of their own would be copied to every worker.
        encoded = [one.name.encode("utf-8", "replace") for found in members for one in found]
        self.names = b"".join(encoded)
        self.name_ends = np.cumsum([len(name) for name in encoded])

    def __len__(self) -> int:
        return len(self.offsets)

    def name(self, index: int) -> str:
        """Name a member, for example "shards/000.tar:cat.jpg"."""
        start = self.name_ends[index - 1] if index else 0
        return f"{self._shard(index)}:{self.names[start : self.name_ends[index]].decode()}"

    def place(self, index: int) -> tuple[Path, int]:
        """The shard, links resolved, and the offset."""
        return self._shard(index).resolve(), int(self.offsets[index])

    def load(self, index: int, channels: int = 3) -> torch.Tensor:
        """Load an image as float32 (channels, H, W) in [-1, 1].

        Raises:
            ImageError: the member is no image that can be read.
            SourceError: the shard is gone or shorter than it was.
        """
        shard, size = self._shard(index), int(self.sizes[index])
        try:
            with shard.open("rb") as file:
                file.seek(int(self.offsets[index]))
                data = file.read(size)
        except OSError as error:
            raise SourceError(
                f"{shard} can no longer be read ({error.strerror or error}). Restore it; what was "
                "saved goes on with --resume latest."
            ) from error
        if len(data) < size:
            raise SourceError(
                f"{shard} is shorter than when the run began. Restore it; what was saved goes on with "
                "--resume latest."
            )
        return load_image(data, name=self.name(index), channels=channels)

    def _shard(self, index: int) -> Path:
        return self.shards[self.shard_of[index]]


def list_members(shard: Path, extension: str | None = None) -> list[Member]:
    """List the images of one tar, in its order, seeking over the data.

    Raises:
        ImageError: it cannot be opened, is compressed, damaged, or cut short.
    """
    found = []
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all headers it has seen
                if member.isreg() and not member.issparse() and _is_image(member.name, extension):
                    found.append(Member(member.name, member.offset_data, member.size))
            _check_end(tar)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ImageError(
            f"{shard} cannot be listed ({getattr(error, 'strerror', None) or error}), but a whole, "
            "uncompressed tar was wanted: fetch it again, or leave it out"
        ) from error
    return found


def _check_end(tar: tarfile.TarFile) -> None:
    """Refuse a tar whose listing ended at a damaged header: tarfile takes one for the end, silently."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"damaged header at byte {tar.offset}")


def _is_image(member: str, extension: str | None) -> bool:
    name = PurePosixPath(member).name
    if name.startswith("."):  # such as macOS' ._cat.jpg
        return False
    if extension is None:
        return is_image_name(PurePosixPath(name).suffix.lower())
    return name.partition(".")[2].lower() == extension.lower().lstrip(".")


def _warn_of_pairs(shards: list[Path], members: list[list[Member]]) -> None:
    """Say where a WebDataset sample has two images, as one of them may be a mask or a depth map."""
    for shard, found in zip(shards, members, strict=True):
        for one, other in pairwise(found):
            if _key(one.name) == _key(other.name):
                logger.warning(
                    "%s: %s and %s belong to one sample; both are trained on. To take one kind, set "
                    "data.column to its extension.",
                    *(shard, one.name, other.name),
                )
                return


def _key(member: str) -> str:
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _named(shards: list[Path]) -> str:
    return str(shards[0]) + (f" and {len(shards) - 1} more" if len(shards) > 1 else "")


def expand_braces(pattern: str) -> list[str]:
    """Spell out {000..011} and {a,b} as a shell does, in order."""
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    head, rests = pattern[: match.start()], expand_braces(pattern[match.end() :])
    return [f"{head}{item}{rest}" for item in _alternatives(match[1]) for rest in rests]


def _alternatives(text: str) -> list[str]:
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if bounds is None:
        return text.split(",") if "," in text else [f"{{{text}}}"]
    padded = any(bound.startswith("0") and len(bound) > 1 for bound in bounds.groups())
    width = max(map(len, bounds.groups())) if padded else 0
    first, last = map(int, bounds.groups())
    step = 1 if first <= last else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]
