"""BMPs packed in runs: every way to write a pixel, and what ends too early."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import P3, rgb_profile
from PIL import Image

from latentvae.base.errors import ImageError, TooManyPixels
from latentvae.images.reading import load_image, load_image_with_info
from latentvae.images.tensors import to_uint8

PALETTE = np.random.default_rng(0).integers(0, 256, (16, 3), dtype=np.uint8)
WIDTH = 7
# from the last row to the first: a run with a jump in it, nothing, odd pixels as they are, and a mixture
INDICES = np.array(
    [
        [1, 2, 1, 2, 1, 3, 3],
        [4, 5, 6, 7, 8, 9, 10],
        [0, 0, 0, 0, 0, 0, 0],
        [11, 11, 0, 0, 12, 12, 12],
    ]
)
RLE4 = bytes((2, 0xBB, 0, 2, 2, 0, 3, 0xCC, 0, 0, 0, 0, 0, 7, 0x45, 0x67, 0x89, 0xA0, 0, 0))
RLE4 += bytes((5, 0x12, 2, 0x33, 0, 1))
RLE8 = bytes((2, 11, 0, 2, 2, 0, 3, 12, 0, 0, 0, 0, 0, 7, 4, 5, 6, 7, 8, 9, 10, 0, 0, 0))
RLE8 += bytes((0, 5, 1, 2, 1, 2, 1, 0, 2, 3, 0, 1))


def bmp(runs: bytes, bits: int, width: int = WIDTH, height: int = len(INDICES)) -> bytes:
    palette = b"".join(bytes((*colour[::-1], 0)) for colour in PALETTE.tolist())
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 2 if bits == 4 else 1, 0, 0, 0, 16, 0)
    start = 14 + len(header) + len(palette)
    return struct.pack("<2sI4xI", b"BM", start + len(runs), start) + header + palette + runs


def levels(source: bytes | Path) -> np.ndarray:
    return to_uint8(load_image(source)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("runs", "bits"), [(RLE4, 4), (RLE8, 8)])
def test_every_run_is_read_as_it_is_written(tmp_path: Path, runs: bytes, bits: int) -> None:
    (tmp_path / "a.bmp").write_bytes(bmp(runs, bits))
    assert (levels(tmp_path / "a.bmp") == PALETTE[INDICES]).all()
    assert (levels(bmp(runs, bits)) == PALETTE[INDICES]).all()
    # pixels beyond a row's end are lost, and move nothing
    assert (levels(bmp(runs, bits, width=5)) == PALETTE[INDICES[:, :5]]).all()


def test_runs_that_end_too_early_are_an_error_and_large_sizes_are_refused_before_any() -> None:
    with pytest.raises(ImageError, match="ends before its picture does"):
        levels(bmp(RLE8[:12], 8))
    assert (levels(bmp(RLE8[:8] + b"\0\1", 8))[:3] == PALETTE[0]).all()  # but a picture may say that it ends
    full = bytes(byte for index in INDICES[:1, ::-1].flat for byte in (1, index))
    assert levels(bmp(full, 8, height=1)).shape == (1, WIDTH, 3)  # no mark at the end, and none is needed
    with pytest.raises(TooManyPixels):
        levels(bmp(RLE8, 8, width=1 << 20, height=1 << 20))


def test_what_is_not_packed_is_read_as_before() -> None:
    stream = io.BytesIO()
    picture = Image.fromarray(INDICES.astype(np.uint8), "P")
    picture.putpalette(PALETTE.tobytes())
    picture.save(stream, "BMP")
    assert (levels(stream.getvalue()) == PALETTE[INDICES]).all()


def test_a_profile_in_a_bmp_is_applied(tmp_path: Path) -> None:
    picture, profile = Image.fromarray(PALETTE.reshape(4, 4, 3)), rgb_profile(P3, 2.2)
    picture.save(tmp_path / "a.png", icc_profile=profile)
    stream = io.BytesIO()
    picture.save(stream, "BMP")
    rows = stream.getvalue()[14 + 40 :]
    header = stream.getvalue()[14:54] + bytes(16) + b"DEBM" + bytes(52)
    header += struct.pack("<II4x", 124 + len(rows), len(profile))
    header = struct.pack("<I", len(header)) + header[4:]
    start = 14 + len(header)
    data = struct.pack("<2sI4xI", b"BM", start + len(rows) + len(profile), start) + header + rows + profile
    image, info = load_image_with_info(data)
    assert info.notes == ["converted from ICC profile 'Test'"]
    assert torch.equal(image, load_image(tmp_path / "a.png"))
    (tmp_path / "a.bmp").write_bytes(data)
    assert torch.equal(image, load_image(tmp_path / "a.bmp"))
