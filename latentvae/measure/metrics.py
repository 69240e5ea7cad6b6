"""How good reconstructions are: PSNR, SSIM, LPIPS and rate, each figure with the protocol that gave it.

Distortions are measured after both images are rounded to 8 bits, as a viewer or a saved PNG would have them
(scans: to their own depth); unrounded tensors give other figures. A rate here is a KL bound: the mean number
of bits that ideal "bits back" coding of the latents would need (Hinton & van Camp 1993). It is not the size
of any file.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from latentvae.base.errors import LatentVAEError
from latentvae.measure.lpips import LPIPS

LatentsMode = Literal["mode", "sample"]

SSIM_WINDOW = 11  # pixels; 11, 1.5, 0.01 and 0.03 below are those of the paper
NO_RATE = "a KL tells one only where the model's deviations differ from place to place"
# names of attributes of a row and of a summary, in the order of the table's columns
FIGURES = ("psnr", "ssim", "lpips", "rate_bpp")


@dataclass(frozen=True)
class Protocol:
    """How the figures were made; two tables compare only where these agree."""

    image_count: int
    latents: LatentsMode
    lpips_net: str | None
    lpips_missing_reason: str | None  # None when LPIPS was measured
    rounding: str = "8-bit: clamped to [-1, 1], rounded to 0..255, images and reconstructions alike"
    psnr: str = "dB over all channels and pixels of an image, peak 255"
    ssim: str = "Gaussian window 11x11, sigma 1.5, k1 0.01, k2 0.03, borders reflected, mean over channels"
    rate: str = "KL to the prior in bits per source pixel: a bound, not a file size"
    mean: str = "mean over images of each figure (of dB for PSNR)"


@dataclass(frozen=True)
class ImageMetrics:
    """The figures of one image; None where one was not measured."""

    name: str
    width: int
    height: int
    psnr: float  # dB; inf where identical after rounding
    ssim: float  # <= 1; nan for images smaller than the window
    lpips: float | None
    rate_bpp: float | None


@dataclass(frozen=True)
class MetricsSummary:
    """The figures of every image, their means, and the protocol."""

    images: tuple[ImageMetrics, ...]
    protocol: Protocol
    psnr: float  # dB; inf as soon as one image is identical
    ssim: float  # over the images that are not smaller than the window; nan when there is none
    lpips: float | None  # over the images that have it, as the next
    rate_bpp: float | None

    @property
    def notes(self) -> tuple[str, ...]:
        """Say why figures are missing or not finite."""
        notes = []
        if self.protocol.lpips_missing_reason is not None:
            notes.append(f"LPIPS was not measured: {self.protocol.lpips_missing_reason}")
        elif count := sum(image.lpips is None for image in self.images):
            notes.append(f"LPIPS: {count} image(s) are too small for the network and not in the mean")
        if count := sum(math.isinf(image.psnr) for image in self.images):
            notes.append(f"PSNR is infinite: {count} image(s) are identical after rounding")
        if count := sum(math.isnan(image.ssim) for image in self.images):
            notes.append(f"SSIM: {count} image(s) are smaller than its window of 11 and not in the mean")
        if 0 < (count := sum(image.rate_bpp is None for image in self.images)) < len(self.images):
            notes.append(f"rate: {count} image(s) were added without their KL and are not in the mean")
        return tuple(notes)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values: inf and nan become None, and `notes` says why."""
        mean = {name: _finite(getattr(self, name)) for name in FIGURES}
        images = [{key: _finite(value) for key, value in asdict(image).items()} for image in self.images]
        return {"protocol": asdict(self.protocol), "mean": mean, "images": images, "notes": list(self.notes)}

    def table(self) -> str:
        """Return an aligned plain-text table with a mean row, the protocol and the notes."""
        net = self.protocol.lpips_net
        header = ("image", "size", "PSNR dB", "SSIM", f"LPIPS-{net}" if net else "LPIPS", "bpp (KL)")
        rows = [(i.name, f"{i.width}x{i.height}", *_cells(i)) for i in self.images]
        rows.append((f"mean of {len(self.images)}", "", *_cells(self)))
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [_line(row, widths) for row in (header, *rows)]
        rule = "-" * len(lines[0])
        rounding = self.protocol.rounding.partition(":")[0]  # 8-bit, or a number of levels
        foot = [f"{rounding} rounding; latents: {self.protocol.latents}; SSIM: Gaussian 11x11, sigma 1.5."]
        foot.append(f"Means: {self.protocol.mean}.")
        bpp = f"bpp: {self.protocol.rate}" if self.rate_bpp is not None else f"No bpp: {NO_RATE}"
        foot.append(f"{bpp}.")
        foot.extend(f"Note: {note}" for note in self.notes)
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], "", *foot])


