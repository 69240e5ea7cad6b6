"""Image files to `images`, float32 (C, H, W) in [-1, 1]: found, opened, upright, in sRGB, without alpha.

Formats, decompression bombs, palettes, 16 bits, ICC profiles and EXIF are this file's matter alone.
"""

import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, features

from latentvae.base.errors import ImageError
from latentvae.base.files import check_local, collect_too_long, is_too_long, may_be_file
from latentvae.images.given import Given, array_samples, file_bytes
from latentvae.images.tensors import channels_first_tensor, channels_last_array, from_uint8

logger = logging.getLogger(__name__)

# An allow-list: Pillow reads dozens of formats, some by way of other programs (EPS starts Ghostscript).
HAS_AVIF = bool(features.check("avif"))  # not in every build of Pillow
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", *(("AVIF",) if HAS_AVIF else ()))
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm", *((".avif",) if HAS_AVIF else ()))
MAX_PIXELS = 178_956_970  # where Pillow itself refuses: twice its MAX_IMAGE_PIXELS
ORIENTATION_TAG, BITS_TAG, PHOTOMETRIC_TAG = 0x0112, 258, 262  # of EXIF and TIFF 6.0
UNUSABLE = "unusable ICC profile ignored"
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # ICC's colour spaces as Pillow's
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what Pillow's mode "L" means


Colour = tuple[int, int, int]
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


@dataclass
class Pixels:
    """One picture: colour (H, W) or (H, W, 3) in 0..white, alpha (H, W) in 0..1 or None."""

    colour: np.ndarray
    white: float = 255.0
    alpha: np.ndarray | None = None
    mode: str = ""
    format: str = ""
    notes: list[str] = field(default_factory=list)
    frames: int = 1


Source = Path | ImageBytes


def find_images(path: PathLike | Sequence[PathLike]) -> list[Path]:
    """List the image files that a file, a folder (recursive, sorted) or several of them name, each once.

    Hidden files are left out. Links to folders are followed, each target once.
    Raises ImageError where a path is missing, is no image by its suffix, or a folder holds no image.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise ImageError("no path came, but at least one image file or folder was wanted: name one")
    try:
        # each once, though a folder and a file in it may both be named
        return list(dict.fromkeys(image for one in paths for image in _find_in(Path(one))))
    except OSError as error:
        raise ImageError(
            f"{error.filename} cannot be read ({error.strerror}): check its permissions"
        ) from error


def _find_in(path: Path) -> list[Path]:
    accepted = " ".join(SUFFIXES)
    if path.is_dir():
        found = list_files(path, SUFFIXES)
        if not found:
            raise ImageError(f"no image in the folder {path}: put files there that end in one of {accepted}")
        return found
    if not path.exists():
        check_local(path, ImageError)
        raise ImageError(f"{path} does not exist: name an image file ({accepted}) or a folder of them")
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(f"{path} ends in '{path.suffix}', but an image was wanted: use one of {accepted}")
    return [path]


def list_files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Sort the files below root that end in one of the suffixes; hidden ones and loops are left out."""
    return sorted(_walk(root, suffixes), key=lambda file: file.as_posix())


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield files below root, following links to folders unless that would visit one twice."""

    too_long = list[Path]()
    top = root.resolve()
    visited = {top}
    for folder, names, files in os.walk(root, onerror=collect_too_long(too_long), followlinks=True):
        names[:] = [name for name in sorted(names) if _follow(Path(folder, name), top, visited)]
        for file in files:
            path = Path(folder, file)
            if not file.startswith(".") and path.suffix.lower() in suffixes and may_be_file(path):
                yield path
    yield from too_long


def _follow(folder: Path, top: Path, visited: set[Path]) -> bool:
    if folder.name.startswith("."):
        return False
    if is_too_long(folder):  # no link, then
        return True
    real = folder.resolve()  # where a link leads
    # A link into the tree would list its images under two names, one to above the tree would list the disk.
    loops = folder.is_symlink() and (real.is_relative_to(top) or top.is_relative_to(real))
    if loops or real in visited:
        return False
    visited.add(real)
    return True


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
    Raises: ImageError, for whatever is wrong with the file.
    """
    if channels not in (1, 3):
        raise ImageError(
            f"channels={channels} came, but images have 3 (RGB) or 1 (luminance): pass one of these"
        )
    pixels = _pixels(source, name, max_pixels)
    images = _with_channels(_composite(pixels, background), channels)
    size = (images.shape[2], images.shape[1])
    info = ImageInfo(*size, pixels.mode, pixels.format, pixels.notes, pixels.frames)
    return images, info


