"""Pictures that a program holds already: what `load_image` takes besides the path of a file.

A Pillow image becomes a file in memory, so that one loader owns orientation, profiles, palettes and alpha.
"""

import io
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageFile

from latentvae.base.errors import ImageError

Given = bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray | torch.Tensor
ORIENTATION_TAG = 0x0112  # of EXIF
WHITE = {"uint8": 255.0, "uint16": 65535.0, "bool": 255.0}  # of arrays; floats are in [0, 1]
WANTED = (
    "wanted the path of an image file, its bytes, a binary file object, a Pillow image, or an array or "
    "tensor (H, W), (H, W, C) or (C, H, W) of uint8, uint16 or floats in [0, 1]"
)


def file_bytes(given: Any) -> bytes:
    """What an image file holds, from its bytes, an open file (read from where it stands) or a Pillow image.

    Raises:
        ImageError: it is none of these.
    """
    if isinstance(given, Image.Image):
        return _unread(given) or _written(given)
    if isinstance(given, bytes | bytearray | memoryview):
        return bytes(given)
    data = given.read() if hasattr(given, "read") else None
    if isinstance(data, bytes):
        return data
    came = "a file opened as text" if isinstance(data, str) else type(given).__name__
    raise ImageError(f"{came} came; {WANTED}")


def array_samples(given: np.ndarray | torch.Tensor) -> tuple[np.ndarray, float, np.ndarray | None]:
    """Colour (H, W) or (H, W, 3), the value of white, and alpha (H, W) in 0..1 or None, of one picture.

    Where both ends of the shape could be the channels, the last are.

    Raises:
        ImageError: another shape or type, or floats that are not in [0, 1].
    """
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    shape, dtype = given.shape, str(given.dtype)
    if given.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        given = np.moveaxis(given, 0, 2)
    if given.ndim == 3 and given.shape[2] == 1:
        given = given[..., 0]
    if given.size == 0 or not (given.ndim == 2 or (given.ndim == 3 and given.shape[2] in (3, 4))):
        raise ImageError(f"an array of shape {shape} came; {WANTED}: one image, of 1, 3 or 4 channels")
    if dtype not in WHITE and given.dtype.kind != "f":
        raise ImageError(f"an array of {dtype} came; {WANTED}: convert it first")
    if given.dtype.kind == "f" and not (given.min() >= 0 and given.max() <= 1):  # written so that NaN fails
        raise ImageError(
            f"an array of floats from {given.min():g} to {given.max():g} came; wanted [0, 1] (black to "
            "white). What is in [-1, 1] already needs no loading: (C, H, W) of it is an image"
        )
    white = WHITE.get(dtype, 1.0)
    samples = given.astype(np.uint8) * 255 if dtype == "bool" else given
    if samples.ndim == 2 or samples.shape[2] == 3:
        return samples, white, None
    return samples[..., :3], white, samples[..., 3].astype(np.float32) / np.float32(white)


def _unread(image: Image.Image) -> bytes | None:
    """The file behind a picture that was opened and not loaded: it may hold more bits than Pillow keeps."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.tell() or image.fp is None:
        return None  # loaded, and perhaps changed since; or another frame than the first
    place = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(place)
    return data


def _written(image: Image.Image) -> bytes:
    """A TIFF of the same samples, profile and orientation."""
    if "transparency" in image.info:
        image = image.convert("RGBA")  # TIFF has no transparent colour
    elif image.mode in ("HSV", "YCbCr", "La", "RGBa"):  # which it lacks too, or halves in size
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGB"))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ORIENTATION_TAG] = image.getexif().get(ORIENTATION_TAG, 1)
    # raw, said so: Pillow would go on with the compression of the file that it came from
    image.save(buffer, "TIFF", exif=exif, compression="raw", icc_profile=image.info.get("icc_profile"))
    return buffer.getvalue()
