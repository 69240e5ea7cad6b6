"""One-channel images whose samples are measurements: a window of intensities to [-1, 1] and back.

Photographs are 8 bits, or 16 of which all are used. Scans have 12 bits in 16-bit files, negative numbers or
floats; scaled as photographs they would be nearly black, or refused.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latentvae.base.errors import ImageError
from latentvae.images import tiffs
from latentvae.images.kinds import FORMATS
from latentvae.images.pixels import check_size
from latentvae.images.reading import MAX_PIXELS, ImageInfo, PathLike, load_image_with_info
from latentvae.images.saving import save_image, save_picture
from latentvae.images.tensors import channels_first_tensor

MODES = ("L", "I", "I;16", "I;16B", "I;16L", "F")  # Pillow's of one channel; a palette is no measurement
FINEST = 65535  # steps of a window of floats


@dataclass(frozen=True)
class Window:
    """The samples that become -1 and 1; what lies outside is clipped."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"

    @property
    def steps(self) -> int:
        """Differences that the data can show: of whole numbers their range, of others that of 16 bits."""
        span = self.high - self.low
        whole = float(self.low).is_integer() and float(self.high).is_integer()
        return int(span) if whole and 1 <= span <= FINEST else FINEST

    def apply(self, samples: np.ndarray) -> torch.Tensor:
        """Samples (H, W) of any type as an image (1, H, W), float32 in [-1, 1]."""
        scaled = (samples.astype(np.float64) - self.low) * (2 / (self.high - self.low)) - 1
        return channels_first_tensor(np.clip(scaled, -1, 1).astype(np.float32))

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1], any shape, as samples: float32, clipped to the window."""
        return images.double().clamp(-1, 1).add(1).mul((self.high - self.low) / 2).add(self.low).float()


def read_samples(
    source: PathLike | bytes, name: str = "image bytes", max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, ImageInfo]:
    """The samples (H, W) of a one-channel image file, as they are in it.

    Raises:
        ImageError: colour, or no image that can be read; TooManyPixels: it has more than `max_pixels`.
    """
    name = name if isinstance(source, bytes) else str(source)
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
            found = tiffs.read_samples(file, name, max_pixels)
        if found is not None:
            samples, info = found, ImageInfo(found.shape[1], found.shape[0], str(found.dtype), "TIFF")
            return _finite(samples, name), info
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS
        ) as image:
            if image.mode not in MODES:
                raise ImageError(
                    f"{name} has the mode {image.mode}, and an intensity range is of one channel of numbers: "
                    "convert it to grey, or leave data.range out"
                )
            check_size(name, *image.size, max_pixels)
            samples = np.asarray(image)
            info = ImageInfo(image.width, image.height, image.mode, image.format or "")
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise nearly everything on damaged files
        raise ImageError(f"{name} cannot be read: {error}. Replace the file, or leave it out") from error
    return _finite(samples, name), info


def _finite(samples: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(samples).all():
        raise ImageError(f"{name} holds NaN or infinite samples: replace them, or leave the file out")
    return samples


def load(
    source: PathLike | bytes,
    channels: int,
    window: Window | None,
    name: str = "image bytes",
    max_pixels: int = MAX_PIXELS,
) -> tuple[torch.Tensor, ImageInfo]:
    """An image (channels, H, W) in [-1, 1], through the window where there is one; and what was done to it.

    Raises:
        ImageError: it cannot be read, or has colour where there is a window.
    """
    if window is None:
        return load_image_with_info(source, name=name, channels=channels, max_pixels=max_pixels)
    samples, info = read_samples(source, name, max_pixels)
    slack = (window.high - window.low) / window.steps / 2  # what rounding moves is not clipped
    outside = float(np.mean((samples < window.low - slack) | (samples > window.high + slack)))
    if outside:
        info.notes.append(f"{outside:.2%} of its samples lie outside {window} and are clipped")
    return window.apply(samples), info


def ending(window: Window | None) -> str:
    """Of the file names that `save` wants: .tif of scans, .png of pictures."""
    return ".png" if window is None else ".tif"


def save(image: torch.Tensor, path: Path, window: Window | None) -> None:
    """Write an image (C, H, W) in [-1, 1] as a picture; with a window its samples, as a float32 TIFF."""
    if window is None:
        save_image(image, path)
        return
    samples = window.undo(image.detach().reshape(image.shape[-2:])).cpu().numpy()
    save_picture(Image.fromarray(samples), path, "TIFF")


def measure_window(images: Iterable[np.ndarray], percentiles: tuple[float, float]) -> Window:
    """The window between two percentiles of all samples, those of each image weighing the same.

    Of each image some quantiles are kept, of one size however large it is.

    Raises:
        ImageError: no image, or both percentiles are the same number.
    """
    found = [np.quantile(samples, _SHARES) for samples in images]
    if not found:
        raise ImageError("no image can be read, so data.percentiles has nothing to measure: set data.range")
    low, high = (_percentile(found, each) for each in percentiles)
    if low >= high:
        raise ImageError(
            f"data.percentiles={list(percentiles)} are both {low:g}: the images are flat; set data.range"
        )
    return Window(low, high)


# a thousandth apart, and closer at both ends, where windows begin and end
_TAIL = np.geomspace(1e-6, 1e-3, 46)[:-1]
_SHARES = np.concatenate([[0], _TAIL, np.linspace(0, 1, 1001)[1:-1], 1 - _TAIL[::-1], [1]])


def _percentile(quantiles: list[np.ndarray], percent: float) -> float:
    """The smallest number that so many per cent of all images' samples do not exceed."""

    def share(sample: float) -> float:
        return float(np.mean([np.interp(sample, each, _SHARES) for each in quantiles]))

    low, high = (float(end) for end in (min(q[0] for q in quantiles), max(q[-1] for q in quantiles)))
    if percent == 100 or share(low) >= percent / 100:
        return high if percent == 100 else low
    while low < (middle := (low + high) / 2) < high:  # until no number lies between them
        low, high = (middle, high) if share(middle) < percent / 100 else (low, middle)
    return high
