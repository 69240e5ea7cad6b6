"""WebDataset shards, tar files of images, as a source: listed by their headers, then read by offset."""

import io
import logging
import posixpath
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from latentvae.base import addresses
from latentvae.base.addresses import Address, Place
from latentvae.base.cache import Cache, found_now
from latentvae.base.errors import ImageError, SourceError
from latentvae.base.files import portable
from latentvae.images import captions, kinds
from latentvae.images.reading import load_image

logger = logging.getLogger(__name__)

TEXTS = (".cls", *captions.SIDECARS)  # the later one counts
COLUMN = "data.column of training, --column of encode"  # where a person names one
CAPTIONED = 16  # shards whose texts are sorted at once
CACHES = ("_texts_of", "_resolved", "_prefix")
BLOCK = 1 << 20  # bytes that are fetched at once where headers of a shard at an address are read
GO_ON = "Restore it, then go on: a training with --resume latest, encoding with the same command."


Answer = TypeVar("Answer")


class Member(NamedTuple):
    """Where a file lies in its shard."""

    name: str
    offset: int  # of its first byte
    size: int


class Listed(NamedTuple):
    """What is in a shard: images and texts in its order, and the suffixes of all else."""

    images: list[Member]
    texts: list[Member]
    left_out: Counter[str]


class TarSource:
    """Images in tar files, in the order of the shards and of the members in each.

    Only headers are read to list them. A shard is opened anew for every image, so nothing is shared between
    processes. Some 50 bytes are kept per image, for a worker process to be sent the list quickly.

    Args:
        shards: uncompressed tar files.
        extension: take the members of this extension only, counted from the first dot as WebDataset does;
            None: all that are images by their suffix.
        root: the folder that keys are relative to; None: each shard's own.
        texts: keep in mind where captions and labels are.

    Attributes:
        left_out: what else is in the shards, by suffix.
        cache: where shards at addresses are fetched to as a whole; None: each member is a request of its own.

    Raises:
        ImageError: a shard that is missing, damaged or cut short, or no image in any.
    """

    def __init__(
        self,
        shards: Sequence[Place],
        extension: str | None = None,
        root: Place | None = None,
        texts: bool = False,
    ) -> None:
        self.shards, self.root = shards, root
        self.cache: Cache | None = None
        listing = _in_turn(partial(_packed, extension=extension, texts=texts), shards)
        found = list(tqdm(listing, desc="listing shards", total=len(shards), delay=2, leave=False))
        self.members = _Members.of([each.images for each in found])
        if not len(self.members):
            wanted = f"with the extension {extension!r} ({COLUMN})" if extension else " ".join(kinds.SUFFIXES)
            raise ImageError(
                f"no image in {_named(shards)}: members {wanted} were wanted. Name other shards, or the "
                f"members' extension ({COLUMN})."
            )
        _warn_of_pair(shards, [each.pair for each in found])
        self.left_out = sum((each.left_out for each in found), Counter[str]())
        self.texts = _Members.of([each.texts for each in found])
        self._remember()

    def _remember(self) -> None:
        """Start with nothing kept of what is asked for image by image."""
        self._texts_of = lru_cache(CAPTIONED)(self._by_sample)
        self._resolved = lru_cache(maxsize=None)(lambda shard: self.shards[shard].resolve())
        self._prefix = lru_cache(maxsize=None)(self._key_of)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in CACHES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """Name a member, for example "shards/000.tar:cat.jpg"."""
        return f"{self._shard(index)}:{self._member(index)}"

    def place(self, index: int) -> tuple[Place, int]:
        """The shard, links resolved, and the offset."""
        return self._resolved(self.members.shard(index)), self.members.extent(index)[0]

    def load(self, index: int, channels: int = 3) -> torch.Tensor:
        """Load an image as float32 (channels, H, W) in [-1, 1].

        Raises:
            ImageError: the member is no image that can be read.
            SourceError: the shard is gone or shorter than it was.
        """
        return load_image(self.read(index), name=self.name(index), channels=channels)

    def read(self, index: int) -> bytes:
        """The member's bytes.

        Raises:
            SourceError: the shard is gone or shorter than it was.
            StoreError: the cache cannot hold it.
        """
        extent = self._extent(index)
        return self._here(self._shard(index), lambda shard: read_part(shard, *extent))

    def fetch(self, numbers: Iterable[int]) -> None:
        """Have shards, by number, in the cache before they are asked for; raises as `read`."""
        for number in numbers:
            self._here(self.shards[number], lambda shard: None)

    def _here(self, shard: Place, do: Callable[[Place], Answer]) -> Answer:
        if self.cache is None or not isinstance(shard, Address):
            return do(shard)
        return self.cache.use(shard, found_now(shard), do, is_hash=False)

    def open(self, index: int) -> IO[bytes]:
        """The member as a file, of which only what is asked for is read."""
        shard = self._shard(index)
        file = shard.open("rb") if isinstance(shard, Path) else _Ranges(shard)
        return io.BufferedReader(_Part(file, *self._extent(index)), addresses.HEADER)

    def state(self, index: int) -> tuple[int, int]:
        """The member's bytes, and when its shard was changed, in nanoseconds."""
        return self._extent(index)[1], self._shard(index).stat().st_mtime_ns

    def key(self, index: int) -> str:
        """The shard below the root without its suffix, and the member: "000/cat.jpg"."""
        # what leads out of the shard stays in it: keys become paths
        member = posixpath.normpath(f"/{self._member(index)}").lstrip("/")
        return f"{self._prefix(self.members.shard(index))}/{member}"

    def _key_of(self, shard: int) -> str:
        below = below_root(self.shards[shard], self.root)
        return portable(PurePosixPath(below).with_suffix("").as_posix())

    def origin(self, index: int) -> str:
        """What a store notes of where an image came from."""
        return f"{portable(str(self._shard(index)))}:{self._member(index)}"

    def caption(self, index: int) -> tuple[captions.Caption, list[str]]:
        """What NAME.txt, NAME.json and NAME.cls beside the member say; and notes on what cannot be read.

        NAME is the member's up to its last dot, or, as WebDataset has it, up to its first.
        """
        texts, shard = self._texts_of(self.members.shard(index)), self._shard(index)
        member, found, notes = self._member(index), dict[str, object](), list[str]()
        own = texts.get(posixpath.splitext(member)[0], {}) or texts.get(_sample(member), {})
        for suffix in (each for each in TEXTS if each in own):
            text = own[suffix]
            size = min(text.size, captions.MAX_BYTES + 1)
            said, note = captions.parse(
                posixpath.basename(text.name), partial(read_part, shard, text.offset, size)
            )
            found.update(said)
            notes += note
        return found or None, notes

    def _by_sample(self, shard: int) -> dict[str, dict[str, Member]]:
        """A shard's texts by the name that they share with an image, and by suffix."""
        found: dict[str, dict[str, Member]] = {}
        for text in self.texts.of_shard(shard):
            name, suffix = posixpath.splitext(text.name)
            found.setdefault(name, {})[suffix.lower()] = text
        return found

    def _member(self, index: int) -> str:
        return self.members.name(index)

    def _extent(self, index: int) -> tuple[int, int]:
        return self.members.extent(index)

    def _shard(self, index: int) -> Place:
        return self.shards[self.members.shard(index)]


