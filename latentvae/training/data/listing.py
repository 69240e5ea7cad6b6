"""Large folders: listed once on each machine, kept in some thirty bytes a file, which its processes share."""

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from latentvae.base.errors import ConfigError
from latentvae.images.kinds import is_image_name

ARCHIVES = (".tar", ".parquet")
ARRAYS = ("names", "ends", "folder_of")


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

    images: FileTable
    archives: list[Path]

    def everything(self) -> list[Path]:
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
            if wanted and entry.is_file():  # by the listing itself, but for links
                files.append(name)
            elif entry.is_dir():
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


def scan_together(root: Path) -> Listing:
    """`scan`, by one process of each machine; the others map what it found.

    Raises:
        OSError: as `scan`, in all processes.
        ConfigError: machines see different files.
    """
    state = PartialState()
    if state.num_processes == 1:
        return scan(root)
    said: tuple[str | None, str, OSError | None] = (None, "", None)
    place: Path | None = None
    if state.is_local_main_process:
        try:
            found = scan(root)
            place = Path(tempfile.mkdtemp(prefix="latentvae-listing-"))
            found.images.save(place)
            (place / "archives.json").write_text(json.dumps([*map(str, found.archives)]), encoding="utf-8")
            said = (str(place), found.images.digest, None)
        except OSError as error:
            said = (None, "", error)
    all_said = gather_object([said])
    if problem := next((error for _, _, error in all_said if error is not None), None):
        raise problem
    others = {digest for _, digest, _ in all_said if digest}
    if len(others) == 1:
        first, _, _ = all_said[state.process_index - state.local_process_index]
        archives = json.loads((Path(first) / "archives.json").read_text(encoding="utf-8"))
        found = Listing(FileTable.load(Path(first)), [*map(Path, archives)])
    gather_object([None])  # all have opened it
    if place is not None:
        shutil.rmtree(place, ignore_errors=True)  # what is mapped stays
    if len(others) > 1:
        raise ConfigError(
            f"machines see different files in {root}: processes would train on other images than they are "
            "counted as. Make the folders alike, or put them on storage that all machines share."
        )
    return found


ROUNDS = 6
LISTED = (
    2**16
)  # images up to which the order of an epoch is drawn as a whole; beyond, 8 bytes an image add up


def shuffled(place: int, count: int, keys: tuple[int, ...]) -> int:
    """Where a pseudorandom permutation of range(count) takes `place`; computed, so that none need be stored.

    A Feistel network permutes the numbers of an even number of bits, at most four times as many; those that
    it takes outside are taken on until they are inside (Black & Rogaway 2002, cycle walking).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            mixed = (right + key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & mask)
        place = left << half | right
        if place < count:
            return place
