"""Packages that only some need, imported when they are."""

from importlib import import_module
from typing import Any

from latentvae.base.errors import LatentVAEError

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
