"""Documents name files that are there, and the walks through the code name what stands in those files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md")),
    *(path for folder in ("docs", "train", "demo", "benchmarks") for path in (ROOT / folder).glob("*.md")),
]
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = [target for _, target in LINK.findall(text) if "://" not in target]
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing
    named = re.findall(r"`((?:latentvae|train|benchmarks|tests|docs|demo)/[\w./-]+\.(?:py|yaml|md))`", text)
    assert not [path for path in named if not (ROOT / path).exists()]


def test_where_a_pipeline_is_loaded_its_extra_is_named() -> None:
    for document in DOCUMENTS:
        sections = re.split(r"^## ", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for section in sections if document.name == "README.md" else ["".join(sections)]:
            if re.search(r"^pipe = \w+Pipeline", section, flags=re.MULTILINE):
                assert 'pip install -e ".[pipelines]"' in section, f"{document.name}: {section[:40]}"


def test_the_walks_name_functions_where_they_are() -> None:
    page = ROOT / "docs" / "architecture.md"
    steps = re.findall(r"\[`([\w.]+)`\]\((\S+\.py)\)", page.read_text(encoding="utf-8"))
    assert len(steps) > 60
    wrong = [(name, path) for name, path in steps if name not in defined(page.parent / path)]
    assert not wrong


def defined(path: Path) -> set[str]:
    """Functions and classes of a file, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found
