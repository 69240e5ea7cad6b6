"""How large a batch fits: two batches that show beside what setting up took, on a CPU too."""

from pathlib import Path

import pytest
from training_runs import write_photos

from latentvae.training import batch_size
from latentvae.training.batch_size import BatchFit, find_batch_size
from latentvae.training.config import Config


@pytest.mark.parametrize(
    ("peaks", "each", "fixed"),
    [
        ([100, 140, 220], 20, 100),  # as on a GPU: two batches are enough
        ([500, 500, 500, 560, 920], 10, 380),  # as on a CPU: the first two hide, 18 and 54 tell
        ([500, 502, 504, 560, 920], 10, 380),  # a few pages more are no batch
        ([648, 648, 648, 648, 648, 648], 4, 0),  # none shows: the bound
        ([640, 642, 644, 646, 647, 648], 4, 0),
    ],
)
def test_batches_grow_until_two_of_them_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peaks: list[int], each: int, fixed: int
) -> None:
    told = iter(peaks)
    monkeypatch.setattr(batch_size, "peak_memory", lambda: next(told))
    monkeypatch.setattr(batch_size, "usable_memory", lambda: 10_000)
    data = {"train": str(write_photos(tmp_path / "photos")), "crop": 16, "val_size": 16, "workers": 0}
    train = {"tracker": "none", "max_steps": 200}
    config = Config(
        output=str(tmp_path / "run"),
        model={"preset": "tiny"},
        data=data,
        loss={"perceptual_weight": 0},
        train=train,
    )
    found = find_batch_size(config)
    assert (found.bytes_per_image, found.fixed_bytes) == (each, fixed)
    assert found.batch_size == (8500 - fixed) // each
    assert not (tmp_path / "run").exists()
    assert not list(told)


def test_the_advice_says_of_how_much_memory_the_batch_is() -> None:
    said = BatchFit(800, 10**7, 5 * 10**8, 10**10).advice()
    assert said.startswith(
        "0.50 GB, and 0.010 GB more for each image: into 85% of the 10.0 GB that it may have"
    )
    assert said.endswith("up to 800 images per process and pass (--set train.batch_size=800)")
