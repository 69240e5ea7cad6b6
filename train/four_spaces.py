"""Train the students of all four latent spaces (SD, SDXL, SD3, FLUX) within so many minutes of the clock.

    python train/four_spaces.py PHOTOS --teachers TEACHERS --lpips LPIPS --minutes 8 --together

TEACHERS holds the folders taesd, taesdxl, taesd3 and taef1 (AutoencoderTiny), LPIPS the backbone's weights
(train/README.md): nothing is downloaded. The recipes are train/configs/{sd,sdxl,sd3,flux}-small.yaml, on a
CUDA GPU with larger crops and batches; `--set` changes any setting of all four, or of
one: `--set sd3:loss.perceptual_weight=2`.

A run begins with a short piece that shows how many steps a second this machine makes; then it goes on, with
as many steps as fit into its share of the time, so that the learning rate falls to its end just before the
time does. It saves checkpoints on the way. Call it again to go on after an interruption: what is finished
stays. Each student is exported as it is bundled, to OUTPUT/NAME/fp16, finished or not. Exit code 4: more to
do.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reproduce_default import FAILED, STOPPED, history

from latentvae.base.errors import ConfigError, LatentVAEError
from latentvae.models.card import Provenance
from latentvae.models.exporting import export
from latentvae.models.licences import check_licence
from latentvae.models.loading import load
from latentvae.models.shipped import bundled
from latentvae.training.checkpoint import listing, newest
from latentvae.training.config import Config
from latentvae.training.recipes import load_config
from latentvae.training.record import read_records

TEACHERS = {"sd": "taesd", "sdxl": "taesdxl", "sd3": "taesd3", "flux": "taef1"}
PROBE = 0.15  # of a run's time: to see its speed
AFTER = 30.0  # seconds for the last validation and the exports, but never more than a share of the time:
AFTER_SHARE = 0.15
START = 20.0  # seconds until the first step of a run that goes on, where none has been measured
MARGIN = 0.9  # of the steps that would fit: a machine may slow down
DECAY = 0.4  # of the steps that are left, in which the learning rate falls
GRACE = 60.0  # seconds after its time until a run is told to stop, and as many until it is killed
SHARED_MEMORY = 2**30  # bytes that worker processes need for their batches; containers often have less
FIGURES = ("val_r2", "val_psnr", "val_lpips", "val_teacher_student_psnr", "val_teacher_student_lpips")


@dataclass
class Student:
    """One run."""

    space: str
    run: Path
    settings: list[str]
    start: float = START  # seconds of a piece that are no training

    @property
    def recipe(self) -> str:
        """Its recipe, and the name that it is bundled under."""
        return f"{self.space}-small"

    @property
    def steps(self) -> int:
        """Of the newest checkpoint; 0 before the first."""
        saved = listing(self.run / "checkpoints")
        if not saved:
            return 0
        return int(json.loads((saved[-1] / "state.json").read_text(encoding="utf-8"))["step"])

    @property
    def finished(self) -> bool:
        """Whether all of its steps are done."""
        status = self.run / "status.json"
        return status.is_file() and json.loads(status.read_text(encoding="utf-8"))["state"] == "finished"

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return max((r["seconds"] for r in self.records() if "seconds" in r), default=0.0)

    def records(self) -> list[dict[str, Any]]:
        """Its figures so far."""
        path = self.run / "metrics.jsonl"
        return read_records(path) if path.is_file() else []


def on_a_gpu(together: int) -> list[str]:
    """Settings beside the recipe's on a CUDA GPU, which `together` runs share. Not measured yet."""
    shared = Path("/dev/shm")
    room = shared.is_dir() and shutil.disk_usage(shared).free > together * SHARED_MEMORY
    workers = min(4, max(1, (os.cpu_count() or 1) // together - 1)) if room else 0
    sizes = {"data.crop": 128, "train.batch_size": 64, "data.workers": workers}
    return [f"{key}={value}" for key, value in sizes.items()]


def students(arguments: argparse.Namespace) -> list[Student]:
    """The runs that were asked for.

    Raises:
        ConfigError: a teacher that is not there, or settings that cannot work; nothing has begun yet.
    """
    found = []
    for space in arguments.spaces:
        teacher = arguments.teachers / TEACHERS[space]
        if not (teacher / "config.json").is_file():
            raise ConfigError(f"no teacher in {teacher}. Wanted there: {', '.join(TEACHERS.values())}.")
        run, name = arguments.output / f"{space}-small", f"{space}-small"
        settings = [f"data.train={arguments.photos}", f"output={run}", f"model.teacher={teacher}"]
        settings += [f"loss.perceptual_weights={arguments.lpips}"] if arguments.lpips else []
        if arguments.from_bundled and name in bundled():
            # what makes it a teacher's layers stays; a rate for weights that are nearly right
            settings += [f"model.init={name}", "distil.transplant=false", "optim.lr=1e-4"]
            settings += ['model.freeze=["*norm*", "*conv_shortcut*"]']
        settings += on_a_gpu(len(arguments.spaces) if arguments.together else 1) if usable_gpu() else []
        settings += ["train.validate_every=1000000", "train.save_every=500", "train.tracker=none"]
        settings += own(space, arguments.set)
        load_config(name, settings)
        found.append(Student(space, run, settings))
    return found


def own(space: str, settings: list[str]) -> list[str]:
    """The settings for all, and those for one space, such as "sd3:loss.perceptual_weight=2"."""
    found = []
    for each in settings:
        name, _, rest = each.partition(":")
        if name not in TEACHERS:
            found.append(each)
        elif name == space:
            found.append(rest)
    return found


def usable_gpu() -> bool:
    """Whether runs will use a CUDA GPU."""
    return torch.cuda.is_available()


def plan(student: Student, config: Config, seconds: float) -> list[str]:
    """How many steps to end with, and in how many the learning rate falls, for so many seconds more."""
    timed = [(r["step"], r["seconds"]) for r in student.records() if "seconds" in r]
    (first, begun), (last, ended) = timed[0], timed[-1]
    if first == last:
        first, begun = 0, 0.0
    rate = (last - first) / max(ended - begun, 1e-3)  # without the first, slow steps where there are others
    done, warmup = student.steps, config.optim.warmup_steps
    left = max(1, int(MARGIN * rate * max(0.0, seconds - student.start)))
    total = max(done + left, warmup + 1)
    return [f"train.max_steps={total}", f"optim.decay_steps={max(1, min(int(DECAY * left), total - warmup))}"]


def piece(group: list[Student], seconds: float) -> None:
    """Train all of a group at the same time, from the start or on, for so many seconds of the clock."""
    lines = []
    for student in group:
        chosen = [*student.settings, f"train.max_minutes={max(seconds, 0.01) / 60}"]
        line = ["--config", student.recipe]
        if student.steps:  # what the run began with, and not the recipe of today
            line = ["--config", str(student.run / "config.yaml"), "--resume", "latest"]
            chosen += plan(student, load_config(student.run / "config.yaml", student.settings), seconds)
        lines.append([*line, *(word for setting in chosen for word in ("--set", setting))])
    before, began = [student.seconds for student in group], time.monotonic()
    codes = together(lines, [student.run.with_suffix(".log") for student in group], seconds + GRACE)
    for student, code, trained in zip(group, codes, before, strict=True):
        student.start = max(1.0, time.monotonic() - began - (student.seconds - trained))
        if code not in (0, STOPPED):
            log = student.run.with_suffix(".log")
            print(f"{student.recipe} ended with code {code}: {reason(code, log)} ({log})", file=sys.stderr)


def reason(code: int, log: Path) -> str:
    """Why a run failed: what it said last, or that it was ended here, of which its log knows nothing."""
    if code == -signal.SIGTERM:  # a run that has begun to train saves and ends with STOPPED
        return (
            f"{GRACE:.0f} s after its time it was still setting up; give more --minutes, or let fewer runs "
            "share this machine (without --together)"
        )
    return "".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:])


