"""The .lvae file: a header, the entropy-coded latents, and a checksum of both.

Little-endian, in this order:

| bytes | what |
|---|---|
| 4 | `LVAE` |
| 1 | version of the format |
| 8 | first bytes of the weight hash of the VAE that decodes it |
| 4, 4 | width and height of the image in pixels |
| 1, 1 | pixels of padding on the right and at the bottom |
| 1, 1 | channels of the image, channels of the latents |
| 1 | the quality it was made with, for people |
| 4 | length of the payload |
| 2 each | step of every latent channel, IEEE half precision |
| | payload |
| 4 | CRC-32 of all before |
"""

import io
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from latentvae.base.errors import CodecError
from latentvae.images.reading import MAX_PIXELS
from latentvae.images.tensors import Padding

MAGIC, VERSION = b"LVAE", 1
FIXED = struct.Struct("<4sB8sIIBBBBBI")
CHECKSUM = struct.Struct("<I")
HASH_BYTES = 8
MAX_CHANNELS = 128  # of latents; known models have 4 to 64
MAX_BYTES_PER_PIXEL = 4  # of payload: more than the raw pixels is no compressed image


@dataclass(frozen=True)
class Header:
    """What the decoder must know before the payload; steps are those of each latent channel."""

    weights: bytes
    width: int
    height: int
    right: int
    bottom: int
    image_channels: int
    quality: int
    steps: tuple[float, ...]

    @property
    def padding(self) -> Padding:
        """What decoding crops off."""
        return Padding(0, 0, self.right, self.bottom, self.height, self.width)

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width that the model decodes, in pixels."""
        return self.height + self.bottom, self.width + self.right


def pack(header: Header, payload: bytes) -> bytes:
    """The whole file as bytes."""
    fixed = FIXED.pack(
        MAGIC,
        VERSION,
        header.weights,
        header.width,
        header.height,
        header.right,
        header.bottom,
        header.image_channels,
        len(header.steps),
        header.quality,
        len(payload),
    )
    body = fixed + struct.pack(f"<{len(header.steps)}e", *header.steps) + payload
    return body + CHECKSUM.pack(zlib.crc32(body))


def unpack(data: bytes, *, name: str = "these bytes", max_pixels: int = MAX_PIXELS) -> tuple[Header, bytes]:
    """Header and payload of a file's bytes, which messages call `name`; see `read_lvae`."""
    return _read(io.BytesIO(data), len(data), name, max_pixels)


def read_lvae(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> tuple[Header, bytes]:
    """Header and payload of a file, of which no more is read than its header admits.

    Raises:
        CodecError: it cannot be read, is no .lvae file, of another version, larger than `max_pixels`, cut
            off, longer than it says, or fails its checksum.
    """
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return _read(file, size, str(path), max_pixels)
    except OSError as error:
        raise CodecError(f"{path} cannot be read ({error.strerror or error}): name an .lvae file.") from error


def _read(file: BinaryIO, size: int, name: str, max_pixels: int) -> tuple[Header, bytes]:
    start = file.read(FIXED.size)
    if start[:4] != MAGIC:
        raise CodecError(f"{name} is no .lvae file: it does not begin with {MAGIC.decode()}.")
    if len(start) < FIXED.size:
        raise CodecError(f"{name} is cut off in its header: it has {size} bytes. Get the file again.")
    _, version, weights, width, height, *rest = FIXED.unpack(start)
    right, bottom, colours, channels, quality, length = rest
    if version != VERSION:
        raise CodecError(
            f"{name} is of version {version}; this program reads version {VERSION}: use a newer one."
        )
    _check_sizes(name, width, height, colours, channels)
    # a line of pixels is padded to eight lines or more: those count too, with room for what is usual
    if width * height > max_pixels or (width + right) * (height + bottom) > 2 * max_pixels:
        raise CodecError(
            f"{name} holds {width}x{height} px, computed as {width + right}x{height + bottom}, which is more "
            f"than the {max_pixels} px that are decoded."
        )
    wanted = FIXED.size + 2 * channels + length + CHECKSUM.size
    if wanted != size:
        raise CodecError(
            f"{name} has {size} bytes, but its header says {wanted}: it is cut off or damaged. Get it again."
        )
    if length > MAX_BYTES_PER_PIXEL * (width + right) * (height + bottom) + 1024 or length % 4:
        raise CodecError(f"{name} is damaged: a payload of {length} bytes for {width}x{height} px.")
    body = file.read(wanted - FIXED.size)
    body, checksum = body[: -CHECKSUM.size], body[-CHECKSUM.size :]
    if CHECKSUM.pack(zlib.crc32(body, zlib.crc32(start))) != checksum:
        raise CodecError(f"{name} is damaged: its checksum does not fit its content. Get the file again.")
    steps = struct.unpack_from(f"<{channels}e", body)
    if not all(math.isfinite(step) and step > 0 for step in steps):
        raise CodecError(f"{name} is damaged: steps of {steps}, but positive numbers were wanted.")
    return Header(weights, width, height, right, bottom, colours, quality, steps), body[2 * channels :]


def _check_sizes(name: str, width: int, height: int, colours: int, channels: int) -> None:
    if width * height == 0 or colours == 0 or not 0 < channels <= MAX_CHANNELS:
        raise CodecError(
            f"{name} is damaged: {width}x{height} px of {colours} channels, latents of {channels} channels."
        )
