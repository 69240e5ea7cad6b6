"""What latents are good for as features: digits with few labels and in clusters, photographs' other halves.

    python benchmarks/digits_projection.py --photos ../shared/photos/val --umap

Trains a VAE on 1,297 handwritten digits without their labels (about 5 CPU minutes; --model uses one that is
there), then asks of latents, raw pixels and principal components of both: how well logistic regression labels
the held-out 500 from 10 labels a class (mean and deviation of 20 draws), and how k-means with 10 clusters
agrees with the labels (NMI, mean of 5 seeds; with --umap, in the plane of a UMAP map too). With --photos, the
bundled model: how often a half photograph has its other half as the nearest of all others. All kinds are
normalised alike (`projection.normalise`).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import Digits, read_digits, write_digits
from machine import machine
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

import latentvae
from latentvae.images.reading import find_images, load_image
from latentvae.images.resizing import thumbnail
from latentvae.models.latents import encode, pool_latents
from latentvae.toolbox.atlas.clusters import cluster, nmi
from latentvae.toolbox.atlas.gallery import raw_pixels
from latentvae.toolbox.atlas.projection import normalise, project
from latentvae.training.loop import train
from latentvae.training.recipes import load_config

PER_CLASS, DRAWS, SEEDS = 10, 20, 5
GRIDS = (0, 2, 4, 8)
RANKS = (16, 64)
LONGEST = 256  # pixels of a photograph, as `latentvae project` shrinks it
Tables = dict[str, np.ndarray]
OVERRIDES = "{in_channels: 1, out_channels: 1, block_out_channels: [16, 32, 64], latent_channels: 4}"
SETTINGS = {
    "model.overrides": OVERRIDES,  # 32 px to 4 x 8 x 8 latents
    "data.crop": 32,
    "data.val_size": 32,
    "data.val_images": 32,
    "data.horizontal_flip": "false",  # digits have a handedness
    "data.in_memory": "true",
    "data.workers": 0,
    "train.max_steps": 1200,
    "train.batch_size": 32,
    "train.validate_every": 600,
    "train.save_every": 1200,
    "train.tracker": "none",
}


def train_vae(learned: Digits, folder: Path) -> Path:
    """A VAE that has seen the pictures, not the labels."""
    pictures = write_digits(learned, folder / "digits")
    settings = {**SETTINGS, "data.train": pictures, "output": folder / "run"}
    return Path(train(load_config("tiny", [f"{name}={value}" for name, value in settings.items()]), None))


@torch.no_grad()
def latents_of(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """The posteriors' modes of pictures of one size, (N, C, h, w)."""
    return torch.cat([encode(vae, batch)[0].mode() for batch in images.split(256)])