def together(lines: list[list[str]], logs: list[Path], timeout: float) -> list[int]:
    """Run `latentvae train` with each line's words, all at the same time; their exit codes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # nothing is to be waited for
    processes = []
    try:
        for line, log in zip(lines, logs, strict=True):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as written:
                words = [sys.executable, "-m", "latentvae", "train", *line]
                processes.append(subprocess.Popen(words, stdout=written, stderr=written, env=environment))
        deadline = time.monotonic() + timeout
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:  # it hangs, or its first step takes longer than its time
                process.terminate()
    finally:  # also where this program is told to stop: they save, as they were told it too
        return_codes = [end(process) for process in processes]
    return return_codes


def end(process: subprocess.Popen[bytes]) -> int:
    """Ask a process to stop if it has not, and see that it does; its exit code."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def train(group: list[Student], seconds: float) -> None:
    """All of a group at the same time: a piece to see their speed where one is new, and one to the end."""
    deadline = time.monotonic() + seconds
    after = min(AFTER, AFTER_SHARE * seconds)
    fresh = [student for student in group if not student.steps]
    if fresh:
        piece(fresh, PROBE * seconds)
    # one that could not even begin has said so, and would again
    rest = [student for student in group if student.steps and not student.finished]
    if rest:
        piece(rest, deadline - time.monotonic() - after)


