"""Where images lie: folders, lists of files, Hugging Face datasets and WebDataset shards, all by number."""

import glob
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from latentvae.base.addresses import Address, Place, is_below, place
from latentvae.base.errors import ConfigError, ImageError
from latentvae.base.files import check_local, local, portable
from latentvae.images import captions, kinds, scans, tables
from latentvae.images.listing import ARCHIVES, Listing, scan
from latentvae.images.reading import HEAD, kind_of
from latentvae.images.scans import Window
from latentvae.images.tars import TarSource, below_root, list_members, read_part

BRACES = re.compile(r"\{([^{}]*)\}")
PATTERN = re.compile(r"[{*?\[]")
LISTS = (".jsonl", ".csv")  # of paths; taken where one is named, and not from folders
WANTED = (
    "a folder of images, .tar shards or .parquet files, one such file, a .jsonl or .csv that lists images, a "
    "dataset saved with save_to_disk, or a pattern such as shards/{000..011}.tar or shards/*.tar"
)

Spec = str | Place
Scan = Callable[[Path], Listing]


class ImageSource(Protocol):
    """Images by number; the same number is the same image in every process and every run."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What reports call an image, for example "shards/000.tar:cat.jpg"."""

    def place(self, index: int) -> tuple[Place, int]:
        """The file, links resolved, and the place in it: the same for one image under two names."""

    def load(self, index: int, channels: int = 3) -> torch.Tensor:
        """Load an image as float32 (channels, H, W) in [-1, 1].

        Raises:
            ImageError: this image cannot be read; others can.
            SourceError: the source itself is gone.
        """


class ImageFiles(ImageSource, Protocol):
    """The same, and their files' bytes, with all that a store notes of them. Each may raise OSError too."""

    def read(self, index: int) -> bytes:
        """What is in the image file; raises as `load`."""

    def open(self, index: int) -> IO[bytes]:
        """The image file; raises as `load`."""

    def state(self, index: int) -> tuple[int | None, int]:
        """Its size in bytes, None where only reading would tell, and when it was changed, in nanoseconds."""

    def key(self, index: int) -> str:
        """What it is called below what was named, with its suffix: a POSIX path, in any locale the same."""

    def origin(self, index: int) -> str:
        """Its name as text that is the same in any locale; `read_origin` reads it by that."""

    def caption(self, index: int) -> tuple[captions.Caption, list[str]]:
        """What is said about it, and notes on what cannot be read: see `captions.read_caption`."""


@dataclass(frozen=True)
class FolderSource:
    """Image files; with a window the samples of one channel, which it scales.

    Attributes:
        root: the folder that keys are relative to, up to which captions are looked for; None: each one's own.
    """

    paths: Sequence[Place]
    window: Window | None = None
    root: Place | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path."""
        return str(self.paths[index])

    def place(self, index: int) -> tuple[Place, int]:
        """The path, links resolved."""
        return self.paths[index].resolve(), 0

    def load(self, index: int, channels: int = 3) -> torch.Tensor:
        """Load an image as float32 (channels, H, W) in [-1, 1]; raises ImageError."""
        path = self.paths[index]
        source = path if isinstance(path, Path) else path.read_bytes()
        return scans.load(source, channels, self.window, self.name(index))[0]

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        return self.paths[index].read_bytes()

    def open(self, index: int) -> IO[bytes]:
        """The file."""
        return self.paths[index].open("rb")

    def state(self, index: int) -> tuple[int, int]:
        """The file's size in bytes, and when it was changed, in nanoseconds."""
        found = self.paths[index].stat()
        return found.st_size, found.st_mtime_ns

    def key(self, index: int) -> str:
        """The path below the root; its name where it does not lie there."""
        return portable(below_root(self.paths[index], self.root))

    def origin(self, index: int) -> str:
        """What a store notes of where an image came from."""
        return portable(str(self.paths[index]))

    def caption(self, index: int) -> tuple[captions.Caption, list[str]]:
        """What is said about it in the files beside it, and notes on what cannot be read."""
        path = self.paths[index]
        return captions.read_caption(path, self.root or path.parent)


