"""Packages that import their modules when these are first used (PEP 562), so that `--help` is instant."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any


def importer(package: str, homes: Mapping[str, str] = MappingProxyType({})) -> Callable[[str], Any]:
    """The `__getattr__` of a package: Python calls it with a name that the package does not have yet.

    So `from latentvae import images` costs nothing, and `images.drawing` imports that module. Type checkers
    read what there is from the package's `__init__.pyi`.

    Args:
        package: its `__name__`.
        homes: names offered beside its modules, each with the module below the package that defines it.

    Raises:
        AttributeError: by the function: neither a module of the package nor one of `homes`.
    """

    def load(name: str) -> Any:
        if name in homes:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        if find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(f"{package}.{name}")

    return load
