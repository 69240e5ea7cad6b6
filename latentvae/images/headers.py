"""What Pillow does not say of a file: chunks of PNG, boxes of AVIF and HEIC, the size of JPEG XL."""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

from latentvae.images.colour import Encoding, from_cicp, from_gamma

PNG_START = 8  # bytes of the signature
MAX_PROFILE = 1 << 24  # bytes of an ICC profile; those of presses have two million
PICTURE_CHUNKS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")  # ancillary by their names, and yet of the pixels
COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"eXIf")
SHORT = 1 << 20  # bytes of a text; Pillow refuses longer ones
XMP = b"XML:com.adobe.xmp\0\0"  # and not compressed: it may say how the picture is turned
MAX_BOXES = 1 << 22  # bytes of the boxes that describe an image; its pixels are not in these


class Chunk(NamedTuple):
    """One of a PNG: its name, where its content begins, and how long it is."""

    name: bytes
    start: int
    length: int


def png_chunks(file: IO[bytes]) -> Iterator[Chunk]:
    """The chunks as far as the file goes; their content is not read."""
    place = PNG_START
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return
        chunk = Chunk(head[4:], place + 8, int.from_bytes(head[:4], "big"))
        yield chunk
        if chunk.name == b"IEND":
            return
        place = chunk.start + chunk.length + 4


def png_encoding(file: IO[bytes]) -> tuple[Encoding | None, list[str]]:
    """What a PNG's chunks say of its colours, where no ICC profile does: cICP, then sRGB, then gAMA, cHRM.

    Returns: the encoding, None for sRGB; and notes.
    """
    found: dict[bytes, bytes] = {}
    for chunk in png_chunks(file):
        if chunk.name == b"IDAT":
            break
        if chunk.name in (*COLOUR_CHUNKS, b"iCCP"):
            file.seek(chunk.start)
            found[chunk.name] = file.read(min(chunk.length, 64))
    if len(found.get(b"cICP", b"")) == 4:
        return from_cicp(*found[b"cICP"][:2]), []
    if b"sRGB" in found or b"iCCP" in found:
        return None, []
    gamma, xy = None, None
    if len(found.get(b"gAMA", b"")) == 4:
        gamma = int.from_bytes(found[b"gAMA"], "big") / 100_000
    if len(found.get(b"cHRM", b"")) == 32:
        white, *colours = struct.iter_unpack(">2I", found[b"cHRM"])
        xy = tuple((x / 100_000, y / 100_000) for x, y in (*colours, white))
    try:
        return from_gamma(gamma, xy), []
    except ValueError as error:
        return None, [f"its gAMA or cHRM was passed over ({error})"]


def png_pixels_only(file: IO[bytes]) -> tuple[io.BytesIO, bytes | None, list[str]] | None:
    """A PNG without what is not needed for its pixels, colours and orientation; None where that is all of it.

    For a file that Pillow refuses: it does so for texts above a million bytes, and for damaged ones.

    Returns: the file, an ICC profile that is too long for Pillow, and the names of what was passed over.
    """
    file.seek(0)
    kept, profile, dropped = [file.read(PNG_START)], None, list[str]()
    for chunk in list(png_chunks(file)):
        file.seek(chunk.start - 8)
        whole = file.read(chunk.length + 12)
        content = whole[8:-4]
        if chunk.name[0] & 0x20 and chunk.name not in PICTURE_CHUNKS:
            intact = zlib.crc32(whole[4:-4]) == int.from_bytes(whole[-4:], "big")
            if intact and chunk.name == b"iCCP":
                profile = _inflated(content.partition(b"\0")[2][1:])
            is_orientation = chunk.name == b"iTXt" and content.startswith(XMP) and len(content) < SHORT
            if not intact or not (is_orientation or chunk.name in COLOUR_CHUNKS):
                if chunk.name != b"iCCP" or profile is None:
                    dropped.append(chunk.name.decode("ascii", "replace"))
                continue
        kept.append(whole)
    if not dropped and profile is None:
        return None
    return io.BytesIO(b"".join(kept)), profile, sorted(set(dropped))


def _inflated(data: bytes) -> bytes | None:
    try:
        stream = zlib.decompressobj()
        found = stream.decompress(data, MAX_PROFILE)
    except zlib.error:
        return None
    return found if stream.eof else None


@dataclass
class Boxes:
    """What an AVIF's or HEIC's boxes say of its main image, and Pillow does not."""

    encoding: Encoding | None = None
    clean: tuple[int, int, int, int] | None = None  # left, top, right, bottom of what is to be shown (`clap`)
    gain_map: bool = False  # of HDR, beside a picture in SDR
    bits: int = 8  # of a channel


