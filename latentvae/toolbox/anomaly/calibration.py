"""What is usual among normal images, for one VAE: quantiles of every term, and the file that keeps them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from latentvae.base.errors import LatentVAEError
from latentvae.base.files import check_file, whole_file
from latentvae.models.fingerprint import weight_hash
from latentvae.toolbox.anomaly.terms import TERMS, Look

LEAST = 5  # normal images: fewer have no quantiles
FOLDS = 5

# Of the quantiles
LEVELS = np.linspace(0, 1, 101)  # of the stored ones
MIDDLE, HIGH = 50, 95  # places in LEVELS: a term counts in units of the distance between them

# Of the cloud
SHRINKAGE = 0.1  # of the covariance towards its diagonal, so that few images give an inverse
LIKENESS_SAMPLE = 2000  # images whose distances to each other are measured: they take N x N numbers
ALIKE = 0.5  # digits have 0.3, photographs of anything 0.7

# Of the score: the smooth maximum's, log-mean-exp. A defect often shows in one term alone, which a mean would
# drown.
SHARPNESS = 3.0
# The term of the score, the first that was measured, where no two normal images are alike: what the whole of
# an image is says nothing then, and `alone` finds more by itself than with `patch` (docs/toolbox.md).
PLACES = ("alone", "patch")

# Of the file
FORMAT = "latentvae-anomaly-3"  # 1 was JSON, without layouts; 2 had scores of other terms
SUFFIX = ".safetensors"
AGAIN = "make it again with `latentvae anomaly fit`"


@dataclass(frozen=True)
class Verdict:
    """How odd an image is.

    Attributes:
        score: smooth maximum over the terms that count (`Calibration.counted`) of (value - median) /
            (95 % quantile - median) of normal images: 0 is usual, above 1 is rare, without an upper end.
        quantile: the share of normal images that scored lower, each judged by the others, in 0..1.
        terms: every term's value.
        quantiles: every term's share of normal images with a lower value.
        heat: (H, W), where it is odd, from 0; 1 is as odd as the worst place of one normal image in twenty.
            Of the root of the squared error or, where only `alone` counts, of the distance to the nearest
            place that looks alike, above the image's median or, if that is lower, normal images' median.
    """

    score: float
    quantile: float
    terms: dict[str, float]
    quantiles: dict[str, float]
    heat: torch.Tensor


@dataclass(frozen=True, eq=False)
class Cloud:
    """Where normal images lie in latent space.

    Attributes:
        pooled: (N, 2C), as `Look` has it.
        layout: (N, 64C), the same.
    """

    pooled: np.ndarray
    layout: np.ndarray

    def distances(self, one: Look) -> dict[str, float]:
        """The terms latent, neighbour and layout of an image that is not part of the cloud."""
        to_all = self._lengths(one.pooled - self.pooled)
        to_layouts = np.linalg.norm(one.layout - self.layout, axis=1)
        return {
            "latent": float(self._lengths((one.pooled - self.pooled.mean(0))[None])[0]),
            "neighbour": float(to_all.min()),
            "layout": float(to_layouts.min()),
        }

    @property
    def likeness(self) -> float:
        """Median distance of a layout to the nearest other one over that to any other: 0 for sets of copies,
        near 1 where no image is more like another than the rest. Of a large cloud, only every so many count.
        """
        some = self.layout[:: -(-len(self.layout) // LIKENESS_SAMPLE)]
        squares = np.square(some).sum(1)  # |a - b|^2 = |a|^2 + |b|^2 - 2ab, so no (N, N, 64C) is made
        distances = squares[:, None] + squares - 2 * some @ some.T
        # clip: of equal layouts rounding can leave less than 0; and nobody is its own neighbour
        apart = np.sqrt(distances.clip(0))[~np.eye(len(squares), dtype=bool)].reshape(len(squares), -1)
        # medians: a few copies in the set do not make it one of images that are alike
        return float(np.median(apart.min(1)) / max(np.median(apart), 1e-12))

    def without(self, left_out: np.ndarray) -> "Cloud":
        """The cloud without the images that a mask (N,) names."""
        return Cloud(self.pooled[~left_out], self.layout[~left_out])

    def _lengths(self, differences: np.ndarray) -> np.ndarray:
        """Mahalanobis lengths of (M, 2C)."""
        return np.sqrt(np.einsum("nc,cd,nd->n", differences, self._inverse, differences))

    @cached_property
    def _inverse(self) -> np.ndarray:
        covariance = np.atleast_2d(np.cov(self.pooled, rowvar=False, bias=True))
        diagonal = np.diag(np.diag(covariance) + 1e-9)  # a channel that never varies has an inverse too
        found: np.ndarray = np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal)
        return found


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is usual among normal images, for one VAE.

    Attributes:
        weights_sha256: of the VAE.
        lpips_net: of the terms lpips and alone, or None where those are left out.
        quantiles: of each term, and of "score", at LEVELS.
        cloud: the normal images in latent space.
    """

    weights_sha256: str
    lpips_net: str | None
    quantiles: dict[str, list[float]]
    cloud: Cloud

    def judge(self, one: Look) -> Verdict:
        """Compare an image with the normal ones."""
        terms = {**one.terms, **self.cloud.distances(one)}
        if missing := (self.quantiles.keys() - {"score"}) ^ terms.keys():
            raise LatentVAEError(
                f"the terms {sorted(missing)} are not in both the image's measures and the calibration: "
                "measure with the LPIPS network the calibration was made with, or with none if it had none."
            )
        if self.counted == ["alone"] and one.lonely is not None and not one.lonely.isfinite().any():
            raise LatentVAEError(
                "the image is too small for its places to have like ones elsewhere, and this calibration "
                "counts nothing else: use larger images, or fit with --no-lpips."
            )
        score = self.score(terms)
        quantiles = {name: share_below(value, self.quantiles[name]) for name, value in terms.items()}
        rarity = share_below(score, self.quantiles["score"])
        return Verdict(score, rarity, terms, quantiles, self._heat(one))

    def _heat(self, one: Look) -> torch.Tensor:
        if self.counted != ["alone"] or one.lonely is None:
            # the root: heat goes with the error, not with its square
            return (one.error / max(self.quantiles["patch"][HIGH], 1e-12)).sqrt()
        usual = min(float(one.lonely.nanmedian()), self.quantiles["alone"][MIDDLE])
        unit = max(self.quantiles["alone"][HIGH] - usual, 1e-12)
        above = ((one.lonely - usual) / unit).clamp(min=0).nan_to_num()  # NaN: not known
        size = tuple(one.error.shape)  # (H, W), from (h, w)
        return torch.nn.functional.interpolate(above[None, None], size, mode="bilinear")[0, 0]

    @cached_property
    def counted(self) -> list[str]:
        """The terms in the score: all where normal images are alike, else one of single places."""
        if self.cloud.likeness >= ALIKE:
            return [next((name for name in PLACES if self._tells(name)), PLACES[-1])]
        return [name for name in self.quantiles if name != "score"]  # which is made of the others

    def _tells(self, name: str) -> bool:
        """Whether a term differs at all: `alone` does not in images too small to have an elsewhere."""
        quantiles = self.quantiles.get(name)
        return quantiles is not None and quantiles[HIGH] > quantiles[MIDDLE]

    def score(self, terms: dict[str, float]) -> float:
        """Smooth maximum over counted terms of how far each is above its median, in units of its spread."""
        above = np.array([excess(terms[name], self.quantiles[name]) for name in self.counted])
        top = above.max()
        # top taken out first: exp of a score of some hundreds is infinite
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
        """Write a safetensors file, whole or not at all: the cloud, and all else in its metadata.

        Raises:
            LatentVAEError: it cannot be written.
        """
        about = {"format": FORMAT, "weights_sha256": self.weights_sha256, "lpips_net": self.lpips_net or ""}
        about["quantiles"] = json.dumps(self.quantiles)
        with whole_file(path) as partial:
            # not by safetensors' own `save_file`: names of files need not be UTF-8
            partial.write_bytes(save({"pooled": self.cloud.pooled, "layout": self.cloud.layout}, about))


