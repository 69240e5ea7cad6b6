"""Several processes compute what one does."""

from pathlib import Path

import pytest
from training_runs import command, finish, launch, records, tensors, write_photos

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def difference(one: Path, other: Path) -> float:
    """The largest difference of two runs' last checkpoints, relative to each tensor's largest value."""
    first, second = (tensors(run / "checkpoints" / "step-00000010") for run in (one, other))
    return max(
        ((first[key] - second[key]).abs().max() / first[key].abs().max().clamp_min(1e-3)).item()
        for key in first
        if not key.startswith("rng-")
    )


def test_two_processes_with_half_the_batch_equal_one_in_float64_with_gan_and_accumulation(
    photos: Path, tmp_path: Path
) -> None:
    fp64 = ("train.precision=fp64", "train.accumulation=2")
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
