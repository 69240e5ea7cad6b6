"""Write the image files that Pillow cannot: 16-bit colour, packed bits, colour profiles."""

import struct
import zlib
from pathlib import Path

import numpy as np

P3 = [
    (0.5151, 0.2412, -0.0011),
    (0.2920, 0.6922, 0.0419),
    (0.1571, 0.0666, 0.7841),
]  # columns, adapted to D50
SRGB = [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]


def png(
    path: Path, samples: np.ndarray, colour_type: int, *chunks: tuple[bytes, bytes], depth: int = 16
) -> Path:
    """Write what Pillow cannot: 16-bit colour, or packed rows given as bytes (H, row)."""
    rows = samples.astype(">u2").view(np.uint8).reshape(len(samples), -1) if depth == 16 else samples
    width = samples.shape[1] if depth == 16 else samples.shape[1] * 8 // depth
    header = struct.pack(">IIBBBBB", width, len(samples), depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def tiff(
    path: Path, samples: np.ndarray, order: str, *, bits: int = 16, photometric: int = 2, deflate=False
) -> Path:
    """Write a one-strip TIFF of unsigned samples (H, W, C), or of packed rows."""
    height, width, count = samples.shape
    data = samples.astype(f"{order}u2").tobytes() if bits == 16 else samples.astype(np.uint8).tobytes()
    width = width if bits == 16 else samples.shape[1] * 8 // bits
    data = zlib.compress(data) if deflate else data
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 8 if deflate else 1,
        262: photometric,
        273: 8,
        277: count,
    }
    tags |= {278: height, 279: len(data)}
    where = (
        8 + len(data) + 2 + 12 * len(tags) + 4
    )  # of the bits per sample, where they do not fit into the entry
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    entries = struct.pack(f"{order}H", len(tags))
    for tag, value in tags.items():
        if tag == 258 and count > 2:
            entries += struct.pack(f"{order}HHII", tag, 3, count, where)
        else:
            entries += struct.pack(f"{order}HHII", tag, 4, 1, value)
    path.write_bytes(head + data + entries + b"\0" * 4 + struct.pack(f"{order}{count}H", *[bits] * count))
    return path


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    """Assemble an ICC v2 profile named 'Test'."""
    name = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"Test\0" + b"\0" * 78
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    tags = {b"desc": name, b"cprt": b"text\0\0\0\0none\0", b"wtpt": white, **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    d50 = struct.pack(">iii", 63190, 65536, 54061)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, kind, space, pcs)
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + d50
    return head.ljust(128, b"\0") + table + body


def rgb_profile(primaries: list[tuple[float, ...]], gamma: float) -> bytes:
    tags = {}
    for letter, column in zip(b"rgb", primaries, strict=True):
        xyz = struct.pack(">iii", *(round(v * 65536) for v in column))
        tags[bytes([letter]) + b"XYZ"] = b"XYZ \0\0\0\0" + xyz
        tags[bytes([letter]) + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    return profile(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))})


def cmyk_profile(darkest: int = 0) -> bytes:
    """A press whose coloured inks are all invisible: only black darkens, to the given lightness of 255."""
    ramp = bytes(range(256))
    grid = b"".join(
        bytes((darkest if corner & 1 else 255, 128, 128)) for corner in range(16)
    )  # K runs fastest
    one = struct.pack(">9i", *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + one + ramp * 4 + grid + ramp * 3
    return profile(b"CMYK", {b"A2B0": lut, b"A2B1": lut}, b"scnr", b"Lab ")


def dng(path: Path, side: int = 64) -> Path:
    """A camera's raw file: a black preview of 8 x 8 pixels, and the sensor's samples in a directory below."""
    import tifffile

    bayer = np.full((side, side), 30_000, dtype=np.uint16)
    one = (1, 1)
    with tifffile.TiffWriter(path) as file:
        common = [
            (50706, "B", 4, (1, 4, 0, 0), True),
            (50708, "s", 0, "Test", True),
            (50721, "2i", 9, sum(((round(v * 100), 100) for row in np.eye(3) for v in row), ()), True),
            (50728, "2I", 3, one * 3, True),
            (50778, "H", 1, 21, True),
            (271, "s", 0, "Test", True),
        ]
        file.write(
            np.zeros((8, 8, 3), np.uint8), photometric="rgb", subifds=1, subfiletype=1, extratags=common
        )
        sensor = [
            (33421, "H", 2, (2, 2), True),
            (33422, "B", 4, (0, 1, 1, 2), True),
            (50714, "H", 1, 0, True),
            (50717, "I", 1, 65535, True),
        ]
        file.write(bayer, photometric="cfa", subfiletype=0, extratags=sensor)
    return path
