"""Run a bundled model's recipe again, from a folder of photographs, in pieces of borrowed time.

    python train/reproduce_default.py PHOTOS --model f8c4-small --minutes 10 --test OTHER_PHOTOS

The bundled weights had a second run after it, which their cards describe.

Each call trains for at most so many minutes of the clock and goes on where the last one stopped; then it
exports the averaged weights as they are bundled (RUN/fp16) and measures them, in fp32. Exit code 4: more
to do.

    until python train/reproduce_default.py PHOTOS; do [ $? = 4 ] || break; done

On a CUDA GPU the recipe is MODEL-gpu (train/configs), with the passes of a step chosen by what its memory
holds. A run keeps the settings it started with (RUN/config.yaml), whatever becomes of the recipe or the
machine. The weights of LPIPS: train/README.md. Every step is a verb of `latentvae`, printed before it runs.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from latentvae.base.errors import LatentVAEError
from latentvae.training.checkpoint import newest
from latentvae.training.config import Config
from latentvae.training.recipes import load_config, recipes
from latentvae.training.record import read_records

STOPPED = 4  # exit code of `latentvae train`: saved, and there is more to do
FAILED = 2


def call(*line: str | Path, printed: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a verb of `latentvae`, its messages shown, its output too unless it is read here."""
    words = [str(word) for word in line]
    print(f"$ latentvae {shlex.join(words)}", file=sys.stderr, flush=True)
    # a process of its own for each verb: what it held of memory and GPU is gone before the next one
    out = None if printed else subprocess.PIPE
    return subprocess.run([sys.executable, "-m", "latentvae", *words], stdout=out, text=True, check=False)


def read_json(*line: str | Path) -> Any:
    """What a verb prints with --json; ends this program where the verb fails."""
    result = call(*line, "--json", printed=False)
    if result.returncode not in (0, 3):  # 3: some images were skipped, each named
        raise SystemExit(result.returncode)
    return json.loads(result.stdout)


def passes(images: int, fit: int) -> int:
    """The fewest equal forward passes of at most `fit` images that make a step of `images`."""
    return next(
        count for count in range(1, images + 1) if images % count == 0 and images // count <= max(1, fit)
    )


def beginning(model: str, photos: Path) -> list[str]:
    """Arguments that start a run: the recipe for this machine, with passes that fit into its memory."""
    if not torch.cuda.is_available():
        return ["--config", model]
    recipe = f"{model}-gpu"
    train = load_config(recipe).train
    images = train.batch_size * train.accumulation  # of a step, which stays: only its passes are chosen
    fit = read_json("train", "--config", recipe, "--set", f"data.train={photos}", "--find-batch-size")[
        "batch_size"
    ]
    count = passes(images, fit)
    sizes = {"train.batch_size": images // count, "train.accumulation": count}
    return [
        "--config",
        recipe,
        *(word for key, value in sizes.items() for word in ("--set", f"{key}={value}")),
    ]


def train(arguments: argparse.Namespace, run: Path) -> int:
    """Train for the given minutes, from the start or the newest checkpoint; returns the exit code."""
    if newest(run / "checkpoints") is None:
        start = beginning(arguments.model, arguments.photos)
    else:
        # what the run began with, not the recipe of today
        start = ["--config", str(run / "config.yaml"), "--resume", "latest"]
    settings = {"data.train": arguments.photos, "output": run, "train.max_minutes": arguments.minutes}
    # the caller's own settings last, as the last of a key counts
    chosen = [f"{key}={value}" for key, value in settings.items()] + arguments.set
    return call("train", *start, *(word for setting in chosen for word in ("--set", setting))).returncode


def finished(run: Path, settings: list[str]) -> bool:
    """Whether all steps are done, those that `settings` now ask for too, and the model is exported."""
    status = run / "status.json"
    if not status.is_file():
        return False
    found = json.loads(status.read_text(encoding="utf-8"))
    wanted = load_config(run / "config.yaml", settings).train.max_steps
    return bool(found["state"] == "finished" and found["step"] >= wanted)


def history(run: Path, config: Config, step: int) -> str:
    """What was done up to a step, for the card."""
    # counted over all pieces; lines of validations have none
    seconds = max((r.get("seconds", 0.0) for r in read_records(run / "metrics.jsonl")), default=0.0)
    device = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else device
    images = config.train.batch_size * config.train.accumulation
    return (
        f"{step:,} steps of {images} crops of {config.data.crop} px in {seconds / 60:.1f} minutes on {device}"
    )


def summary(figures: Any) -> str:
    """What `latentvae evaluate --json` printed, in a line."""
    mean, count = figures["mean"], figures["protocol"]["image_count"]
    lpips = "not measured" if mean["lpips"] is None else f"{mean['lpips']:.4f}"
    quality = f"PSNR {mean['psnr']:.2f} dB, SSIM {mean['ssim']:.4f}, LPIPS-alex {lpips}"
    return f"{count} images, {quality}, rate {mean['rate_bpp']:.3f} bpp (KL)"


def finish(arguments: argparse.Namespace, run: Path) -> None:
    """Export the newest checkpoint's averaged weights in half precision, and print their figures."""
    checkpoint = newest(run / "checkpoints")
    if checkpoint is None:
        raise SystemExit(f"{run} has no checkpoint to export.")
    config = load_config(run / "config.yaml")
    step = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"]
    done = history(run, config, step)
    name = f"latentvae {arguments.model}"
    # --overwrite: an earlier piece's export is there
    line = ["export", run, "-o", run / "fp16", "--half", "--overwrite", "--name", name]
    line += ["--licence", arguments.licence, "--trained-on", arguments.trained_on, "--training", done]
    print(f"{done}; of {config.train.max_steps:,} steps", flush=True)
    if arguments.test:
        # the checkpoint's weights, as they are averaged: fp32, before they are halved
        figures = read_json("evaluate", arguments.test, "--model", checkpoint / "ema.safetensors")
        (run / "test.json").write_text(json.dumps(figures), encoding="utf-8")
        line += ["--metrics", run / "test.json"]
        print(f"{arguments.test.name}: {summary(figures)}", flush=True)
    if code := call(*line).returncode:
        raise SystemExit(code)


def main() -> None:
    """One piece: train, export, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="folder of images, searched recursively")
    parser.add_argument(
        "--model", default="f8c4-small", choices=[n for n in recipes() if f"{n}-gpu" in recipes()]
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of training in this call; export and figures come on top"
    )
    parser.add_argument("--test", type=Path, help="folder of other images to measure; default: none")
    parser.add_argument("--output", type=Path, help="folder of the run; default: runs/MODEL")
    parser.add_argument(
        "--set", action="append", default=[], help="section.key=value of the recipe; repeatable"
    )
    parser.add_argument("--licence", default="unknown", help="of the weights, for the card")
    parser.add_argument("--trained-on", default="not stated", help="the data and its terms, for the card")
    arguments = parser.parse_args()
    run = arguments.output or Path("runs") / arguments.model
    code = 0 if finished(run, arguments.set) else train(arguments, run)
    if code not in (0, STOPPED):
        raise SystemExit(code)
    finish(arguments, run)  # after every piece: whoever stops here has a model and its figures
    raise SystemExit(code)


if __name__ == "__main__":
    try:
        main()
    except LatentVAEError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(FAILED) from error