def check_count(count: int) -> None:
    """Refuse to learn from so few normal images that they have no quantiles.

    Raises:
        LatentVAEError: fewer than 5.
    """
    if count < LEAST:
        images = "1 normal image" if count == 1 else f"{count} normal images"
        raise LatentVAEError(f"{images} came; at least {LEAST} are needed, and hundreds are better.")


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
    check_count(len(seen))
    cloud = Cloud(np.stack([one.pooled for one in seen]), np.stack([one.layout for one in seen]))
    fold = np.arange(len(seen)) % FOLDS  # every fifth, so that no series in a folder is left out whole
    others = [cloud.without(fold == number) for number in range(FOLDS)]
    # image i against the cloud without its own fold
    rows = [{**one.terms, **others[i % FOLDS].distances(one)} for i, one in enumerate(seen)]
    quantiles = {name: quantiles_of([row[name] for row in rows]) for name in rows[0]}
    made = Calibration(weight_hash(vae), lpips_net, quantiles, cloud)  # all of it: no new image is in it
    quantiles["score"] = quantiles_of([made.score(row) for row in rows])
    return made


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
    # normal images that all have one value, or all 0: any other is far above, but not infinitely
    return (value - quantiles[MIDDLE]) / max(spread, 1e-9 * abs(quantiles[MIDDLE]), 1e-12)