def digit_features(vae: Any, learned: Digits, held_out: Digits) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each kind of features, of the digits to learn from and of those held out."""
    both = [learned.images, held_out.images]
    latents = [latents_of(vae, images) for images in both]
    pixels = [images.flatten(1).double().numpy() for images in both]
    flat = [each.flatten(1).double().numpy() for each in latents]
    found: dict[str, Any] = {"raw pixels": pixels}
    for name, tables in (("pixels", pixels), ("latents", flat)):
        for rank in RANKS:
            pca = PCA(rank, random_state=0).fit(tables[0])
            found[f"PCA-{rank} of {name}"] = [pca.transform(table) for table in tables]
    found["latents, flattened"] = flat
    for grid in GRIDS:
        name = "mean and std" + f", {grid} x {grid} cells" * bool(grid)
        found[f"latents, {name}"] = [pool_latents(each, grid) for each in latents]
    return {name: (tables[0], tables[1]) for name, tables in found.items()}


def few_labels(learned: tuple[np.ndarray, np.ndarray], held: tuple[np.ndarray, np.ndarray]) -> list[float]:
    """Held-out accuracy of each draw of 10 labels a class."""
    values = normalise(np.concatenate([learned[0], held[0]]))  # looks at no label
    known, asked = values[: len(learned[0])], values[len(learned[0]) :]
    random = np.random.default_rng(0)
    shares = []
    for _ in range(DRAWS):
        rows = [
            random.choice(np.flatnonzero(learned[1] == each), PER_CLASS, replace=False) for each in range(10)
        ]
        chosen = np.concatenate(rows)
        classifier = LogisticRegression(max_iter=2000).fit(known[chosen], learned[1][chosen])
        shares.append(float(classifier.score(asked, held[1])))
    return shares


def measure_digits(vae: Any, learned: Digits, held_out: Digits) -> list[dict[str, Any]]:
    """One row for each kind of features."""
    rows = []
    names = [str(label) for label in learned.labels]
    for name, (known, asked) in tqdm(digit_features(vae, learned, held_out).items(), unit="kind"):
        shares = few_labels((known, learned.labels), (asked, held_out.labels))
        agreement = [nmi(cluster(known, 10, seed).numbers, names) for seed in range(SEEDS)]
        row = {"features": name, "size": known.shape[1]}
        figures = {"accuracy": np.mean(shares), "spread": np.std(shares), "nmi": np.mean(agreement)}
        rows.append(row | {key: float(value) for key, value in figures.items()})
    return rows


def measure_maps(vae: Any, learned: Digits) -> list[dict[str, Any]]:
    """How 10 clusters of the points of a UMAP map agree with the labels."""
    tables = {
        "raw pixels": learned.images.flatten(1).double().numpy(),
        "latents, flattened": latents_of(vae, learned.images).flatten(1).double().numpy(),
    }
    names = [str(label) for label in learned.labels]
    rows = []
    for name, table in tables.items():
        maps = [project(table, "umap", seed).points for seed in range(SEEDS)]
        found = [nmi(cluster(points, 10).numbers, names) for points in maps]
        figures = {"nmi": float(np.mean(found)), "spread": float(np.std(found))}
        rows.append({"features": f"UMAP of {name}", "size": 2, **figures})
    return rows


def halves(vae: Any, files: list[Path]) -> list[dict[str, Any]]:
    """How often the nearest of all other halves is the other half of the same photograph."""
    kinds: dict[str, list[np.ndarray]] = {}
    for file in tqdm(files, unit="image"):
        image = thumbnail(load_image(file), LONGEST)
        middle = image.shape[-1] // 2
        for half in (image[..., :middle], image[..., middle:]):
            latents = latents_of(vae, half[None].contiguous())
            for grid in GRIDS:
                kinds.setdefault(f"latents, grid {grid}", []).append(pool_latents(latents, grid)[0])
            kinds.setdefault("mean and std of colours", []).append(pool_latents(half[None])[0])
            kinds.setdefault("raw pixels", []).append(raw_pixels(half))
    rows = []
    for name, table in kinds.items():
        values = normalise(np.stack(table))
        distances = np.linalg.norm(values[:, None] - values[None], axis=-1)
        np.fill_diagonal(distances, np.inf)
        own = np.arange(len(values)) ^ 1
        rank = (distances < distances[np.arange(len(values)), own][:, None]).sum(1)
        figures = {"first": float((rank == 0).mean()), "in ten": float((rank < 10).mean())}
        rows.append({"features": name, "size": values.shape[1], **figures})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    columns = list(rows[0])
    print("  ".join([f"{columns[0]:34}", *(f"{name:>8}" for name in columns[1:])]))
    for row in rows:
        cells = (f"{row[name]:8}" if name == "size" else f"{row[name]:8.3f}" for name in columns[1:])
        print("  ".join([f"{row['features']:34}", *cells]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=None, help="VAE of digits; default: train one")
    parser.add_argument("--umap", action="store_true", help="clusters of UMAP maps too (umap-learn)")
    parser.add_argument("--photos", type=Path, default=None, help="folder of photographs")
    parser.add_argument("--output", type=Path, default=None, help="JSON of the tables")
    options = parser.parse_args()
    learned, held_out = read_digits()
    result: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        vae = latentvae.load(options.model or str(train_vae(learned, Path(folder))))
    result["digits"] = measure_digits(vae, learned, held_out)
    show(result["digits"])
    if options.umap:
        result["maps"] = measure_maps(vae, learned)
        show(result["maps"])
    if options.photos:
        result["halves"] = halves(latentvae.load(), find_images(options.photos))
        show(result["halves"])
    print(machine())
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
