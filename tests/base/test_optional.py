"""How to get an optional package: a command that works for the copy that says it."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from latentvae.base import optional
from latentvae.base.errors import LatentVAEError
from latentvae.base.optional import EXTRAS, install_command, need

ROOT = Path(__file__).parents[2]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_a_checkout_installs_its_own_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert install_command("demo") == f'pip install -e "{ROOT}[demo]"'
    monkeypatch.chdir(ROOT)
    assert install_command("demo") == 'pip install -e ".[demo]"'


def test_a_wheel_names_what_its_extra_asks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "latentvae").mkdir()  # as in site-packages: no pyproject.toml beside it
    monkeypatch.setattr(optional, "ROOT", tmp_path)
    # as a wheel's metadata have them
    stated = ["torch>=2.11", 'gradio>=6.20; extra == "demo"', "scikit-learn>=1.5; extra == 'demo'"]
    stated.append('torch-fidelity>=0.4; extra == "fid"')
    monkeypatch.setattr(metadata, "requires", lambda name: stated)
    assert install_command("demo") == 'pip install "gradio>=6.20" "scikit-learn>=1.5"'
    assert install_command("fid") == 'pip install "torch-fidelity>=0.4"'
    stated += ['latentvae[demo,fid]; extra == "mcp"', 'mcp<2; extra == "mcp"']
    both = '"gradio>=6.20" "scikit-learn>=1.5" "torch-fidelity>=0.4"'
    assert install_command("mcp") == f'pip install {both} "mcp<2"'  # never by our own name
    monkeypatch.setattr(metadata, "requires", lambda name: None)
    assert install_command("fid") == 'pip install "torch-fidelity"'


def test_what_is_missing_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(LatentVAEError) as raised:
        need("umap", what="the map")
    assert str(raised.value).startswith("the map needs umap-learn, which cannot be imported (")
    assert str(raised.value).endswith(install_command("umap"))


def test_each_extra_is_declared_and_brings_its_package() -> None:
    for package, extra in EXTRAS.values():
        declared = [re.split("[>=<]", line)[0] for line in DECLARED["optional-dependencies"][extra]]
        assert package in declared


def test_no_message_or_document_takes_the_package_from_an_index() -> None:
    files = [*(ROOT / "latentvae").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), ROOT / "README.md"]
    files += [
        each for folder in ("docs", "train", "demo", "benchmarks") for each in (ROOT / folder).glob("*.md")
    ]
    by_name = re.compile(r"pip install ['\"]?latentvae|latentvae\[\w")
    found = [path.name for path in files if by_name.search(path.read_text(encoding="utf-8"))]
    assert not found
