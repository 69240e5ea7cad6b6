"""TIFFs that Pillow reads wrongly or not at all, through tifffile; and cameras' raw files, through LibRaw."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from warnings import catch_warnings, filterwarnings

import numpy as np
from PIL import TiffImagePlugin

from latentvae.base.errors import ImageError, TooManyPixels, ran_out_of_memory
from latentvae.images import kinds
from latentvae.images.pixels import Picture, check_size, white_of_floats

# tags of TIFF 6.0 and its supplements
BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES, PLANAR = 258, 259, 262, 274, 277, 284
SUBFILE, REDUCED = 254, 1  # and the bit that says: a smaller copy of another page
MAKE, STRIPS, COLOURS, TILES = 271, 273, 320, 324  # with STRIPS and TILES: where the picture's parts begin
SUBIFDS, FORMAT, PROFILE, DNG_VERSION = 330, 339, 34675, 50706
SENSOR = {32803, 34892}  # photometric: a colour filter array, and what was made of one
UNSIGNED, FLOAT = 1, 3  # of FORMAT
PLAIN, DEFLATE, PACKBITS = {1}, {8, 32946}, {32773}  # what tifffile reads without more packages
GREY, RGB, INKS, YCBCR = {0, 1}, {2}, {5}, {6}
MAX_IFDS = 32
PHASE_ONE, BACKS = (b"IIII", b"MMMM"), ("Phase One", "Leaf")  # after the header, and who writes that
LIBRAW = "developed from a camera's raw file by LibRaw, at the camera's white balance"


def is_tiff(head: bytes) -> bool:
    """By its first bytes, of the classic kind or of BigTIFF."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_raw(file: IO[bytes]) -> bool:
    """Whether a TIFF is a camera's raw file, of which an ordinary reader shows the small preview."""
    try:
        pages = _directories(file)
        first = next(pages)
        if DNG_VERSION in first:
            return True
        file.seek(8)
        if file.read(4) in PHASE_ONE and str(first.get(MAKE)).startswith(BACKS):
            return True
        return any(page.get(PHOTOMETRIC) in SENSOR for page in (first, *pages))
    except Exception:  # a damaged one: what reads its pixels says so
        return False


def _is_cut_off(file: IO[bytes]) -> bool:
    """Whether parts of the sensor's picture would begin after the file's end: LibRaw makes them black."""
    try:
        pages = [page for page in _directories(file) if page.get(PHOTOMETRIC) in SENSOR]
        end = file.seek(0, 2)
        return any(place >= end for page in pages for tag in (STRIPS, TILES) for place in page.get(tag, ()))
    except Exception:  # no TIFF, or one that LibRaw may know more of
        return False


def _directories(file: IO[bytes]) -> Iterator[Any]:
    """The tags of a TIFF's first page, and of those below it."""
    file.seek(0)
    head = file.read(16)
    yield (first := _directory(file, head, None))
    offsets = first.get(SUBIFDS, ())
    for offset in (offsets if isinstance(offsets, tuple) else (offsets,))[:MAX_IFDS]:
        yield _directory(file, head, int(offset))


def _directory(file: IO[bytes], head: bytes, offset: int | None) -> Any:
    found = TiffImagePlugin.ImageFileDirectory_v2(head[: 16 if head[2:4] in (b"+\0", b"\0+") else 8])
    file.seek(found.next if offset is None else offset)
    found.load(file)
    return found


def is_beyond_pillow(file: IO[bytes]) -> bool:
    """Whether a TIFF is of those that Pillow refuses, or reads as noise.

    These are planes of more than 8 bits; grey with alpha of so many or in planes; floats; unsigned 32 bits;
    YCbCr that is not compressed, which it takes for RGB; and what lies below a preview, which it shows.
    """
    if _shows_preview(file):
        return True
    file.seek(0)
    try:
        tags = _directory(file, file.read(16), None)
        bits = max(tags.get(BITS, (1,)))
        sample = max(tags.get(FORMAT, (UNSIGNED,)))
        samples = tags.get(SAMPLES, 1)
        if sample == FLOAT or (tags.get(PHOTOMETRIC) in YCBCR and tags.get(COMPRESSION, 1) in PLAIN):
            return True
        deep = bits > 16 and sample == UNSIGNED
        if samples == 1:
            return deep
        # two of: deep, grey with alpha, in planes
        return deep or (bits > 8) + (samples == 2) + (tags.get(PLANAR, 1) == 2) > 1
    except Exception:  # damaged, or of a kind that Pillow knows more of
        return False


