"""New digits: a VAE, a store of its latents, priors, 500 samples of each, and a judge; all from nothing.

    pip install -e ".[train,explore]"
    python benchmarks/digits_sampling.py --work /tmp/digits --output digits.json --picture digits.png

Each step is a verb of the command line in a process of its own, whose CPU seconds are counted. A step whose
result is in the work folder already is not repeated, and its seconds are kept. Figures: the share of pictures
that a classifier of real digits is sure of (> 0.9), the digits that appear (2 % or more of the pictures), the
Frechet distance in its features to 500 held-out digits, and the median distance to the nearest digit that was
learned from, relative to that of held-out digits (1: as new as a real digit is; 0: copies).
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import Digits, Judge, read_digits, write_digits
from machine import machine
from PIL import Image

import latentvae
from latentvae.images.drawing import grid
from latentvae.models.latents import reconstruct
from latentvae.toolbox.priors.loading import load_prior
from latentvae.toolbox.priors.prior import StandardNormal
from latentvae.toolbox.priors.sampling import sample, sample_labels

COUNT = 500
SHOWN = 10  # pictures of a row
Row = dict[str, Any]


class Steps:
    """Runs verbs below a work folder, each once, and keeps what they cost."""

    def __init__(self, work: Path) -> None:
        self.work, self.file = work, work / "seconds.json"
        self.seconds: dict[str, float] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def verb(self, name: str, *arguments: object) -> None:
        """Run `latentvae ARGUMENTS`, unless it is done."""
        self.count(name, lambda: run(*arguments), resource.RUSAGE_CHILDREN)

    def count(self, name: str, step: Callable[[], object], who: int = resource.RUSAGE_SELF) -> None:
        """Run a step and note its CPU seconds, unless it is done."""
        if name in self.seconds:
            return
        before = cpu_seconds(who)
        step()
        self.seconds[name] = cpu_seconds(who) - before
        self.file.write_text(json.dumps(self.seconds), encoding="utf-8")


def run(*arguments: object) -> None:
    """A verb in a process of its own."""
    subprocess.run([sys.executable, "-m", "latentvae", *map(str, arguments)], check=True)


def cpu_seconds(who: int) -> float:
    """User and system time."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def make(work: Path, learned: Digits, steps: int) -> Steps:
    """Everything up to the priors."""
    did = Steps(work)
    folder, run_folder, store = work / "digits", work / "run", work / "store"
    did.count("drawing digits", lambda: write_digits(learned, folder))
    did.verb(
        *("VAE", "train", "--config", "digits"),
        *("--set", f"data.train={folder}", "--set", f"output={run_folder}"),
    )
    did.verb("store", "encode", folder, store, "--model", run_folder / "vae", "--dtype", "fp32")
    for kind in ("gaussian", "mixture"):
        did.verb(f"prior: {kind}", "prior", "fit", store, work / kind, "--kind", kind)
    for card in (work / name / "prior.json" for name in ("diffusion", "by-class")):
        if card.is_file() and (had := json.loads(card.read_text(encoding="utf-8"))["fit"]["steps"]) != steps:
            raise SystemExit(f"{card.parent} has a prior of {had} steps: delete it, or name another --work.")
    network = ("--kind", "diffusion", "--steps", steps)
    did.verb("prior: diffusion", "prior", "fit", store, work / "diffusion", *network)
    did.verb(
        *("prior: diffusion by class", "prior", "fit", store, work / "by-class", *network),
        "--by-class",
    )
    return did


def nearest(images: torch.Tensor, learned: torch.Tensor) -> float:
    """Median root mean square distance to the nearest of the learned images."""
    distances = torch.cdist(images.flatten(1).double(), learned.flatten(1).double())
    return float(distances.min(1).values.median()) / images[0].numel() ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--steps", type=int, default=2000, help="of each diffusion prior")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--output", type=Path, default=None, help="JSON of the table")
    parser.add_argument("--picture", type=Path, default=None, help="PNG of samples")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    learned, held_out = read_digits()
    did = make(options.work, learned, options.steps)
    vae = latentvae.load(options.work / "run" / "vae")
    judge = Judge(learned, held_out)
    usual = nearest(held_out.images, learned.images)
    rows, pictures = list[Row](), dict[str, torch.Tensor]()

    def add(name: str, images: torch.Tensor, labels: Any = None) -> None:
        known = None if labels is None else np.asarray(labels)
        row = {"pictures": name, **asdict(judge(images, known))}
        rows.append({**row, "nearest": nearest(images, learned.images) / usual})
        pictures[name] = images[:SHOWN]

    add("real digits, held out", held_out.images, held_out.labels)
    add("real digits, learned from", learned.images[:COUNT], learned.labels[:COUNT])
    add(
        "reconstructions of held-out ones", reconstruct(vae, held_out.images).reconstructions, held_out.labels
    )
    noise = torch.randn(COUNT, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    add("noise", noise.clamp(-1, 1))
    priors = {
        "standard normal": StandardNormal(vae, 32, 32),
        **{name: load_prior(options.work / name) for name in ("gaussian", "mixture", "diffusion")},
        "diffusion by class": load_prior(options.work / "by-class"),
    }
    for name, prior in priors.items():
        found: list[torch.Tensor] = []
        did.seconds.pop(f"samples: {name}", None)
        did.count(f"samples: {name}", lambda p=prior, f=found: f.append(sample(vae, p, COUNT, options.seed)))
        add(name, found[0], sample_labels(prior, COUNT, options.seed))
    report(rows, did.seconds, options.output)
    if options.picture:
        columns = [f"{n + 1}" for n in range(SHOWN)]
        whole = grid([list(images) for images in pictures.values()], columns)
        whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.BOX).save(options.picture)


def report(rows: list[Row], seconds: dict[str, float], output: Path | None) -> None:
    """Print the table and what it cost."""
    print("| pictures | sure | classes | Frechet | nearest | accuracy |\n|---|---|---|---|---|---|")
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %"
        print(
            f"| {row['pictures']} | {100 * row['sure']:.1f} % | {row['classes']} | {row['frechet']:.2f} | "
            f"{row['nearest']:.2f} | {accuracy} |"
        )
    for name, took in seconds.items():
        print(f"{name}: {took:.1f} CPU s")
    print(f"In all: {sum(seconds.values()) / 60:.1f} CPU minutes. {machine()}")
    if output:
        result = {"machine": machine(), "table": rows, "cpu_seconds": seconds}
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
