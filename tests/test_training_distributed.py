"""Several processes compute what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

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
    "regularise.equivariance.probability=0.5",
    "train.max_steps=10",
    "train.save_every=10",
    "train.validate_every=10",
    "train.log_every=1",
    "train.tracker=none",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for index in range(8):
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def train(photos: Path, output: Path, processes: int, *settings: str) -> Path:
    """Run `train/train.py` as torchrun starts it, and return its last checkpoint."""
    chosen = [f"data.train={photos}", f"output={output}", *SETTINGS, *settings]
    arguments = [argument for setting in chosen for argument in ("--set", setting)]
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run(
        [*command, str(root / "train" / "train.py"), "--config", "tiny", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return output / "checkpoints" / "step-00000010"


def difference(first: Path, second: Path, name: str) -> float:
    """The largest relative difference between two files of tensors, each relative to its tensor's largest."""
    one, other = load_file(first / name), load_file(second / name)
    assert one.keys() == other.keys()
    return max(((one[k] - other[k]).abs().max() / one[k].abs().max().clamp_min(1e-3)).item() for k in one)


def test_two_processes_with_half_the_batch_equal_one_in_float64_with_gan_and_accumulation(
    photos: Path, tmp_path: Path
) -> None:
    fp64 = ("train.precision=fp64", "train.accumulation=2")
    one = train(photos, tmp_path / "one", 1, *fp64, "train.batch_size=4")
    two = train(photos, tmp_path / "two", 2, *fp64, "train.batch_size=2")
    for name in (
        "model.safetensors",
        "ema.safetensors",
        "discriminator.safetensors",
        "optimizer.safetensors",
    ):
        assert difference(one, two, name) < 1e-8, name
    weights = [json.loads(line).get("adaptive_weight") for line in (one / "../../metrics.jsonl").open()]
    assert sum(weight is not None and weight > 0 for weight in weights) == 6, "the GAN ran in steps 5 to 10"


def test_accumulation_with_the_gan_equals_one_large_batch_in_float64(photos: Path, tmp_path: Path) -> None:
    still = ("train.precision=fp64", "regularise.equivariance.probability=0")
    large = train(photos, tmp_path / "large", 1, *still, "train.batch_size=4")
    small = train(photos, tmp_path / "small", 1, *still, "train.batch_size=2", "train.accumulation=2")
    assert difference(large, small, "model.safetensors") < 1e-8
    assert difference(large, small, "discriminator.safetensors") < 1e-8
