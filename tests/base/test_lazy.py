"""Rooms import a module of theirs when it is first used, and their stubs say what there is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import latentvae
from latentvae.base import files, lazy

PACKAGE = Path(latentvae.__file__).parent
STUBS = sorted(PACKAGE.rglob("__init__.pyi"))


def test_a_module_is_imported_when_it_is_used_and_not_before():
    code = (
        "import sys\n"
        "from latentvae import images\n"
        "assert 'latentvae.images.captions' not in sys.modules\n"
        "assert images.captions.read_caption\n"
        "assert 'latentvae.images.captions' in sys.modules\n"
        "assert 'latentvae.images.drawing' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True, timeout=60)


def test_what_a_package_has_is_given_and_nothing_else():
    load = lazy.importer("latentvae.base", {"whole_file": "files"})
    assert load("files") is files
    assert load("whole_file") is files.whole_file
    with pytest.raises(AttributeError, match=r"module 'latentvae\.base' has no attribute 'no_such'"):
        load("no_such")


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.parent.relative_to(PACKAGE.parent).as_posix())
def test_the_stub_of_a_package_says_what_it_has(stub):
    found = [node for node in ast.parse(stub.read_text("utf-8")).body if isinstance(node, ast.ImportFrom)]
    told = {name.name: node.module for node in found for name in node.names}
    if stub.parent == PACKAGE:
        assert told == latentvae._HOME
        return
    modules = {path.stem for path in stub.parent.glob("*.py")} - {"__init__"}
    assert told.keys() == modules | {path.parent.name for path in stub.parent.glob("*/__init__.py")}
    assert (stub.parent / "__init__.py").read_text("utf-8").count("lazy.importer(__name__)") == 1
