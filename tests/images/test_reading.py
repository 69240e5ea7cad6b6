"""Every kind of file that a camera, a scanner or a browser makes."""

import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import P3, SRGB, cmyk_profile, grey_profile, png, rgb_profile, tiff
from PIL import Image, ImageCms

from latentvae.base.errors import ImageError
from latentvae.images import headers
from latentvae.images.reading import load_image, load_image_with_info, read_size
from latentvae.images.tensors import to_uint8

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


def levels(path: Path, **options) -> np.ndarray:
    """The loaded picture in 0..255, (H, W, C)."""
    return to_uint8(load_image(path, **options)).permute(1, 2, 0).numpy()


def notes(path: Path, **options) -> list[str]:
    return load_image_with_info(path, **options)[1].notes


def to_srgb(colour: tuple[int, ...], primaries: list[tuple[float, ...]], gamma: float) -> np.ndarray:
    """The textbook formula, in float64."""
    xyz = np.array(primaries).T @ (np.array(colour) / 255) ** gamma
    linear = np.clip(np.linalg.inv(np.array(SRGB).T) @ xyz, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def as_integers(path: Path, white: int = 65535, **options) -> np.ndarray:
    return ((load_image(path, **options).double() + 1) / 2 * white).round().long().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_16_bit_ramp_keeps_every_value(tmp_path, suffix):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = tmp_path / f"ramp{suffix}"
    Image.fromarray(ramp).save(path)
    assert (as_integers(path, channels=1)[..., 0] == ramp).all()
    assert (as_integers(path) == ramp[..., None]).all()


def test_16_bit_pgm_and_big_endian_tiff_keep_every_value(tmp_path):
    ramp = np.arange(0, 65536, 7, dtype=np.uint16)[:9000].reshape(90, 100)
    (tmp_path / "a.pgm").write_bytes(b"P5\n100 90\n65535\n" + ramp.astype(">u2").tobytes())
    tiff(tmp_path / "b.tif", ramp[..., None], ">", photometric=1)
    tiff(tmp_path / "c.tif", 65535 - ramp[..., None], "<", photometric=0)  # white is zero
    for name in ("a.pgm", "b.tif", "c.tif"):
        assert (as_integers(tmp_path / name, channels=1)[..., 0] == ramp).all(), name


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_colour_tiff_keeps_every_value(tmp_path, order, deflate):
    samples = np.random.default_rng(0).integers(0, 65536, (9, 7, 3))
    assert (as_integers(tiff(tmp_path / "a.tif", samples, order, deflate=deflate)) == samples).all()


def test_16_bit_colour_png_keeps_every_value(tmp_path):
    samples = np.random.default_rng(0).integers(0, 65536, (9, 7, 3))
    assert (as_integers(png(tmp_path / "a.png", samples, 2)) == samples).all()
    opaque = np.concatenate([samples, np.full((9, 7, 1), 65535)], 2)
    assert (as_integers(png(tmp_path / "b.png", opaque, 6)) == samples).all()
    opaque[..., 3] = 13107  # a fifth
    want = samples / 5 + 65535 * 0.8
    assert np.abs(as_integers(png(tmp_path / "c.png", opaque, 6)) - want).max() <= 1


def test_16_bit_colour_with_a_profile_is_converted(tmp_path):
    samples = np.full((2, 2, 3), (180, 120, 90)) * 257
    icc = (b"iCCP", b"x\0\0" + zlib.compress(rgb_profile(P3, 2.2)))
    path = png(tmp_path / "a.png", samples, 2, icc)
    assert np.abs(levels(path)[0, 0] - to_srgb((180, 120, 90), P3, 2.2)).max() <= 1.5
    assert notes(path) == ["converted from ICC profile 'Test' at 8 bits"]


def test_16_bit_grey_with_alpha_says_that_it_lost_bits(tmp_path):
    path = png(tmp_path / "a.png", np.full((2, 3, 2), (0x8000, 0xFFFF)), 4)
    assert (levels(path) == 128).all()
    assert notes(path) == ["16 bits per channel read as 8"]


def test_12_bit_tiff_is_scaled_by_its_own_white(tmp_path):
    packed = np.array([0xFF, 0xF8, 0x00]).reshape(1, 3, 1)  # 4095, 2048
    path = tiff(tmp_path / "a.tif", packed, "<", bits=12, photometric=1)
    assert as_integers(path, 4095, channels=1).ravel().tolist() == [4095, 2048]


def test_integers_beyond_16_bits_are_refused(tmp_path):
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif holds integers from 0 to 70000.*scale them"):
        load_image(tmp_path / "a.tif")


def test_float_tiff_in_0_to_1_is_scaled_and_others_are_refused(tmp_path):
    values = np.array([[0.0, 0.123456, 1.0]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.allclose(load_image(tmp_path / "a.tif", channels=1)[0].numpy(), values * 2 - 1, atol=1e-6)
    for bad in (1.5, -0.5, np.nan):
        Image.fromarray(np.array([[0.5, bad]], dtype=np.float32)).save(tmp_path / "b.tif")
        with pytest.raises(ImageError, match=r"b\.tif holds floats from .* but floats in \[0, 1\]"):
            load_image(tmp_path / "b.tif")


@pytest.mark.parametrize("colour", [(180, 120, 90), (40, 90, 60), (128, 128, 128)])
def test_a_wide_gamut_profile_is_converted_to_srgb(tmp_path, colour):
    icc = rgb_profile(P3, 2.2)
    Image.new("RGB", (4, 4), colour).save(tmp_path / "a.png", icc_profile=icc)
    Image.new("RGBA", (4, 4), (*colour, 255)).save(tmp_path / "b.webp", icc_profile=icc, lossless=True)
    indexed = Image.new("P", (4, 4))
    indexed.putpalette(colour)
    indexed.save(tmp_path / "c.png", icc_profile=icc)
    want = to_srgb(colour, P3, 2.2)
    for name in ("a.png", "b.webp", "c.png"):
        assert np.abs(levels(tmp_path / name) - want).max() <= 1.5, name
        assert notes(tmp_path / name) == ["converted from ICC profile 'Test'"]


def test_a_profile_whose_name_cannot_be_read_is_used(tmp_path):
    icc = rgb_profile(P3, 2.2).replace(b"Test\0", b"T\x8est\0")  # an accent in a place for ASCII
    Image.new("RGB", (4, 4), (180, 120, 90)).save(tmp_path / "a.png", icc_profile=icc)
    assert np.abs(levels(tmp_path / "a.png") - to_srgb((180, 120, 90), P3, 2.2)).max() <= 1.5
    assert notes(tmp_path / "a.png") == ["converted from ICC profile '(a name that cannot be read)'"]


def test_an_srgb_profile_keeps_the_exact_samples(tmp_path):
    samples = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(samples).save(tmp_path / "a.png", icc_profile=icc)
    assert (levels(tmp_path / "a.png") == samples).all()
    assert notes(tmp_path / "a.png") == []


def test_a_grey_profile_is_converted_and_grey_with_an_rgb_profile_too(tmp_path):
    Image.new("L", (2, 2), 100).save(tmp_path / "a.png", icc_profile=grey_profile(1.0))
    Image.new("L", (2, 2), 100).save(tmp_path / "b.png", icc_profile=rgb_profile(SRGB, 1.0))
    for name in ("a.png", "b.png"):
        assert np.abs(levels(tmp_path / name) - to_srgb((100, 100, 100), SRGB, 1.0)).max() <= 1.5, name


@pytest.mark.parametrize(
    "icc", [b"no profile", rgb_profile(P3, 2.2)[:200], grey_profile(1.8), cmyk_profile()]
)
def test_an_unusable_profile_is_ignored_with_a_warning(tmp_path, caplog, icc):
    Image.new("RGB", (2, 2), (180, 120, 90)).save(tmp_path / "a.png", icc_profile=icc)
    with caplog.at_level(logging.WARNING):
        assert (levels(tmp_path / "a.png") == (180, 120, 90)).all()
    assert f"{tmp_path / 'a.png'}: unusable ICC profile ignored (" in caplog.text
    assert [note[:28] for note in notes(tmp_path / "a.png")] == ["unusable ICC profile ignored"]


def test_cmyk_with_and_without_a_profile(tmp_path):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    cyan.save(tmp_path / "a.jpg", quality=100)  # Pillow writes Adobe's inverted CMYK
    cyan.save(tmp_path / "b.tif")
    cyan.save(tmp_path / "c.jpg", quality=100, icc_profile=cmyk_profile())
    assert np.abs(levels(tmp_path / "a.jpg").astype(int) - (0, 255, 255)).max() <= 3
    assert (levels(tmp_path / "b.tif") == (0, 255, 255)).all()
    assert levels(tmp_path / "c.jpg").min() >= 252  # an invisible ink
    assert notes(tmp_path / "c.jpg") == ["converted from ICC profile 'Test'"]


def test_the_blackest_ink_is_black(tmp_path):
    Image.new("CMYK", (2, 2), (0, 0, 0, 255)).save(tmp_path / "a.tif", icc_profile=cmyk_profile(darkest=50))
    assert levels(tmp_path / "a.tif").max() <= 2  # 50 of 255 in lightness is a grey of 47


def test_grey_one_bit_palette_and_rgb_are_exact(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "l.png")
    Image.fromarray(grey > 99).save(tmp_path / "1.tif")
    palette = Image.fromarray(grey, "L").convert("P")
    palette.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
    palette.save(tmp_path / "p.bmp")
    assert (levels(tmp_path / "l.png") == grey[..., None]).all()
    assert (levels(tmp_path / "l.png", channels=1)[..., 0] == grey).all()
    assert (levels(tmp_path / "1.tif")[..., 2] == np.where(grey > 99, 255, 0)).all()
    assert (levels(tmp_path / "p.bmp") == np.stack([grey, 255 - grey, grey * 0 + 7], -1)).all()
    assert load_image_with_info(tmp_path / "p.bmp")[1].mode == "P"


def test_one_channel_is_the_luminance(tmp_path):
    Image.new("RGB", (2, 2), (200, 100, 50)).save(tmp_path / "a.png")
    want = (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 127.5 - 1
    assert load_image(tmp_path / "a.png", channels=1).flatten().tolist() == pytest.approx(
        [want] * 4, abs=1e-6
    )
    with pytest.raises(ImageError, match="channels=4 came"):
        load_image(tmp_path / "a.png", channels=4)


def half_transparent(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Files whose left pixel is opaque and whose right one is clear: name to (path, colour of the left)."""
    files = {
        name: folder / name for name in ("rgba.png", "la.png", "p.png", "p.gif", "rgb.png", "l.png", "l2.png")
    }
    rgba = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    rgba.putpixel((1, 0), (9, 9, 9, 0))
    rgba.save(files["rgba.png"])
    rgba.convert("LA").save(files["la.png"])
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([200, 100, 50, 9, 9, 9])
    indexed.putpixel((1, 0), 1)
    indexed.save(files["p.png"], transparency=b"\xff\0")
    indexed.save(files["p.gif"], transparency=1)
    rgba.convert("RGB").save(files["rgb.png"], transparency=(9, 9, 9))
    rgba.convert("L").save(files["l.png"], transparency=9)
    png(files["l2.png"], np.array([[0b01110000]], dtype=np.uint8), 0, (b"tRNS", b"\0\3"), depth=2)
    grey = (rgba.convert("L").getpixel((0, 0)),) * 3
    colour = {"la.png": grey, "l.png": grey, "l2.png": (85, 85, 85)}
    return {name: (path, colour.get(name, (200, 100, 50))) for name, path in files.items()}


def test_transparent_pixels_show_the_background(tmp_path):
    for name, (path, colour) in half_transparent(tmp_path).items():
        for background, word in (
            ((255, 255, 255), "white"),
            ((0, 0, 0), "black"),
            ((1, 2, 3), "rgb(1, 2, 3)"),
        ):
            got = levels(path, background=background)
            assert got[0, 0].tolist() == list(colour), name
            assert got[0, 1].tolist() == list(background), name
            assert notes(path, background=background) == [f"transparent pixels composited on {word}"], name


def test_half_alpha_blends_and_opaque_alpha_says_nothing(tmp_path):
    Image.new("RGBA", (1, 1), (200, 100, 50, 51)).save(tmp_path / "a.png")
    Image.new("RGBA", (1, 1), (200, 100, 50, 255)).save(tmp_path / "b.png")
    assert levels(tmp_path / "a.png")[0, 0].tolist() == [round(v / 5 + 255 * 0.8) for v in (200, 100, 50)]
    assert levels(tmp_path / "b.png")[0, 0].tolist() == [200, 100, 50]
    assert notes(tmp_path / "b.png") == []


def test_16_bit_transparent_colours(tmp_path):
    grey = np.array([[[0x1234], [0x1235]]])
    colour = np.array([[(1, 2, 3), (1, 2, 4)]]) * 256 + 7
    path = png(tmp_path / "a.png", grey, 0, (b"tRNS", struct.pack(">H", 0x1235)))
    assert as_integers(path).tolist() == [[[0x1234] * 3, [65535] * 3]]
    path = png(tmp_path / "b.png", colour, 2, (b"tRNS", struct.pack(">3H", *colour[0, 1])))
    assert as_integers(path).tolist() == [[colour[0, 0].tolist(), [65535] * 3]]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_exif_orientations_show_the_same_picture(tmp_path, orientation, suffix):
    upright = Image.new("RGB", (48, 32), RED)
    for box, colour in {(24, 0): GREEN, (0, 16): BLUE, (24, 16): YELLOW}.items():
        upright.paste(colour, (*box, box[0] + 24, box[1] + 16))
    way = Image.Transpose  # how a camera held that way stores it: the inverse of what a viewer does
    stored = [None, way.FLIP_LEFT_RIGHT, way.ROTATE_180, way.FLIP_TOP_BOTTOM, way.TRANSPOSE]
    stored += [way.ROTATE_90, way.TRANSVERSE, way.ROTATE_270]
    turned = upright if orientation == 1 else upright.transpose(stored[orientation - 1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}
    turned.save(path, exif=exif, **options.get(suffix, {}))
    assert np.abs(levels(path).astype(int) - np.asarray(upright)).max() <= (2 if suffix == ".jpg" else 0)
    assert notes(path) == ([f"rotated by EXIF orientation {orientation}"] if orientation > 1 else [])


def test_alpha_turns_with_the_picture(tmp_path):
    image = Image.new("RGBA", (3, 2), (0, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    assert [*map(tuple, np.argwhere(levels(tmp_path / "a.png")[..., 0] == 255))] == [(0, 1)]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_refuse_the_picture(tmp_path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert (levels(tmp_path / "a.png") == RED).all()


def test_the_size_of_a_damaged_picture_is_read_without_a_word(tmp_path, caplog):
    """Pillow looks for EXIF data behind the pixels; the file's name is not known there."""
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    data = path.read_bytes()
    place = data.index(b"IDAT") + 4
    path.write_bytes(data[:place] + bytes(8) + data[place + 8 :])
    read_size(path)
    assert caplog.text == ""
    with pytest.raises(ImageError, match=r"a\.png cannot be read as PNG"):
        load_image(path)


def test_an_avif_is_turned_by_its_boxes_and_not_by_what_its_xmp_says(tmp_path):
    image = Image.fromarray(np.arange(64 * 32 * 3, dtype=np.uint8).reshape(32, 64, 3))
    image.save(tmp_path / "a.avif", xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>')
    assert levels(tmp_path / "a.avif").shape == (32, 64, 3)
    assert read_size(tmp_path / "a.avif") == (64, 32)
    assert notes(tmp_path / "a.avif") == []
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "b.avif", exif=exif)  # which Pillow writes as boxes
    assert levels(tmp_path / "b.avif").shape == (64, 32, 3)


def test_an_aperture_between_two_pixels_keeps_its_size():
    assert headers._clean((722, 1024), (385, 1, 330, 1, 103, 1, -308, 1)) == (271, 39, 656, 369)


def test_an_avif_whose_exif_is_damaged_is_read_without_it(tmp_path):
    image, exif = Image.fromarray(np.arange(64 * 32 * 3, dtype=np.uint8).reshape(32, 64, 3)), Image.Exif()
    exif[0x010E] = "a photograph"
    image.save(tmp_path / "a.avif", exif=exif)
    data = (tmp_path / "a.avif").read_bytes()
    place = data.index(b"a photograph")
    start = max(data.rfind(mark, 0, place) for mark in (b"II*\0", b"MM\0*"))
    damaged = data[: start - 4] + b"\xff" * 4 + data[start:]  # where in them they begin
    assert (levels(damaged) == levels(tmp_path / "a.avif")).all()
    assert notes(damaged)[0].startswith("metadata passed over (EXIF): ")
    assert notes(tmp_path / "a.avif") == []
