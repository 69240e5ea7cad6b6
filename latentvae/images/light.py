"""Pictures that hold light rather than what a screen shows: OpenEXR and Radiance HDR, read by OpenImageIO.

1.0 in them is SDR's white, as everywhere where such files are made for people to look at.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from latentvae.base.errors import ImageError
from latentvae.images import kinds
from latentvae.images.colour import PEAK_NITS, SRGB, WHITE_NITS, Encoding
from latentvae.images.pixels import Picture, check_size

MODULE = "OpenImageIO"
ENDINGS = {"OpenEXR": ".exr", "Radiance HDR": ".hdr"}
PEAK = PEAK_NITS / WHITE_NITS


def read_light(file: IO[bytes], path: object, kind: str, max_pixels: int) -> Picture:
    """The picture in a file, tone-mapped where it is brighter than white.

    Args:
        file: its first bytes were those of `kind`, a key of ENDINGS.
        path: for messages.
        max_pixels: more are refused before any is decoded.

    Raises:
        ImageError: the extra `hdr` is not installed, the file is damaged, or holds no colours.
    """
    if kinds.optional(MODULE) is None:
        raise kinds.unreadable(path, file_head(file))
    with _opened(file, path, kind) as opened:
        spec = opened.spec()
        check_size(path, spec.full_width, spec.full_height, max_pixels)
        wanted = _channels(spec.channelnames, path)
        light = opened.read_image(0, 0, 0, spec.nchannels, "float")
        if light is None:
            raise _damaged(path, kind, opened.geterror())
        notes = ["first part of several"] if opened.seek_subimage(1, 0) else []
    light = _in_view(np.clip(np.nan_to_num(light[..., wanted]), 0, None), spec)
    colour, alpha = light[..., : 3 if len(wanted) > 2 else 1], None
    if light.shape[-1] > colour.shape[-1]:
        alpha = np.clip(light[..., -1], 0, 1)
        colour = colour / np.maximum(alpha, 1e-6)[..., None]  # they are stored times it
    peak = min(max(float(colour.max()), 1.0), PEAK)
    curve = "light" if peak > 1 else 1.0
    encoding = Encoding(f"{kind}, linear light", curve, _primaries(spec), peak * WHITE_NITS)
    picture = Picture.of_array(
        np.minimum(colour, peak), peak, mode=str(spec.format), format=kind, notes=notes, encoding=encoding
    )
    picture.notes.append(encoding.note)
    if alpha is not None:
        picture.set_alpha(alpha, multiplied=False)
    return picture


def light_size(file: IO[bytes], kind: str) -> tuple[int, int] | None:
    """Width and height from the header; None where the extra `hdr` is not installed."""
    if kinds.optional(MODULE) is None:
        return None
    with _opened(file, "", kind) as opened:
        return opened.spec().full_width, opened.spec().full_height


def file_head(file: IO[bytes]) -> bytes:
    """The first bytes of a file that has been read from."""
    file.seek(0)
    return file.read(256)


@contextmanager
def _opened(file: IO[bytes], path: object, kind: str) -> Iterator[Any]:
    """A file as OpenImageIO opens it: by name, and the name's ending decides which reader tries first."""
    library = kinds.optional(MODULE)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(str(getattr(file, "name", "")))
        if place.suffix.lower() != ENDINGS[kind] or not place.is_file():
            place = Path(folder) / f"image{ENDINGS[kind]}"
            file.seek(0)
            with place.open("wb") as copy:
                shutil.copyfileobj(file, copy)
        opened = library.ImageInput.open(str(place))
        if opened is None:
            raise _damaged(path, kind, library.geterror())
        try:
            yield opened
        finally:
            opened.close()


def _damaged(path: object, kind: str, reason: str) -> ImageError:
    # its first line: the name of a copy may stand in it, and in the others
    said = re.sub(r" \(\S*image\.(exr|hdr)\)", "", reason.strip().partition("\n")[0]).rstrip(".")
    return ImageError(
        f"{path} cannot be read as {kind}: {said}. If another program opens it, save it as PNG there; else "
        "replace the file, or leave it out"
    )


def _channels(names: tuple[str, ...], path: object) -> list[int]:
    """Which channels are red, green and blue, or grey, and then alpha.

    Raises:
        ImageError: there are none of these.
    """
    for colours in (("R", "G", "B"), ("Y",)):
        if set(colours) <= set(names) and not {"RY", "BY"} & set(names):
            return [names.index(name) for name in (*colours, *(["A"] if "A" in names else []))]
    raise ImageError(
        f"{path} has the channels {', '.join(names)}, and R, G and B or Y were wanted: it holds no picture, "
        "or several in layers; export the one you want"
    )


def _in_view(light: np.ndarray, spec: Any) -> np.ndarray:
    """Pixels (h, w, C) where they lie in the picture (H, W, C): less may be stored than is shown, or more."""
    shown = np.zeros((spec.full_height, spec.full_width, light.shape[2]), np.float32)
    top, left = spec.y - spec.full_y, spec.x - spec.full_x
    rows = slice(max(top, 0), min(top + light.shape[0], spec.full_height))
    columns = slice(max(left, 0), min(left + light.shape[1], spec.full_width))
    if rows.start < rows.stop and columns.start < columns.stop:
        there = light[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        shown[rows, columns] = there
    return shown


def _primaries(spec: Any) -> tuple[tuple[float, float], ...]:
    """Red, green, blue and white, where the file names them."""
    numbers = spec.getattribute("chromaticities")
    if numbers is None or len(numbers) != 8:
        return SRGB
    return tuple((float(numbers[i]), float(numbers[i + 1])) for i in range(0, 8, 2))
