"""Image files found, and read to `images`: float32 (C, H, W) in [-1, 1], upright, in sRGB, without alpha.

Which formats there are is said in `kinds`, what a decoded picture takes in `pixels`.
"""

import ctypes
import io
import logging
import os
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO
from warnings import catch_warnings, filterwarnings, simplefilter

import numpy as np
import torch
from PIL import Image, ImageFile, ImagePalette, _imaging

from latentvae.base.errors import ImageError, NoMemoryError, ran_out_of_memory
from latentvae.base.files import check_local
from latentvae.images import bitmaps, headers, kinds, light, tiffs
from latentvae.images.given import ORIENTATION_TAG, Given, file_bytes
from latentvae.images.kinds import SUFFIXES
from latentvae.images.listing import files_below
from latentvae.images.pixels import UNUSABLE, Colour, Picture, check_size, picture_of, picture_of_array

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970  # where Pillow itself refuses: twice its MAX_IMAGE_PIXELS
BYTES_PER_PIXEL = 20  # that reading takes, the result of 12 included
PNG = b"\x89PNG"
HEAD = 4096  # bytes that tell what a file is
GAIN_MAPS = (b"hdr-gain-map", b"urn:iso:std:iso:ts:21496", b"hdrgainmap")  # Google's, the standard's, Apple's
NOT_MINE = (SyntaxError, IndexError, TypeError, struct.error)  # as Pillow has it of what openers raise
MENDED = "latentvae mended"  # key of an image's info
TALKERS = ("tifffile", "PIL.TiffImagePlugin")
GAIN_MAP_NOTE = "its HDR gain map is not applied: this is the picture in SDR"

PathLike = str | Path


@dataclass
class ImageInfo:
    """What the file held and what was done to it; width and height are those of the loaded tensor."""

    width: int
    height: int
    mode: str
    format: str
    notes: list[str] = field(default_factory=list)
    frames: int = 1  # of an animation or a file of several pages; the first is loaded


@dataclass(frozen=True)
class ImageBytes:
    """An image file in memory, under the name that messages give it; read like the file at a path."""

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name


Source = Path | ImageBytes
NAMELESS = ImageBytes(b"", "an image")


