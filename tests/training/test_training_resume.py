"""A run that was killed and resumed is the run that was not, to the bit."""

import random
import time
from pathlib import Path

import pytest
from training_runs import assert_same, command, finish, kill, kill_after_step, launch, write_photos

from latentvae.training.checkpoint import listing, newest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize(
    ("precision", "processes"), [("fp32", 1), ("bf16", 1), ("fp32", 2), ("bf16", 2), ("fp32", 3)]
)
def test_killed_and_resumed_equals_straight_across_disc_start_with_accumulation(
    photos: Path, tmp_path: Path, precision: str, processes: int
) -> None:
    settings = (
        f"train.precision={precision}",
        "train.accumulation=2",
        "train.batch_size=2",
        "train.save_every=3",  # the checkpoint of step 3 lies before disc_start, the kill behind it
    )
    finish(launch(command(photos, tmp_path / "straight", processes, *settings)))
    kill_after_step(
        launch(command(photos, tmp_path / "killed", processes, *settings)), tmp_path / "killed", 5
    )
    assert newest(tmp_path / "killed" / "checkpoints") is not None
    finish(launch(command(photos, tmp_path / "killed", processes, *settings, resume="latest")))
    assert_same(tmp_path / "straight", tmp_path / "killed", 10)


def test_25_kills_at_random_moments_lose_nothing(photos: Path, tmp_path: Path) -> None:
    settings = (
        "train.precision=fp32",
        "train.batch_size=2",
        "train.save_every=1",  # so that many kills come while it saves
        "train.max_steps=1000",
        "train.validate_every=1000",
        "optim.schedule=constant",  # a cosine would depend on the last step, which the kills decide
    )
    output = tmp_path / "killed"
    moments = random.Random(0)
    saved = 0
    for _ in range(25):
        process = launch(command(photos, output, 1, *settings, resume="latest" if saved else None))
        started = time.monotonic()
        while len(listing(output / "checkpoints")) == 0 or newest_step(output) <= saved:
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() - started < 120
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.4))
        before = newest_step(output)
        kill(process)
        whole = newest(output / "checkpoints")
        assert whole is not None
        step = int(whole.name.removeprefix("step-"))
        assert step >= before, "a checkpoint that was there is lost"
        saved = step
    last = saved + 1
    finish(launch(command(photos, output, 1, *settings, f"train.max_steps={last}", resume="latest")))
    straight = ("train.save_every=1000", f"train.max_steps={last}")
    finish(launch(command(photos, tmp_path / "straight", 1, *settings, *straight)))
    assert_same(tmp_path / "straight", output, last)


def newest_step(output: Path) -> int:
    """The step of the newest checkpoint folder, verified or not."""
    return max((int(path.name.removeprefix("step-")) for path in listing(output / "checkpoints")), default=0)
