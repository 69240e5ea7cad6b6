"""AUROC of defects painted into photographs that are otherwise all different, beside PCA of patches.

    pip install scikit-learn
    python benchmarks/photo_anomaly.py --images ../shared/photos/val

Centre crops. Half of the photographs calibrate; of the other half every second one is normal, and each of
the rest is scored with one defect of each kind. PCA learns 16 px patches of the same normal photographs and
scores by the largest error of a patch, or their mean. The score's form was chosen inside the calibrating
half, with scratch, noise and blur; that only terms of places count was decided after a run with all kinds.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from defects import KINDS, damage
from machine import machine
from odd_scores import Scores, areas, fit_pca, our_scores, squared_error, table
from PIL import Image
from tqdm import tqdm

import latentvae
from latentvae.images.drawing import grid
from latentvae.images.reading import find_images, load_image
from latentvae.images.saving import to_pil
from latentvae.images.tensors import from_uint8
from latentvae.measure.lpips import load_lpips
from latentvae.toolbox.anomaly.calibration import calibrate
from latentvae.toolbox.anomaly.terms import look

PATCH = 16  # pixels a side
PATCHES = 64  # drawn from each normal photograph for PCA to learn
RANKS = (8, 16, 32, 64, 128)  # of PCA
SHOWN = 3  # photographs in the picture of defects


def read_crop(path: Path, side: int) -> Image.Image:
    """The middle of a photograph."""
    image = load_image(path)
    top, left = ((length - side) // 2 for length in image.shape[-2:])
    return to_pil(image[:, top : top + side, left : left + side])


def to_images(photo: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1))[None]


def patches(images: torch.Tensor) -> np.ndarray:
    """(N, D), those of (1, 3, H, W) that begin at every half patch."""
    found: np.ndarray = torch.nn.functional.unfold(images, PATCH, stride=PATCH // 2)[0].T.double().numpy()
    return found


def pca_scores(normal: list[torch.Tensor], tried: list[torch.Tensor]) -> Scores:
    """The largest and the mean error of an image's patches, for each rank."""
    random = np.random.default_rng(0)
    known = [random.choice(patches(images), PATCHES, replace=False) for images in normal]
    scores: Scores = {}
    for rank, pca in fit_pca(np.concatenate(known), RANKS).items():
        errors = [squared_error(pca, patches(images)) for images in tried]
        scores[f"PCA-{rank}, largest"] = [float(each.max()) for each in errors]
        scores[f"PCA-{rank}, mean"] = [float(each.mean()) for each in errors]
    return scores


def measure(photos: list[Image.Image], place: Path | None) -> dict[str, dict[str, float]]:
    """AUROC of every detector for each kind of defect."""
    half = len(photos) // 2
    normal = [to_images(photo) for photo in photos[:half]]
    tried = [(photo, "") for photo in photos[half::2]]
    for number in range(half + 1, len(photos), 2):
        tried += [(damage(photos[number], photos[number - 1], kind, number), kind) for kind in KINDS]
    images, kinds = [to_images(photo) for photo, _ in tried], np.array([kind for _, kind in tried])
    if place is not None:
        shown = [image[0] for image, kind in zip(images, kinds, strict=True) if kind]
        rows = [shown[len(KINDS) * i : len(KINDS) * (i + 1)] for i in range(SHOWN)]
        grid(rows, list(KINDS)).save(place)
    vae, lpips = latentvae.optimize(latentvae.load()), load_lpips("alex")
    usual = calibrate(vae, [look(vae, each, lpips) for each in tqdm(normal, unit="photo")], "alex")
    scores = our_scores([usual.judge(look(vae, each, lpips)) for each in tqdm(images, unit="photo")])
    scores |= pca_scores(normal, images)
    return {kind: areas(scores, kinds == kind, (kinds == kind) | (kinds == "")) for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="photographs, drawn from the folder")
    parser.add_argument("--size", type=int, default=192, help="side of the centre crop, pixels")
    parser.add_argument("--output", type=Path, default=None, help="JSON of the table")
    parser.add_argument("--picture", type=Path, default=None, help="PNG of a few defects")
    options = parser.parse_args()
    files = find_images(options.images)
    order = np.random.default_rng(0).permutation(len(files))[: options.count]
    found = measure([read_crop(files[i], options.size) for i in order], options.picture)
    print(table(found))
    print(machine())
    if options.output:
        text = json.dumps({"machine": machine(), "auroc": found}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
