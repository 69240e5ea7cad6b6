"""Lint, format, types and layers, so that one command checks everything."""

import subprocess
import sys
from pathlib import Path

import pytest

import latentvae

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        pytest.param(["-m", "mypy"], marks=pytest.mark.slow),
        ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
    ],
    ids=["ruff-check", "ruff-format", "mypy", "import-linter"],
)
def test_tool_finds_nothing(command: list[str]) -> None:
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_file_is_one_subject() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for folder in ("latentvae", "train", "demo", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long, f"files over 500 lines are likely two subjects: {long}"


def test_no_module_hides_a_public_name() -> None:
    names = set(latentvae.__all__)
    modules = {path.stem for path in (ROOT / "latentvae").iterdir()}
    assert not names & modules, "importing latentvae.NAME would replace the function by the module"


def test_no_script_hides_a_standard_module() -> None:
    # a script's folder comes first: its neighbours are imported in place of what others mean by the name
    standard = sys.stdlib_module_names | {"compression"}  # since 3.14; tifffile asks for it before
    scripts = {
        path.stem for folder in ("train", "demo", "benchmarks") for path in (ROOT / folder).glob("*.py")
    }
    assert not scripts & standard


def test_every_public_name_is_there_and_no_other() -> None:
    for name in latentvae.__all__:
        assert getattr(latentvae, name) is not None
    assert {"load", "encode", "decode", "optimize", "export", "swap"} <= set(latentvae.__all__)
    with pytest.raises(AttributeError, match="'smell'"):
        _ = latentvae.smell
