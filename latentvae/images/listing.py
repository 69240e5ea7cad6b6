"""Image files below a folder: as paths, or listed quickly and kept in some thirty bytes a file."""

import errno
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from latentvae.base.addresses import Place
from latentvae.base.errors import ImageError
from latentvae.base.files import collect_too_long, is_too_long, may_be_file
from latentvae.images import kinds
from latentvae.images.kinds import SUFFIXES, is_image_name

ARCHIVES = (".tar", ".parquet")
ARRAYS = ("names", "ends", "folder_of")


def files_below(
    folder: Path, left_out: Counter[str], outside: Path | None = None, also: tuple[str, ...] = ()
) -> list[Path]:
    """`list_files`, or an error that says what else is there.

    Raises:
        ImageError: the folder holds no image.
    """
    own = Counter[str]()
    found = list_files(folder, also, own, outside)
    if not found:
        what = f"; {kinds.describe(own)}" if own else ""
        raise ImageError(
            f"no image in the folder {folder}: put files there that end in one of {' '.join(SUFFIXES)}{what}"
        )
    left_out.update(own)
    return found


def list_files(
    root: Path, also: tuple[str, ...] = (), left_out: Counter[str] | None = None, outside: Path | None = None
) -> list[Path]:
    """Sort the image files below root; hidden ones and loops are left out.

    Args:
        also: suffixes of others that are listed too.
        left_out: where to count the rest by suffix.
        outside: a folder that is not entered.
    """
    return sorted(_walk(root, also, left_out, outside), key=lambda file: file.as_posix())


def _walk(
    root: Path, also: tuple[str, ...], left_out: Counter[str] | None, outside: Path | None
) -> Iterator[Path]:
    """Yield files below root, following links to folders unless that would visit one twice."""

    too_long = list[Path]()
    top = root.resolve()
    visited = {top} if outside is None else {top, outside.resolve()}
    for folder, names, files in os.walk(root, onerror=collect_too_long(too_long), followlinks=True):
        names[:] = [name for name in sorted(names) if _follow(Path(folder, name), top, visited)]
        for file in files:
            path = Path(folder, file)
            if file.startswith("."):
                continue
            if not may_be_file(path):
                if left_out is not None and path.is_symlink():
                    left_out[kinds.BROKEN_LINKS] += 1
                continue
            suffix = path.suffix.lower()
            if suffix in also or kinds.is_image_name(suffix):
                yield path
            elif left_out is not None:
                kinds.count(left_out, suffix)
    yield from too_long


def _follow(folder: Path, top: Path, visited: set[Path]) -> bool:
    if folder.name.startswith("."):
        return False
    if is_too_long(folder):  # no link, then
        return True
    real = folder.resolve()  # where a link leads
    # A link into the tree would list its images under two names, one to above the tree would list the disk.
    loops = folder.is_symlink() and (real.is_relative_to(top) or top.is_relative_to(real))
    if loops or real in visited:
        return False
    visited.add(real)
    return True


class FileTable(Sequence[Path]):
    """Paths by number, in arrays: objects of their own would take ten times the room in every process.

    Args:
        folders: each once.
        names: of all files, one behind the other, uint8.
        ends: where each name ends, int64 (N,).
        folder_of: the number of each file's folder, int32 (N,).
    """

    def __init__(
        self, folders: list[str], names: np.ndarray, ends: np.ndarray, folder_of: np.ndarray
    ) -> None:
        self.folders, self.names, self.ends, self.folder_of = folders, names, ends, folder_of

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]  # counts from the end, or raises IndexError
        start = self.ends[number - 1] if number else 0
        name = os.fsdecode(self.names[start : self.ends[number]].tobytes())
        return Path(self.folders[self.folder_of[number]], name)

    @property
    def digest(self) -> str:
        """Of all that it holds."""
        found = hashlib.sha256(json.dumps(self.folders).encode("utf-8", "surrogatepass"))
        for name in ARRAYS:
            found.update(np.ascontiguousarray(getattr(self, name)).data)
        return found.hexdigest()

    def save(self, folder: Path) -> None:
        """Write it as files that `load` maps."""
        (folder / "folders.json").write_text(json.dumps(self.folders), encoding="utf-8")
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> "FileTable":
        """The one that was saved, in memory that all who load it share."""
        folders = json.loads((folder / "folders.json").read_text(encoding="utf-8"))
        return cls(folders, *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS))


@dataclass(frozen=True)
class Listing:
    """What lies below a folder: images, and .tar and .parquet files, sorted by their paths."""

    images: Sequence[Place]
    archives: Sequence[Place]

    def everything(self) -> list[Place]:
        """Both in one order."""
        return sorted([*self.images, *self.archives], key=lambda file: file.as_posix())


def scan(root: Path) -> Listing:
    """List a folder with all below it; hidden files, and links that would list the same twice, are left out.

    Raises:
        OSError: a folder that cannot be read.
    """
    names, lengths = bytearray(), array("H")
    folders: list[str] = []
    counts: list[int] = []  # images in each
    archives: list[Path] = []
    for folder, files in _runs(root):
        images = [os.fsencode(name) for name in files if not name.lower().endswith(ARCHIVES)]
        if len(images) < len(files):
            archives += [Path(folder, name) for name in files if name.lower().endswith(ARCHIVES)]
        if images:
            folders.append(folder)
            counts.append(len(images))
            names += b"".join(images)
            lengths.extend(map(len, images))
    # a folder comes again after each of its subfolders: the same text, of a few bytes, once more
    folder_of = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
    ends = np.cumsum(np.frombuffer(lengths, dtype=np.uint16), dtype=np.int64)
    return Listing(FileTable(folders, np.frombuffer(names, dtype=np.uint8), ends, folder_of), archives)


def _runs(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Names of wanted files that follow one another in one folder, in the order of whole paths."""
    top = str(root.resolve())
    visited = {top}
    # folders that are being listed, each with its names still to come, the next one last
    stack = [(str(root), _entries(str(root), top, top, visited))]
    while stack:
        folder, names = stack[-1]
        files = []
        while names and not names[-1].endswith("/"):
            files.append(names.pop())
        if files:
            yield folder, files
        if names:
            inside = str(Path(folder, names.pop()[:-1]))
            stack.append((inside, _entries(inside, os.path.realpath(inside), top, visited)))
        else:
            stack.pop()


def _entries(folder: str, real: str, top: str, visited: set[str]) -> list[str]:
    """Names in a folder, the last first, subfolders with a slash: so names sort as whole paths do."""
    files: list[str] = []
    inside: list[tuple[str, bool]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            suffix = name[name.rfind(".") :].lower() if "." in name else ""
            wanted = suffix in ARCHIVES or is_image_name(suffix)
            if wanted and _leads(entry.is_file):  # by the listing itself, but for links
                files.append(name)
            elif _leads(entry.is_dir):
                inside.append((name, entry.is_symlink()))
    for name, link in sorted(inside):
        place = os.path.realpath(Path(folder, name)) if link else str(Path(real, name))
        # a link into the tree would list its images under two names, one to above it would list the disk
        loops = link and (Path(place).is_relative_to(top) or Path(top).is_relative_to(place))
        if not loops and place not in visited:
            visited.add(place)
            files.append(f"{name}/")
    files.sort(reverse=True)
    return files


def _leads(is_kind: Callable[[], bool]) -> bool:
    """What an entry says it is; a link in circles leads nowhere, as one to nothing does."""
    try:
        return is_kind()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False
