"""JPEG and WebP files of at most so many bytes: what a model's small file is compared with."""

import io
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image

from latentvae.images.reading import load_image
from latentvae.images.saving import to_pil

Format = Literal["JPEG", "WebP"]

QUALITIES: dict[str, tuple[int, int]] = {"JPEG": (1, 95), "WebP": (0, 100)}


@dataclass(frozen=True)
class Coded:
    """An image through a codec.

    Attributes:
        image: (C, H, W) in [-1, 1], decoded again.
        size: of the file, in bytes.
        quality: what the codec was set to.
        fits: whether the file is no larger than was asked for; the codec's smallest may be.
    """

    image: torch.Tensor
    size: int
    quality: int
    fits: bool


def best_within(image: torch.Tensor, name: Format, budget: int) -> Coded:
    """The best file of a format of at most `budget` bytes, or the smallest there is.

    Args:
        image: (C, H, W) in [-1, 1], C of 1 or 3.
        name: of the format, as Pillow writes it (JPEG: optimised, 4:2:0; WebP: its slowest method).
        budget: bytes.
    """
    picture = to_pil(image)
    low, high = QUALITIES[name]
    best, data = low, _encode(picture, name, low)
    fits = len(data) <= budget
    while fits and low < high:  # sizes grow with quality
        middle = (low + high + 1) // 2
        tried = _encode(picture, name, middle)
        if len(tried) <= budget:
            low, best, data = middle, middle, tried
        else:
            high = middle - 1
    decoded = load_image(data, name=name, channels=image.shape[0])
    return Coded(decoded, len(data), best, fits)


def _encode(picture: Image.Image, name: Format, quality: int) -> bytes:
    buffer = io.BytesIO()
    options = {"optimize": True} if name == "JPEG" else {"method": 6}
    picture.save(buffer, format=name.upper(), quality=quality, **options)
    return buffer.getvalue()