def heif_boxes(file: IO[bytes]) -> Boxes:
    """Read the properties of the main image (ISO/IEC 23008-12); nothing where they are damaged."""
    file.seek(0)
    found = Boxes()
    try:
        head = file.read(MAX_BOXES)
        top = dict(_boxes(head))
        found.gain_map = b"tmap" in top.get(b"ftyp", b"")
        meta = dict(_boxes(top[b"meta"][4:]))
        main = _main_item(meta[b"pitm"])
        parts = list(_boxes(meta[b"iprp"]))
        properties = [each for name, part in parts if name == b"ipco" for each in _boxes(part)]
        numbers = [number for name, part in parts if name == b"ipma" for number in _associated(part, main)]
        own = [properties[number - 1] for number in numbers if 0 < number <= len(properties)]
        profile = any(name == b"colr" and part[:4] in (b"prof", b"rICC") for name, part in own)
        for name, part in own:
            if name == b"colr" and part[:4] == b"nclx" and not profile:
                found.encoding = from_cicp(*struct.unpack(">HH", part[4:8]))
        found.bits = max((part[5] for name, part in own if name == b"pixi"), default=8)
        size = next((struct.unpack(">II", part[4:12]) for name, part in own if name == b"ispe"), None)
        clap = next((struct.unpack(">IIIIiIiI", part[:32]) for name, part in own if name == b"clap"), None)
        if size and clap:
            found.clean = _clean(size, clap)
    except (KeyError, IndexError, ValueError, struct.error, ZeroDivisionError):
        pass  # a film, or damaged: what decodes the picture says so
    return found


def with_one_ipma(file: IO[bytes]) -> io.BytesIO | None:
    """An AVIF whose lists of which item has which properties are several, with one; None: any other file.

    The standard has one list of each version and flags. Early encoders wrote one for each item, which is two
    where there is alpha, and libavif refuses such a file. No other byte changes its place.
    """
    file.seek(0)
    data = file.read()
    try:
        iprp = dict(_boxes(dict(_boxes(data))[b"meta"][4:]))[b"iprp"]
        parts = list(_boxes(iprp))
    except (KeyError, ValueError):
        return None
    lists: dict[bytes, tuple[int, bytes]] = {}
    for kind, content in ((part[:4], part[4:]) for name, part in parts if name == b"ipma"):
        count, entries = lists.get(kind, (0, b""))
        lists[kind] = count + int.from_bytes(content[:4], "big"), entries + content[4:]
    boxes = [_box(name, part) for name, part in parts if name != b"ipma"]
    for kind, (count, entries) in lists.items():
        boxes.append(_box(b"ipma", kind + count.to_bytes(4, "big") + entries))
    several, one = _box(b"iprp", iprp), _box(b"iprp", b"".join(boxes))
    spare = len(several) - len(one)
    if not spare or several not in data:
        return None
    return io.BytesIO(data.replace(several, one + _box(b"free", bytes(spare - 8)), 1))


def without_exif(file: IO[bytes]) -> io.BytesIO | None:
    """An AVIF whose EXIF data, which may be damaged, are called something else; None where there are none.

    No byte changes its place.
    """
    file.seek(0)
    data = file.read()
    try:
        iinf = dict(_boxes(dict(_boxes(data))[b"meta"][4:]))[b"iinf"]
    except (KeyError, ValueError):
        return None
    if b"Exif" not in iinf:
        return None
    return io.BytesIO(data.replace(iinf, iinf.replace(b"Exif", b"skip"), 1))


def _box(name: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + name + content


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 0
    while place + 8 <= len(data):
        size, name, head = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        size = size or len(data) - place  # 0: to the end
        if size < head:
            raise ValueError("a box shorter than its head")
        yield name, data[place + head : place + size]
        place += size


def _main_item(pitm: bytes) -> int:
    return int.from_bytes(pitm[4:6] if pitm[0] == 0 else pitm[4:8], "big")


def _associated(ipma: bytes, item: int) -> list[int]:
    """The numbers of an item's properties, from 1."""
    version, wide = ipma[0], ipma[3] & 1
    (entries,) = struct.unpack(">I", ipma[4:8])
    place = 8
    for _ in range(entries):
        bytes_of_id = 2 if version < 1 else 4
        key = int.from_bytes(ipma[place : place + bytes_of_id], "big")
        count = ipma[place + bytes_of_id]
        start, step = place + bytes_of_id + 1, 1 + wide
        place = start + count * step
        if key == item:
            mask = 0x7FFF if wide else 0x7F  # the highest bit says that a reader must know the property
            return [int.from_bytes(ipma[i : i + step], "big") & mask for i in range(start, place, step)]
    return []


def _clean(size: tuple[int, ...], clap: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """The pixels of the clean aperture, None where it is all or reaches outside."""
    (width, height), sides = size, [clap[i] / clap[i + 1] for i in (0, 2, 4, 6)]
    left, top = (
        (whole - side) / 2 + shift for whole, side, shift in zip(size, sides, sides[2:], strict=False)
    )
    left, top = math.floor(left), math.floor(top)  # halves too, so that the size stays as declared
    box = left, top, left + round(sides[0]), top + round(sides[1])
    inside = 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
    return box if inside and box != (0, 0, width, height) else None


def jxl_size(file: IO[bytes]) -> tuple[int, int] | None:
    """Width and height of a JPEG XL image as stored (ISO/IEC 18181-1), by its header; None: there is none."""
    file.seek(0)
    stream = file.read(MAX_BOXES)
    if stream[4:8] == b"JXL ":
        try:
            boxes = list(_boxes(stream))
        except ValueError:
            return None
        # whole, or in parts that begin with a number
        stream = b"".join(part[4 * (name == b"jxlp") :] for name, part in boxes if name in (b"jxlc", b"jxlp"))
    if stream[:2] != b"\xff\x0a":
        return None
    bits, used = int.from_bytes(stream[2:18], "little"), 0

    def take(count: int) -> int:
        nonlocal used
        value = bits >> used & (1 << count) - 1
        used += count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    height, ratio = side(), take(3)
    if ratio == 0:
        return side(), height
    across, down = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height * across // down, height
