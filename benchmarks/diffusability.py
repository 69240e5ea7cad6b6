"""Is the latent space easy to diffuse? What the equivariance term gains a diffusion model, and what it costs.

    OMP_NUM_THREADS=2 python benchmarks/diffusability.py --train ../shared/photos/train \\
        --val ../shared/photos/val --lpips ../shared/lpips --json docs/diffusability.json

Two VAEs, equal but for `regularise.equivariance.probability`, then on the latents of each what `latentvae
diffusability` measures: the same small diffusion model for the same steps, with several seeds. The rows of
photographs say how near its pictures can come.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ablations
import numpy as np
import torch
from machine import DEVICE, machine
from tqdm import tqdm

import latentvae
from latentvae.images.drawing import grid
from latentvae.images.reading import find_images, load_image
from latentvae.measure.lpips import load_lpips
from latentvae.toolbox.priors.diffusability import SETTINGS, Bench
from latentvae.training.recipes import load_config

TERM = "regularise.equivariance.probability"
SIDE = 128  # px of the crops that are encoded
Row = dict[str, Any]


def crops(folder: str) -> torch.Tensor:
    """(N, 3, SIDE, SIDE): the middle of every image."""
    found = []
    for path in tqdm(find_images(folder), desc="decoding", leave=False):
        image = load_image(path)
        top, left = ((side - SIDE) // 2 for side in image.shape[-2:])
        if min(top, left) >= 0:
            found.append(image[:, top : top + SIDE, left : left + SIDE])
    return torch.stack(found)


def vae_runs(arguments: argparse.Namespace) -> dict[float, Path]:
    """The run folders of both VAEs by the term's probability, trained unless they are there."""
    if arguments.existing:
        found = {folder: load_config(folder / "config.yaml") for folder in arguments.existing}
        return {config.regularise.equivariance.probability: folder for folder, config in found.items()}
    runs = {}
    for probability in (0.0, arguments.probability):
        name = f"equivariance-{probability:g}"
        if ablations.run(name, [f"{TERM}={probability}", *arguments.vae], arguments):
            raise SystemExit(f"the VAE {name} was not trained; the reason is above.")
        runs[probability] = arguments.runs / name
    return runs


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Every row of the table."""
    runs, lpips = vae_runs(arguments), load_lpips("alex", arguments.lpips).to(DEVICE)
    train, val = crops(arguments.train), crops(arguments.val)
    steps = arguments.diffusion_steps
    settings = replace(
        SETTINGS, steps=steps, warmup_steps=steps // 20, sampling_steps=arguments.sampling_steps
    )
    # as many photographs as samples: the distance grows as there are fewer
    some = val[torch.linspace(0, len(val) - 1, min(arguments.samples, len(val))).long()]
    bench = Bench(train, some, lpips, settings, arguments.samples)
    rows = [{"name": "photographs not trained on", "frechet": bench.photographs}]
    for probability, folder in runs.items():
        figures = ablations.read_run(folder)
        vae = latentvae.load(folder / "vae", device=DEVICE)
        learned, judged = bench.latents(vae)
        rebuilt = bench.reconstructions(vae)[2]
        rows.append({"name": f"their reconstructions, equivariance {probability:g}", "frechet": rebuilt})
        for seed in range(arguments.seeds):
            run, model, drawn = bench.run(vae, learned, judged, seed)
            rows.append(
                {
                    "probability": probability,
                    "psnr": figures["psnr"],
                    "lpips": figures["lpips"],
                    "loss": run.loss,
                    "parameters": model.card.fit["parameters"],
                    "name": f"samples, equivariance {probability:g}, seed {seed}",
                    "frechet": run.frechet,
                }
            )
            print(rows[-1], flush=True)
            if arguments.pictures:
                picture = arguments.pictures / f"{folder.name}-{seed}.png"
                draw(torch.cat(drawn), rows[-1]["name"], picture)
    return rows


def draw(images: torch.Tensor, title: str, path: Path) -> None:
    """The first dozen samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = images[:12].cpu().reshape(-1, 6, *images.shape[1:])
    grid([list(line) for line in shown], [title, *[""] * 5]).save(path)


def report(rows: list[Row]) -> str:
    """The table in Markdown, and the means over seeds with their spread."""
    lines = ["| | VAE: PSNR, dB | LPIPS | denoising loss | Fréchet distance |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in FORMS.items()]
        lines.append(f"| {' | '.join([row['name'], *cells])} |")
    runs = [row for row in rows if "loss" in row]
    for probability in dict.fromkeys(row["probability"] for row in runs):
        seeds = [row for row in runs if row["probability"] == probability]
        values = {key: [row[key] for row in seeds] for key in ("loss", "frechet")}
        cells = [f"{np.mean(v):{FORMS[k]}} ± {(max(v) - min(v)) / 2:{FORMS[k]}}" for k, v in values.items()]
        vae = f"{seeds[0]['psnr']:.2f} | {seeds[0]['lpips']:.3f}"
        lines.append(
            f"| **mean of {len(seeds)} seeds, equivariance {probability:g}** | {vae} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


FORMS = {"psnr": ".2f", "lpips": ".3f", "loss": ".4f", "frechet": ".4f"}


def main() -> None:
    """Train, measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", required=True, help="folder of images")
    parser.add_argument("--val", required=True, help="folder of other images")
    parser.add_argument("--lpips", required=True, help="folder of LPIPS backbone weights")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/diffusability"), help="folder of the VAEs' runs"
    )
    parser.add_argument("--config", default="f8c4-small")
    parser.add_argument("--vae", nargs="*", default=VAE, help="settings of both VAEs")
    parser.add_argument("--steps", type=int, default=200, help="of the VAEs")
    parser.add_argument(
        "--existing", type=Path, nargs=2, metavar="RUN", help="two runs that are there, instead of training"
    )
    parser.add_argument("--probability", type=float, default=0.5, help="of the equivariance term")
    parser.add_argument("--diffusion-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2, help="of the diffusion model")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--pictures", type=Path, help="also draw a few samples of each into this folder")
    parser.set_defaults(set=[], val_images=48)
    arguments = parser.parse_args()
    rows = measure(arguments)
    print(report(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


VAE = ["model.overrides={block_out_channels: [16, 16, 32, 64]}", "data.crop=64", "train.batch_size=8"]

if __name__ == "__main__":
    main()
