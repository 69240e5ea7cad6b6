"""What JPEG, WebP and AVIF take for a picture at the same distance from it, or give in as many bytes."""

import io
from collections.abc import Callable
from typing import Any

from PIL import Image

from latentvae.base.errors import CodecError
from latentvae.images.kinds import HAS_AVIF

# the range of qualities, and options that make files smallest, or a comparison would flatter the model
FORMATS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "JPEG": (1, 95, {"optimize": True}),
    "WEBP": (0, 100, {"method": 6}),
}
# the same for one size, by the names that people know; but AVIF's next slower speed gains at most 0.4 dB at
# equal bytes (two Kodak images), and takes five times as long
WITHIN: dict[str, tuple[int, int, dict[str, Any]]] = {
    "JPEG": FORMATS["JPEG"],
    "WebP": FORMATS["WEBP"],
    **({"AVIF": (0, 100, {"speed": 6})} if HAS_AVIF else {}),
}


def size_at(
    picture: Image.Image, format: str, distance: Callable[[bytes], float], wanted: float
) -> int | None:
    """Bytes of the smallest file that is as near to the picture; None where none is, or none can be made.

    Taken for granted: a higher quality is nearer. So seven files are tried and not a hundred.

    Args:
        format: "JPEG" or "WEBP".
        distance: of a file to the picture.
        wanted: the largest distance that will do.
    """
    low, high, options = FORMATS[format]
    found = None
    while low <= high:
        quality = (low + high) // 2
        buffer = io.BytesIO()
        try:
            picture.save(buffer, format, quality=quality, **options)
        except (OSError, ValueError):  # sides that are too long for the format
            return None
        if distance(buffer.getvalue()) <= wanted:
            found, high = len(buffer.getvalue()), quality - 1
        else:
            low = quality + 1
    return found


def best_within(picture: Image.Image, name: str, budget: int) -> tuple[bytes, int]:
    """The best file of at most `budget` bytes and its quality, or else the smallest that there is.

    Taken for granted: files grow with their quality.

    Args:
        picture: RGB or grey.
        name: one of WITHIN.
        budget: bytes.

    Raises:
        CodecError: another name, or a picture that is too large for this kind of file.
    """
    if name not in WITHIN:
        raise CodecError(f"{name!r} came; wanted one of {', '.join(WITHIN)} (AVIF only where Pillow has it).")
    low, high, _ = WITHIN[name]
    best = write(picture, name, low), low
    while len(best[0]) <= budget and low < high:
        middle = (low + high + 1) // 2  # rounded up, or low and its neighbour would never end
        file = write(picture, name, middle)
        if len(file) <= budget:
            best, low = (file, middle), middle
        else:
            high = middle - 1
    return best


def write(picture: Image.Image, name: str, quality: int) -> bytes:
    """A picture as a file of one of WITHIN.

    Raises:
        CodecError: it is too large for this kind of file.
    """
    buffer = io.BytesIO()
    try:
        picture.save(buffer, format=name.upper(), quality=quality, **WITHIN[name][2])
    except (OSError, ValueError) as error:
        size = f"{picture.width}x{picture.height}"
        raise CodecError(f"a picture of {size} px cannot be written as {name} ({error}).") from error
    return buffer.getvalue()