def _pixels(source: PathLike | Given, name: str, max_pixels: int) -> Pixels:
    if isinstance(source, np.ndarray | torch.Tensor):
        pixels = Pixels(*array_samples(source), mode=str(source.dtype), format="array")
        height, width = pixels.colour.shape[:2]
        _check_size(ImageBytes(b"", name), width, height, max_pixels)
        return pixels
    if isinstance(source, str | os.PathLike):
        return read_pixels(Path(source), max_pixels)
    pixels = read_pixels(ImageBytes(file_bytes(source), name), max_pixels)
    if isinstance(source, Image.Image):  # not what it was carried in
        pixels.mode, pixels.format = source.mode, source.format or ""
    return pixels


def _composite(pixels: Pixels, background: Colour) -> torch.Tensor:
    """Scale to [-1, 1], (1 or 3, H, W), with the background where the picture is transparent."""
    alpha = pixels.alpha
    if alpha is not None and alpha.min() < 1:
        behind = np.asarray(background, dtype=np.float32) / 255
        colour = channels_last_array(pixels.colour).astype(np.float32) / np.float32(pixels.white)
        colour = colour * alpha[..., None] + behind * (1 - alpha[..., None])
        name = {(255, 255, 255): "white", (0, 0, 0): "black"}.get(background, f"rgb{background}")
        pixels.notes.append(f"transparent pixels composited on {name}")
        return channels_first_tensor(colour).mul_(2).sub_(1)
    if pixels.colour.dtype == np.uint8:  # the usual case, by the same formula as everywhere else
        return from_uint8(pixels.colour)
    return channels_first_tensor(pixels.colour.astype(np.float32)).mul_(2 / pixels.white).sub_(1)


def _with_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    if images.shape[0] == channels:
        return images
    if channels == 3:
        return images.repeat(3, 1, 1)
    return torch.einsum("chw,c->hw", images, images.new_tensor(LUMA))[None].clamp_(-1, 1)


def read_pixels(path: Source, max_pixels: int) -> Pixels:
    """Read one image file upright, in sRGB; every way in which that fails is an ImageError that names it."""
    with _opened(path, max_pixels) as image:
        mode, rawmode = image.mode, _rawmode(image)
        # Pillow's TIFF reader turns the picture itself while it loads, and then drops the tag.
        turned = _orientation(image, path) if image.format == "TIFF" else 1
        image.load()
        pixels = _samples(image, rawmode, path, max_pixels)
        pixels.mode, pixels.format = mode, image.format or ""
        orientation = _orientation(image, path)
        pixels.colour = _upright(pixels.colour, orientation)
        pixels.alpha = None if pixels.alpha is None else _upright(pixels.alpha, orientation)
        if 2 <= max(turned, orientation) <= 8:
            pixels.notes.append(f"rotated by EXIF orientation {max(turned, orientation)}")
        pixels.frames = _count_frames(image)
        if pixels.frames > 1:
            pixels.notes.append(f"first of {pixels.frames} frames")
    for note in pixels.notes:
        if note.startswith(UNUSABLE):
            logger.warning("%s: %s; its colours are read as sRGB", path, note)
    return pixels


