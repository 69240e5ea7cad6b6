"""Captions and labels beside images: NAME.txt, NAME.json, or a metadata.jsonl as `datasets` reads it."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from latentvae.base.errors import StoreError

METADATA = "metadata.jsonl"
PREFIX = "caption "  # of notes made here
MAX_BYTES = 1 << 20  # of one sidecar; a larger one is no caption

Caption = dict[str, Any] | None


def read_caption(image: Path, root: Path) -> tuple[Caption, list[str]]:
    """What is said about an image, as one JSON object, and notes on sidecars that cannot be read.

    Args:
        image: path of the image file.
        root: the folder up to which metadata.jsonl is looked for; the nearest one counts.

    Returns:
        The image's line of metadata.jsonl without `file_name`, updated by the object in NAME.json, updated by
        {"caption": the text of NAME.txt}; None where there is none of these.

    Raises:
        StoreError: a metadata.jsonl that is none.
    """
    found: dict[str, Any] = {}
    notes: list[str] = []
    for folder in _upto(image.parent, root):
        if METADATA in _names(folder):
            found.update(_metadata(folder / METADATA).get(image.relative_to(folder).as_posix(), {}))
            break
    for sidecar in (image.with_suffix(".json"), image.with_suffix(".txt")):  # the later one counts
        if sidecar.name in _names(image.parent):
            try:
                found.update(_read(sidecar))
            except (OSError, ValueError, RecursionError) as error:
                notes.append(f"{PREFIX}{sidecar.name} left out: {error}")
    return found or None, notes


def forget() -> None:
    """Read folders anew: to be called when a run begins."""
    _names.cache_clear()
    _metadata.cache_clear()


def _upto(folder: Path, root: Path) -> list[Path]:
    inside = folder.is_relative_to(root)
    return [folder, *(parent for parent in folder.parents if inside and parent.is_relative_to(root))]


@lru_cache(maxsize=256)  # folders: images come sorted, so the next ones are mostly in the same
def _names(folder: Path) -> frozenset[str]:
    """What is in a folder, so that a missing sidecar costs nothing."""
    return frozenset(path.name for path in folder.iterdir() if path.suffix in (".txt", ".json", ".jsonl"))


@lru_cache(maxsize=4)  # a file may have a line for every image of a data set
def _metadata(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a metadata.jsonl by `file_name`."""
    rows: dict[str, dict[str, Any]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = row.pop("file_name")
            except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
                raise StoreError(
                    f"line {number} of {path} is no JSON object with a `file_name` ({error!r}): mend it, or "
                    "rename the file so that it is not read."
                ) from error
            rows[str(name)] = row
    return rows


def _read(sidecar: Path) -> dict[str, Any]:
    if sidecar.stat().st_size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    text = sidecar.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a mark
    if sidecar.suffix == ".txt":
        return {"caption": text.strip()}
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value
