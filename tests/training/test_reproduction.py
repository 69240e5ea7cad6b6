"""The recipes of the bundled models, rerun in pieces from a folder of photographs."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from training_runs import SETTINGS, write_photos

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train" / "reproduce_default.py"
TINY = [
    "model.preset=tiny",
    "optim.warmup_steps=0",
    "optim.decay_steps=1",
    "train.max_steps=2",
    "adversarial.disc_weight=0",
]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = spec_from_file_location("reproduce_default", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("images", "fit", "wanted"),
    [(64, 100, 1), (64, 64, 1), (64, 63, 2), (64, 20, 4), (64, 22, 4), (6, 2, 3), (7, 0, 7)],
)
def test_a_step_takes_the_fewest_equal_passes_that_fit(
    script: Any, images: int, fit: int, wanted: int
) -> None:
    assert script.passes(images, fit) == wanted


def test_a_cpu_takes_the_recipe_and_a_gpu_its_own_filled(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.beginning("f8c4-small", Path("photos")) == ["--config", "f8c4-small"]
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script, "read_json", lambda *line: asked.append(line) or {"batch_size": 40})
    line = script.beginning("f8c16-small", Path("photos"))
    assert line[:2] == ["--config", "f8c16-small-gpu"]
    assert line[2:] == ["--set", "train.batch_size=32", "--set", "train.accumulation=2"]  # 64 images a step
    assert "--find-batch-size" in asked[0]


def piece(photos: Path, run: Path, minutes: str) -> subprocess.CompletedProcess[str]:
    """One call of the script for the tiny model, measured on the photographs themselves."""
    line = [sys.executable, str(SCRIPT), str(photos), "--output", str(run), "--minutes", minutes]
    settings = [word for setting in [*SETTINGS, *TINY] for word in ("--set", setting)]
    line += ["--test", str(photos), "--licence", "cc0-1.0", *settings]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pieces_go_on_until_all_is_done_and_each_is_exported_and_measured(tmp_path: Path) -> None:
    photos, run = write_photos(tmp_path / "photos"), tmp_path / "run"
    first = piece(photos, run, "0.00001")
    assert first.returncode == 4, first.stderr
    assert first.stdout.startswith("1 steps of 16 crops of 32 px")
    assert "photos: 8 images, PSNR" in first.stdout
    second = piece(photos, run, "10")
    assert second.returncode == 0, second.stderr
    assert "--resume latest" in second.stderr
    assert "\n2 steps of 16 crops" in second.stdout
    assert AutoencoderKL.from_pretrained(run / "fp16", torch_dtype=torch.float16).dtype == torch.float16
    card = json.loads((run / "fp16" / "latentvae.json").read_text(encoding="utf-8"))
    assert card["licence"] == "cc0-1.0"
    assert card["metrics"]["protocol"]["image_count"] == 8
    assert card["training"].startswith("2 steps of 16 crops of 32 px in")
    third = piece(photos, run, "10")  # nothing is left: the figures once more
    assert third.returncode == 0, third.stderr
    assert "$ latentvae train" not in third.stderr


@pytest.mark.slow
def test_bad_input_is_said_once_and_ends_with_code_2(tmp_path: Path) -> None:
    result = piece(tmp_path / "missing", tmp_path / "run", "1")
    assert result.returncode == 2
    assert "missing" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