class _Packed(NamedTuple):
    """Members of one shard in a few arrays: as objects they would be ten times as large."""

    extents: np.ndarray  # (N, 2) int64: offset, size
    lengths: np.ndarray  # (N,) int64: of the names
    names: bytes

    @classmethod
    def of(cls, members: Sequence[Member]) -> "_Packed":
        extents = np.array([(one.offset, one.size) for one in members], dtype=np.int64).reshape(-1, 2)
        names = [one.name.encode("utf-8", "surrogateescape") for one in members]
        return cls(extents, np.array([len(name) for name in names], dtype=np.int64), b"".join(names))


class _Members:
    """Members of many shards by number; what is pickled for each worker."""

    def __init__(self, shard_of: np.ndarray, extents: np.ndarray, names: bytes, ends: np.ndarray) -> None:
        self.shard_of, self.extents, self.names, self.ends = shard_of, extents, names, ends

    @classmethod
    def of(cls, shards: Sequence[_Packed]) -> "_Members":
        """From the members of each shard."""
        return cls(
            np.repeat(np.arange(len(shards), dtype=np.int32), [len(each.lengths) for each in shards]),
            np.concatenate([each.extents for each in shards]),
            b"".join(each.names for each in shards),
            np.cumsum(np.concatenate([each.lengths for each in shards])),
        )

    def __len__(self) -> int:
        return len(self.shard_of)

    def shard(self, index: int) -> int:
        return int(self.shard_of[index])

    def extent(self, index: int) -> tuple[int, int]:
        offset, size = self.extents[index]
        return int(offset), int(size)

    def name(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.names[start : self.ends[index]].decode("utf-8", "surrogateescape")

    def of_shard(self, shard: int) -> list[Member]:
        first, end = np.searchsorted(self.shard_of, (shard, shard + 1))
        return [Member(self.name(at), *self.extent(at)) for at in range(first, end)]


def below_root(file: Place, root: Place | None) -> str:
    """The POSIX path of a file below a root; its name where it does not lie there."""
    return addresses.below(file, root) if root is not None and addresses.is_below(file, root) else file.name


def read_part(shard: Place, offset: int, size: int) -> bytes:
    """Some bytes of a shard; raises SourceError where it is gone or shorter than it was."""
    try:
        data = addresses.read_part(shard, offset, size)
    except OSError as error:
        raise SourceError(f"{shard} can no longer be read ({error.strerror or error}). {GO_ON}") from error
    if len(data) < size:
        raise SourceError(f"{shard} is shorter than when the run began. {GO_ON}")
    return data


class _Ranges:
    """What `_Part` asks of an open file, of one at an address: each time it reads, that is one request."""

    def __init__(self, shard: Place) -> None:
        self.shard, self.at = shard, 0

    def seek(self, at: int) -> None:
        self.at = at

    def read(self, size: int) -> bytes:
        return read_part(self.shard, self.at, size)

    def close(self) -> None:
        pass


class _Part(io.RawIOBase):
    """A stretch of an open file as a file of its own, which closes the other with it."""

    def __init__(self, file: IO[bytes] | _Ranges, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, (0, self.at, self.size)[whence] + offset)
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.file.seek(self.start + self.at)
        data = self.file.read(max(0, min(len(buffer), self.size - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def list_members(shard: Place, extension: str | None = None) -> Listed:
    """List the members of one tar, in its order, seeking over the data.

    Raises:
        ImageError: it cannot be opened, is compressed, damaged, or cut short.
    """
    try:
        if isinstance(shard, Path):
            return _list(lambda: tarfile.open(shard, "r:"), shard, extension)

        def listed(files: Any, path: str) -> Listed:
            file = shard.opened(files, path, BLOCK)
            return _list(lambda: tarfile.open(fileobj=file, mode="r:"), shard, extension)

        return shard.ask(listed)  # a connection that breaks in the middle begins again
    except (OSError, tarfile.TarError, ValueError) as error:
        raise _unlisted(shard, error) from error


def _list(opened: Callable[[], tarfile.TarFile], shard: Place, extension: str | None) -> Listed:
    found = Listed([], [], Counter())
    try:
        with opened() as tar:  # which reads the first header: damage there is no connection's fault either
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all headers it has seen
                if member.isreg() and not member.issparse():
                    _sort(Member(member.name, member.offset_data, member.size), extension, found)
            _check_end(tar)
    except (tarfile.TarError, ValueError) as error:
        raise _unlisted(shard, error) from error
    return found


def _unlisted(shard: Place, error: Exception) -> ImageError:
    return ImageError(
        f"{shard} cannot be listed ({getattr(error, 'strerror', None) or error}), but a whole, "
        "uncompressed tar was wanted: fetch it again, or leave it out"
    )


def _sort(member: Member, extension: str | None, found: Listed) -> None:
    name = member.name.rpartition("/")[2]
    if name.startswith("."):  # such as macOS' ._cat.jpg
        return
    suffix = posixpath.splitext(name)[1].lower()
    is_image = kinds.is_image_name(suffix)
    if (name.partition(".")[2].lower() == extension.lower().lstrip(".")) if extension else is_image:
        found.images.append(member)
    elif suffix in TEXTS:
        found.texts.append(member)
    elif not is_image:  # images of another extension were asked not to be taken
        kinds.count(found.left_out, suffix)


def _check_end(tar: tarfile.TarFile) -> None:
    """Refuse a tar whose listing ended at a damaged header: tarfile takes one for the end, silently."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"damaged header at byte {tar.offset}")


def _in_turn(function: Callable[[Place], Answer], shards: Sequence[Place]) -> Iterator[Answer]:
    """A function of each shard, in their order; side by side where the first one waited for its disk.

    Where none waits, threads only get in one another's way: they take 1.7 times as long.
    """
    start, busy = time.perf_counter(), time.thread_time()
    yield from map(function, shards[:1])
    waited = time.thread_time() - busy < (time.perf_counter() - start) / 2
    if not waited:
        yield from map(function, shards[1:])
        return
    with ThreadPoolExecutor() as pool:
        yield from pool.map(function, shards[1:])


class _Listing(NamedTuple):
    """What is in one shard, of many, as it is kept."""

    images: _Packed
    texts: _Packed
    left_out: Counter[str]
    pair: tuple[str, str] | None  # of images in one sample


def _packed(shard: Place, extension: str | None, texts: bool) -> _Listing:
    found = list_members(shard, extension)
    names = pairwise(one.name for one in found.images)
    pair = next(((one, other) for one, other in names if _sample(one) == _sample(other)), None)
    kept = found.texts if texts else []
    return _Listing(_Packed.of(found.images), _Packed.of(kept), found.left_out, pair)


def _warn_of_pair(shards: Sequence[Place], pairs: Sequence[tuple[str, str] | None]) -> None:
    """Say where a WebDataset sample has two images, as one of them may be a mask or a depth map."""
    for shard, pair in zip(shards, pairs, strict=True):
        if pair is not None:
            logger.warning(
                "%s: %s and %s belong to one sample; both are taken. To take one kind, name its extension: "
                "%s.",
                *(shard, *pair, COLUMN),
            )
            return


def _sample(member: str) -> str:
    """The name of a member's sample, up to the first dot."""
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _named(shards: Sequence[Place]) -> str:
    return str(shards[0]) + (f" and {len(shards) - 1} more" if len(shards) > 1 else "")
