"""The bundled models measured, and docs/models.md brought up to date: tables, failures, training curves.

    python benchmarks/models.py --kodak ../shared/photos/kodak --val ../shared/photos/val \\
        --lpips ../shared/lpips --runs runs/f8c4-small runs/f8c16-small

Rerun it when the weights change. `--parts` measures some things only; the others keep their figures, which
lie in docs/models.json. Figures of images are means of `latentvae evaluate` (posterior mode, 8-bit rounding).
What was not measured here is marked in the page.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import model_tables
import optimizers
import torch
from diffusers import AutoencoderKL
from machine import DEVICE, machine, seconds
from small_files import measure, ours, pillow
from tqdm import tqdm

import latentvae
from latentvae.codec.compression import DEFAULT_QUALITY
from latentvae.images.drawing import grid
from latentvae.images.reading import find_images, load_image
from latentvae.measure.evaluate import evaluate
from latentvae.measure.lpips import load_lpips
from latentvae.models.exporting import SIDECAR
from latentvae.models.fingerprint import weight_hash
from latentvae.models.latents import reconstruct
from latentvae.models.loading import cast
from latentvae.models.shipped import WEIGHTS_DIR, WEIGHTS_NAME, bundled
from latentvae.pipelines.doctor.halves import compare_halves
from latentvae.training.record import read_records

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CODECS = {"JPEG": (10, 20, 50), "WebP": (5, 10, 20, 50)}
OURS = (DEFAULT_QUALITY,)
SIDE = 512
HALVES_IMAGE = "23"  # saturated colours beside smooth shades
# Kodak image, left, top: what small models get wrong
CROPS = {
    "face": ("18", 228, 148),
    "text": ("08", 600, 280),
    "texture": ("13", 344, 318),
    "weave": ("04", 198, 84),
}
CROP = 112
Figures = dict[str, Any]


def describe(name: str) -> Figures:
    """A bundled model's size, card and weights."""
    folder = WEIGHTS_DIR / name
    sidecar = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    vae = latentvae.load(name)
    return {
        "weights": weight_hash(vae),
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "bytes": (folder / WEIGHTS_NAME).stat().st_size,
        "card": {key: sidecar[key] for key in ("training", "trained_on", "licence")},
    }


def quality(figures: Figures, arguments: argparse.Namespace) -> None:
    """PSNR, SSIM, LPIPS and rate of every model on both sets."""
    lpips = load_lpips("alex", arguments.lpips)
    for name, model in figures["models"].items():
        vae = latentvae.optimize(latentvae.load(name, device=DEVICE))
        for key in ("kodak", "val"):
            files = find_images(getattr(arguments, key))[: arguments.limit]
            images = ((path.name, load_image(path)) for path in tqdm(files, desc=f"{name}, {key}"))
            found = evaluate(vae, images, lpips)
            worst = min(found.images, key=lambda image: image.psnr)
            model.setdefault("sets", {})[key] = {
                "count": len(found.images),
                **found.as_dict()["mean"],
                "worst": {"name": worst.name, "psnr": worst.psnr},
            }


def codecs(figures: Figures, arguments: argparse.Namespace) -> None:
    """Whole files on Kodak: the models' at the default quality, JPEG's and WebP's at several."""
    lpips = load_lpips("alex", arguments.lpips)
    files = find_images(arguments.kodak)[: arguments.limit]
    chosen = {name: (ours(name), OURS) for name in figures["models"]}
    options = {"JPEG": {"optimize": True}, "WebP": {"method": 6}}
    chosen |= {name: (pillow(name.upper(), **options[name]), CODECS[name]) for name in CODECS}
    figures["codecs"] = {
        name: [vars(point) for point in measure(name, codec, qualities, files, lpips)]
        for name, (codec, qualities) in chosen.items()
    }


def sizes(figures: Figures, arguments: argparse.Namespace) -> None:
    """Seconds of encode and decode at 512 px, all models taking turns, so that a busy moment hits all."""
    ways = {("stock", "as it comes"): latentvae.build("f8c4").eval()}
    for name in figures["models"]:
        ways[name, "as it loads"] = latentvae.load(name)
        ways[name, "after `optimize`"] = latentvae.optimize(latentvae.load(name))
    times: dict[tuple[str, ...], list[float]] = {}
    for dtype_name, dtype in DTYPES.items():
        for vae in ways.values():
            cast(vae.to(DEVICE), dtype)
        for _ in tqdm(range(arguments.rounds), desc=f"times in {dtype_name}"):
            for way, vae in ways.items():
                for verb in ("encode", "decode"):
                    times.setdefault((*way, dtype_name, verb), []).append(time_of(vae, verb, dtype))
    for (name, way, dtype_name, verb), found in times.items():
        place = figures.setdefault("stock", {}) if name == "stock" else figures["models"][name]
        place = place.setdefault("seconds", {})
        place = place if name == "stock" else place.setdefault(way, {})
        place.setdefault(dtype_name, {})[verb] = statistics.median(found)
    parameters = sum(parameter.numel() for parameter in ways["stock", "as it comes"].parameters())
    figures["stock"] |= {
        "side": SIDE,
        "parameters": parameters,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
    }