class Metrics:
    """Gather figures image by image; `summary` gives them with their means and protocol."""

    def __init__(
        self,
        lpips: LPIPS | None = None,
        lpips_missing_reason: str | None = None,
        latents: LatentsMode = "mode",
        steps: int = 255,
    ) -> None:
        """Say what will be measured, and how the reconstructions are made.

        Args:
            lpips: from `load_lpips`, on any device; None leaves LPIPS out.
            lpips_missing_reason: why `lpips` is None, for the reader of the table.
            latents: whether reconstructions are decoded from the posterior's mode or from a sample.
            steps: from black to white, that images are rounded to: 255 of 8 bits, 4095 of 12.
        """
        if latents not in ("mode", "sample"):
            raise LatentVAEError(f"latents must be 'mode' or 'sample', got {latents!r}.")
        self.lpips = lpips
        self.latents: LatentsMode = latents
        self.steps = steps
        self.lpips_missing_reason = None if lpips else lpips_missing_reason or "no network was given"
        self.images: list[ImageMetrics] = []  # in the order in which they came; others' may be added

    def add(
        self,
        name: str | Sequence[str],
        images: Tensor,
        reconstructions: Tensor,
        kl_nats: Tensor | None = None,
    ) -> tuple[ImageMetrics, ...]:
        """Measure a batch and return its figures.

        Args:
            name: of the image, or one for each of the batch.
            images: (B, C, H, W) float in [-1, 1]; values outside are clamped.
            reconstructions: the same shape, any padding cropped off.
            kl_nats: (B,) KL of each image's posterior to the prior, summed, in nats.

        Raises:
            LatentVAEError: on shapes that differ, values that are not finite, or the wrong number of names.
        """
        names = [name] if isinstance(name, str) else list(name)
        levels, rebuilt = _levels(images, reconstructions, self.steps)
        batch, _, height, width = levels.shape  # (B, C, H, W), whole numbers in 0..steps
        if len(names) != batch:
            raise LatentVAEError(f"a batch of {batch} images needs {batch} names, got {len(names)}.")
        if kl_nats is not None and (kl_nats.shape != (batch,) or not kl_nats.isfinite().all()):
            raise LatentVAEError(
                f"kl_nats must be finite and of shape ({batch},), got {kl_nats.tolist()}. Sum the KL over "
                f"each image's latents, in float32 (float16 overflows)."
            )
        bpp = None if kl_nats is None else bits_per_pixel(rate(kl_nats), height, width)
        # (B,) each, or None; by figure here, by image below
        pair = levels, rebuilt
        columns = (_psnr(*pair, self.steps), _ssim(*pair, self.steps), self._lpips(*pair), bpp)
        values = [[None] * batch if c is None else c.tolist() for c in columns]
        added = tuple(
            ImageMetrics(name, width, height, *figures) for name, *figures in zip(names, *values, strict=True)
        )
        self.images.extend(added)
        return added

    def summary(self) -> MetricsSummary:
        """Return the figures so far. Raises LatentVAEError when there are none."""
        if not self.images:
            raise LatentVAEError("no images were measured, so there is nothing to summarise: add some first.")
        net = self.lpips.net if self.lpips else None
        protocol = Protocol(len(self.images), self.latents, net, self.lpips_missing_reason)
        if self.steps != 255:
            rounding = (
                f"{self.steps + 1} levels: clamped to the intensity range, images and reconstructions alike"
            )
            peak = f"dB over all pixels of an image, peak {self.steps}"
            protocol = replace(protocol, rounding=rounding, psnr=peak)
        columns = ([getattr(i, name) for i in self.images] for name in FIGURES)
        return MetricsSummary(tuple(self.images), protocol, *map(_mean, columns))

    def _lpips(self, levels: Tensor, rebuilt: Tensor) -> Tensor | None:
        if self.lpips is None or min(levels.shape[2:]) < self.lpips.min_size:
            return None
        device = self.lpips.shift.device
        # of the rounded images too, as every figure of a table
        pair = [(x.to(device) / (self.steps / 2) - 1) for x in (levels, rebuilt)]
        # a caller's autocast would make the figure depend on where it is measured
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self.lpips(*pair)


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Measure the peak signal-to-noise ratio of each pair after 8-bit rounding.

    Args:
        images: (B, C, H, W) float in [-1, 1]; values outside are clamped.
        reconstructions: the same shape.

    Returns:
        (B,) float32 in dB: 10 log10(255^2 / mean squared error); inf where the two are identical.

    Raises:
        LatentVAEError: on shapes that differ, no 4-D float, or values that are not finite.
    """
    return _psnr(*_levels(images, reconstructions))


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Measure the structural similarity of each pair after 8-bit rounding (Wang et al. 2004).

    Args and errors as `psnr`. Returns (B,) float32 <= 1, the mean over channels and pixels with a Gaussian
    window (11x11, sigma 1.5) and reflected borders, as torchmetrics in float64; nan for images smaller than
    the window.
    """
    return _ssim(*_levels(images, reconstructions))


