"""Documents name files that are there, and the walks through the code name what stands in those files."""

import ast
import inspect
import re
import shlex
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from conftest import textured
from PIL import Image
from typer.testing import CliRunner

import latentvae
from latentvae.cli import main as cli
from latentvae.cli.main import VERBS, load_verb
from latentvae.models.loading import spatial_compression_ratio
from latentvae.models.presets import preset_config
from latentvae.training.recipes import load_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md")),
    *(path for folder in ("docs", "train", "demo", "benchmarks") for path in (ROOT / folder).rglob("*.md")),
]
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)[^)]*\)")
LINKED = re.compile(r"\[`([\w.]+)`\]\((\S+\.py)\)")  # a function and its file
ANCHOR = re.compile(r"\]\(([^)#\s]*)#([^)\s]+)\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = [target for _, target in LINK.findall(text) if "://" not in target]
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing
    named = re.findall(r"`((?:latentvae|train|benchmarks|tests|docs|demo)/[\w./-]+\.(?:py|yaml|md))`", text)
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_into_a_page_leads_to_a_heading(document: Path) -> None:
    for page, anchor in ANCHOR.findall(document.read_text(encoding="utf-8")):
        target = document.parent / page if page else document
        if "://" not in page and target.suffix == ".md":
            assert anchor in anchors(target), f"{page}#{anchor}"


def test_modules_that_are_called_are_commands() -> None:
    for path in [*DOCUMENTS, ROOT / ".ci" / "run"]:
        if path.name != "CHANGELOG.md":  # which names one that was
            for module in re.findall(r"-m (latentvae[\w.]*)", path.read_text(encoding="utf-8")):
                assert find_spec(f"{module}.__main__"), f"{path.name}: {module}"


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_where_a_pipeline_is_loaded_its_extra_is_named() -> None:
    for document in DOCUMENTS:
        sections = re.split(r"^## ", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for section in sections if document.name == "README.md" else ["".join(sections)]:
            if re.search(r"^pipe = \w+Pipeline", section, flags=re.MULTILINE):
                assert 'pip install -e ".[pipelines]"' in section, f"{document.name}: {section[:40]}"


def python_blocks(page: Path) -> str:
    """The Python of a page, one block after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))


def test_how_to_tile_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    latentvae.build("tiny", latent_channels=16).save_pretrained(tmp_path / "path/to/flux-vae")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(python_blocks(ROOT / "docs" / "how-to" / "large-images.md"), names)
    assert names["image"].shape == (1, 3, 640, 128)
    page = (ROOT / "docs" / "how-to" / "large-images.md").read_text(encoding="utf-8")
    settings = set(re.findall(r"^\| `(\w+)` \(", page, re.M))
    assert settings
    assert settings <= set(inspect.signature(latentvae.enable_exact_tiling).parameters)
    printed = capsys.readouterr().out
    assert "2048 x 2048 px\nencode: " in printed  # the plan, of which the page speaks
    words = re.findall(r'\("(\w+)"\)', page)
    assert words
    assert all(f" {word} " in printed for word in words)


def test_the_table_of_levels_says_what_each_shape_gives() -> None:
    table = (ROOT / "train" / "README.md").read_text(encoding="utf-8").partition("## Shapes of your own")[2]
    rows = re.findall(r"^\| (\d) \| f(\d+) \| (\d+) x \d+ \| `(\[.*?\])` \|$", table, re.M)
    assert [int(levels) for levels, *_ in rows] == [3, 4, 5]
    for _, ratio, side, widths in rows:
        with torch.device("meta"):
            vae = latentvae.build("f8c4-small", block_out_channels=ast.literal_eval(widths))
        assert spatial_compression_ratio(vae) == int(ratio) == 256 // int(side)
    example = re.search(r"model.overrides='(.*?)'", table)
    assert example is not None
    assert preset_config("f8c4-small", **yaml.safe_load(example[1]))["latent_channels"] == 8


def test_the_walks_name_functions_where_they_are() -> None:
    page = ROOT / "docs" / "architecture.md"
    steps = re.findall(LINKED, page.read_text(encoding="utf-8"))
    assert len(steps) > 60
    wrong = [(name, path) for name, path in steps if name not in defined(page.parent / path)]
    assert not wrong


def test_the_walk_to_a_shard_is_in_the_order_of_its_calls(tmp_path: Path, model: Path) -> None:
    page = ROOT / "docs" / "architecture.md"
    walk = page.read_text(encoding="utf-8").split("## 1.")[1].split("The shard is on disk.")[0]
    steps = [(name, str((page.parent / path).resolve())) for name, path in re.findall(LINKED, walk)]
    assert len(steps) > 20
    (tmp_path / "photos").mkdir()
    Image.fromarray(textured(48, 40, 0)).save(tmp_path / "photos" / "a.png")
    words = ["encode", str(tmp_path / "photos"), str(tmp_path / "latents"), "--model", str(model)]
    found = calls(lambda: CliRunner().invoke(cli.app, words), {path for _, path in steps})
    assert (tmp_path / "latents" / "store.json").is_file()
    ahead = iter(found)
    late = [name for name, path in steps if (name, path) not in ahead]  # `in` goes on from the one before
    assert not late, f"{late[0]} is not called after what is named before it"


def calls(what: Callable[[], Any], files: set[str]) -> list[tuple[str, str]]:
    """Names and files of functions in these files, in the order in which all threads call them."""
    found = []

    def look(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename in files:
            found.append((code.co_qualname, code.co_filename))

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        what()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return found


def defined(path: Path) -> set[str]:
    """Functions and classes of a file, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def verb_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words name, and its arguments; a KeyError where there is none of that name."""
    command, rest = typer.main.get_command(load_verb(words[0])), words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def test_every_command_in_a_document_is_a_verb_with_these_options() -> None:
    checked = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for found in re.finditer(r"(?:^|`|\$ |&& |-m )latentvae ([a-z][^`#|\n]*)", text, re.M):
            words = shlex.split(found[1].partition(" > ")[0])
            if document.name != "CHANGELOG.md" and words[0] in VERBS:
                command, rest = verb_of(words)
                known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
                given = {word.partition("=")[0] for word in rest if re.match("--?[a-z]", word)}
                assert given <= known | {"--help"}, f"{document.name}: {found[0]}"
                checked += 1
    assert checked > 100


def test_every_training_run_in_a_document_is_a_recipe_that_takes_these_settings() -> None:
    checked = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for found in re.finditer(r"(?:latentvae train|train/train\.py) (--config [^`#|\n;]*)", text):
            words = shlex.split(found[1])
            load_config(words[1], [words[i + 1] for i, word in enumerate(words) if word == "--set"])
            checked += 1
    assert checked > 20


def test_settings_that_the_training_guide_names_are_taken() -> None:
    text = (ROOT / "train" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:--set )?((?:adversarial|data|loss|model|regularise|train)\.[^`]*=[^`]*)`", text)
    assert len(named) > 15
    for settings in named:
        # the table of the adversary's is for runs that have one
        one = ["adversarial.disc_weight=0.5"] if settings.startswith("adversarial.") else []
        load_config("f8c4", [*one, *shlex.split(settings.replace(" --set ", " "))])
