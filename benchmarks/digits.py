"""scikit-learn's handwritten digits as 32 px pictures, and a classifier that judges pictures of digits."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from latentvae.images.saving import save_image
from latentvae.measure.rfid import frechet_distance

SIDE = 32  # pixels; the scans have 8
SURE = 0.9  # probability from which the judge counts as sure


@dataclass(frozen=True)
class Digits:
    """Pictures (N, 1, 32, 32) in [-1, 1], white on black, with the digit each shows."""

    images: torch.Tensor
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, chosen: np.ndarray) -> "Digits":
        """Those at the given places, or where a mask is true."""
        return Digits(self.images[torch.from_numpy(np.asarray(chosen))], self.labels[chosen])


def read_digits(seed: int = 0) -> tuple[Digits, Digits]:
    """1,297 digits to learn from and 500 held out, drawn by the seed with all classes alike."""
    scans, labels = load_digits(return_X_y=True)
    pixels = np.stack([_enlarge(scan.reshape(8, 8)) for scan in scans])
    every = Digits(torch.from_numpy(pixels)[:, None] * 2 - 1, labels)
    order = np.random.default_rng(seed).permutation(len(every))
    order = order[np.argsort(_rank_in_class(labels[order]), kind="stable")]  # one of each class in turn
    return every.select(order[500:]), every.select(order[:500])


def _enlarge(scan: np.ndarray) -> np.ndarray:
    """8 x 8 of 0..16 to 32 x 32 of 0..1."""
    picture = Image.fromarray((scan / 16 * 255).round().astype(np.uint8))
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
    """How many of the same label stand before each place."""
    ranks = np.zeros(len(labels), dtype=int)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        ranks[places] = np.arange(len(places))
    return ranks


def write_digits(digits: Digits, folder: Path) -> Path:
    """One PNG each, and beside it a caption record with its label, as stores read them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        save_image(image, folder / f"{number:04d}.png")
        (folder / f"{number:04d}.json").write_text(json.dumps({"label": int(label)}), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a set of pictures: shares are 0..1."""

    sure: float  # share of pictures with a probability above 0.9
    classes: int  # digits that at least 2 % of the pictures were taken for
    frechet: float  # distance to the held-out digits in the judge's features
    accuracy: float | None  # where labels are known


class Judge:
    """A multilayer perceptron that has learned real digits; its last hidden layer gives features.

    Args:
        learned: trained on.
        held_out: what a Frechet distance is measured to.
    """

    def __init__(self, learned: Digits, held_out: Digits, seed: int = 0) -> None:
        self.network = MLPClassifier((128, 64), max_iter=400, random_state=seed)
        self.network.fit(_flat(learned.images), learned.labels)
        self.reference = _moments(self.features(held_out.images))

    def features(self, images: torch.Tensor) -> np.ndarray:
        """(N, 64) of pictures (N, 1, 32, 32) in [-1, 1]."""
        values = _flat(images)
        for weight, bias in list(zip(self.network.coefs_, self.network.intercepts_, strict=True))[:-1]:
            values = np.maximum(values @ weight + bias, 0)
        return values

    def __call__(self, images: torch.Tensor, labels: np.ndarray | None = None) -> Judgement:
        """Judge pictures (N, 1, 32, 32) in [-1, 1]."""
        probabilities = self.network.predict_proba(_flat(images))
        taken_for = probabilities.argmax(1)
        counts = np.bincount(taken_for, minlength=10)
        return Judgement(
            sure=float((probabilities.max(1) > SURE).mean()),
            classes=int((counts >= 0.02 * len(images)).sum()),
            frechet=frechet_distance(*_moments(self.features(images)), *self.reference),
            accuracy=None if labels is None else float((taken_for == labels).mean()),
        )


def _flat(images: torch.Tensor) -> np.ndarray:
    """(N, 1024) in 0..1."""
    values: np.ndarray = images.detach().cpu().double().flatten(1).clamp(-1, 1).numpy()
    return values / 2 + 0.5


def _moments(features: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of (N, D)."""
    return torch.from_numpy(features.mean(0)), torch.from_numpy(np.cov(features, rowvar=False))
