"""Finding odd images: terms that are calibrated on normal ones, one score, and heat maps."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import avg_pool2d, pad

from latentvae.errors import LatentVAEError
from latentvae.explore.features import pool
from latentvae.fingerprint import weight_hash
from latentvae.latents import decode, encode
from latentvae.model import spatial_compression_ratio
from latentvae.perceptual import LPIPS

FORMAT = 1
LEAST = 5  # normal images: fewer have no quantiles
FOLDS = 5
LEVELS = np.linspace(0, 1, 101)  # of the stored quantiles
MIDDLE, HIGH = 50, 95  # places in LEVELS: a term counts in units of the distance between them
# Of the smooth maximum, log-mean-exp: a defect often shows in one term alone, which a mean would drown.
SHARPNESS = 3.0
SHRINKAGE = 0.1  # of the covariance towards its diagonal, so that few images give an inverse

TERMS = {
    "pixel": "mean squared error of the reconstruction",
    "patch": "largest mean squared error over one latent pixel's area",
    "lpips": "perceptual distance to the reconstruction",
    "kl": "KL of the posterior in nats per image pixel",
    "latent": "Mahalanobis distance of the pooled latents to those of normal images",
    "neighbour": "distance of the pooled latents, whitened, to the nearest normal image's",
}


@dataclass(frozen=True)
class Look:
    """What the model says of one image, before any comparison.

    Attributes:
        terms: pixel, patch, kl and, with a network, lpips.
        pooled: (2C,), mean and standard deviation of each latent channel over the image.
        heat: (H, W), the squared error, averaged over the area of one latent pixel.
    """

    terms: dict[str, float]
    pooled: np.ndarray
    heat: torch.Tensor


@dataclass(frozen=True)
class Verdict:
    """How odd an image is.

    Attributes:
        score: smooth maximum over terms of (value - median) / (95 % quantile - median) of normal images: 0 is
            usual, above 1 is rare, without an upper end.
        quantile: the share of normal images that scored lower, each judged by the others, in 0..1.
        terms: every term's value.
        quantiles: every term's share of normal images with a lower value.
        heat: (H, W), local error in units of the 95 % quantile of normal images' worst place.
    """

    score: float
    quantile: float
    terms: dict[str, float]
    quantiles: dict[str, float]
    heat: torch.Tensor


@torch.no_grad()
def look(vae: AutoencoderKL, images: torch.Tensor, lpips: LPIPS | None = None) -> Look:
    """Encode and decode one image (1, C, H, W) in [-1, 1] and measure what is odd about it.

    Raises:
        LatentVAEError: more than one image, a model that gives NaN, or an image too small for LPIPS.
    """
    if images.ndim != 4 or images.shape[0] != 1:
        raise LatentVAEError(f"shape {tuple(images.shape)} came; one image (1, C, H, W) was wanted.")
    images = images.to(vae.device)
    posterior, padding = encode(vae, images)
    latents = posterior.mode()
    rebuilt = decode(vae, latents, padding).clamp(-1, 1)
    error = (rebuilt - images.float()).square().mean(1, keepdim=True)  # (1, 1, H, W)
    heat = _average(error, spatial_compression_ratio(vae))[0, 0].cpu()
    terms = {"pixel": float(error.mean()), "patch": float(heat.max())}
    if lpips is not None:
        terms["lpips"] = float(lpips(images.float(), rebuilt.float()))
    terms["kl"] = float(posterior.kl()) / error.numel()
    if not all(math.isfinite(value) for value in terms.values()):
        raise LatentVAEError(f"the model gave {terms}: compute in float32 (half precision overflows).")
    return Look(terms, pool(latents)[0], heat)


def _average(error: torch.Tensor, side: int) -> torch.Tensor:
    """Mean over squares of about `side` pixels around each pixel, (1, 1, H, W); edges have fewer."""
    reach = side // 2
    kernel = 2 * reach + 1
    weight = avg_pool2d(pad(torch.ones_like(error), (reach,) * 4), kernel, stride=1)
    return avg_pool2d(pad(error, (reach,) * 4), kernel, stride=1) / weight


@dataclass(frozen=True)
class Calibration:
    """What is usual among normal images, for one VAE.

    Attributes:
        weights_sha256: of the VAE.
        lpips_net: of the term lpips, or None where that term is left out.
        quantiles: of each term, and of "score", at LEVELS.
        pooled: (N, 2C), of the normal images.
    """

    weights_sha256: str
    lpips_net: str | None
    quantiles: dict[str, list[float]]
    pooled: list[list[float]]

    def judge(self, one: Look) -> Verdict:
        """Compare an image with the normal ones."""
        terms = {**one.terms, **distances(one.pooled, np.asarray(self.pooled))}
        if missing := (self.quantiles.keys() - {"score"}) ^ terms.keys():
            raise LatentVAEError(
                f"the terms {sorted(missing)} are not in both the image's measures and the calibration: "
                "measure with the LPIPS network the calibration was made with, or with none if it had none."
            )
        score = self.score(terms)
        quantiles = {name: share_below(value, self.quantiles[name]) for name, value in terms.items()}
        heat = one.heat / max(self.quantiles["patch"][HIGH], 1e-12)
        return Verdict(score, share_below(score, self.quantiles["score"]), terms, quantiles, heat)

    def score(self, terms: dict[str, float]) -> float:
        """Smooth maximum over the terms of how far each is above its median, in units of its upper spread."""
        above = np.array([excess(value, self.quantiles[name]) for name, value in terms.items()])
        top = above.max()
        return float(top + np.log(np.mean(np.exp(SHARPNESS * (above - top)))) / SHARPNESS)

    def check(self, vae: AutoencoderKL) -> None:
        """Refuse another VAE: its errors and latents are on other scales.

        Raises:
            LatentVAEError: the weights' hash is not the calibration's.
        """
        found = weight_hash(vae)
        if found != self.weights_sha256:
            raise LatentVAEError(
                f"this calibration was made with the VAE {self.weights_sha256[:12]}, but the model is "
                f"{found[:12]}: name the model it was made with (--model), or fit it again with this one."
            )

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        partial = path.with_name(f".{path.name}.tmp")
        try:
            partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            reason = error.strerror or error
            raise LatentVAEError(
                f"{path} cannot be written ({reason}): name a file in your folder."
            ) from error


def load_calibration(path: Path) -> Calibration:
    """Read what `Calibration.save` wrote.

    Raises:
        LatentVAEError: no such file, or no calibration in it.
    """
    try:
        read: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(read, dict) or read.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        found = Calibration(**read)
        columns = {name: np.asarray(values, dtype=np.float64) for name, values in found.quantiles.items()}
        whole = all(values.shape == LEVELS.shape and np.isfinite(values).all() for values in columns.values())
        if not whole or not {"pixel", "patch", "kl", "score"} <= columns.keys():
            raise ValueError("its quantiles are not whole")
        if np.asarray(found.pooled, dtype=np.float64).ndim != 2:
            raise ValueError("its pooled latents are no table")
    except OSError as error:
        raise LatentVAEError(
            f"{path} cannot be read ({error.strerror}): make it with `latentvae anomaly fit`."
        ) from error
    except (ValueError, TypeError) as error:
        raise LatentVAEError(
            f"{path} is no calibration ({error}): make it again with `latentvae anomaly fit`."
        ) from error
    return found


def calibrate(vae: AutoencoderKL, looks: Iterable[Look], lpips_net: str | None = None) -> Calibration:
    """Learn from normal images what is usual.

    Distances in latent space are measured with each fifth of the images against the others, because a
    distance to a cloud that an image is part of is too short.

    Args:
        vae: what looked at them.
        looks: of the normal images, at least 5; hundreds give quantiles that mean something.
        lpips_net: of the network they were measured with; None: with none.

    Raises:
        LatentVAEError: fewer than 5.
    """
    seen = list(looks)
    if len(seen) < LEAST:
        raise LatentVAEError(
            f"{len(seen)} normal images came; at least {LEAST} are needed, and hundreds are better."
        )
    pooled = np.stack([one.pooled for one in seen])
    fold = np.arange(len(seen)) % FOLDS
    rows = [{**one.terms, **distances(one.pooled, pooled[fold != fold[i]])} for i, one in enumerate(seen)]
    quantiles = {name: quantiles_of([row[name] for row in rows]) for name in rows[0]}
    made = Calibration(weight_hash(vae), lpips_net, quantiles, pooled.tolist())
    quantiles["score"] = quantiles_of([made.score(row) for row in rows])
    return made


def distances(one: np.ndarray, normal: np.ndarray) -> dict[str, float]:
    """Mahalanobis distances of pooled latents (2C,) to normal ones (N, 2C) and to their nearest."""
    centre = normal.mean(0)
    covariance = np.atleast_2d(np.cov(normal, rowvar=False, bias=True))
    diagonal = np.diag(np.diag(covariance) + 1e-9)
    inverse = np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal)

    def length(difference: np.ndarray) -> np.ndarray:
        return np.sqrt(np.einsum("nc,cd,nd->n", difference, inverse, difference))

    return {
        "latent": float(length((one - centre)[None])[0]),
        "neighbour": float(length(one - normal).min()),
    }


def quantiles_of(values: list[float]) -> list[float]:
    """Quantiles at LEVELS, linear between the values."""
    found: list[float] = np.quantile(np.asarray(values, dtype=np.float64), LEVELS).tolist()
    return found


def share_below(value: float, quantiles: list[float]) -> float:
    """The share of normal images with a lower value, 0..1, linear between the stored quantiles."""
    below, above = (np.searchsorted(quantiles, value, side=side) for side in ("left", "right"))
    if below != above:  # on one quantile, or on several that are equal: their middle
        return float(LEVELS[below] + LEVELS[above - 1]) / 2
    return float(np.interp(value, quantiles, LEVELS))


def excess(value: float, quantiles: list[float]) -> float:
    """How far a value is above the median, in units of the distance from there to the 95 % quantile."""
    spread = quantiles[HIGH] - quantiles[MIDDLE]
    return (value - quantiles[MIDDLE]) / max(spread, 1e-9 * abs(quantiles[MIDDLE]), 1e-12)
