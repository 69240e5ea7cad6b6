"""Accuracy of a classifier that has few digits, with copies from a VAE's posterior beside plain augmentation.

    pip install scikit-learn
    python benchmarks/digits_augmentation.py --place runs/digits

The VAE has learned all 1,297 digits without their labels (half a minute on one core; one in `--place` is used
again); the classifier, an SVM on pixels, sees 5, 10 or 20 of each class with labels, and beside each so many
copies. Accuracy is over 500 held-out digits: mean and standard deviation over draws of the few.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from digits import Digits, read_digits
from digits_vae import digits_vae
from machine import machine
from odd_scores import flat
from sklearn.svm import SVC
from tqdm import tqdm

from latentvae.models.latents import decode, encode

SIZES = (5, 10, 20)  # of each class
TEMPERATURES = (0.0, 1.0, 2.0, 4.0)
NOISE = 0.2  # standard deviation, of a range of 2
SHIFT = 3  # pixels of 32, at most: less than one of the 8 x 8 scans

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def few(digits: Digits, count: int, seed: int) -> Digits:
    """So many of each class; a smaller draw of one seed is part of a larger one."""
    order = np.random.default_rng(seed).permutation(len(digits))
    chosen = [order[digits.labels[order] == label][:count] for label in range(10)]
    return digits.select(np.concatenate(chosen))


def add_noise(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pixel noise."""
    return (images + NOISE * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each digit moved on its black ground by up to SHIFT pixels."""
    padded = torch.nn.functional.pad(images, (SHIFT,) * 4, value=-1.0)
    height, width = images.shape[-2:]
    places = torch.randint(0, 2 * SHIFT + 1, (len(images), 2), generator=generator).tolist()
    moved = [each[:, y : y + height, x : x + width] for each, (y, x) in zip(padded, places, strict=True)]
    return torch.stack(moved)


def sample(vae: AutoencoderKL, temperature: float) -> Augment:
    """Samples of each digit's posterior, decoded."""

    @torch.no_grad()
    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        posterior, padding = encode(vae, images)
        noise = torch.randn(posterior.mean.shape, generator=generator)
        return decode(vae, posterior.at(temperature * noise), padding).clamp(-1, 1)

    return augment


def both(first: Augment, second: Augment) -> Augment:
    """One after the other."""
    return lambda images, generator: second(first(images, generator), generator)


def accuracy(train: Digits, copies: list[torch.Tensor], held_out: Digits) -> float:
    """Of an SVM that learned the digits and their copies."""
    images = torch.cat([train.images, *copies])
    labels = np.tile(train.labels, 1 + len(copies))
    return float(SVC(C=10).fit(flat(images), labels).score(flat(held_out.images), held_out.labels))


def measure(ways: dict[str, Augment | None], copies: int, seeds: int) -> dict[str, dict[int, list[float]]]:
    """Accuracies by way of augmentation and number of digits, one for each seed."""
    learned, held_out = read_digits()
    found: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in ways}
    for seed, (name, way) in tqdm([(seed, way) for seed in range(seeds) for way in ways.items()]):
        generator = torch.Generator().manual_seed(seed)
        for size in SIZES:
            train = few(learned, size, seed)
            made = [way(train.images, generator) for _ in range(copies)] if way else []
            found[name][size].append(accuracy(train, made, held_out))
    return found


def table(found: dict[str, dict[int, list[float]]]) -> str:
    """Markdown, in per cent."""
    lines = ["| | " + " | ".join(f"{size} a class" for size in SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
    for name, row in found.items():
        cells = [f"{100 * np.mean(values):.1f} ± {100 * np.std(values):.1f}" for values in row.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--place", type=Path, default=Path("runs/digits"), help="folder of the VAE")
    parser.add_argument("--copies", type=int, default=5, help="of each digit")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the few digits")
    parser.add_argument("--output", type=Path, default=None, help="JSON of every accuracy")
    options = parser.parse_args()
    vae = digits_vae(read_digits()[0], options.place / "all")
    ways: dict[str, Augment | None] = {"none": None, "pixel noise": add_noise, "shift": shift}
    ways |= {f"posterior, temperature {t:g}": sample(vae, t) for t in TEMPERATURES}
    ways["shift, then temperature 1"] = both(shift, sample(vae, 1.0))
    found = measure(ways, options.copies, options.seeds)
    print(table(found))
    print(machine())
    if options.output:
        text = json.dumps({"machine": machine(), "copies": options.copies, "accuracy": found}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
