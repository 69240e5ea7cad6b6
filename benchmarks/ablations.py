"""What each choice of a recipe is worth: variants of it, each trained for the same steps, in one table.

    python benchmarks/ablations.py --train PHOTOS --val OTHER_PHOTOS --runs runs/ablations --steps 300 \\
        --variants base seed-1 adamw crop-64 --json docs/ablations.json
    python benchmarks/ablations.py --train PHOTOS --define mine loss.kl_weight=0 --variants base mine
    python benchmarks/ablations.py --tabulate runs/f8c4-small runs/ablations/adamw   # runs that are there

Each variant is a `latentvae train` of its own. One that is finished is not trained again, one that was
stopped continues. Figures are those of the averaged weights on the validation images; `seed-1` is the base
with other draws: its distance from the base says how much of a difference is noise.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine import machine

from latentvae.models.presets import build
from latentvae.training.config import Config
from latentvae.training.recipes import load_config
from latentvae.training.record import read_records

VARIANTS: dict[str, list[str]] = {
    "base": [],
    "seed-1": ["seed=1"],
    "adamw": ["optim.name=adamw"],
    "lr-5e-4": ["optim.lr=0.0005"],
    "lr-2e-3": ["optim.lr=0.002"],
    "l2": ["loss.pixel=l2"],
    "charbonnier": ["loss.pixel=charbonnier"],
    "lpips-0": ["loss.perceptual_weight=0"],
    "lpips-0.25": ["loss.perceptual_weight=0.25"],
    "lpips-1": ["loss.perceptual_weight=1"],
    "kl-1e-5": ["loss.kl_weight=0.00001"],
    "kl-1e-7": ["loss.kl_weight=0.0000001"],
    "ema-0.99": ["train.ema_decay=0.99"],
    # crops of other sizes with as many pixels in a step
    "crop-64": ["data.crop=64", "train.batch_size=36"],
    "crop-128": ["data.crop=128", "train.batch_size=9"],
    "narrow": ["model.overrides={block_out_channels: [24, 48, 96, 192]}"],
    "top-heavy": [
        "model.overrides={block_out_channels: [48, 96, 128, 192]}"
    ],  # more at full size, fewer below
    "two-layers": ["model.overrides={layers_per_block: 2}"],
    "equivariance": ["regularise.equivariance.probability=0.5"],
    "latent-noise": ["regularise.latent_noise=0.1"],
}
# what changes neither the weights nor their figures
OWN = (
    "output",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.tracker",
    "train.max_minutes",
)
MACHINE = (
    "data.train",
    "data.val",
    "data.workers",
    "data.in_memory",
    "loss.perceptual_weights",
    "train.precision",
)
Row = dict[str, Any]


def settings_of(variant: list[str], arguments: argparse.Namespace, folder: Path) -> list[str]:
    """All `--set` values of a variant: those of every variant first, its own last."""
    steps = arguments.steps
    common = {
        "data.train": arguments.train,
        "output": folder,
        "train.tracker": "none",
        "train.max_steps": steps,
        "train.validate_every": max(1, steps // 4),
        "train.save_every": max(1, min(steps, 250)),
        "optim.warmup_steps": min(100, steps // 10),
        "optim.decay_steps": steps // 2,
        "train.ema_decay": 0.999 if steps >= 4000 else 0.98,  # averages over a fraction of a short run
    }
    if arguments.val:
        common |= {"data.val": arguments.val, "data.val_images": arguments.val_images}
    return [*(f"{key}={value}" for key, value in common.items()), *(arguments.set or []), *variant]


def run(name: str, variant: list[str], arguments: argparse.Namespace) -> int:
    """Train one variant, or what is left of it; returns `latentvae train`'s exit code."""
    folder = arguments.runs / name
    settings = settings_of(variant, arguments, folder)
    wanted = load_config(arguments.config, settings)
    if (folder / "config.yaml").is_file():
        other = differences(load_config(folder / "config.yaml"), wanted)
        if other:
            raise SystemExit(
                f"{folder} is a run with other settings ({other}); choose another --runs, or delete it."
            )
    if state(folder) == "finished":
        return 0
    line = [sys.executable, "-m", "latentvae", "train", "--config", arguments.config]
    for setting in settings:
        line += ["--set", setting]
    if any((folder / "checkpoints").glob("step-*")):
        line += ["--resume", "latest"]
    print(f"{name}: {' '.join(variant) or 'the recipe'}", file=sys.stderr)
    return subprocess.run(line, stdout=sys.stderr, check=False).returncode


def state(folder: Path) -> str:
    """What status.json says became of a run; empty before it has started."""
    path = folder / "status.json"
    return json.loads(path.read_text(encoding="utf-8"))["state"] if path.is_file() else ""


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and key != "overrides"
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def differences(one: Config, other: Config) -> str:
    """The settings that matter in which `other` is not `one`, as --set takes them."""
    before, after = (flat(config.model_dump(mode="json")) for config in (one, other))
    changed = [key for key in after if after[key] != before[key] and key not in (*OWN, *MACHINE)]
    return ", ".join(
        f"{key}={json.dumps(after[key]) if isinstance(after[key], dict) else after[key]}" for key in changed
    )