def _shows_preview(file: IO[bytes]) -> bool:
    """Whether the first page is a smaller copy of one below it."""
    try:
        first, *below = [tags.get(SUBFILE, 0) & REDUCED for tags in _directories(file)]
        return bool(first and not all(below))
    except Exception:  # damaged: what reads its pixels says so
        return False


def palette(image: Any) -> bytes | None:
    """The colours (3, N) of a TIFF's map, which some programs write with 8 bits instead of 16; else None."""
    colours = image.tag_v2.get(COLOURS, ())
    return bytes(colours) if colours and max(colours) < 256 else None


def read_samples(file: IO[bytes], path: object, max_pixels: int) -> np.ndarray | None:
    """The samples (H, W) of a one-channel TIFF, of any type, as they are; None where it is for Pillow to try.

    Pillow turns the bytes of packed big-endian ones twice, and refuses whole numbers of 32 bits.
    """
    if not is_tiff(file.read(16)):
        return None
    import tifffile  # as long to import as all of Pillow, and wanted for few files

    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        # one channel in which black is zero; what else there is, Pillow knows
        usual = page.photometric == 1 and page.bitspersample >= 8 and page.imagedepth == 1
        if page.samplesperpixel != 1 or not usual or page.compression not in PLAIN | DEFLATE | PACKBITS:
            return None
        check_size(path, page.imagewidth, page.imagelength, max_pixels)
        _check_inflation(page, file, path)
        return np.asarray(page.asarray()).reshape(page.imagelength, page.imagewidth)


def read_tiff(file: IO[bytes], path: object, max_pixels: int) -> Picture | None:
    """The first page, whose samples stay as deep as they are; None where it is for Pillow to try.

    Raises:
        ImageError: floats outside [0, 1], more pixels than are taken, or what is not read.
    """
    import tifffile  # as long to import as all of Pillow, and wanted for few files

    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        # film scanners put the picture below a preview, as cameras do with what their sensors saw
        below = [each for each in page.pages or () if not each.is_reduced] if page.is_reduced else []
        page = below[0] if below else page
        check_size(path, page.imagewidth, page.imagelength, max_pixels)
        if page.compression not in PLAIN | DEFLATE | PACKBITS:
            if below:
                raise ImageError(
                    f"{path} is a TIFF that shows a preview, and whose picture is packed by "
                    f"{page.compression.name}, which is not read below one: save it as a TIFF of one page"
                )
            if page.dtype is not None and page.dtype.kind == "f" and tiff.byteorder == ">":  # noise to Pillow
                raise ImageError(
                    f"{path} is a TIFF of big-endian floats packed by {page.compression.name}, which is not "
                    "read: save it without compression"
                )
            return None
        if page.photometric not in GREY | RGB | INKS or page.imagedepth > 1:
            raise ImageError(
                f"{path} is a TIFF of {page.photometric.name} whose samples of {page.bitspersample} bits are "
                "laid out in a way that is not read: save it as RGB"
            )
        _check_inflation(page, file, path)
        samples = np.asarray(page.asarray())
        if page.planarconfig == 2 and page.samplesperpixel > 1:
            samples = np.moveaxis(samples.reshape(page.samplesperpixel, *samples.shape[-2:]), 0, -1)
        orientation = int(page.tags[ORIENTATION].value) if ORIENTATION in page.tags else 1
        picture = _picture(samples.reshape(page.imagelength, page.imagewidth, -1), page, path)
        picture.orientation = orientation if 1 <= orientation <= 8 else 1
        picture.mode, picture.format, picture.frames = str(samples.dtype), "TIFF", len(tiff.pages)
        if below:
            picture.notes.append("the full picture, which stands below a preview of it")
        if picture.frames > 1:
            picture.notes.append(f"first of {picture.frames} frames")
        if picture.orientation > 1:
            picture.notes.append(f"rotated by EXIF orientation {picture.orientation}")
    return picture