def rate(kl_nats: Tensor) -> Tensor:
    """Convert each image's KL to the prior, (B,) in nats, to bits, (B,): a bound, not a file size."""
    return kl_nats.float() / math.log(2)


def bits_per_pixel(bits: Tensor, height: int, width: int) -> Tensor:
    """Divide bits, (B,), by the pixels of the source image (before any padding)."""
    if height < 1 or width < 1:
        raise LatentVAEError(f"an image has at least one pixel, got height {height} and width {width}.")
    return bits / (height * width)


@torch.no_grad()
def _levels(images: Tensor, reconstructions: Tensor, steps: int = 255) -> tuple[Tensor, Tensor]:
    """Check both and round them to 0..steps, as float32."""
    if images.shape != reconstructions.shape or images.ndim != 4 or 0 in images.shape:
        raise LatentVAEError(
            f"images and reconstructions must be (B, C, H, W) of one shape, got {tuple(images.shape)} and "
            f"{tuple(reconstructions.shape)}. Crop the padding off the reconstructions first."
        )
    for name, x in (("images", images), ("reconstructions", reconstructions)):
        if not x.is_floating_point():
            raise LatentVAEError(f"{name} must be float in [-1, 1], got {x.dtype}. Scale them first.")
        if count := int((~x.isfinite()).sum()):
            raise LatentVAEError(
                f"{name} hold {count} nan or infinite values of {x.numel()}: no figure would mean anything. "
                f"If the model ran in float16, use bfloat16 or float32."
            )
    # rounded as a saved PNG would be, originals too: those from JPEG or a resize need not be whole
    half = steps / 2
    rounded = [x.float().mul(half).add(half).round().clamp(0, steps) for x in (images, reconstructions)]
    return rounded[0], rounded[1].to(rounded[0].device)


def _psnr(levels: Tensor, rebuilt: Tensor, steps: int = 255) -> Tensor:
    return 10 * (steps**2 / (levels - rebuilt).square().mean((1, 2, 3))).log10()


@torch.no_grad()
def _ssim(levels: Tensor, rebuilt: Tensor, steps: int = 255) -> Tensor:
    if min(levels.shape[2:]) < SSIM_WINDOW:
        return levels.new_full((len(levels),), math.nan)
    pairs = zip(levels.flatten(0, 1), rebuilt.flatten(0, 1), strict=True)
    channels = torch.stack(
        [_ssim_of_plane(x, y, steps) for x, y in pairs]
    )  # (B * C,); one at a time stays in cache
    return channels.view(levels.shape[:2]).mean(1).to(levels)


def _ssim_of_plane(x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Wang et al. 2004, equation 13, averaged over (H, W) levels in 0..steps.

    In float64, because E[x^2] - E[x]^2 in float32 gives a white image 0.9991 with itself.
    """
    device = "cpu" if x.device.type == "mps" else x.device  # MPS has no float64
    x, y = (
        pad(v[None].to(device, torch.float64), (SSIM_WINDOW // 2,) * 4, mode="reflect")[0] for v in (x, y)
    )
    mean_x, mean_y = _blur(x), _blur(y)
    means, product = mean_x.square() + mean_y.square(), mean_x * mean_y
    variances, covariance = _blur(x.square() + y.square()) - means, _blur(x * y) - product
    # keep the ratio stable where an image is black or flat
    c1, c2 = (0.01 * steps) ** 2, (0.03 * steps) ** 2
    return ((2 * product + c1) * (2 * covariance + c2) / ((means + c1) * (variances + c2))).mean()


def _blur(x: Tensor) -> Tensor:
    """Filter (H, W) with the Gaussian window, one axis after the other: 22 taps instead of 121."""
    offsets = range(-(SSIM_WINDOW // 2), SSIM_WINDOW // 2 + 1)
    # divided by their sum below, so that a flat image stays as it is
    taps = [math.exp(-(k**2) / (2 * 1.5**2)) for k in offsets]
    for dim in (0, 1):
        size = x.shape[dim] - SSIM_WINDOW + 1
        parts = (x.narrow(dim, k, size) * (tap / sum(taps)) for k, tap in enumerate(taps))
        x = sum(parts, torch.zeros(()))
    return x


def _mean(column: Sequence[float | None]) -> Any:
    """Average what is there: None where nothing was measured, nan where nothing could be."""
    measured = [value for value in column if value is not None]
    found = [value for value in measured if not math.isnan(value)]
    if not found:
        return math.nan if measured else None
    # exact, so that the mean does not depend on the images' order
    return math.fsum(found) / len(found)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(row: ImageMetrics | MetricsSummary) -> list[str]:
    values = ((getattr(row, name), digits) for name, digits in zip(FIGURES, (2, 4, 4, 3), strict=True))
    return ["-" if value is None else f"{value:.{digits}f}" for value, digits in values]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *figures = row
    return "  ".join([name.ljust(widths[0]), *map(str.rjust, figures, widths[1:])])