@dataclass(frozen=True)
class ListSource(FolderSource):
    """Image files that the lines of a list name; what else a line says is said of its image.

    Attributes:
        lines: without the path, in the order of the paths.
        notes: on the list's encoding.
    """

    lines: Sequence[dict[str, Any]] = ()
    notes: Sequence[str] = ()

    def key(self, index: int) -> str:
        """The path below the list's folder; elsewhere the whole path, without its first slash."""
        path = self.paths[index]
        if self.root is not None and is_below(path, self.root):
            return super().key(index)
        if isinstance(path, Address):
            return path.bare.partition("://")[2].lstrip("/")
        whole = path.absolute()
        return portable(whole.relative_to(whole.anchor).as_posix())

    def caption(self, index: int) -> tuple[captions.Caption, list[str]]:
        """Its line, updated by the files beside it."""
        return captions.with_sidecars(dict(self.lines[index]), list(self.notes), self.paths[index])


def open_source(spec: Spec, column: str | None = None, scan: Scan = scan, texts: bool = False) -> ImageFiles:
    """Open image files, a Hugging Face dataset on disk or WebDataset shards, told apart by what is there.

    Args:
        spec: a folder, a file, or several of them as a pattern such as shards/{000..011}.tar.
        column: of a dataset: the column with the images, None to find it; of tars: the extension of the
            members, None for all images; of a list: the column with the paths; of image files: not used.
        scan: lists a folder.
        texts: keep in mind what is said of the images, for `caption`.

    Raises:
        ImageError: something that is missing or damaged, or no image there.
        ConfigError: no image column or several, files of several kinds, or `datasets` is not installed.
    """
    path = place(spec)
    try:
        if path.is_dir():
            if tables.is_saved(path):
                return tables.open_saved(path, column, texts)
            return _open_folder(path, column, _listed(path, scan), texts)
        files = [
            file for part in parts(spec) for file in _files(part, "" if part == path else f" ({spec})", scan)
        ]
    except OSError as error:
        raise ImageError(
            f"{error.filename} cannot be read ({error.strerror}): check its name and permissions"
        ) from error
    # each file once, however many parts of the pattern name it
    return _open_files(str(spec), list(dict.fromkeys(files)), column, base(spec), texts)


def open_sources(specs: Sequence[Spec], column: str | None, scan: Scan) -> list[ImageFiles]:
    """Open several, with what is said of their images; files that are named one by one go together.

    Raises:
        LatentVAEError: as `open_source`.
    """
    named = [place(spec) for spec in specs]
    folders = [path for path in named if path.is_dir()]
    files: dict[tuple[str, Place], list[Place]] = {}
    found = list[ImageFiles]()
    for spec, path in zip(specs, named, strict=True):
        if not path.is_file():
            found.append(open_source(spec, column, scan, texts=True))
            continue
        # keys are relative to a folder that is named too
        root = next((folder for folder in folders if is_below(path, folder)), path.parent)
        files.setdefault((_kind(path), root), []).append(path)
    return [
        *found,
        *(_open_files(str(some[0]), some, column, root, True) for (_, root), some in files.items()),
    ]


def _open_folder(folder: Place, column: str | None, found: Listing, texts: bool) -> ImageFiles:
    if found.archives:
        return _open_files(str(folder), found.everything(), column, folder, texts)
    if not found.images:
        raise ImageError(f"no image in the folder {folder}. Wanted: {WANTED}.")
    return FolderSource(found.images, root=folder)


def parts(spec: Spec) -> list[Place]:
    """The files or folders that a pattern names; a name that exists is no pattern."""
    whole = place(spec)
    if isinstance(whole, Path) and whole.exists():
        return [whole]
    found = list[Place]()
    for part in expand_braces(str(spec)):
        one = place(part)
        if isinstance(one, Address):  # where ? begins a query, and a bracket is no pattern
            found += (one.matching() if "*" in part else []) or [one]
            continue
        matching = glob.glob(part, recursive=True) if glob.has_magic(part) else []  # noqa: PTH207  # absolute too
        found += [Path(name) for name in sorted(matching) or [part]]
    return found


def root(spec: Spec) -> Place:
    """The file or folder, links resolved, that everything `spec` names lies in."""
    path = place(spec)
    return (path if path.exists() else base(spec)).resolve()


