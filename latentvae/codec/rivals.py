"""What JPEG and WebP take for a picture at the same distance from it, which says what a size is worth."""

import io
from collections.abc import Callable
from typing import Any

from PIL import Image

# the range of qualities, and options that make files small
FORMATS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "JPEG": (1, 95, {"optimize": True}),
    "WEBP": (0, 100, {"method": 4}),
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
