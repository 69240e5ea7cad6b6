"""Validation shared out over processes, here threads that meet where processes would."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from latentvae.base.errors import ConfigError, ImageError
from latentvae.images.sources import open_source
from latentvae.models.presets import build
from latentvae.training import machine, validation
from latentvae.training.config import Config
from latentvae.training.distillation import Teacher
from latentvae.training.validation import BATCH, Validation

COUNT = 2 * BATCH + 5  # three batches, the last not full


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two sizes, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(COUNT):
        side = 24 if number % 5 == 3 else 40
        pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    (folder / "01.png").write_bytes(b"no image")
    return folder


def together(monkeypatch: pytest.MonkeyPatch, world: int, work) -> list:
    """What `work(rank, world)` returns in each of so many processes."""
    meeting, slots, own = threading.Barrier(world), [[]] * world, threading.local()

    def gather_object(values):
        slots[own.rank] = values
        meeting.wait(30)
        found = [*chain.from_iterable(slots)]
        meeting.wait(30)
        return found

    def process(rank: int):
        own.rank = rank
        return work(rank, world)

    monkeypatch.setattr(validation, "gather_object", gather_object)
    with ThreadPoolExecutor(world) as pool:
        return [*pool.map(process, range(world))]


@pytest.mark.parametrize("world", [2, 4])  # of four processes one has nothing to do
def test_any_number_of_processes_measures_and_compares_what_one_does(images, monkeypatch, tmp_path, world):
    config = Config.model_validate({"data": {"train": str(images), "val_size": 32}})
    source, vae = open_source(images), build("tiny").eval()
    teacher = Teacher(build("tiny").eval(), None, -10.0)

    def measure(rank: int, world: int):
        each = Validation(config, source, source, 3, teacher, rank, world)
        each.lpips = None
        summary, picture = each(vae, 1, tmp_path / f"{world}-{rank}")
        return summary, each.beside_teacher(vae), picture is not None, sum(map(len, each.batches))

    ((alone, beside, drawn, count),) = together(monkeypatch, 1, measure)
    assert drawn
    assert count == COUNT - 1
    shares = together(monkeypatch, world, measure)
    names = [image.name for image in alone.images]
    assert names == [f"{number:02d}.png" for number in range(COUNT) if number != 1]
    for summary, figures, _, _ in shares:
        assert [image.name for image in summary.images] == names
        for one, other in zip(alone.images, summary.images, strict=True):
            assert other.psnr == pytest.approx(one.psnr, abs=1e-6)
            assert other.ssim == pytest.approx(one.ssim, abs=1e-6)
            assert other.rate_bpp == pytest.approx(one.rate_bpp, abs=1e-6)
        assert summary.psnr == pytest.approx(alone.psnr, abs=1e-6)
        assert figures == pytest.approx(beside, abs=1e-6)
    assert [drawn for _, _, drawn, _ in shares] == [True] + [False] * (world - 1)
    assert [share for *_, share in shares] == ([12, 8] if world == 2 else [7, 8, 5, 0])


def test_validation_images_of_which_no_process_can_read_any_are_refused(tmp_path, monkeypatch):
    for number in range(BATCH + 1):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    source, config = open_source(tmp_path), Config()
    with pytest.raises(ImageError, match="none of the 9 validation images can be read"):
        together(monkeypatch, 2, lambda *share: Validation(config, source, source, 3, None, *share))


def test_one_process_trains_in_one_precision() -> None:
    def start(precision: str) -> None:
        train = {"precision": precision, "tracker": "none"}
        machine.start_processes(Config.model_validate({"train": train}))

    # the first, if an earlier test has had the other one
    with pytest.raises(ConfigError, match=r"had (fp32|bf16), which Accelerate keeps to its end"):  # noqa: PT012
        start("fp32")
        start("bf16")


def test_processes_wait_for_one_another_as_long_as_the_configuration_says(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        machine,
        "Accelerator",
        lambda **settings: seen.update(settings) or SimpleNamespace(mixed_precision="no"),
    )
    config = Config.model_validate({"train": {"timeout_minutes": 7, "tracker": "none"}})
    machine.start_processes(config)
    (waiting,) = seen["kwargs_handlers"]
    assert waiting.timeout.total_seconds() == 7 * 60
