"""The students of all four spaces within a time limit, rehearsed with tiny models."""

import json
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL
from training_runs import write_photos
from vaes import tiny_autoencoder

from latentvae.base.errors import ConfigError
from latentvae.models.presets import SPACES
from latentvae.models.spaces import space_of
from latentvae.training.recipes import load_config

ROOT = Path(__file__).parents[2]
TINY = [
    "model.preset=tiny",
    "distil.transplant=false",
    "sd3:model.overrides={latent_channels: 16}",
    "flux:model.overrides={latent_channels: 16}",
    "data.crop=32",
    "data.val_images=2",
    "data.val_size=32",
    "loss.perceptual_weight=0",
    "optim.warmup_steps=1",
    "train.batch_size=2",
    "train.log_every=1",
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "train"))
    spec = spec_from_file_location("four_spaces", ROOT / "train" / "four_spaces.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "four_spaces", module)  # where its dataclass looks for its types
    spec.loader.exec_module(module)
    before = module.signal.getsignal(module.signal.SIGTERM)
    yield module
    module.signal.signal(module.signal.SIGTERM, before)


@pytest.fixture
def teachers(tmp_path: Path) -> Path:
    for number, (name, channels) in enumerate((("taesd", 4), ("taesdxl", 4), ("taesd3", 16), ("taef1", 16))):
        tiny_autoencoder(channels, seed=number).save_pretrained(tmp_path / "teachers" / name)
    return tmp_path / "teachers"


def called(script: Any, monkeypatch: pytest.MonkeyPatch, *words: Any) -> Any:
    line = ["four_spaces.py", *map(str, words)]
    monkeypatch.setattr(sys, "argv", [*line, *(word for setting in TINY for word in ("--set", setting))])
    return script.parse()


def student(script: Any, folder: Path, *lines: dict[str, Any], step: int = 0) -> Any:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if step:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step:08d}" / "state.json").write_text(json.dumps({"step": step}))
    return script.Student("sd", folder, [])


def test_steps_are_those_that_fit_without_the_first_slow_ones(script: Any, tmp_path: Path) -> None:
    lines = ({"step": 10, "seconds": 30.0}, {"step": 110, "seconds": 40.0}, {"step": 110, "val_r2": 0.5})
    run = student(script, tmp_path / "run", *lines, step=110)
    run.start = 20.0
    config = load_config("sd-small")
    # 10 steps a second for 100 seconds, less a tenth; the rate falls in 0.4 of them
    assert script.plan(run, config, 120.0) == ["train.max_steps=1010", "optim.decay_steps=360"]
    # no time is left: one step, so that the run ends and is exported
    assert script.plan(run, config, -5.0) == ["train.max_steps=111", "optim.decay_steps=1"]
    alone = student(script, tmp_path / "alone", {"step": 5, "seconds": 10.0}, step=5)
    alone.start = 0.0
    assert script.plan(alone, config, 10.0) == ["train.max_steps=51", "optim.decay_steps=1"]  # 50 warm up


def test_each_space_has_its_recipe_teacher_and_settings(
    script: Any, teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("photos", "--teachers", teachers, "--output", tmp_path / "runs")
    runs = script.students(called(script, monkeypatch, *words))
    configs = [load_config(run.recipe, run.settings) for run in runs]
    assert [config.model.space for config in configs] == ["sd", "sdxl", "sd3", "flux"]
    assert [Path(config.model.teacher).name for config in configs] == ["taesd", "taesdxl", "taesd3", "taef1"]
    assert [config.model.overrides for config in configs] == [{}, {}, *[{"latent_channels": 16}] * 2]
    assert script.own("sd", ["a=1", "sd:b=2", "flux:c=3", "d={e: 4}"]) == ["a=1", "b=2", "d={e: 4}"]
    monkeypatch.setattr(script, "usable_gpu", lambda: True)
    on_gpu = load_config("sd-small", script.students(called(script, monkeypatch, *words))[0].settings)
    assert on_gpu.train.batch_size == 2  # what the caller sets comes last
    assert load_config("sd-small", script.on_a_gpu(4)).train.batch_size == 64
    (teachers / "taef1" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no teacher in .*taef1\. Wanted there: taesd, taesdxl"):
        script.students(called(script, monkeypatch, *words))


def test_a_run_that_does_not_end_is_ended(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = tmp_path / "sleeps"
    sleeper.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(script.sys, "executable", str(sleeper))
    logs = [tmp_path / "logs" / name for name in "ab"]
    assert script.together([[], []], logs, 0.1) == [-15, -15]
    logs[0].write_text("a warning\nthe error\n")
    assert script.reason(2, logs[0]) == "the error"
    assert "still setting up; give more --minutes" in script.reason(-15, logs[0])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("order", [["--together"], []], ids=["together", "one-after-the-other"])
def test_all_four_are_trained_and_exported_and_a_second_call_has_nothing_to_do(
    order: list[str], script: Any, teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "GRACE", 600.0)  # a machine that is busy takes long to import
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    photos, output = write_photos(tmp_path / "photos"), tmp_path / "runs"
    words = (photos, "--teachers", teachers, "--output", output, "--minutes", "0.4", "--licence", "cc0-1.0")
    called(script, monkeypatch, *words, *order)
    with pytest.raises(SystemExit) as ended:
        script.main()
    logs = {log.name: log.read_text()[-800:] for log in output.glob("*.log")}
    assert ended.value.code == 0, logs
    report = json.loads((output / "report.json").read_text())
    for name, told in zip(SPACES, report, strict=True):
        assert told["student"] == f"{name}-small"
        assert told["finished"]
        assert told["steps"] > 1
        assert told["val_r2"] is not None
        loaded = AutoencoderKL.from_pretrained(output / f"{name}-small" / "fp16")
        assert space_of(loaded) == SPACES[name]
        card = json.loads((output / f"{name}-small" / "fp16" / "latentvae.json").read_text())
        assert card["licence"] == "cc0-1.0"
    monkeypatch.setattr(script, "together", lambda *_: pytest.fail("trained again"))
    with pytest.raises(SystemExit) as again:
        script.main()
    assert again.value.code == 0
