"""Which images a store is made of: their keys, files and captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latentvae.errors import StoreError
from latentvae.images import PathLike, find_images
from latentvae.store import captions
from latentvae.store.captions import Caption


@dataclass(frozen=True)
class Source:
    """One image file.

    Attributes:
        path: as it was found.
        root: the folder that its key is relative to.
    """

    path: Path
    root: Path

    def caption(self) -> tuple[Caption, list[str]]:
        """What is said about it, and notes on what cannot be read: see `captions.read_caption`."""
        return captions.read_caption(self.path, self.root)


def find_sources(paths: PathLike | Sequence[PathLike], store: Path) -> dict[str, Source]:
    """The images below the paths, by key, sorted; those inside the store are left out.

    A key is the POSIX path below the folder that was named, with its suffix; of a file named itself its name.

    Raises:
        ImageError: no images, or a path that is missing.
        StoreError: two images of one key.
    """
    named = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    captions.forget()
    found: dict[str, Source] = {}
    inside = store.resolve()
    for path in find_images(named):
        if inside in path.resolve().parents:
            continue
        root = next((one for one in named if one.is_dir() and path.is_relative_to(one)), path.parent)
        key = path.relative_to(root).as_posix()
        if key in found and not found[key].path.samefile(path):
            raise StoreError(
                f"{found[key].path} and {path} would both have the key {key!r}: name a folder that holds "
                "both, or encode them to two stores."
            )
        found[key] = Source(path, root)
    return dict(sorted(found.items()))
