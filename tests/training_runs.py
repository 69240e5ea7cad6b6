"""Small training runs in processes of their own, for the tests that kill, resume and distribute them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]

SETTINGS = [
    "data.val_images=2",
    "data.val_size=32",
    "data.crop=32",
    "data.workers=0",
    "loss.perceptual_weight=0",
    "optim.warmup_steps=2",
    "adversarial.disc_weight=0.5",
    "adversarial.disc_start=4",
    "adversarial.disc_ramp=2",
    "adversarial.width=16",
    "adversarial.layers=2",
    "adversarial.lecam_weight=0.1",
    "adversarial.augment=[colour, translation, cutout]",
    "regularise.equivariance.probability=0.5",
    "train.max_steps=10",
    "train.save_every=10",
    "train.validate_every=10",
    "train.log_every=1",
    "train.tracker=none",
]
# what depends on the clock or the machine
UNREPEATABLE = {"images_per_second", "data_wait", "seconds", "memory_gb"}


def write_photos(folder: Path, count: int = 8) -> Path:
    """A folder of small smooth images."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(count):
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


# the beginning of a program: what it says last is which threads of gloo still run, which C++ would abort
THREADS_LEFT = """
import atexit, pathlib, sys
def left():
    names = [task.read_text().strip() for task in pathlib.Path("/proc/self/task").glob("*/comm")]
    if found := [name for name in names if "gloo" in name]:
        print("still running:", *found, file=sys.stderr)
atexit.register(left)
"""


def command(
    photos: Path, output: Path, processes: int, *settings: str, resume: str | None = None
) -> list[str]:
    """The command line of a run, as torchrun starts it where there are several processes."""
    chosen = [f"data.train={photos}", f"output={output}", *SETTINGS, *settings]
    arguments = [argument for setting in chosen for argument in ("--set", setting)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    start = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train" / "train.py")]
    return [*start, "--config", "tiny", *arguments, *(["--resume", resume] if resume else [])]


def launch(line: list[str]) -> subprocess.Popen[str]:
    """Start a run of this checkout in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run that is to succeed, and return what it printed."""
    printed, _ = process.communicate(timeout=280)
    assert process.returncode == 0, printed[-3000:]
    return printed


def kill_after_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    """SIGKILL every process of a run as soon as it has recorded a step."""
    deadline = time.monotonic() + 240
    while last_step(output) < step:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL every process of a run."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def records(output: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in UNREPEATABLE}
        for line in lines
        if line.endswith("}")
    ]


def last_step(output: Path) -> int:
    """The last step that a run has recorded; 0 before the first."""
    return (
        max((int(str(r["step"])) for r in records(output)), default=0)
        if (output / "metrics.jsonl").is_file()
        else 0
    )


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return {
        f"{path.name}:{key}": tensor
        for path in sorted(checkpoint.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def assert_same(one: Path, other: Path, step: int) -> None:
    """Two runs have bitwise the same checkpoint and metrics."""
    first, second = (tensors(run / "checkpoints" / f"step-{step:08d}") for run in (one, other))
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different, f"{len(different)} of {len(first)} differ, e.g. {different[:3]}"
    assert [*map(_figures, records(one))] == [*map(_figures, records(other))]


def _figures(record: dict[str, object]) -> dict[str, str]:
    """A record in which NaN equals NaN; a step that changed nothing had no rate."""
    skipped = record.get("total") != record.get("total")
    return {key: repr(value) for key, value in record.items() if not (skipped and key == "lr")}
