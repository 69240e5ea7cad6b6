"""Images to files."""

import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentvae.base.errors import ImageError
from latentvae.images.reading import PathLike
from latentvae.images.tensors import to_uint8

SAVE_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    ".webp": ("WEBP", {"lossless": True}),
}


def to_pil(image: torch.Tensor) -> Image.Image:
    """Turn one image, (C, H, W) or (1, C, H, W) in [-1, 1] with C of 1 or 3, into a Pillow image."""
    one = image[0] if image.ndim == 4 and image.shape[0] == 1 else image
    if one.ndim != 3 or one.shape[0] not in (1, 3) or 0 in one.shape:
        raise ImageError(
            f"shape {tuple(image.shape)} came, but one image (C, H, W) or (1, C, H, W) with C of 1 or 3 "
            "was wanted: save a batch image by image"
        )
    samples = to_uint8(one).permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)


def save_image(images: torch.Tensor, path: PathLike) -> None:
    """Write one image as PNG, JPEG (quality 95, 4:4:4) or lossless WebP, by suffix, whole or not at all."""
    path = Path(path)
    if path.suffix.lower() not in SAVE_OPTIONS:
        raise ImageError(f"{path} ends in '{path.suffix}': images are saved as {', '.join(SAVE_OPTIONS)}")
    name, options = SAVE_OPTIONS[path.suffix.lower()]
    partial = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with partial.open("xb") as file:
            to_pil(images).save(file, format=name, **options)
        partial.replace(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path} cannot be written ({reason}): use a folder that exists, yours") from error
    finally:
        with suppress(OSError):  # gone by then, unless something failed
            partial.unlink()
