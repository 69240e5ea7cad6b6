"""What kind of file something is, by its content and by its name, and what it takes to read it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib import import_module
from typing import IO, Any

from PIL import Image, ImageFile, features

from latentvae.base.errors import ImageError
from latentvae.base.optional import EXTRAS, install_command

# An allow-list: Pillow reads dozens of formats, some by way of other programs (EPS starts Ghostscript).
HAS_AVIF = bool(features.check("avif"))  # not in every build of Pillow
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", *(("AVIF",) if HAS_AVIF else ()))
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".mpo", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm", *((".avif",) if HAS_AVIF else ()))
# What an optional package reads: its module, the kind as `recognise` calls it, and suffixes. Cameras' raw
# formats have many suffixes; these are the ones that are common.
RAW_SUFFIXES = (
    *(".dng", ".nef", ".nrw", ".cr2", ".cr3", ".arw", ".sr2", ".raf", ".orf", ".rw2", ".pef", ".srw"),
    *(".3fr", ".iiq", ".erf", ".mrw", ".dcr", ".kdc", ".raw", ".x3f"),
)
OPTIONAL = {
    "HEIC": ("pillow_heif", (".heic", ".heif", ".hif")),
    "JPEG XL": ("pillow_jxl", (".jxl",)),
    "raw": ("rawpy", RAW_SUFFIXES),
    "OpenEXR": ("OpenImageIO", (".exr",)),
    "Radiance HDR": ("OpenImageIO", (".hdr", ".pic")),
}
MODULES = {suffix: module for module, suffixes in OPTIONAL.values() for suffix in suffixes}
BROKEN_LINKS = "behind broken links"  # among suffixes of what was left out: 3 .psd, 1 behind broken links
SIDECARS = (".txt", ".json", ".jsonl", ".csv")  # captions, labels: read, or none of a folder of images
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}

ABOUT = {
    "HEIC": "HEIC, a phone's photograph",
    "JPEG XL": "a JPEG XL image",
    "AVIF": "an AVIF image, which this build of Pillow does not read",
    "raw": "a camera's raw file",
    "OpenEXR": "an OpenEXR image",
    "Radiance HDR": "a Radiance HDR image",
}
# first bytes, where, and what it is; `recognise` knows those that take more than a look
SIGNATURES: tuple[tuple[bytes, int, str], ...] = (
    (b"\xff\x0a", 0, "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", 0, "JPEG XL"),
    *((magic, 0, "raw") for magic in (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb")),
    *((b"\0MRM", 0, "raw"), (b"HEAPCCDR", 6, "raw"), (b"CR\2", 8, "raw"), (b"ftypcrx ", 4, "raw")),
    (b"8BPS", 0, "a Photoshop document"),
    (b"gimp xcf", 0, "a GIMP document"),
    (b"v/1\x01", 0, "OpenEXR"),
    (b"#?R", 0, "Radiance HDR"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", 0, "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", 0, "a JPEG 2000 image"),
    (b"II\xbc\1", 0, "a JPEG XR image"),
    (b"qoif", 0, "a QOI image"),
    (b"DDS ", 0, "a DDS texture"),
    (b"\xabKTX ", 0, "a KTX texture"),
    (b"\0\0\1\0", 0, "an icon (ICO)"),
    (b"\0\0\2\0", 0, "a cursor (CUR)"),
    (b"icns", 0, "an icon (ICNS)"),
    (b"\x01\xda", 0, "an SGI image"),
    (b"BPG\xfb", 0, "a BPG image"),
    (b"FLIF", 0, "a FLIF image"),
    (b"SIMPLE  =", 0, "a FITS image"),
    (b"DICM", 128, "a DICOM image"),
    (b"%!PS", 0, "a PostScript document"),
    (b"%PDF", 0, "a PDF document"),
    (b"<svg", 0, "an SVG drawing"),
    (b"version https://git-lfs", 0, "a pointer of Git LFS: fetch the file itself with `git lfs pull`"),
    (b"<!DOCTYPE html", 0, "a web page: fetch the image itself"),
    (b"<html", 0, "a web page: fetch the image itself"),
    (b"ftyp", 4, "a film, or an image in a film's container"),
    (b"\x1aE\xdf\xa3", 0, "a film"),
    (b"PK\3\4", 0, "a ZIP archive: unpack it first"),
)


def recognise(head: bytes) -> str | None:
    """What a file is by its first bytes (256 are enough): a key of ABOUT, or words for people; None: unknown.

    Formats that are always read are known to Pillow, and not to this function.
    """
    if head[4:8] == b"ftyp":
        brands = {head[i : i + 4] for i in (8, *range(16, min(int.from_bytes(head[:4], "big"), 256), 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & HEIC_BRANDS:
            return "HEIC"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"<?xml") and b"<svg" in head:
        return "an SVG drawing"
    for magic, place, kind in SIGNATURES:
        if head[place : place + len(magic)] == magic or (place == 0 and start.startswith(magic)):
            return kind
    return None


def unreadable(name: object, head: bytes, kind: str | None = None) -> ImageError:
    """The error for a file of a format that is not read: what it is, and the remedy.

    Args:
        name: of the file.
        head: its first bytes.
        kind: what it is, where more than these bytes say so: many raw files begin as any TIFF.
    """
    kind = kind or recognise(head)
    if kind is None:
        return ImageError(
            f"{name} is no image by its content, whatever its name says: one of {', '.join(readable())} was "
            "wanted; if another program opens it, convert it to PNG there"
        )
    what = ABOUT.get(kind, kind)
    if kind in OPTIONAL:
        return ImageError(f"{name} is {what}: {remedy(OPTIONAL[kind][0])}, or convert it to PNG")
    what, _, advice = what.partition(": ")
    advice = advice or f"convert it to one of {', '.join(FORMATS)}"
    return ImageError(f"{name} is {what}, which is not read: {advice}")


def remedy(module: str) -> str:
    """How to get an optional package."""
    return install_command(EXTRAS[module][1])


@lru_cache(maxsize=8)
def optional(module: str) -> Any:
    """An optional package; None where it is missing. Imported once wanted: most folders do not need it."""
    try:
        return import_module(module)
    except ImportError:
        return None


def readable() -> list[str]:
    """The formats that can be read now: ours, and those whose optional package is there."""
    return [*FORMATS, *(kind for kind, (module, _) in OPTIONAL.items() if optional(module) is not None)]


def is_image_name(suffix: str) -> bool:
    """Whether files of a (lower-case) suffix are taken from folders: what can be read now."""
    if suffix in SUFFIXES:
        return True
    if suffix in MODULES and optional(MODULES[suffix]) is not None:
        return True
    return _is_foreign(Image.EXTENSION.get(suffix, ""))


def _is_foreign(name: str) -> bool:
    """Whether a format of Pillow's registry was registered by someone else than Pillow."""
    factory = Image.OPEN.get(name, (None,))[0]
    return factory is not None and not factory.__module__.startswith("PIL.")


