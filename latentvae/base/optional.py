"""Packages that only some need, imported when they are needed: which extra of ours brings each."""

from importlib import import_module
from typing import Any

from latentvae.base.errors import LatentVAEError

# what is imported: the package's name where it is installed from, and the smallest extra that brings it
EXTRAS = {
    "sklearn": ("scikit-learn", "explore"),
    "matplotlib": ("matplotlib", "explore"),
    "pyarrow": ("pyarrow", "explore"),
    "umap": ("umap-learn", "umap"),
    "datasets": ("datasets", "train"),
    "gradio": ("gradio", "demo"),
    "torch_fidelity": ("torch-fidelity", "fid"),
    "pillow_heif": ("pillow-heif", "heif"),
    "pillow_jxl": ("pillow-jxl-plugin", "jxl"),
    "rawpy": ("rawpy", "raw"),
}
MISSING = "{what} needs {package}, which cannot be imported ({reason}): pip install 'latentvae[{extra}]'"


def need(
    module: str, error: type[LatentVAEError] = LatentVAEError, message: str = MISSING, what: object = "this"
) -> Any:
    """Import a module of an optional package.

    Args:
        module: such as "sklearn.cluster"; its package is one of EXTRAS.
        error: class of what is raised.
        message: a template with {what}, {package}, {extra} and {reason}.
        what: needs it; for the message.

    Raises:
        LatentVAEError: as `error`: it is not installed; says how to get it.
    """
    try:  # ImportError, not find_spec: a package may be there and lack one of its own
        return import_module(module)
    except ImportError as cause:
        package, extra = EXTRAS[module.partition(".")[0]]
        raise error(message.format(what=what, package=package, extra=extra, reason=cause)) from cause