def read_run(folder: Path, base: Config | None = None, step: int | None = None) -> Row:
    """The row of a run folder: its last validation, or that at `step`.

    Args:
        folder: of a run, finished or not.
        base: of the row that others are compared with.
        step: the validation to tabulate, so that runs of different lengths compare; None: the last.
    """
    config = load_config(folder / "config.yaml")
    records = read_records(folder / "metrics.jsonl")
    checks = [r for r in records if r.get("val_psnr") is not None and (step is None or r["step"] == step)]
    if not checks:
        raise SystemExit(f"{folder} has no validation{f' at step {step}' if step else ' yet'}.")
    last = checks[-1]
    steps = [r for r in records if "images_per_second" in r]
    seconds = (r["seconds"] for r in steps if r["step"] <= last["step"])
    batch = config.train.batch_size * config.train.accumulation
    with torch.device("meta"):
        vae = build(config.model.preset, **config.model.overrides)
    return {
        "name": folder.name,
        "differs": differences(base, config) if base else "",
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "step": last["step"],
        "of": config.train.max_steps,
        **{key: last.get(f"val_{key}") for key in ("psnr", "ssim", "lpips", "rate_bpp")},
        "seconds_per_step": statistics.median(batch / r["images_per_second"] for r in steps),
        "minutes": max(seconds, default=0.0) / 60,
        "state": state(folder),
    }


def report(rows: list[Row]) -> str:
    """The table in Markdown."""
    columns = (
        "run | differs by | parameters | steps | PSNR, dB | LPIPS-alex | rate (KL), bpp | s/step | minutes"
    )
    lines = [f"| {columns} |", f"|{'---|' * (columns.count('|') + 1)}"]
    for row in rows:
        cells = [
            row["name"],
            f"`{row['differs']}`" if row["differs"] else "",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['step']:,}" if row["step"] == row["of"] else f"{row['step']:,} of {row['of']:,}",
            f"{row['psnr']:.2f}",
            "" if row["lpips"] is None else f"{row['lpips']:.3f}",
            f"{row['rate_bpp']:.2f}",
            f"{row['seconds_per_step']:.2f}",
            f"{row['minutes']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(rows: list[Row], path: Path) -> list[Row]:
    """Put rows into a JSON file, those of earlier runs kept; returns all."""
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    new = {row["name"]: row for row in rows}
    merged = [new.pop(row["name"], row) for row in before] + list(new.values())
    text = json.dumps({"machine": machine(), "rows": merged}, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")
    return merged


def train_all(arguments: argparse.Namespace) -> list[Path]:
    """Train every variant asked for; returns the folders of those that are there."""
    known = VARIANTS | {name: settings for name, *settings in arguments.define or []}
    names = arguments.variants or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown variants {', '.join(unknown)}. Known: {', '.join(known)}.")
    folders = []
    for name in names:
        code = run(name, known[name], arguments)
        if code == 4:
            print("stopped; the same command continues it.", file=sys.stderr)
            break
        if code:
            print(f"{name} ended with exit code {code} and is left out.", file=sys.stderr)
            continue
        folders.append(arguments.runs / name)
    return folders


def main() -> None:
    """Train variants, or read runs that are there, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", help="folder of images")
    parser.add_argument("--val", help="folder of other images; default: 24 of --train are held out")
    parser.add_argument("--val-images", type=int, default=48)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/ablations"), help="a folder for each variant in it"
    )
    parser.add_argument("--config", default="f8c4-small", help="recipe that the variants change")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--set", action="append", help="section.key=value for every variant; repeatable")
    parser.add_argument("--variants", nargs="+", help=f"of {', '.join(VARIANTS)}; default: all")
    parser.add_argument(
        "--define", nargs="+", action="append", metavar=("NAME", "SETTING"), help="another variant"
    )
    parser.add_argument("--tabulate", type=Path, nargs="+", metavar="RUN", help="train nothing: read these")
    parser.add_argument("--step", type=int, help="tabulate the validation at this step; default: the last")
    parser.add_argument("--json", type=Path, help="also put the rows into this file, those of others kept")
    arguments = parser.parse_args()
    if not (arguments.train or arguments.tabulate):
        parser.error("give --train FOLDER, or --tabulate RUN...")
    folders = arguments.tabulate or train_all(arguments)
    if not folders:
        raise SystemExit("no run to tabulate.")
    base = load_config(folders[0] / "config.yaml")
    rows = [read_run(folder, base, arguments.step) for folder in folders]
    print(report(write(rows, arguments.json) if arguments.json else rows))


if __name__ == "__main__":
    main()