@contextmanager
def _opened(path: Source, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Open the file, refuse a bomb by its header, and name the file in whatever goes wrong inside."""
    try:
        if isinstance(path, Path) and not path.is_file():
            check_local(path, ImageError)
            came = "is no file" if path.exists() else "does not exist"
            raise ImageError(f"{path} {came}, but one image file was wanted: use find_images for a folder")
        with path.open("rb") if isinstance(path, Path) else io.BytesIO(path.data) as file:
            image = _identify(file, path)
            width, height = image.size
            _check_size(path, width, height, max_pixels)
            # Silenced only where Pillow would warn: catch_warnings resets what Python has shown once already.
            with _quiet() if width * height > (Image.MAX_IMAGE_PIXELS or max_pixels) else nullcontext():
                yield image
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise nearly everything on damaged files
        reason = (str(error) or type(error).__name__).rstrip(".")
        raise ImageError(f"{path} cannot be read: {reason}. Replace the file, or leave it out") from error


def _identify(file: IO[bytes], path: Source) -> ImageFile.ImageFile:
    """Do what Image.open does, without its size check: that one warns, and obeys a process-wide number."""
    prefix = file.read(16)
    if not prefix:
        raise ImageError(f"{path} is empty (0 bytes), but an image was wanted: fetch the file again")
    if any(name not in Image.OPEN for name in FORMATS):
        Image.init()
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is True:
            file.seek(0)
            with _quiet() if name == "GIF" else nullcontext():  # the one reader that warns while it opens
                # Pillow maps a file of this name into memory, so bytes must not be called like another file.
                return factory(file, str(path) if isinstance(path, Path) else "")
    raise ImageError(
        f"{path} is no image by its content, whatever its name says: "
        f"one of {', '.join(FORMATS)} was wanted; convert it to PNG"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    with catch_warnings():
        simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _check_size(path: Source, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{path} is {width} x {height} pixels: it holds no picture; leave it out")
    if width * height > max_pixels:
        raise ImageError(
            f"{path} is {width} x {height} = {width * height} pixels, but at most {max_pixels} are read: "
            "shrink it, or raise max_pixels if you trust the file"
        )


def _orientation(image: ImageFile.ImageFile, path: Source) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception as error:  # damaged EXIF says nothing about the pixels
        logger.warning("%s: unreadable EXIF data ignored (%s)", path, error)
        return 1


def _count_frames(image: ImageFile.ImageFile) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a later frame is damaged, the first was read
        return 1


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Bring the samples upright, as a view."""
    if orientation in (5, 7):  # transposed: a mirror image of 8 and 6
        samples, orientation = samples[:, ::-1], {5: 8, 7: 6}[orientation]
    if orientation in (2, 4):
        samples, orientation = samples[:, ::-1], {2: 1, 4: 3}[orientation]
    return np.rot90(samples, {3: 2, 6: -1, 8: 1}.get(orientation, 0))


def read_size(path: Path) -> tuple[int, int] | None:
    """Upright width and height from an image file's header; None where it has no usable one.

    Batches are planned by it. What loading the file gives decides all else, so that a header may be wrong.
    """
    try:
        with _quiet(), Image.open(os.fspath(path), formats=FORMATS) as image:
            turned = 5 <= int(image.getexif().get(ORIENTATION_TAG, 1)) <= 8
            width, height = image.size
    except Exception:  # Pillow's readers raise nearly everything; loading the file says what is wrong with it
        return None
    return (height, width) if turned else (width, height)


def _rawmode(image: ImageFile.ImageFile) -> str:
    """Return how the samples are stored, for instance 'RGB;16B'; known only before they are loaded."""
    args = image.tile[0].args if image.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _samples(image: ImageFile.ImageFile, rawmode: str, path: Source, max_pixels: int) -> Pixels:
    if image.mode == "F":
        return _float_grey(image, path)
    if image.mode.startswith("I"):
        return _integer_grey(image, path)
    swapped = re.fullmatch(r"(RGB|RGBA|RGBX);16([BLN])", rawmode)
    if swapped:
        return _deep_colour(image, f"{swapped[1]};16{_other_order(swapped[2])}", path, max_pixels)
    pixels = _eight_bits(image, rawmode)
    if ";16" in rawmode:
        pixels.notes.append("16 bits per channel read as 8")
    return pixels


def _float_grey(image: Image.Image, path: Source) -> Pixels:
    colour = np.asarray(image, dtype=np.float32)
    low, high = float(colour.min()), float(colour.max())
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise ImageError(
            f"{path} holds floats from {low:g} to {high:g}, but floats in [0, 1] (black to white) were "
            "wanted: scale them to that range, or save 16-bit integers"
        )
    return Pixels(colour, 1.0, notes=_unapplied_profile(image))


def _integer_grey(image: ImageFile.ImageFile, path: Source) -> Pixels:
    """Scale instead of clipping: Pillow's convert("RGB") turns 99.6 % of a 16-bit ramp white."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_TAG, (16,))[0]
    white = 4095 if bits == 12 else 65535
    colour = np.asarray(image).astype(np.int64)
    if colour.min() < 0 or colour.max() > white:
        raise ImageError(
            f"{path} holds integers from {colour.min()} to {colour.max()}, but 0 to {white} were wanted: "
            "scale them to 16 bits"
        )
    alpha = _keyed_alpha(colour, image.info.get("transparency"))
    if tags.get(PHOTOMETRIC_TAG) == 0:  # "white is zero", which Pillow leaves as it is at 16 bits
        colour = white - colour
    return Pixels(colour, float(white), alpha, notes=_unapplied_profile(image))


def _unapplied_profile(image: Image.Image) -> list[str]:
    return ["ICC profile not applied (it is for 8 bits only)"] if image.info.get("icc_profile") else []


def _other_order(order: str) -> str:
    native = "L" if sys.byteorder == "little" else "B"
    return "L" if (native if order == "N" else order) == "B" else "B"


def _deep_colour(image: ImageFile.ImageFile, swapped: str, path: Source, max_pixels: int) -> Pixels:
    """Read 16-bit colour in full: Pillow keeps the high bytes, or in the wrong byte order the low ones."""
    with _opened(path, max_pixels) as again:
        again.tile = [
            tile._replace(args=(swapped, *tile.args[1:]) if isinstance(tile.args, tuple) else swapped)
            for tile in again.tile
        ]
        # (H, W, 3 or 4): the high bytes of one reading, the low ones of the other
        samples = np.asarray(image).astype(np.uint16) << 8 | np.asarray(again)
    colour, alpha = samples[..., :3], _keyed_alpha(samples[..., :3], image.info.get("transparency"))
    if samples.shape[2] == 4:
        alpha = samples[..., 3].astype(np.float32) / 65535
    notes: list[str] = []
    # 65535 / 255 = 257; LittleCMS through Pillow converts 8 bits only
    rounded = Image.fromarray(((colour.astype(np.uint32) + 128) // 257).astype(np.uint8))
    converted = _to_srgb(rounded, image.info.get("icc_profile"), notes)
    if any("converted" in note for note in notes):
        return Pixels(np.asarray(converted), 255.0, alpha, notes=[f"{notes[0]} at 8 bits"])
    return Pixels(colour, 65535.0, alpha, notes=notes)


def _eight_bits(image: Image.Image, rawmode: str) -> Pixels:
    """Undo palettes, split alpha off, convert to sRGB."""
    profile, alpha, notes = image.info.get("icc_profile"), None, list[str]()
    key = image.info.get("transparency") if image.mode in ("1", "L", "RGB") else None
    if isinstance(key, int):
        key *= {"L;2": 85, "L;4": 17}.get(rawmode, 1)  # Pillow scales these samples, but not their key
    if image.mode in ("LA", "La"):
        image = image.convert("LA")
        image, alpha = image.getchannel("L"), image.getchannel("A")
    elif image.mode in ("P", "PA", "RGBA", "RGBa"):
        if image.has_transparency_data:
            image = image.convert("RGBA")
            alpha = image.getchannel("A")
        image = image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    weight = _keyed_alpha(np.asarray(image), key) if alpha is None else np.asarray(alpha, np.float32) / 255
    return Pixels(np.asarray(_to_srgb(image, profile, notes)), 255.0, weight, notes=notes)


def _keyed_alpha(colour: np.ndarray, key: object) -> np.ndarray | None:
    """Make the one colour transparent that a PNG's tRNS names."""
    if not isinstance(key, int | tuple):
        return None
    same = colour == np.asarray(key)
    return np.where(same.all(-1) if same.ndim == 3 else same, 0, 1).astype(np.float32)


def _to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Convert to sRGB by the embedded profile, or without one by Pillow's formulas; grey may stay grey."""
    plain = image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")
    if profile:
        try:
            name, wanted, transform = _conversion(profile, plain.mode)
            if transform is not None:
                converted = ImageCms.applyTransform(plain.convert(wanted), transform)
                notes.append(f"converted from ICC profile '{name}'")
                return converted or plain
        except Exception as error:  # LittleCMS through Pillow: PyCMSError, OSError, ValueError, TypeError
            notes.append(f"{UNUSABLE} ({error})")
    return plain.convert("RGB") if plain.mode == "CMYK" else plain


@lru_cache(maxsize=16)
def _conversion(profile: bytes, mode: str) -> tuple[str, str, ImageCms.ImageCmsTransform | None]:
    """Return the profile's name, the mode it is for, and the transform to sRGB (None where it is sRGB)."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    wanted = PROFILE_MODES.get(space, "")
    if wanted != mode and (wanted, mode) != ("RGB", "L"):
        raise ValueError(f"a profile for {space} cannot describe {mode} pixels")
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), wanted, "RGB", intent, flags)
    name = ImageCms.getProfileDescription(source).strip()
    return name, wanted, None if _changes_nothing(transform, wanted) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Tell sRGB by what it does, not by its name, so that sRGB pictures keep their exact samples."""
    if mode not in ("L", "RGB"):
        return False
    levels = np.linspace(0, 255, 9) if mode == "RGB" else np.arange(256)
    grid = np.stack(np.meshgrid(*[levels] * len(mode)), -1).reshape(1, -1, len(mode)).astype(np.uint8)
    probe = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
    after = np.asarray(ImageCms.applyTransform(probe, transform), dtype=np.int16)
    return bool(np.abs(after - np.asarray(probe.convert("RGB"), dtype=np.int16)).max() <= 1)