def base(spec: Spec) -> Place:
    """The folder that a spec's keys are relative to: itself, its own, or that before a pattern begins."""
    path = place(spec)
    if path.is_dir():
        return path
    if not path.exists() and (match := PATTERN.search(str(spec))):
        # the pattern may begin in the middle of a name: any letter in its place keeps the parent right
        return place(str(spec)[: match.start()] + "-").parent
    return path.parent


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


def _files(path: Place, context: str, scan: Scan) -> list[Place]:
    if path.is_file():
        return [path]
    if not path.exists():
        check_local(path if isinstance(path, Path) else "", ImageError)
        why = path.why_missing() if isinstance(path, Address) else ""
        raise ImageError(f"{path} does not exist{why}{context}. Wanted: {WANTED}.")
    found = _listed(path, scan)
    if not (files := found.everything()):
        raise ImageError(f"no image in the folder {path}. Wanted: {WANTED}.")
    return files


def _listed(folder: Place, scan: Scan) -> Listing:
    if isinstance(folder, Path):
        return scan(folder)
    files = folder.below()
    archives = [file for file in files if file.suffix.lower() in ARCHIVES]
    return Listing([file for file in files if kinds.is_image_name(file.suffix.lower())], archives)


def _kind(file: Place) -> str:
    suffix = file.suffix.lower()
    return "image" if kinds.is_image_name(suffix) else suffix


def _open_files(
    spec: str, files: list[Place], column: str | None, root: Place | None, texts: bool
) -> ImageFiles:
    found: dict[str, list[Place]] = {}
    for file in files:
        found.setdefault(_kind(file), []).append(file)
    match list(found):
        case ["image"]:
            return FolderSource(files, root=root)
        case [".tar"]:
            return TarSource(files, column, root, texts)
        case [".parquet"]:
            return tables.open_parquet(files, column, root, texts)
        case [suffix] if suffix in LISTS:
            return open_list(files, column)
        case [suffix]:
            with files[0].open("rb") as opened:
                head = opened.read(HEAD)
                kind = kind_of(opened, head)
            if kind is not None:
                raise kinds.unreadable(files[0], head, kind)
            raise ImageError(f"{files[0]} ends in {suffix!r}. Wanted: {WANTED}; unpack other archives first.")
        case _:
            counts = " and ".join(f"{len(some)} {kind} files" for kind, some in found.items())
            raise ConfigError(
                f"{spec} holds {counts}: which are to be used? Name a subfolder, one file, or a pattern "
                "such as shards/{000..011}.tar."
            )


def open_list(files: Iterable[Place], column: str | None) -> ListSource:
    """The image files that lists name, relative to where each list lies, as their lines have them.

    Raises:
        ImageError: no line.
        StoreError: a line without a path.
    """
    paths, lines, notes, folders = list[Place](), list[dict[str, Any]](), list[str](), list[Place]()
    for file in files:
        rows, said = captions.read_list(file, column)
        paths += [_beside(file, name) for name in rows]
        lines += rows.values()
        notes += said
        folders.append(file.parent)
    if not paths:
        raise ImageError(f"{file} lists no image: a line for each was wanted, with its path as file_name")
    return ListSource(paths, root=folders[0], lines=lines, notes=notes)


def _beside(file: Place, name: str) -> Place:
    """What a list calls a file: an address, or a path relative to the list."""
    named = place(local(name))
    return named if isinstance(named, Address) else file.parent / local(name)


@lru_cache(maxsize=4)
def _members(shard: Place) -> dict[str, tuple[int, int]]:
    return {each.name: (each.offset, each.size) for each in list_members(shard).images}


def read_origin(origin: str) -> bytes:
    """The image file that a source calls so: PATH, SHARD.tar:MEMBER or FILE[ROW].

    Raises:
        LatentVAEError, OSError: it is not there.
    """
    path = place(local(origin))
    if isinstance(path, Path) and path.exists():
        return path.read_bytes()
    shard, colon, member = origin.partition(".tar:")
    if colon:
        file = place(local(f"{shard}.tar"))
        extent = _members(file).get(member)
        if extent is None:
            raise ImageError(f"{file} has no member {member!r}")
        return read_part(file, *extent)
    if match := re.fullmatch(r"(.+)\[(\d+)\]", origin, re.DOTALL):
        return tables.read_row(place(local(match[1])), int(match[2]))
    return path.read_bytes()
