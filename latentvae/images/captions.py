"""Captions and labels beside images: NAME.txt, NAME.json, or a metadata.jsonl as `datasets` reads it.

What has the image's name but for upper and lower case, or the Unicode form, is the image's too, unless it is
another image's by its exact name. Texts are UTF-8, or what a mark at their beginning says; or Windows-1252.
"""

import csv
import json
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from latentvae.base import addresses
from latentvae.base.addresses import Address, Place
from latentvae.base.errors import SourceError, StoreError
from latentvae.base.files import local, portable

METADATA = "metadata.jsonl"
FILE_NAME = "file_name"  # what `datasets` calls the column of a list that has the images' paths
PREFIX = "caption "  # of notes made here
MAX_BYTES = 1 << 20  # of one sidecar; a larger one is no caption
SIDECARS = (".json", ".txt")  # the later one counts
MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # of Windows' editors
WESTERN = "windows-1252"
GUESSED = f"read as {WESTERN}, for it is no UTF-8: save it as UTF-8 if that is wrong"
MAX_HIGH = 1 / 3  # of the bytes above ASCII's: more is text of another script

Caption = dict[str, Any] | None


def read_caption(image: Place, root: Place) -> tuple[Caption, list[str]]:
    """What is said about an image, as one JSON object, and notes on sidecars that cannot be read.

    Args:
        image: path of the image file.
        root: the folder up to which metadata.jsonl is looked for; the nearest one counts.

    Returns:
        The image's line of metadata.jsonl without `file_name`, updated by the object in NAME.json, updated by
        {"caption": the text of NAME.txt}; None where there is none of these. A note also says where an
        encoding had to be guessed.

    Raises:
        StoreError: a metadata.jsonl that is none.
    """
    found: dict[str, Any] = {}
    notes: list[str] = []
    for folder in _upto(image.parent, root):
        if METADATA in _listed(folder).names:
            metadata = _metadata(folder / METADATA)
            found.update(metadata.of(portable(addresses.below(image, folder))))
            notes += metadata.notes
            break
    return with_sidecars(found, notes, image)


def with_sidecars(found: dict[str, Any], notes: list[str], image: Place) -> tuple[Caption, list[str]]:
    """What is said about an image elsewhere, updated by the files beside it."""
    for suffix in SIDECARS:
        name = _listed(image.parent).sidecar(image, suffix)
        if name is not None:
            said, note = parse(name, partial(_start, image.with_name(name)))
            found = found | said
            notes = notes + note
    return found or None, notes


def parse(name: str, read: Callable[[], bytes]) -> tuple[dict[str, Any], list[str]]:
    """What a NAME.txt, NAME.json or NAME.cls says, and notes: why it is left out, or how it was read."""
    try:
        said, guessed = _parsed(name, read())
    except (OSError, ValueError, RecursionError, SourceError) as error:
        return {}, [f"{PREFIX}{name} left out: {error}"]
    return said, [f"{PREFIX}{name} {guessed}"] if guessed else []


def read_list(path: Place, column: str | None = None) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The lines of a .jsonl or .csv by the path in a column, `file_name`; and notes on its encoding.

    Raises:
        StoreError: a line without one, or no text.
    """
    metadata = _metadata(path, column or FILE_NAME)
    return metadata.rows, metadata.notes


def unclaimed(images: list[Place], roots: list[Place]) -> list[str]:
    """Paths of the NAME.txt and NAME.json beside images that none of these is called like, sorted.

    And how many lines of a metadata.jsonl name none of them.
    """
    folders: dict[Place, set[str]] = {}
    below: dict[Place, set[str]] = {}
    for image, root in zip(images, roots, strict=True):
        try:
            listed = _listed(image.parent)
        except OSError:  # a path that is too long: the image is named as one that failed
            continue
        names = {listed.sidecar(image, suffix) for suffix in SIDECARS}
        folders.setdefault(image.parent, set()).update(name for name in names if name)
        folder = next((each for each in _upto(image.parent, root) if METADATA in _listed(each).names), None)
        if folder is not None:
            below.setdefault(folder, set()).add(
                _metadata(folder / METADATA).name_of(portable(addresses.below(image, folder))) or ""
            )
    left = [
        str(folder / name)
        for folder, claimed in folders.items()
        for name in _listed(folder).names - claimed
        if Path(name).suffix.lower() in SIDECARS and not name.startswith(".")
    ]
    for folder, named in below.items():
        if others := sorted(_metadata(folder / METADATA).rows.keys() - named):
            left.append(f"{folder / METADATA}: {len(others)} of its lines, the first of {others[0]!r}")
    return sorted(left)


def forget() -> None:
    """Read folders anew: to be called when a run begins."""
    addresses.forget()
    _listed.cache_clear()
    _metadata.cache_clear()


def _upto(folder: Place, root: Place) -> list[Place]:
    inside = addresses.is_below(folder, root)
    return [folder, *(parent for parent in folder.parents if inside and addresses.is_below(parent, root))]


def _loose(name: str) -> str:
    """A name without what differs between systems: case, Unicode form, "./" and Windows' backslashes."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")).casefold())


@dataclass(frozen=True)
class _Listed:
    """What is in a folder, so that a missing sidecar costs nothing."""

    names: frozenset[str]  # that may be sidecars
    others: frozenset[str]  # without suffixes, of other files: images are among them
    loose: dict[str, list[str]]  # names as they are by `_loose`

    def sidecar(self, image: Place, suffix: str) -> str | None:
        """The name of an image's sidecar, if there is one; of several that differ in case, none."""
        exact = image.with_suffix(suffix).name
        if exact in self.names:
            return exact
        found = self.loose.get(_loose(exact), [])
        if len(own := [name for name in found if Path(name).stem == image.stem]) == 1:
            return own[0]  # of several the one that differs in its suffix alone
        free = [name for name in found if Path(name).stem not in self.others]
        return free[0] if len(free) == 1 else None


