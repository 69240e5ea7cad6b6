"""rFID, the Fréchet Inception distance between images and their reconstructions, with its protocol.

Source: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule
Converge to a Local Nash Equilibrium", NeurIPS 2017, equation 6. Features, resizing and weights are those of
the package torch-fidelity (Obukhov et al. 2020), which published figures for reconstructions mostly use.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from latentvae.base.errors import LatentVAEError, MissingWeightsError
from latentvae.base.files import file_sha256
from latentvae.base.optional import need
from latentvae.images.tensors import to_uint8

FEATURES = 2048
PUBLISHED_IMAGES = 50_000
# How torch-fidelity's file and pytorch-fid's (the same bytes) end; the last part begins its sha256.
WEIGHTS = "inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d"

NO_NETWORK = (
    "rFID's network comes with the package '{package}', which cannot be imported ({reason}). "
    "To install it: {install}."
)


@dataclass(frozen=True)
class RFIDProtocol:
    """How an rFID was made; two compare only where these agree, and the images too."""

    image_count: int
    weights_sha256: str
    extractor: str = "inception-v3-compat of torch-fidelity: TensorFlow's InceptionV3 of 2015-12-05"
    feature_count: int = FEATURES
    resize: str = "each image from its own size to 299x299, bilinear without antialiasing, as TensorFlow 1"
    rounding: str = "8-bit: clamped to [-1, 1], rounded to 0..255, images and reconstructions alike"
    statistics: str = "mean and covariance (divided by n - 1) in float64, network in float32"

    @property
    def biased(self) -> bool:
        """Whether images are fewer than features, so that the covariances are singular."""
        return self.image_count < self.feature_count

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what the figure must not be compared with."""
        notes = []
        if self.biased:
            notes.append(
                f"rFID: {self.image_count:,} images are fewer than the {self.feature_count:,} features, so "
                f"the covariances are singular and the figure is biased: compare it only with figures of the "
                f"same images, never with published ones, which use {PUBLISHED_IMAGES:,}"
            )
        elif self.image_count < PUBLISHED_IMAGES:
            notes.append(
                f"rFID: it depends on the number of images: {self.image_count:,} here, "
                f"{PUBLISHED_IMAGES:,} in published figures"
            )
        if not self.weights_sha256.startswith(WEIGHTS_SHA256):
            notes.append(
                f"rFID: the weights are not the published ones (sha256 {self.weights_sha256[:8]}, not "
                f"{WEIGHTS_SHA256}); compare it with no figure from other weights"
            )
        return tuple(notes)