def read_instead(file: IO[bytes], path: object, max_pixels: int, error: Exception) -> Picture | None:
    """What tifffile makes of a TIFF that Pillow has refused; None where it is no better off.

    Raises:
        TooManyPixels: for Pillow may have refused it before it knew of its size.
    """
    if isinstance(error, TooManyPixels) or ran_out_of_memory(error):
        return None
    try:
        return read_tiff(file, path, max_pixels)
    except TooManyPixels:
        raise
    except Exception as again:  # what Pillow said stands
        if ran_out_of_memory(again):
            raise
        return None


def _check_inflation(page: Any, file: IO[bytes], path: object) -> None:
    """Refuse a part that would inflate to more than its place in the picture: tifffile has no limit."""
    if page.compression not in DEFLATE:
        return
    rows, width = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    channels = page.samplesperpixel if page.planarconfig == 1 else 1
    most = min(int(rows), page.imagelength if not page.is_tiled else int(rows)) * width * channels
    most = most * page.dtype.itemsize + 1024
    for offset, length in zip(page.dataoffsets, page.databytecounts, strict=False):
        file.seek(offset)
        stream, data, came = zlib.decompressobj(), file.read(length), 0
        while data and not stream.eof:
            came += len(stream.decompress(data, 1 << 20))
            data = stream.unconsumed_tail
            if came > most:
                raise ImageError(f"{path} is a TIFF with parts that inflate beyond its size: it is damaged")


def _picture(samples: np.ndarray, page: Any, path: object) -> Picture:
    """Samples (H, W, C) as the file has them: colour, and alpha where an extra channel is that."""
    kind = samples.dtype.kind
    colours = {2: 3, 5: 4}.get(int(page.photometric), 1)
    notes: list[str] = []
    if kind == "f":
        samples = samples.astype(np.float32) if samples.dtype.itemsize != 4 else samples
        white = white_of_floats(path, samples[..., :colours].min(), samples[..., :colours].max())
    else:
        white = float(np.iinfo(samples.dtype).max)
        if kind == "i" or page.bitspersample not in (8, 16, 32):
            raise ImageError(
                f"{path} is a TIFF of {page.bitspersample}-bit {'signed ' if kind == 'i' else ''}integers: "
                "scale them to 16 bits, unsigned"
            )
        if samples.dtype.itemsize == 4:
            white = 65535.0 if samples[..., :colours].max() <= 65535 else white
            notes.append(f"32-bit integers, {white:.0f} read as white")
    colour = samples[..., :colours]
    if page.photometric == 0:  # white is zero
        colour = white - colour.astype(np.float64)
    found = Picture.of_array(colour, white, notes=notes)
    extra = int(page.extrasamples[0]) if page.extrasamples else 0
    if extra in (1, 2):  # multiplied into the colours, or not
        full = np.float32(1 if kind == "f" else np.iinfo(samples.dtype).max)
        found.set_alpha(samples[..., colours].astype(np.float32) / full, extra == 1)
    if colours == 4:
        found.use_inks()
    if PROFILE in page.tags:
        found.apply_profile(bytes(page.tags[PROFILE].value), {3: "RGB", 4: "CMYK"}.get(colours, "L"))
    return found


def develop(file: IO[bytes], path: object, max_pixels: int) -> Picture:
    """A camera's raw file, developed as LibRaw does by itself.

    Raises:
        ImageError: the extra `raw` is not installed, too many pixels, or a file that ends too early.
    """
    rawpy = kinds.optional("rawpy")
    if rawpy is None:
        raise ImageError(
            f"{path} is a camera's raw file, of which only the small preview could be read: "
            f"{kinds.remedy('rawpy')}, or export it as TIFF or JPEG"
        )
    if _is_cut_off(file):
        raise ImageError(f"{path} is a camera's raw file that ends too early: fetch it again")
    file.seek(0)
    # by its name where it has one that LibRaw takes: what that writes to standard error then says it
    named = isinstance(path, Path) and str(path).isprintable()
    with catch_warnings():
        # of OpenMP after a fork, which workers of training do not use: each has one thread
        filterwarnings("ignore", "rawpy is being used in a process", RuntimeWarning)
        opened = rawpy.imread(str(path) if named else file)
    with opened as raw:
        check_size(path, raw.sizes.width, raw.sizes.height, max_pixels)
        # sRGB's own curve; brightness and everything else as LibRaw has it
        samples = raw.postprocess(use_camera_wb=True, output_bps=16, gamma=(2.4, 12.92))
    return Picture.of_array(samples, 65535.0, notes=[LIBRAW], mode="raw", format="RAW")
