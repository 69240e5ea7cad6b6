"""Muon beside AdamW: the same model, data, crops, steps and losses; validation figures at equal steps.

    python benchmarks/optimizers.py --train ../shared/photos/train --lpips ../shared/lpips

Each case is a `latentvae train` of its own. AdamW is given several learning rates; Muon the recipes' own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import machine

CASES = {
    "Muon, lr 1e-3": ("muon", 1e-3),
    "AdamW, lr 1e-3": ("adamw", 1e-3),
    "AdamW, lr 3e-4": ("adamw", 3e-4),
}


def train(case: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Train one case; returns the lines of its metrics.jsonl."""
    name, rate = CASES[case]
    every = arguments.steps // 5
    settings = {
        "model.overrides": f"{{block_out_channels: {arguments.widths}}}",
        "data.train": arguments.train,
        "data.crop": arguments.crop,
        "loss.perceptual_weights": arguments.lpips,
        "optim.name": name,
        "optim.lr": rate,
        "optim.warmup_steps": arguments.steps // 20,
        "optim.decay_steps": arguments.steps // 2,
        "train.max_steps": arguments.steps,
        "train.batch_size": arguments.batch,
        "train.validate_every": every,
        "train.save_every": arguments.steps,
        "train.ema_decay": 0.98,
        "train.tracker": "none",
        "output": folder,
    }
    line = [sys.executable, "-m", "latentvae", "train", "--config", "f8c4-small"]
    for key, value in settings.items():
        line += ["--set", f"{key}={value}"]
    subprocess.run(line, stdout=sys.stderr, check=True)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def report(runs: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> str:
    """The table in Markdown: validation PSNR in dB and LPIPS after each fifth of the steps."""
    checks = {case: [line for line in lines if "val_psnr" in line] for case, lines in runs.items()}
    steps = [line["step"] for line in next(iter(checks.values()))]
    lines = [
        f"f8c4-small, widths {arguments.widths}, batch {arguments.batch}, crops of {arguments.crop} px; "
        + machine(),
        "",
        f"| optimizer | {' | '.join(f'step {step}' for step in steps)} | images/s |",
        f"|---|{'---|' * (len(steps) + 1)}",
    ]
    for case, found in checks.items():
        speeds = sorted(line["images_per_second"] for line in runs[case] if "images_per_second" in line)
        cells = " | ".join(f"{line['val_psnr']:.2f} dB, {line['val_lpips']:.3f}" for line in found)
        lines.append(f"| {case} | {cells} | {speeds[len(speeds) // 2]:.1f} |")
    return "\n".join(lines)


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Validation PSNR and LPIPS over optimizer steps, one line for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, key, title in zip(axes, ("val_psnr", "val_lpips"), ("PSNR, dB", "LPIPS-alex"), strict=True):
        for case, lines in runs.items():
            found = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*found, strict=True), marker="o", markersize=3, label=case)
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train every case and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", required=True, help="folder of images; 24 are held out")
    parser.add_argument("--lpips", required=True, help="folder of LPIPS backbone weights")
    parser.add_argument("--widths", type=json.loads, default=[32, 64, 128, 256], help="per level, as JSON")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--picture", type=Path, help="also draw the curves here")
    arguments = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            runs[case] = train(case, arguments, Path(folder) / str(number))
    print(report(runs, arguments))
    if arguments.picture:
        draw(runs, arguments.picture)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