class FeatureStatistics:
    """Mean and covariance of feature vectors, gathered batch by batch in float64, in memory that stays fixed.

    Source of the update: Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance", 1983, eq. 1.5.
    """

    def __init__(self, size: int = FEATURES, device: torch.device | str = "cpu") -> None:
        """Start with no vectors of `size`; MPS has no float64, so there they are gathered on the CPU."""
        place = "cpu" if torch.device(device).type == "mps" else device
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=place)
        self._scatter = torch.zeros(size, size, dtype=torch.float64, device=place)

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """Add vectors, (B, size) of any float dtype, on any device."""
        if features.ndim != 2 or features.shape[1] != len(self.mean) or not len(features):
            raise LatentVAEError(f"features must be (B, {len(self.mean)}), got {tuple(features.shape)}.")
        x = features.to(self.mean.device).double()  # (B, size)
        batch_mean = x.mean(0)
        step = batch_mean - self.mean
        total = self.count + len(x)
        # The jump between the means is one more row, so that the large matrix is passed over once.
        jump = step * (self.count * len(x) / total) ** 0.5
        rows = torch.cat([x - batch_mean, jump[None]])
        self._scatter.addmm_(rows.T, rows)
        self.mean += step * (len(x) / total)
        self.count = total

    def merge(self, other: "FeatureStatistics") -> None:
        """Add all vectors that another gathered; eq. 1.5 of the same source."""
        if not other.count:
            return
        step = other.mean.to(self.mean) - self.mean
        total = self.count + other.count
        self._scatter += other._scatter.to(self.mean.device)
        self._scatter.addr_(step, step, alpha=self.count * other.count / total)
        self.mean += step * (other.count / total)
        self.count = total

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which may lack the device."""
        return vars(self) | {"mean": self.mean.cpu(), "_scatter": self._scatter.cpu()}

    @property
    def covariance(self) -> Tensor:
        """(size, size) float64, divided by count - 1. Raises LatentVAEError for fewer than two vectors."""
        if self.count < 2:
            raise LatentVAEError(f"a covariance needs two images or more, got {self.count}: add some first.")
        return self._scatter / (self.count - 1)


class Inception(nn.Module):
    """torch-fidelity's InceptionV3 with frozen weights; make one with `load_inception`."""

    def __init__(self, extractor: nn.Module, weights_sha256: str) -> None:
        """Freeze `extractor`, whose forward takes uint8 images and returns a tuple of features."""
        super().__init__()
        self.extractor = extractor
        self.weights_sha256 = weights_sha256
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.extractor.parameters()).device

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of images after 8-bit rounding.

        Args:
            images: (B, 3 or 1, H, W) float in [-1, 1], of any size and device; one channel is repeated to
                three. Values outside are clamped.

        Returns:
            (B, 2048) float32 on the network's device, whatever autocast says.

        Raises:
            LatentVAEError: on another shape or dtype, or values that are not finite.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            raise LatentVAEError(
                f"rFID wants float images (B, 3 or 1, H, W) in [-1, 1], got {images.dtype} of shape "
                f"{tuple(images.shape)}. Convert them first."
            )
        # the network resizes: its way, from the image's own size, is part of the figure
        levels = to_uint8(images).to(self.device).expand(-1, 3, -1, -1)
        # published figures are float32's
        with torch.autocast(self.device.type, enabled=False):
            return self.extractor(levels)[0]


class RFID:
    """Gather the features of images and reconstructions; `value` is their distance, `protocol` how."""

    def __init__(self, inception: Inception) -> None:
        """Start with no images. `inception` comes from `load_inception`, on any device."""
        self.inception = inception
        self.originals = FeatureStatistics(device=inception.device)
        self.rebuilt = FeatureStatistics(device=inception.device)

    @property
    def count(self) -> int:
        """How many pairs were added."""
        return self.originals.count

    def add(self, images: Tensor, reconstructions: Tensor) -> None:
        """Add a batch of pairs.

        Args:
            images: (B, 3 or 1, H, W) float in [-1, 1]; another batch may have another size.
            reconstructions: the same shape, any padding cropped off.

        Raises:
            LatentVAEError: on shapes that differ, and as `Inception.forward`.
        """
        if images.shape != reconstructions.shape:
            raise LatentVAEError(
                f"rFID compares images of one shape, but images are {tuple(images.shape)} and "
                f"reconstructions {tuple(reconstructions.shape)}. Crop the padding off the reconstructions."
            )
        originals, rebuilt = self.inception(images), self.inception(reconstructions)
        self.originals.add(originals)
        self.rebuilt.add(rebuilt)

    def value(self) -> float:
        """Return the rFID of the pairs so far. Raises LatentVAEError when they are fewer than two."""
        return frechet_distance(
            self.originals.mean, self.originals.covariance, self.rebuilt.mean, self.rebuilt.covariance
        )

    def protocol(self) -> RFIDProtocol:
        """Return how the figure is made."""
        return RFIDProtocol(self.count, self.inception.weights_sha256)


