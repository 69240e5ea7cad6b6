"""BMPs as Pillow does not read them: runs, of which it loses an odd pixel or an empty row; profiles."""

import io
import struct
from typing import IO

from latentvae.base.errors import ImageError
from latentvae.images.headers import MAX_PROFILE
from latentvae.images.pixels import check_size

RLE8, RLE4 = 1, 2  # the header's `compression`
FILE_HEADER, SMALLEST = 14, 40  # bytes; BITMAPINFOHEADER is the first header that knows of runs
FIFTH = 124  # bytes of BITMAPV5HEADER
PALETTE = 256
END_OF_ROW, END, JUMP = 0, 1, 2


def is_packed(head: bytes) -> bool:
    """By the first bytes of a file."""
    if head[:2] != b"BM" or len(head) < FILE_HEADER + SMALLEST:
        return False
    size, bits, packing = struct.unpack_from("<I10xHI", head, FILE_HEADER)
    return size >= SMALLEST and (bits, packing) in ((8, RLE8), (4, RLE4))


def profile(file: IO[bytes], head: bytes) -> bytes | None:
    """The ICC profile in a BMP of the fifth version, which is the only one that has any."""
    if head[:2] != b"BM" or head[FILE_HEADER + 56 : FILE_HEADER + 60] != b"DEBM":  # "MBED" as a number
        return None
    size, start, length = struct.unpack_from("<I108xII", head, FILE_HEADER)
    if size < FIFTH or length > MAX_PROFILE:
        return None
    file.seek(FILE_HEADER + start)
    return file.read(length)


def unpack(file: IO[bytes], path: object, max_pixels: int) -> io.BytesIO:
    """The same picture as a plain BMP of 8 bits; pixels that no run covers have the palette's first colour.

    Raises:
        ImageError: more pixels than are taken, or a file that ends before its picture does.
    """
    file.seek(0)
    data = file.read()
    start, size, width, height, bits = struct.unpack_from("<IIii2xH", data, 10)
    check_size(path, width, abs(height), max_pixels)
    rows = _rows(data[start:], width, abs(height), bits == 4)
    if rows is None:
        raise ImageError(f"{path} is a BMP that ends before its picture does: fetch the file again")
    (used,) = struct.unpack_from("<I", data, FILE_HEADER + 32)
    colours = data[FILE_HEADER + size :][: 4 * (used or 1 << bits)][: 4 * PALETTE].ljust(4 * PALETTE, b"\0")
    header = bytearray(data[FILE_HEADER : FILE_HEADER + size])
    struct.pack_into("<HII", header, 14, 8, 0, 0)  # bits, no packing, any length
    struct.pack_into("<I", header, 32, PALETTE)
    begin = FILE_HEADER + len(header) + len(colours)
    front = struct.pack("<2sI4xI", b"BM", begin + len(rows), begin)
    return io.BytesIO(front + header + colours + rows)


def _rows(runs: bytes, width: int, height: int, nibbles: bool) -> bytes | None:
    """Rows of one byte a pixel, each as long as a multiple of four; None where the runs end too early."""
    step = width + -width % 4
    rows = bytearray(step * height)
    x = y = place = 0
    while y < height:
        if place + 2 > len(runs):
            return bytes(rows) if (x, y) == (width, height - 1) else None
        count, value = runs[place], runs[place + 1]
        place += 2
        if count:
            pair = bytes((value >> 4, value & 15)) if nibbles else bytes((value, value))
            pixels = pair * ((count + 1) // 2)
        elif value == END_OF_ROW:
            x, y = 0, y + 1
            continue
        elif value == END:
            break
        elif value == JUMP:
            x, y = x + (runs[place : place + 1] or b"\0")[0], y + (runs[place + 1 : place + 2] or b"\0")[0]
            place += 2
            continue
        else:  # as many pixels as they are, to an even number of bytes
            count, length = value, (value + 1) // 2 if nibbles else value
            pixels = runs[place : place + length]
            if nibbles:
                pixels = bytes(half for byte in pixels for half in (byte >> 4, byte & 15))
            place += length + length % 2
        pixels = pixels[: max(0, min(count, width - x))]
        rows[y * step + x : y * step + x + len(pixels)] = pixels
        x += len(pixels)
    return bytes(rows)
