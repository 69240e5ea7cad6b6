"""Packages that only some need, imported when they are needed, and how each copy of ours gets them."""

import re
from importlib import import_module, metadata
from itertools import chain
from pathlib import Path
from typing import Any

from latentvae.base.errors import LatentVAEError

# what is imported: the package's name where it is installed from, and the smallest extra that brings it
EXTRAS = {
    "sklearn": ("scikit-learn", "explore"),
    "threadpoolctl": ("scikit-learn", "explore"),  # which brings it
    "matplotlib": ("matplotlib", "explore"),
    "pyarrow": ("pyarrow", "explore"),
    "umap": ("umap-learn", "umap"),
    "datasets": ("datasets", "train"),
    "gradio": ("gradio", "demo"),
    "mcp": ("mcp", "mcp"),
    "torch_fidelity": ("torch-fidelity", "fid"),
    "pillow_heif": ("pillow-heif", "heif"),
    "pillow_jxl": ("pillow-jxl-plugin", "jxl"),
    "rawpy": ("rawpy", "raw"),
    "transformers": ("transformers", "align"),
    "OpenImageIO": ("OpenImageIO", "hdr"),
    "openvino": ("openvino", "openvino"),
    "onnx": ("onnx", "onnx"),
    "onnxruntime": ("onnxruntime", "onnx"),
    "onnxscript": ("onnxscript", "onnx"),
    "fsspec": ("fsspec", "remote"),
    "ray": ("ray", "ray"),
}
MISSING = "{what} needs {package}, which cannot be imported ({reason}): {install}"
ROOT = Path(__file__).parents[2]  # the checkout's, or where an installed copy's package lies


def need(
    module: str, error: type[LatentVAEError] = LatentVAEError, message: str = MISSING, what: object = "this"
) -> Any:
    """Import a module of an optional package.

    Args:
        module: such as "sklearn.cluster"; its package is one of EXTRAS.
        error: class of what is raised.
        message: a template with {what}, {package}, {reason} and {install}, the command that gets it.
        what: needs it; for the message.

    Raises:
        LatentVAEError: as `error`: it is not installed; says how to get it.
    """
    try:  # ImportError, not find_spec: a package may be there and lack one of its own
        return import_module(module)
    except ImportError as cause:
        package, extra = EXTRAS[module.partition(".")[0]]
        said = message.format(what=what, package=package, reason=cause, install=install_command(extra))
        raise error(said) from cause


def install_command(extra: str) -> str:
    """The command that installs what an extra brings, into the environment of this copy.

    In a checkout the extra by its path. Elsewhere what the extra asks for, package by package: latentvae is
    on no index, where its name would fetch whatever somebody else put there.
    """
    if (ROOT / "pyproject.toml").is_file() and (ROOT / "latentvae").is_dir():
        here = Path.cwd().resolve() == ROOT.resolve()
        return f'pip install -e "{"." if here else ROOT}[{extra}]"'
    return " ".join(["pip install", *(f'"{one}"' for one in _required(extra))])


def _required(extra: str) -> list[str]:
    """What the installed copy's extra asks for, such as gradio>=6.20, by way of other extras too."""
    try:
        lines = metadata.requires("latentvae") or []
    except metadata.PackageNotFoundError:  # on the path, but never installed
        lines = []
    split = [line.partition(";") for line in lines]
    wanted = (f'extra == "{extra}"', f"extra == '{extra}'")
    found: list[str] = []
    for spec in (spec.strip() for spec, _, marker in split if any(each in marker for each in wanted)):
        ours = re.fullmatch(r"latentvae\[(.+)\]", spec)
        found += chain.from_iterable(map(_required, ours[1].split(","))) if ours else [spec]
    return found or [package for package, one in EXTRAS.values() if one == extra]
