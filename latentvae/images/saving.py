"""Images to files, whole or not at all."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentvae.base.errors import ImageError
from latentvae.base.files import whole_file
from latentvae.images.reading import PathLike
from latentvae.images.tensors import to_uint8

# what a decoder gave is not to be changed by its file: JPEG without halved colour, WebP without loss
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
    save_picture(to_pil(images), path, name, **options)


def save_picture(picture: Image.Image, path: Path, format: str = "PNG", **options: Any) -> None:
    """Write a Pillow image whole or not at all; options are those of its `save`.

    Raises:
        ImageError: it cannot be written, or is larger than the format goes.
    """
    message = "{path} cannot be written ({reason}): use a folder that exists, yours"
    with whole_file(path, ImageError, message) as partial:
        try:
            picture.save(partial, format, **options)  # said: the temporary name has no suffix to tell it
        except ValueError as error:  # Pillow's, for one that is too large for its format
            raise OSError(str(error)) from error
