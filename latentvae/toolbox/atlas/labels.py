"""What images are called by people: labels from captions, from folders, or from a table."""

import csv
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from latentvae.base.errors import LatentVAEError
from latentvae.store.dataset import LABEL_KEY

HEADER = ["name", "label"]
SHARED = 2  # images: a subfolder with fewer is no class


def label_of(caption: Mapping[str, Any] | None) -> str:
    """The label in an image's caption record, a text or a number; "" where there is none."""
    found = (caption or {}).get(LABEL_KEY)
    # as text: a class may be a number in one caption and a word in another
    return str(found).strip() if isinstance(found, str | int | float) else ""


def folder_labels(keys: Sequence[str]) -> list[str]:
    """The folder that each image lies in, below the one that was named; "" for those in that one itself.

    All "" where that would tell nothing: one folder holds them all, or hardly two share one.
    """
    found = [PurePosixPath(key).parent.as_posix() for key in keys]
    folders = ["" if name == "." else name for name in found]
    counts = Counter(folders)
    if len(counts) < 2 or max(counts.values()) < SHARED:
        return [""] * len(keys)
    return folders


def read_table(path: Path) -> dict[str, str]:
    """The label of each name in a CSV of name,label, with or without that header.

    Raises:
        LatentVAEError: it cannot be read, a line is no name,label, or a name comes twice.
    """
    try:  # utf-8-sig: Excel begins a CSV with a byte order mark, which would be part of the first name
        lines = [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise LatentVAEError(f"{path} cannot be read ({reason}): wanted a CSV of name,label.") from error
    if lines and [cell.strip().lower() for cell in lines[0]] == HEADER:
        lines = lines[1:]
    found: dict[str, str] = {}
    for row in lines:
        name = row[0].strip()
        if len(row) != 2 or not row[1].strip() or name in found:
            raise LatentVAEError(f"{path} has the line {','.join(row)!r}; wanted NAME,LABEL, each name once.")
        found[name] = row[1].strip()
    return found


def match_labels(path: Path, labels: Mapping[str, str], names: Collection[str], *, whole: bool) -> None:
    """Check that a table's labels are those of these images.

    Args:
        path: of the table, for the message.
        names: of the images.
        whole: each image must have one; otherwise some may have none.

    Raises:
        LatentVAEError: a label for no image; or none at all, or with `whole` one missing.
    """
    # a label too many is always an error: a name that is spelt wrongly would be an image without a label
    missing, extra = sorted(set(names) - labels.keys()), sorted(labels.keys() - set(names))
    if not extra and labels and not (whole and missing):
        return
    first = f"{extra[0]!r} is no image here" if extra else f"{missing[0]!r} has none"
    raise LatentVAEError(
        f"{path} does not label these images: images without a label: {len(missing)}, labels without an "
        f"image: {len(extra)}; {first}. Names are paths below the folder that was named, with suffixes."
    )


def count_labelled(labels: Sequence[str]) -> int:
    """How many images have a label."""
    return sum(label != "" for label in labels)