def load_calibration(path: Path) -> Calibration:
    """Read what `Calibration.save` wrote.

    Raises:
        LatentVAEError: no such file, no calibration in it, or one of an earlier format.
    """
    try:
        if path.read_bytes()[:1] == b"{":
            raise LatentVAEError(
                f"{path} is JSON, as calibrations were before they held the latents' layout: {AGAIN}."
            )
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}, not {FORMAT!r}")
            cloud = Cloud(file.get_tensor("pooled"), file.get_tensor("layout"))
        quantiles = _checked_quantiles(json.loads(about["quantiles"]))
        if {cloud.pooled.ndim, cloud.layout.ndim} != {2} or len(cloud.pooled) != len(cloud.layout):
            raise ValueError("its tables of latents do not match")
        return Calibration(about["weights_sha256"], about["lpips_net"] or None, quantiles, cloud)
    except OSError as error:
        raise LatentVAEError(
            f"{path} cannot be read ({error.strerror or error}): make it with `latentvae anomaly fit`."
        ) from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise LatentVAEError(f"{path} is no calibration ({error}): {AGAIN}.") from error


def check_place(path: Path) -> None:
    """Refuse to write a calibration over anything else, before the images are looked at.

    Raises:
        LatentVAEError: another suffix (such as that of a photograph), or a file that is no calibration.
    """
    if path.suffix != SUFFIX:
        raise LatentVAEError(
            f"{path} came as the file of the calibration, which is named last and ends in {SUFFIX}, such as "
            f"normal{SUFFIX}. Nothing was written."
        )
    check_file(path, "calibration", _is_calibration)


def _is_calibration(path: Path) -> bool:
    """Whether a file is one, of this format or an earlier one of safetensors."""
    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("format", "").startswith(FORMAT.rstrip("0123456789"))
    except (OSError, SafetensorError):
        return False


def _checked_quantiles(read: object) -> dict[str, list[float]]:
    wanted = TERMS.keys() | {"score"}
    if not isinstance(read, dict) or not read.keys() <= wanted or not {"pixel", "kl", "score"} <= read.keys():
        raise ValueError("its terms are other ones")
    columns = [np.asarray(values, dtype=np.float64) for values in read.values()]
    if not all(values.shape == LEVELS.shape and np.isfinite(values).all() for values in columns):
        raise ValueError("its quantiles are not whole")
    return read
