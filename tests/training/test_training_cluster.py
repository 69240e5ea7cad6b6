"""What happens to a run on a cluster: launchers that restart it, machines without a common folder."""

import os
import random
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from remote import s3, shaky  # noqa: F401  # fixtures
from training_runs import (
    ROOT,
    assert_same,
    command,
    finish,
    kill_after_step,
    launch,
    write_photos,
)

from latentvae.base.addresses import Address
from latentvae.training.checkpoint import listing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def running(loop: subprocess.Popen[str]) -> int | None:
    """The run that a launcher loop waits for, or None between two."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(loop.pid)], capture_output=True, text=True, check=False
    )
    return int(found.stdout.split()[0]) if found.stdout.split() else None


def wait_while(loop: subprocess.Popen[str], waits: Callable[[], bool]) -> None:
    """Until something has come about, while the loop goes on."""
    deadline = time.monotonic() + 240
    while waits():
        assert loop.poll() is None, loop.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


STEPS = 120  # on a busy machine it is seen late that a run has saved: none ends before its tenth kill
LAUNCHER = """
import os, sys
from latentvae.cli.main import main
from latentvae.training import loop  # noqa: what takes long is imported once, for all starts
while True:
    if (run := os.fork()) == 0:
        main(["train", *sys.argv[1:]])
    if os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]) == 0:
        break
"""


def test_a_launcher_loop_that_is_killed_ten_times_ends_as_the_run_that_was_not(
    photos: Path, tmp_path: Path
) -> None:
    """One command line for all eleven starts; the first kill comes before anything has been saved."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)

    def start(output: Path, save_every: int) -> subprocess.Popen[str]:
        settings = ("train.precision=fp32", "train.batch_size=2", f"train.save_every={save_every}")
        line = command(photos, output, 1, *settings, f"train.max_steps={STEPS}", resume="auto")
        line[1] = str(tmp_path / "launcher.py")
        return launch(line)

    output, saved = tmp_path / "killed", tmp_path / "killed" / "checkpoints"
    loop, moments, killed = start(output, 1), random.Random(0), {None}
    try:
        for number in range(10):
            # until the last one is dead, which may be saving until then
            wait_while(loop, lambda: running(loop) in killed)
            run = running(loop)
            # until it has saved: a step is recorded before that, and would be lost with the run
            before = listing(saved)
            wait_while(loop, lambda number=number, before=before: number and listing(saved) == before)
            assert running(loop) == run, f"it ended by itself before kill {number}"
            time.sleep(moments.uniform(0, 0.03))  # within a step, on a fast machine too
            os.kill(run, signal.SIGKILL)
            killed.add(run)
        printed, _ = loop.communicate(timeout=600)
    finally:
        if loop.poll() is None:
            os.killpg(loop.pid, signal.SIGKILL)
    assert loop.returncode == 0, printed[-3000:]
    assert printed.count("continuing from") >= 9
    finish(start(tmp_path / "straight", STEPS))
    assert_same(tmp_path / "straight", output, STEPS)


APART = """
import os, pathlib, sys
own = pathlib.Path(sys.argv[1]) / f"machine{os.environ['RANK']}"
own.mkdir(exist_ok=True)
os.chdir(own)  # so that a relative output is another folder for each process
from latentvae.cli.main import main
main(["train", *sys.argv[2:]])
"""


def apart(photos: Path, tmp_path: Path, resume: str | None = None) -> subprocess.Popen[str]:
    (tmp_path / "apart.py").write_text(APART)
    line = command(photos, Path("run"), 2, "train.batch_size=2", "train.max_steps=4", resume=resume)
    start = line.index(str(ROOT / "train" / "train.py"))
    line[start : start + 1] = [str(tmp_path / "apart.py"), str(tmp_path)]
    line += ["--set", "train.save_every=2", "--set", "adversarial.disc_weight=0"]
    return launch(line)


def test_machines_without_a_common_folder_train_and_a_resume_is_refused_with_the_remedy(
    photos: Path, tmp_path: Path
) -> None:
    printed = finish(apart(photos, tmp_path))
    assert "processes [1] do not see run of process 0" in printed
    saved = listing(tmp_path / "machine0" / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000002", "step-00000004"]
    assert not (tmp_path / "machine1" / "run").exists()
    for resume in ("latest", "auto"):
        process = apart(photos, tmp_path, resume)
        printed, _ = process.communicate(timeout=280)
        assert process.returncode != 0
        assert re.search(r"processes \[1\] do not have .*step-00000004.*folder that all machines", printed)


def test_a_run_from_an_object_store_is_killed_and_resumed_to_the_bits_of_one_from_the_disk(
    photos: Path,
    tmp_path: Path,
    s3: Callable[[], None],  # noqa: F811
) -> None:
    s3()
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for photo in sorted(photos.iterdir())[number::2]:
                tar.add(photo, photo.name)
        Address(f"s3://bucket/shards/{number}.tar").put(tmp_path / f"{number}.tar")

    def start(shards: str, output: Path, resume: str | None = None) -> subprocess.Popen[str]:
        settings = (f"data.train={shards}/{{0..1}}.tar", "data.workers=2", "train.batch_size=2")
        return launch(command(photos, output, 1, *settings, "train.save_every=3", resume=resume))

    finish(start(str(tmp_path), tmp_path / "disk"))
    kill_after_step(start("s3://bucket/shards", tmp_path / "streamed"), tmp_path / "streamed", 5)
    finish(start("s3://bucket/shards", tmp_path / "streamed", "auto"))
    assert_same(tmp_path / "disk", tmp_path / "streamed", 10)
