"""What is written whole, and packages that only some need."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from latentvae.errors import LatentVAEError, StoreError
from latentvae.store.manifest import write_atomically

# package, and the extra of ours that brings it
_EXTRAS = {"umap": ("umap-learn", "umap"), "sklearn": ("scikit-learn", "explore")}


def need(module: str) -> Any:
    """Import an optional package.

    Raises:
        LatentVAEError: it is not installed; says how to get it.
    """
    package, extra = _EXTRAS.get(module.partition(".")[0], (module.partition(".")[0], "explore"))
    try:
        return import_module(module)
    except ImportError as error:
        raise LatentVAEError(
            f"this needs {package}, which cannot be imported ({error}): pip install 'latentvae[{extra}]'"
        ) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Have `write` fill a temporary file beside `path` and give it its name; whole or not at all.

    Raises:
        LatentVAEError: it cannot be written.
    """
    try:
        write_atomically(path, write)
    except (StoreError, OSError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error.__cause__ or error
        raise LatentVAEError(
            f"{path} cannot be written ({reason}): name a place in a folder of yours."
        ) from error
    return path
