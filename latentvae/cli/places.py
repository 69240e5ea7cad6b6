"""What verbs call the files that they write, and where those may lie."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from latentvae.base.errors import LatentVAEError
from latentvae.base.files import whole_file

LONGEST_NAME = 255  # bytes of a file name that common file systems take


def short_names(files: list[Path], sources: list[Path]) -> dict[Path, Path]:
    """What to call each file: its path below the folder it was found in; a file named itself has no folder.

    Suffixes stay: a.jpg and a.png are two images. Where two files would be called the same, all are called by
    their path below what they have in common.
    """
    names = {file: _below(file, sources) for file in files}
    if len(set(names.values())) == len(names):
        return names
    # not resolved: what a link is called is what people know it by
    places = {file: Path(os.path.normpath(file.absolute())) for file in files}
    common = os.path.commonpath([place.parent for place in places.values()])
    return {file: place.relative_to(common) for file, place in places.items()}


def _below(path: Path, sources: list[Path]) -> Path:
    for source in sources:
        if source.is_dir() and path.is_relative_to(source):
            return path.relative_to(source)
    return Path(path.name)


def root_of(path: Path, sources: list[Path]) -> Path:
    """The folder up to which captions of an image are looked for: never above what was named."""
    return next((each for each in sources if each.is_dir() and path.is_relative_to(each)), path.parent)


def check_output(output: Path, sources: list[Path]) -> None:
    """Refuse to write among the originals: the next run would take what this one writes for some.

    Raises:
        LatentVAEError: the output is in a folder of images, or the folder of one.
    """
    target = output.resolve()
    for source in sources:
        place = source.resolve()
        # beside a file that was named itself only its own folder is refused: nothing below it is searched
        among = target.is_relative_to(place) if source.is_dir() else target == place.parent
        if among:
            raise LatentVAEError(
                f"the output {output} lies among the images ({source}), so that another run would take what "
                "this one writes for images too: choose another --output."
            )


def with_ending(name: str, ending: str, key: str | None = None) -> str:
    """A file's name with an ending added; one that is too long for that is cut, and gets a hash of `key`."""
    if len(os.fsencode(name + ending)) <= LONGEST_NAME:
        return name + ending
    # two long names may begin alike, so that the cut ones need the hash to stay apart
    ending = f"~{hashlib.sha256(os.fsencode(key or name)).hexdigest()[:16]}{ending}"
    while len(os.fsencode(name)) + len(ending) > LONGEST_NAME:
        name = name[:-1]  # a character and not a byte at a time, which would cut through one
    return name + ending


def write_json(result: dict[str, Any], path: Path) -> Path:
    """A result beside the pictures it is of, indented for people; in ASCII, for names need not be UTF-8."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="ascii")
    return path