def frechet_distance(mean0: Tensor, covariance0: Tensor, mean1: Tensor, covariance1: Tensor) -> float:
    """Measure the squared Fréchet distance of two Gaussians (Dowson & Landau 1982), in float64 on the CPU.

    |mean0 - mean1|^2 + tr(covariance0) + tr(covariance1) - 2 tr sqrt(covariance0 covariance1). With
    factors F^T F of the covariances the last trace is the sum of the singular values of F0 F1^T: no square
    root is taken of rounding errors, so singular covariances do no harm.

    Args:
        mean0: (F,); `mean1` the same.
        covariance0: (F, F), symmetric, no eigenvalue negative beyond rounding; `covariance1` the same.

    Raises:
        LatentVAEError: on shapes that do not fit, or values that are not finite.
    """
    wanted = (mean0.shape, mean0.shape * 2, mean0.shape, mean0.shape * 2)
    given = [x.detach().cpu().double() for x in (mean0, covariance0, mean1, covariance1)]
    if mean0.ndim != 1 or any(x.shape != shape for x, shape in zip(given, wanted, strict=True)):
        shapes = ", ".join(str(tuple(x.shape)) for x in given)
        raise LatentVAEError(f"two means (F,) and covariances (F, F) were wanted, got {shapes}.")
    if not all(x.isfinite().all() for x in given):
        raise LatentVAEError("the features are not all finite: check the network's weights and the images.")
    m0, c0, m1, c1 = given
    overlap = torch.linalg.svdvals(_factor(c0) @ _factor(c1).T).sum()
    distance = (m0 - m1).square().sum() + c0.trace() + c1.trace() - 2 * overlap
    return max(0.0, distance.item())  # identical sets are 0, not -1e-13


def _factor(covariance: Tensor) -> Tensor:
    """F, (rank, size), with F^T F = covariance, less the eigenvalues that are rounding errors."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0)  # (F,), ascending
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return values[kept].sqrt()[:, None] * vectors[:, kept].T


def load_inception(weights: str | Path | None = None) -> Inception:
    """Load torch-fidelity's InceptionV3 with pretrained weights, or fail: nothing is ever downloaded.

    Args:
        weights: torch-fidelity's or pytorch-fid's own .pth file, read without executing it. None looks in
            torch.hub's cache, where those packages leave it.

    Returns:
        A module on the CPU in float32, frozen, in eval mode.

    Raises:
        MissingWeightsError: the weights, or the package torch-fidelity, are not there.
        LatentVAEError: a file that is not this network's weights.
    """
    network = need("torch_fidelity.feature_extractor_inceptionv3", MissingWeightsError, NO_NETWORK)
    path = _find(weights)
    state, sha256 = _read(path)
    # torch-fidelity reads pickles unsafely, so it gets one that was written here, of plain tensors.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # its random initialisation is no draw of the caller's
            extractor = network.FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(FEATURES)], feature_extractor_weights_path=buffer
            )
    except RuntimeError as error:  # its strict load names every key
        problem = shorten(str(error), 300)
        raise LatentVAEError(f"{path} is not for this network: {problem}. Give weights-{WEIGHTS}.") from error
    return Inception(extractor, sha256)


def _find(weights: str | Path | None) -> Path:
    """Look for weights at the given path, or else in torch.hub's cache."""
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise MissingWeightsError(
                f"Inception weights {path}: no such file. Give the path of weights-{WEIGHTS}."
            )
        return path
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    found = sorted(cache.glob(f"*{WEIGHTS}"))
    if not found:
        raise MissingWeightsError(
            f"no weights for rFID's Inception network: {cache} has no *{WEIGHTS}. Either give a path to that "
            f"file, or fill the cache while online:\n"
            f'  python -c "import torch; from torch_fidelity.feature_extractor_inceptionv3 import '
            f"URL_INCEPTION_V3 as url; "
            f'torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)"'
        )
    return found[-1]  # torch-fidelity's own where both are there; they are the same bytes


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read a pickle of tensors without executing it, and the sha256 of its file."""
    problem = (
        f"{path} is damaged, or no dictionary of tensors; other pickles can run code and are not read. "
        f"Fetch weights-{WEIGHTS} again."
    )
    try:
        sha256 = file_sha256(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LatentVAEError(f"cannot read Inception weights {path} ({error}).") from error
    except Exception as error:  # damaged ones raise anything; torch's words advise to read them unsafely
        raise LatentVAEError(problem) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise LatentVAEError(problem)
    return dict(state), sha256