def openers(kind: str | None, head: bytes) -> Iterator[Callable[[IO[bytes], str], ImageFile.ImageFile]]:
    """What may open a file, first ours, then what others have registered with Pillow, then optional ones."""
    _fill_registry()
    for name in (*FORMATS, *filter(_is_foreign, list(Image.ID))):
        factory, accept = Image.OPEN[name]
        if name == "AVIF" and kind == "HEIC":  # one container, and brands that both have
            continue
        if accept is None or accept(head[:16]) is True:
            yield factory
    if kind == "HEIC" and (package := optional("pillow_heif")) is not None:
        yield package.HeifImageFile  # not registered: that would change what the caller's Pillow does
    if kind == "JPEG XL" and "JXL" not in Image.OPEN and optional("pillow_jxl") is not None:
        yield Image.OPEN["JXL"][0]  # importing it registers it


def asks_all(opener: Callable[..., object]) -> bool:
    """Whether an opener has no look at the first bytes, and so is asked about every file."""
    return (opener, None) in Image.OPEN.values()


def _fill_registry() -> None:
    """Have Pillow know its formats, which it imports late."""
    if any(name not in Image.OPEN for name in FORMATS):
        Image.init()


def format_name(kind: str | None, head: bytes) -> str | None:
    """What to call the format of a file that could not be read."""
    if kind is not None:
        return kind
    _fill_registry()
    return next(
        (name for name in FORMATS if (accept := Image.OPEN[name][1]) and accept(head[:16]) is True), None
    )


def count(left_out: Counter[str], suffix: str) -> None:
    """Count a file of a folder that is not taken, unless it is one that belongs to images."""
    if suffix not in SIDECARS:
        left_out[suffix] += 1


def wants_extra(left_out: Iterable[str]) -> bool:
    """Whether files were left out that an optional package of ours would read."""
    return any(suffix in MODULES for suffix in left_out)


def describe(left_out: dict[str, int]) -> str:
    """What was left out, for people: left out: 44 .heic (pip install -e ".[heif]"), 3 .psd."""
    parts = []
    for suffix, number in sorted(left_out.items(), key=lambda item: (-item[1], item[0])):
        how = f" ({remedy(MODULES[suffix])})" if suffix in MODULES else ""
        parts.append(f"{number} {suffix or 'without a suffix'}{how}")
    return f"left out: {', '.join(parts)}"