def find_images(
    path: PathLike | Sequence[PathLike],
    left_out: Counter[str] | None = None,
    outside: Path | None = None,
) -> list[Path]:
    """List the image files that a file, a folder (recursive, sorted) or several of them name, each once.

    Hidden files are left out. Links to folders are followed, each target once.

    Args:
        left_out: where to count, by suffix, the other files of the folders; None: a warning is logged if
            some of them could be read with a package that is not installed.
        outside: a folder that is not entered.

    Raises:
        ImageError: a path is missing, is no image by its suffix, or a folder holds no image.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise ImageError("no path came, but at least one image file or folder was wanted: name one")
    counted = Counter[str]() if left_out is None else left_out
    try:
        # each once, though a folder and a file in it may both be named
        found = list(dict.fromkeys(image for one in paths for image in _find_in(Path(one), counted, outside)))
    except OSError as error:
        raise ImageError(
            f"{error.filename} cannot be read ({error.strerror}): check its permissions"
        ) from error
    if left_out is None and kinds.wants_extra(counted):
        logger.warning(kinds.describe(counted))
    return found


def _find_in(path: Path, left_out: Counter[str], outside: Path | None) -> list[Path]:
    accepted = " ".join(SUFFIXES)
    if path.is_dir():
        return files_below(path, left_out, outside)
    if not path.exists():
        check_local(path, ImageError)
        raise ImageError(f"{path} does not exist: name an image file ({accepted}) or a folder of them")
    if not kinds.is_image_name(path.suffix.lower()):
        with path.open("rb") as file:
            head = file.read(HEAD)
            kind = kind_of(file, head)
        if kind is not None:
            raise kinds.unreadable(path, head, kind)
        raise ImageError(f"{path} ends in '{path.suffix}', but an image was wanted: use one of {accepted}")
    return [path]


def load_image(
    source: PathLike | Given,
    *,
    name: str = "image bytes",
    background: Colour = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    channels: int = 3,
) -> torch.Tensor:
    """Load one image as float32 (channels, H, W) in [-1, 1]; see `load_image_with_info`."""
    return load_image_with_info(
        source, name=name, background=background, max_pixels=max_pixels, channels=channels
    )[0]


def load_image_with_info(
    source: PathLike | Given,
    *,
    name: str = "image bytes",
    background: Colour = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    channels: int = 3,
) -> tuple[torch.Tensor, ImageInfo]:
    """Load one image upright, in sRGB, without alpha, and say what that took.

    Args:
        source: the path of an image file, or what is in one, as bytes or an open binary file (the content
            decides the format, not a suffix); or a Pillow image; or an array or tensor (H, W), (H, W, C) or
            (C, H, W) of sRGB values, C 1, 3 or 4: uint8, uint16, or floats in [0, 1].
        name: what messages call what is no path; a path names itself.
        background: 8-bit sRGB colour put behind transparent pixels.
        max_pixels: refuse more, from the header, before anything is decompressed.
        channels: 3 for RGB, 1 for luminance (BT.601).

    Returns: float32 (channels, H, W) in [-1, 1], and an ImageInfo whose notes are for people.
    Raises: ImageError, for whatever is wrong with the file: TooManyPixels for one above `max_pixels`; and
        NoMemoryError where the machine has no room for it.
    """
    if channels not in (1, 3):
        raise ImageError(
            f"channels={channels} came, but images have 3 (RGB) or 1 (luminance): pass one of these"
        )
    array = source if isinstance(source, np.ndarray | torch.Tensor) else None
    if isinstance(source, str | os.PathLike):
        path: Source = Path(source)
    else:
        path = ImageBytes(b"" if array is not None else file_bytes(source), name)
    with _named(path), _open(path) as file:
        if array is not None:
            picture = picture_of_array(array, path, max_pixels)
        else:
            picture = _read(file, path, max_pixels)
        images = picture.assemble(background, channels)
    if isinstance(source, Image.Image):  # not what it was carried in
        picture.mode, picture.format = source.mode, source.format or ""
    for note in picture.notes:
        if note.startswith(UNUSABLE):
            logger.warning("%s: %s; its colours are read as sRGB", path, note)
    size = (images.shape[2], images.shape[1])
    return images, ImageInfo(*size, picture.mode, picture.format, picture.notes, picture.frames)


@contextmanager
def _named(path: Source) -> Iterator[None]:
    """Name the file in whatever goes wrong inside, and tell a full memory from a bad file."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        if ran_out_of_memory(error):
            raise NoMemoryError(
                f"{path} could not be read: the machine's memory was full, and reading takes about "
                f"{BYTES_PER_PIXEL} bytes a pixel. Nothing is wrong with the file: try again with more room"
            ) from error
        raise ImageError(f"{path} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an error says, in words also where it is a bare key or number."""
    if isinstance(error, KeyError):
        return f"the value {error} in it has no meaning"
    first = error.args[0] if error.args else None
    said = first.decode("utf-8", "replace") if isinstance(first, bytes) else str(error)  # LibRaw's are bytes
    said = " ".join((said or type(error).__name__).split()).rstrip(".")  # on one line
    return f"{said} (it is damaged, or packed in a way that is not known)" if said.endswith("-2") else said


def _open(path: Source) -> IO[bytes]:
    if isinstance(path, ImageBytes):
        return io.BytesIO(path.data)
    if not path.is_file():
        check_local(path, ImageError)
        came = "is no file" if path.exists() else "does not exist"
        raise ImageError(f"{path} {came}: name one image file, no folder")
    return path.open("rb")


def _read(file: IO[bytes], path: Source, max_pixels: int) -> Picture:
    """A file's picture, decoded but not yet converted.

    Raises:
        ImageError: it is no image, of a format that is not read, empty, damaged, or too large.
    """
    head = file.read(HEAD)
    if not head:
        raise ImageError(f"{path} is empty (0 bytes), but an image was wanted: fetch the file again")
    kind = kind_of(file, head)
    try:
        # only where Pillow would warn: catch_warnings resets what Python has shown once already
        with _quiet() if tiffs.is_tiff(head) else nullcontext():
            return _read_kind(file, path, max_pixels, kind, head)
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise nearly everything on damaged files
        if ran_out_of_memory(error):
            raise
        if (found := _without_metadata(file, path, max_pixels, head, error)) is not None:
            return found
        name = kinds.format_name(kind, head)
        raise ImageError(
            f"{path} cannot be read{f' as {name}' if name else ''}: {_reason(error)}. If another "
            "program opens it, save it as PNG there; else replace the file, or leave it out"
        ) from error


def kind_of(file: IO[bytes], head: bytes) -> str | None:
    """What `kinds.recognise` says; "raw" also of a TIFF that is a camera's raw file."""
    if not tiffs.is_tiff(head):
        return kinds.recognise(head)
    with _quiet():
        return "raw" if tiffs.is_raw(file) else kinds.recognise(head)


def _read_kind(file: IO[bytes], path: Source, max_pixels: int, kind: str | None, head: bytes) -> Picture:
    """A file's picture by the reader that its kind needs, which raises what it may."""
    is_tiff = tiffs.is_tiff(head)
    if kind == "raw":
        return tiffs.develop(file, path, max_pixels)
    if kind in light.ENDINGS:
        return light.read_light(file, path, str(kind), max_pixels)
    if kind == "JPEG XL":  # whose decoder asks nobody before it decodes
        size = headers.jxl_size(file)
        if size is None:
            raise ImageError(f"{path} is a JPEG XL image without a header: it is damaged, replace the file")
        check_size(path, *size, max_pixels)
    if is_tiff and tiffs.is_beyond_pillow(file):
        found = tiffs.read_tiff(file, path, max_pixels)
        if found is not None:
            return found
    profile = bitmaps.profile(file, head)
    if bitmaps.is_packed(head):
        file = bitmaps.unpack(file, path, max_pixels)
    try:
        return _by_pillow(file, path, max_pixels, kind, head, profile)
    except Exception as error:
        found = tiffs.read_instead(file, path, max_pixels, error) if is_tiff else None
        if found is None:
            raise
        return found


def _without_metadata(
    file: IO[bytes], path: Source, max_pixels: int, head: bytes, reason: Exception
) -> Picture | None:
    """What a PNG shows without its metadata, where these are why it is refused; None where they are not."""
    bare = headers.png_pixels_only(file) if head.startswith(PNG) else None
    if bare is None:
        return None
    smaller, profile, dropped = bare
    try:
        found = _by_pillow(smaller, path, max_pixels, None, head, profile)
    except Exception as error:  # so it was not these
        if ran_out_of_memory(error):
            raise
        return None
    if dropped:
        found.notes.append(f"metadata passed over ({', '.join(dropped)}): {_reason(reason)}")
    return found


def _by_pillow(
    file: IO[bytes],
    path: Source,
    max_pixels: int,
    kind: str | None,
    head: bytes,
    profile: bytes | None = None,
) -> Picture:
    """A picture as one of Pillow's readers has it."""
    image = _identify(file, path, kind, head)
    check_size(path, *image.size, max_pixels)
    is_tiff = image.format == "TIFF"
    if is_tiff:
        _silence_libtiff()
        if image.mode == "P" and (colours := tiffs.palette(image)) is not None:
            image.palette = ImagePalette.raw("RGB;L", colours)
    many = image.width * image.height > (Image.MAX_IMAGE_PIXELS or max_pixels)
    with _quiet() if many else nullcontext():
        if profile is not None:
            image.info["icc_profile"] = profile
        mode, rawmode = image.mode, _rawmode(image)
        # Pillow's TIFF reader turns the picture itself while it loads, and then drops the tag.
        turned = _orientation(image, path) if is_tiff else (1, "")
        image.load()
        boxes = headers.heif_boxes(file) if image.format in ("AVIF", "HEIF") else headers.Boxes()
        # libheif cuts the frame itself, libavif does not
        cut = boxes.clean is not None and image.format == "AVIF"
        # the same samples under another name: to count its frames the image goes to others
        shown = image.crop(boxes.clean) if cut else image._new(image.im)

        def reopen(rawmode: str) -> Image.Image:
            again = _identify(file, path, kind, head)
            again.tile = [
                tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
                for tile in again.tile
            ]
            again.load()
            return again

        picture = picture_of(shown, rawmode, getattr(image, "tag_v2", {}), path, reopen)
        picture.mode, picture.format = mode, image.format or ""
        picture.orientation, where = _orientation(image, path)
        if turned[0] > 1 or picture.orientation > 1:
            number, where = max(turned, (picture.orientation, where))
            picture.notes.append(f"rotated by {where} orientation {number}")
        _apply_headers(image, file, picture, boxes)
        _note_frames(image, picture, boxes)
    return picture


def _identify(file: IO[bytes], path: Source, kind: str | None, head: bytes) -> ImageFile.ImageFile:
    """Do what Image.open does, without its size check: that one warns, and obeys a process-wide number."""
    problem: Exception | None = None
    for opener in kinds.openers(kind, head):
        file.seek(0)
        try:
            with _quiet() if head.startswith(b"GIF") else nullcontext():  # the reader that warns as it opens
                # Pillow maps a file of this name into memory, so bytes must not be called like another file.
                in_memory = isinstance(file, io.BytesIO) or not isinstance(path, Path)
                return opener(file, "" if in_memory else str(path))
        except Exception as error:  # the next one may know it
            if not (kinds.asks_all(opener) and isinstance(error, NOT_MINE)):
                problem = problem or error
    if kind == "AVIF" and (mended := headers.with_one_ipma(file)) is not None:
        return _identify(mended, path, kind, head)
    if kind == "AVIF" and (mended := headers.without_exif(file)) is not None:
        image = _identify(mended, path, kind, head)
        image.info[MENDED] = f"metadata passed over (EXIF): {_reason(problem or ValueError())}"
        return image
    if problem is not None:
        raise problem
    raise kinds.unreadable(path, head)


def _apply_headers(
    image: ImageFile.ImageFile, file: IO[bytes], picture: Picture, boxes: headers.Boxes
) -> None:
    """Take from the file's headers what the colours mean, where no ICC profile says it."""
    encoding, bits = boxes.encoding, boxes.bits
    if image.format == "PNG" and not image.info.get("icc_profile"):
        encoding, notes = headers.png_encoding(file)
        picture.notes += notes
    if encoding is not None and not image.info.get("icc_profile"):
        picture.encoding = encoding
        picture.notes.append(encoding.note)
    if MENDED in image.info:
        picture.notes.append(image.info[MENDED])
    if bits > 8:
        picture.notes.append(f"{bits} bits per channel read as 8")


def _note_frames(image: ImageFile.ImageFile, picture: Picture, boxes: headers.Boxes) -> None:
    """Say what else is in the file, and is not shown."""
    segments = [data for _, data in getattr(image, "applist", [])]
    beside = [*segments, *(str(each).encode() for each in image.info.get("aux", ()))]
    if boxes.gain_map or any(mark in each for each in beside for mark in GAIN_MAPS):
        picture.notes.append(GAIN_MAP_NOTE)
        if image.format == "MPO":  # its second picture is that map
            return
    picture.frames, shown = _count_frames(image), image.tell()
    if picture.frames > 1:
        which = f"picture {shown + 1}, the main one," if shown else "first"
        picture.notes.append(f"{which} of {picture.frames} frames")


@lru_cache(maxsize=1)
def _silence_libtiff() -> None:
    """Keep libtiff from writing to standard error: its lines name no file, and our errors do."""
    with suppress(OSError, AttributeError):  # where libtiff is part of Pillow's own library
        library = ctypes.CDLL(_imaging.__file__)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of size or of tags by Pillow and tifffile: they name no file."""
    loggers = [each for name in TALKERS if not (each := logging.getLogger(name)).disabled]
    with catch_warnings():
        simplefilter("ignore", Image.DecompressionBombWarning)
        filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
        try:
            for each in loggers:
                each.disabled = True
            yield
        finally:
            for each in loggers:
                each.disabled = False


def _orientation(image: ImageFile.ImageFile, path: Source | None = None) -> tuple[int, str]:
    """The orientation, 1 to 8, and where it stands: "EXIF" or "XMP". Without a path nothing is said."""
    # libjxl turns the picture itself, but not one that it gives back as the JPEG that it was made from
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1, ""
    try:
        said = image.getexif().get(ORIENTATION_TAG, 1)
        number = said[0] if isinstance(said, bytes) else int(said)  # some write a byte instead of 16 bits
        if not 2 <= number <= 8:
            return 1, ""
        own = Image.Exif()  # without what Pillow takes from XMP
        own.load(image.info.get("exif") or b"")
        has_xmp = any(name in image.info for name in ("xmp", "XML:com.adobe.xmp"))
        if not has_xmp or image.format == "TIFF" or ORIENTATION_TAG in own:
            return number, "EXIF"
        # AVIF has boxes for it, which are the only ones that count (ISO/IEC 23000-22)
        return (1, "") if image.format == "AVIF" else (number, "XMP")
    except Exception as error:  # damaged EXIF says nothing about the pixels
        if ran_out_of_memory(error):
            raise
        if path is not None:
            logger.warning("%s: unreadable EXIF data ignored (%s)", path, error)
        return 1, ""


def _count_frames(image: ImageFile.ImageFile) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception as error:  # a later frame is damaged, the first was read
        if ran_out_of_memory(error):
            raise
        return 1


def read_size(source: Path | IO[bytes]) -> tuple[int, int] | None:
    """Upright width and height from the header of an image file, by path or open; None: no usable one.

    Batches are planned by it. What loading the file gives decides all else, so that a header may be wrong.
    """
    try:
        with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file, _quiet():
            head = file.read(HEAD)
            kind = kind_of(file, head)
            if kind == "JPEG XL":
                return headers.jxl_size(file)
            if kind in light.ENDINGS:
                return light.light_size(file, str(kind))
            if kind == "raw":
                return None
            image = _identify(file, NAMELESS, kind, head)
            turned = 5 <= _orientation(image)[0] <= 8
            width, height = image.size
            if image.format == "AVIF" and (clean := headers.heif_boxes(file).clean):
                width, height = clean[2] - clean[0], clean[3] - clean[1]
    except Exception:  # Pillow's readers raise nearly everything; loading the file says what is wrong with it
        return None
    return (height, width) if turned else (width, height)


def _rawmode(image: ImageFile.ImageFile) -> str:
    """Return how the samples are stored, for instance 'RGB;16B'; known only before they are loaded."""
    args = image.tile[0].args if image.tile else ""
    rawmode = str(args[0] if isinstance(args, tuple) and args else args)
    # of planes, libtiff gives Pillow the high bytes whatever is asked for
    return f"planes of {rawmode}" if getattr(image, "tag_v2", {}).get(tiffs.PLANAR) == 2 else rawmode
