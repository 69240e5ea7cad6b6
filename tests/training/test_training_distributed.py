"""Several processes compute what one does."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from training_runs import ROOT, THREADS_LEFT, command, finish, launch, records, tensors, write_photos

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def difference(one: Path, other: Path) -> float:
    """The largest difference of two runs' last checkpoints, relative to each tensor's largest value."""
    first, second = (tensors(run / "checkpoints" / "step-00000010") for run in (one, other))
    return max(
        ((first[key] - second[key]).abs().max() / first[key].abs().max().clamp_min(1e-3)).item()
        for key in first
    )


def test_two_processes_with_half_the_batch_equal_one_in_float64_with_gan_and_accumulation(
    photos: Path, tmp_path: Path
) -> None:
    # squares, and crops of 24 x 40 either way
    fp64 = ("train.precision=fp64", "train.accumulation=2", "data.max_aspect=2")
    finish(launch(command(photos, tmp_path / "one", 1, *fp64, "train.batch_size=4")))
    finish(launch(command(photos, tmp_path / "two", 2, *fp64, "train.batch_size=2")))
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-8
    weights = [record.get("adaptive_weight", 0) for record in records(tmp_path / "two")]
    assert sum(weight > 0 for weight in weights) == 6, "the GAN ran in steps 5 to 10"  # type: ignore[operator]


def test_accumulation_with_the_gan_equals_one_large_batch_in_float64(photos: Path, tmp_path: Path) -> None:
    fp64 = "train.precision=fp64"
    finish(launch(command(photos, tmp_path / "large", 1, fp64, "train.batch_size=4")))
    finish(launch(command(photos, tmp_path / "small", 1, fp64, "train.batch_size=2", "train.accumulation=2")))
    assert difference(tmp_path / "large", tmp_path / "small") < 1e-8


def test_the_first_gradients_of_two_processes_equal_those_of_one_in_fp32(
    photos: Path, tmp_path: Path
) -> None:
    one_step = (
        "train.precision=fp32",
        "train.max_steps=1",
        "adversarial.disc_weight=0",
        "optim.warmup_steps=0",
    )
    finish(launch(command(photos, tmp_path / "one", 1, *one_step, "train.batch_size=4")))
    finish(launch(command(photos, tmp_path / "two", 2, *one_step, "train.batch_size=2")))
    # after one step the first moments are multiples of the gradients
    first, second = (tensors(tmp_path / run / "checkpoints" / "step-00000001") for run in ("one", "two"))
    moments = [key for key in first if key.endswith((".momentum", ".exp_avg"))]
    assert len(moments) > 50
    gradients = [torch.cat([each[key].flatten() for key in moments]) for each in (first, second)]
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.parametrize(
    "settings", [("train.max_steps=2",), ("train.max_minutes=0.01",), ("data.val=none",)]
)
def test_no_thread_outlives_the_run_however_it_ends(
    photos: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"{THREADS_LEFT}\nfrom latentvae.cli.main import main\nmain(['train', *sys.argv[1:]])\n"
    )
    line = command(
        photos, tmp_path / "run", 2, "optim.warmup_steps=0", "adversarial.disc_weight=0", *settings
    )
    line[line.index(str(ROOT / "train" / "train.py"))] = str(script)
    printed, _ = launch(line).communicate(timeout=280)
    expected = {
        "train.max_steps=2": "Exported",
        "train.max_minutes=0.01": "stopped",
        "data.val=none": "error:",
    }
    assert expected[settings[0]] in printed
    assert "still running" not in printed, printed[-3000:]


def drifting(photos: Path, tmp_path: Path, *settings: str, hardware: str = "") -> subprocess.Popen[str]:
    """A run of two processes of which the second one's weights move by themselves."""
    script = tmp_path / "drift.py"
    script.write_text(
        "import os, sys, torch\n"
        "from latentvae.training import loop, processes\n"
        f"{hardware}\n"
        "step = loop.optimizer_step\n"
        "def apart(run, batches):\n"
        "    terms = step(run, batches)\n"
        "    if run.accelerator.process_index == 1:\n"
        "        with torch.no_grad(): run.state.vae.decoder.conv_in.bias[0] += 1e-6\n"
        "    return terms\n"
        "loop.optimizer_step = apart\n"
        "from latentvae.cli.main import main\n"
        "main(['train', *sys.argv[1:]])\n"
    )
    line = command(photos, tmp_path / "run", 2, "train.batch_size=2", "optim.warmup_steps=0", *settings)
    line[line.index(str(ROOT / "train" / "train.py"))] = str(script)
    return launch(line)


def test_processes_that_drift_apart_are_not_saved_and_noticed_after_the_first_step(
    photos: Path, tmp_path: Path
) -> None:
    process = drifting(photos, tmp_path, "train.max_steps=10", "adversarial.disc_weight=0")
    printed, _ = process.communicate(timeout=280)
    assert process.returncode != 0
    assert "processes [1] hold other weights than process 0 at step 1" in printed
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_where_the_hardware_differs_processes_take_the_first_ones_state_and_count_it(
    photos: Path, tmp_path: Path
) -> None:
    unlike = "processes.hardware = lambda device: 'GPU ' + os.environ['RANK']"
    printed = finish(
        drifting(photos, tmp_path, "train.max_steps=3", "adversarial.disc_start=0", hardware=unlike)
    )
    assert printed.count("had drifted from process 0") == 2  # after the first step, and at the save
    assert [line["realigned"] for line in records(tmp_path / "run") if "total" in line] == [1, 1, 1]
    saved = json.loads((tmp_path / "run/checkpoints/step-00000003/state.json").read_text())
    assert saved["realigned"] == 2