@torch.no_grad()
def time_of(vae: AutoencoderKL, verb: str, dtype: torch.dtype) -> float:
    """Seconds of one call, after one that does not count."""
    if verb == "encode":
        images = torch.zeros(1, 3, SIDE, SIDE, device=DEVICE, dtype=dtype)
        return seconds(lambda: vae.encode(images), 1)
    latents = torch.zeros(1, vae.config["latent_channels"], SIDE // 8, SIDE // 8, device=DEVICE, dtype=dtype)
    return seconds(lambda: vae.decode(latents), 1)


def halves(figures: Figures, arguments: argparse.Namespace) -> None:
    """What bf16 and fp16 change in a picture."""
    image = load_image(arguments.kodak / f"{HALVES_IMAGE}.png")[None].to(DEVICE)
    figures["halves_image"] = HALVES_IMAGE
    for name, model in figures["models"].items():
        found = compare_halves(latentvae.load(name, device=DEVICE), {HALVES_IMAGE: image})
        model["halves"] = {dtype: asdict(each) for dtype, each in found.items()}
        for each in model["halves"].values():
            each["psnr"] = each["psnr"] if each["psnr"] < float("inf") else None


@torch.no_grad()
def pictures(figures: Figures, arguments: argparse.Namespace) -> None:
    """Crops of what comes out worst, and the curves of the runs, beside the page."""
    vaes = {name: latentvae.optimize(latentvae.load(name, device=DEVICE)) for name in figures["models"]}
    rows = []
    for image_name, left, top in tqdm(CROPS.values(), desc="failures"):
        image = load_image(arguments.kodak / f"{image_name}.png")
        whole = [
            image,
            *(reconstruct(vae, image[None]).reconstructions[0].float().cpu() for vae in vaes.values()),
        ]
        rows.append([each[:, top : top + CROP, left : left + CROP] for each in whole])
    path = arguments.page.with_name("models-failures.png")
    grid(rows, ["original", *vaes]).save(path, optimize=True)  # no palette: dithering looks like grain
    runs = {folder.name: read_records(folder / "metrics.jsonl") for folder in arguments.runs}
    if runs:
        figures["curves"] = list(runs)
        optimizers.draw(runs, arguments.page.with_name("models-curves.png"))


PARTS = {"quality": quality, "codecs": codecs, "sizes": sizes, "halves": halves, "pictures": pictures}


def main() -> None:
    """Measure what is asked for, keep the rest, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kodak", type=Path, required=True, help="folder of the 24 images 01.png to 24.png")
    parser.add_argument("--val", type=Path, required=True, help="folder of photographs not trained on")
    parser.add_argument("--lpips", required=True, help="folder of LPIPS backbone weights")
    parser.add_argument(
        "--runs", type=Path, nargs="*", default=[], help="run folders, for the training curves"
    )
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=PARTS,
        default=list(PARTS),
        help="measure only these; none: only write the page",
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of the time measurement")
    parser.add_argument("--limit", type=int, help="first images of each folder only, to try it out")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "models.md")
    parser.add_argument("--json", type=Path, help="default: beside the page")
    arguments = parser.parse_args()
    store = arguments.json or arguments.page.with_suffix(".json")
    figures = json.loads(store.read_text(encoding="utf-8")) if store.is_file() else {"models": {}}
    for name in bundled():
        known, now = figures["models"].get(name, {}), describe(name)
        if known.get("weights") not in (None, now["weights"]) and set(arguments.parts) != set(PARTS):
            print(f"{name} has changed since; measure all parts, or the page mixes two models.")
        figures["models"][name] = known | now
    if "sizes" in arguments.parts:
        figures["machine"] = machine()  # of the times, the only figures that depend on it
    for part in arguments.parts:
        PARTS[part](figures, arguments)
        store.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    missing = model_tables.write(figures, arguments.page)
    print(f"{arguments.page} is written" + (f"; not measured yet: {', '.join(missing)}." if missing else "."))


if __name__ == "__main__":
    main()