@lru_cache(maxsize=256)  # folders: images come sorted, so the next ones are mostly in the same
def _listed(folder: Place) -> _Listed:
    names, others, loose = set[str](), set[str](), dict[str, list[str]]()
    is_web = isinstance(folder, Address) and folder.scheme in addresses.WEB  # which lists no folders
    for path in [] if is_web else folder.iterdir():
        if path.suffix.lower() in (*SIDECARS, ".jsonl"):
            names.add(path.name)
            loose.setdefault(_loose(path.name), []).append(path.name)
        elif path.suffix:  # folders have none, mostly
            others.add(path.stem)
    return _Listed(frozenset(names), frozenset(others), loose)


@dataclass(frozen=True)
class _Metadata:
    """The lines of a metadata.jsonl by `file_name`, and what a person should know of it."""

    folder: Place
    rows: dict[str, dict[str, Any]]
    loose: dict[str, list[str]]
    notes: list[str]

    def name_of(self, name: str) -> str | None:
        """The `file_name` of an image's line; one that differs in form counts if it is no other file's."""
        if name in self.rows:
            return name
        # of a system that does not tell a.jpg from A.jpg, the file that is there is the image itself
        found = [
            each
            for each in self.loose.get(_loose(name), [])
            if _plain(each) == name
            or not _is_other(self.folder / local(_plain(each)), self.folder / local(name))
        ]
        return found[0] if len(found) == 1 else None

    def of(self, name: str) -> dict[str, Any]:
        """An image's line."""
        found = self.name_of(name)
        return {} if found is None else self.rows[found]


def _plain(name: str) -> str:
    return posixpath.normpath(name.replace("\\", "/"))


def _is_other(path: Place, image: Place) -> bool:
    if isinstance(path, Address) or isinstance(image, Address):
        return path != image
    try:
        return not path.samefile(image)
    except OSError:  # one of them is not there
        return False


@lru_cache(maxsize=4)  # a file may have a line for every image of a data set
def _metadata(path: Place, column: str = FILE_NAME) -> _Metadata:
    with path.open("rb") as file:
        mark = file.read(4)
    encoding = next((name for start, name in MARKS.items() if mark.startswith(start)), "utf-8")
    try:
        rows, notes = _rows(path, encoding, column), list[str]()
    except UnicodeDecodeError:
        try:
            rows, notes = _rows(path, WESTERN, column), [f"{PREFIX}{path.name} {GUESSED}"]
        except UnicodeDecodeError as error:
            raise StoreError(f"{path} is no text in {encoding} ({error}): save it as UTF-8.") from error
    loose: dict[str, list[str]] = {}
    for name in rows:
        loose.setdefault(_loose(name), []).append(name)
    return _Metadata(path.parent, rows, loose, notes)


def _rows(path: Place, encoding: str, column: str) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    is_table = path.suffix.lower() == ".csv"
    with path.open(encoding=encoding, newline="" if is_table else None) as file:
        lines = csv.DictReader(file) if is_table else file
        for number, line in enumerate(_whole(lines, path), 2 if is_table else 1):
            try:
                row = _of_table(line) if isinstance(line, dict) else json.loads(line)
                name = row.pop(column)
            except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
                wanted = "has no" if is_table else "is no JSON object with a"
                raise StoreError(
                    f"line {number} of {path} {wanted} `{column}` ({error!r}): mend it, or rename the file "
                    "so that it is not read."
                ) from error
            rows[str(name)] = row
    return rows


def _whole(lines: Iterable[Any], path: Place) -> Iterator[Any]:
    """The lines that are not empty."""
    try:
        for line in lines:
            if not isinstance(line, str) or line.strip():
                yield line
    except csv.Error as error:
        raise StoreError(f"{path} cannot be read as a table ({error}): mend it, or leave it out.") from error


def _of_table(row: dict[Any, Any]) -> dict[str, Any]:
    """A row of a .csv without its empty cells; all of them are text, but for a number as its label."""
    found = {name: value for name, value in row.items() if name is not None and value}
    if found.get("label", "").removeprefix("-").isdecimal():
        found["label"] = int(found["label"])
    return found


def _start(sidecar: Place) -> bytes:
    if isinstance(sidecar, Address):  # an empty one has no first bytes to be asked for
        return sidecar.read_bytes()
    return addresses.read_part(sidecar, 0, MAX_BYTES + 1)


def _parsed(name: str, data: bytes) -> tuple[dict[str, Any], str]:
    """What a sidecar says, and what a person should know of its encoding."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    text, guessed = _decoded(data)
    suffix = posixpath.splitext(name)[1].lower()
    if suffix == ".txt":
        return {"caption": text.strip()}, guessed
    if suffix == ".cls":  # WebDataset's
        return {"label": int(text)}, guessed
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value, guessed


def _decoded(data: bytes) -> tuple[str, str]:
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    guessed = ""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        # a few letters above ASCII are Western; detectors take a short caption for anything
        if encoding != "utf-8" or sum(byte > 127 for byte in data) > MAX_HIGH * len(data):
            raise ValueError(f"no text in {encoding}: save it as UTF-8") from error
        text, guessed = data.decode(WESTERN), GUESSED
    if "\0" in text:
        raise ValueError("zero bytes in it: save it as UTF-8")
    return text, guessed