def finish(student: Student, arguments: argparse.Namespace) -> dict[str, Any]:
    """Export the newest averaged weights as they are bundled; what is known of the run, for the report."""
    checkpoint = newest(student.run / "checkpoints")
    if checkpoint is None:
        return {"student": student.recipe, "steps": 0, "finished": False}
    config = load_config(student.run / "config.yaml")
    provenance = Provenance(
        name=f"latentvae {student.recipe}",
        licence=arguments.licence,
        base_model=config.model.init,
        trained_on=arguments.trained_on,
        training=history(student.run, config, student.steps),
        config=config.model_dump(mode="json"),
    )
    vae = load(checkpoint / "ema.safetensors")
    export(vae, student.run / "fp16", provenance=provenance, half=True, overwrite=True)
    validated = next((r for r in reversed(student.records()) if "val_r2" in r), {})
    figures = {name: validated.get(name) for name in FIGURES}
    known = {"steps": student.steps, "finished": student.finished, "training": provenance.training}
    return {"student": student.recipe, **known, **figures, "export": str(student.run / "fp16")}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="folder of images, searched recursively; or a pattern")
    parser.add_argument(
        "--teachers", type=Path, required=True, help=f"folder with {', '.join(TEACHERS.values())}"
    )
    parser.add_argument("--lpips", type=Path, help="backbone weights of LPIPS; default: torchvision's cache")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the clock for all, exports included")
    parser.add_argument(
        "--together", action="store_true", help="all at the same time, not one after the other"
    )
    parser.add_argument("--spaces", nargs="+", default=list(TEACHERS), choices=list(TEACHERS))
    parser.add_argument(
        "--from-bundled", action="store_true", help="begin with the bundled model of a space, if there is one"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/four-spaces"))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        help="section.key=value, or SPACE:section.key=value; repeatable",
    )
    parser.add_argument("--licence", default="unknown", help="of the weights, for the cards")
    parser.add_argument("--trained-on", default="not stated", help="the data and its terms, for the cards")
    return parser.parse_args()


def main() -> None:
    """Train all, export all, and say what each has become."""
    arguments = parse()
    deadline = time.monotonic() + 60 * arguments.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # through `finally`, so that runs are saved
    check_licence(arguments.licence)  # which the exports at the end will name
    runs = students(arguments)
    groups = [runs] if arguments.together else [[student] for student in runs]
    for number, group in enumerate(groups):
        if not all(student.finished for student in group):
            train(group, (deadline - time.monotonic()) / (len(groups) - number))
    report = [finish(student, arguments) for student in runs]
    text = json.dumps(report, indent=1)
    (arguments.output / "report.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    if not all(student.steps for student in runs):
        raise SystemExit(FAILED)
    raise SystemExit(0 if all(student.finished for student in runs) else STOPPED)


if __name__ == "__main__":
    try:
        main()
    except LatentVAEError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(FAILED) from error
