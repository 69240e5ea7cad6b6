"""The options of a verb without what it works with: `--help` and a mistyped option must not wait for torch.

Verb files import torch, diffusers and the rooms below at their top, which takes seconds; Typer only needs the
signature of the verb. So its file is imported with placeholders for all of these first. Once the arguments
are found to be right, that is forgotten, and the file is imported for good.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HEAVY = {"torch", "diffusers", "numpy", "tqdm", "safetensors"}
OURS = ("latentvae.cli", "latentvae.base")  # imported as they are: options and errors are theirs


@contextmanager
def declarations_only() -> Iterator[None]:
    """Within the block, what was not imported before is a placeholder; after it none of those is left."""
    finder, before = _Placeholders(), set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in {"latentvae", *HEAVY}:  # ours too: they hold names of placeholders
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                if parent in sys.modules:  # `from parent import child` looks there first
                    vars(sys.modules[parent]).pop(child, None)


class _Anything(type):
    """Of classes, each name of which is another such class: that is all that annotations need."""

    def __getattr__(cls, name: str) -> Any:
        return _anything(name)


def _anything(name: str) -> Any:
    if name.startswith("__"):  # what Python looks for in a class or module, and does without
        raise AttributeError(name)
    return _Anything(name, (), {})


class _Placeholders(MetaPathFinder, Loader):
    """Finds a module of nothing but placeholders for whatever is heavy."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """A package, so that modules below it can be asked for; None for what is imported as it is."""
        heavy = name.partition(".")[0] in HEAVY
        below = name.startswith("latentvae.") and not name.startswith(OURS)
        return ModuleSpec(name, self, is_package=True) if heavy or below else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that has every name."""
        module = ModuleType(spec.name)
        vars(module)["__getattr__"] = _anything  # PEP 562
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""
