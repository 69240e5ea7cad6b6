"""Files as people have them: phones' formats, colours beyond sRGB, broken metadata, and all the rest."""

import io
import logging
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pillow_heif
import pillow_jxl  # noqa: F401  (Pillow writes JPEG XL with it)
import pytest
import torch
from image_files import P3, png, rgb_profile
from PIL import Image, ImageFile, PngImagePlugin

from latentvae.base.errors import ImageError, NoMemoryError, TooManyPixels
from latentvae.images import headers, kinds, reading
from latentvae.images.colour import from_cicp, from_gamma
from latentvae.images.reading import find_images, load_image, load_image_with_info, read_size
from latentvae.images.tensors import to_uint8

# to write such files; readers stay those that the library finds
Image.register_save("HEIF", pillow_heif.as_plugin._save_heif)
RED, GREEN = (200, 30, 40), (20, 180, 60)


def two_colours(size=(64, 32)) -> Image.Image:
    """Red above green."""
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (0, size[1] // 2, *size))
    return image


def levels(path, **options) -> np.ndarray:
    return to_uint8(load_image(path, **options)).permute(1, 2, 0).numpy().astype(int)


def notes(path, **options) -> list[str]:
    return load_image_with_info(path, **options)[1].notes


def heic(path, image: Image.Image, **options):
    image.save(path, "HEIF", quality=-1, chroma=444, **options)
    return path


def without(monkeypatch, *modules: str) -> None:
    """As if these packages were not installed."""
    real = kinds.optional
    monkeypatch.setattr(kinds, "optional", lambda module: None if module in modules else real(module))


# --- phones' formats -------------------------------------------------------------------------------------


def test_heic_is_read_upright_with_its_profile_and_alpha(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = two_colours().transpose(Image.Transpose.ROTATE_90)  # as a camera held upright stores it
    path = heic(tmp_path / "a.heic", turned, exif=exif.tobytes())
    assert np.abs(levels(path) - np.asarray(two_colours())).max() <= 2
    assert read_size(path) == (64, 32)
    assert find_images(tmp_path) == [path]
    clear = two_colours().convert("RGBA")
    clear.putalpha(0)
    heic(tmp_path / "b.heic", clear)
    assert (levels(tmp_path / "b.heic") == 255).all()
    assert notes(tmp_path / "b.heic") == ["transparent pixels composited on white"]
    wide = two_colours()
    wide.info["icc_profile"] = rgb_profile(P3, 2.2)
    heic(tmp_path / "c.heic", wide)
    wide.save(tmp_path / "c.png", icc_profile=rgb_profile(P3, 2.2))
    assert np.abs(levels(tmp_path / "c.heic") - levels(tmp_path / "c.png")).max() <= 2
    assert notes(tmp_path / "c.heic") == ["converted from ICC profile 'Test'"]


def test_the_main_picture_of_a_burst_is_read_and_stated(tmp_path):
    burst = pillow_heif.HeifFile()
    for colour in (RED, GREEN):
        burst.add_from_pillow(Image.new("RGB", (64, 64), colour))
    burst.save(tmp_path / "a.heic", quality=-1, chroma=444)
    burst.save(tmp_path / "b.heic", quality=-1, chroma=444, primary_index=1)
    for name, colour, note in (
        ("a.heic", RED, "first of 2 frames"),
        ("b.heic", GREEN, "picture 2, the main one, of 2 frames"),
    ):
        assert np.abs(levels(tmp_path / name) - colour).max() <= 2
        assert notes(tmp_path / name) == [note]


def test_jpeg_xl_is_read_and_its_exif_does_not_turn_it_again(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # which JPEG XL says in its own header, where the decoder obeys it
    path = tmp_path / "a.jxl"
    two_colours().save(path, lossless=True, exif=exif.tobytes())
    assert (levels(path) == np.asarray(two_colours())).all()
    assert notes(path) == []
    assert read_size(path) == (64, 32)
    Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256)).save(path, lossless=True)
    grey = load_image(path, channels=1)
    assert ((grey.double() + 1) / 2 * 65535).round().long().flatten().tolist() == list(range(65536))


@pytest.mark.parametrize("size", [(64, 32), (1, 1), (300, 200), (1600, 900), (5, 4099)])
def test_a_jpeg_xl_is_refused_by_its_header_before_it_is_decoded(tmp_path, monkeypatch, size):
    stream = io.BytesIO()
    Image.new("L", size).save(stream, "JXL", lossless=True)
    assert headers.jxl_size(io.BytesIO(stream.getvalue()[:64])) == size
    monkeypatch.setattr(kinds, "openers", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(TooManyPixels):
        load_image(stream.getvalue(), max_pixels=size[0] * size[1] - 1)


def test_what_is_missing_is_named_with_the_remedy(tmp_path, monkeypatch):
    heic(tmp_path / "a.jpg", two_colours())  # the content decides
    two_colours().save(tmp_path / "b.jxl")
    Image.registered_extensions()
    monkeypatch.delitem(Image.OPEN, "JXL")
    without(monkeypatch, "pillow_heif", "pillow_jxl")
    remedy = re.escape(kinds.remedy("pillow_heif"))
    with pytest.raises(ImageError, match=rf"a\.jpg is HEIC, a phone's photograph: {remedy}"):
        load_image(tmp_path / "a.jpg")
    with pytest.raises(
        ImageError, match=rf"b\.jxl is a JPEG XL image: {re.escape(kinds.remedy('pillow_jxl'))}"
    ):
        load_image(tmp_path / "b.jxl")
    with pytest.raises(ImageError, match=r"b\.jxl is a JPEG XL image: pip install"):
        find_images(tmp_path / "b.jxl")


def test_an_opener_that_the_user_registered_is_taken(tmp_path, monkeypatch):
    class Dots(ImageFile.ImageFile):
        format = "DOTS"

        def _open(self) -> None:
            self.fp.read(4)
            self._size, self._mode = (2, 2), "L"
            self.tile = [ImageFile._Tile("raw", (0, 0, 2, 2), 4, ("L", 0, 1))]

    (tmp_path / "a.dots").write_bytes(b"DOTS" + bytes([0, 255, 255, 0]))
    with pytest.raises(ImageError, match="is no image by its content"):
        load_image(tmp_path / "a.dots")
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    for table in ("OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, table, dict(getattr(Image, table)))
    Image.register_open("DOTS", Dots, lambda head: head.startswith(b"DOTS"))
    Image.register_extension("DOTS", ".dots")
    assert find_images(tmp_path) == [tmp_path / "a.dots"]
    assert levels(tmp_path / "a.dots", channels=1).ravel().tolist() == [0, 255, 255, 0]


def test_an_opener_that_is_asked_about_every_file_has_no_say_in_what_others_are(monkeypatch):
    def never(file: object, name: str) -> ImageFile.ImageFile:
        raise SyntaxError("not a file of mine")

    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    Image.register_open("MINE", never, None)
    with pytest.raises(ImageError, match=r"^a is a Photoshop document, which is not read"):
        load_image(b"8BPS" + bytes(64), name="a")
    with pytest.raises(ImageError, match=r"^a is no image by its content"):
        load_image(b"nothing" + bytes(64), name="a")


def test_of_no_image_it_is_said_what_can_be_read_here(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(kinds, "optional", lambda module, there=there: there or None)
        said = str(kinds.unreadable("a", b"nothing"))
        assert ("PPM" in said, "HEIC, JPEG XL, raw" in said) == (True, there)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"8BPS\0\1", "a Photoshop document, which is not read: convert it"),
        (b"v/1\x01", "an OpenEXR image"),
        (b"#?RADIANCE\n", "a Radiance HDR image"),
        (b"\0\0\0\x18ftypcrx \0\0\0\0", "a camera's raw file"),
        (b"FUJIFILMCCD-RAW 0201", "a camera's raw file"),
        (b"\n<?xml version='1.0'?><svg>", "an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1", "LFS, which is not read: fetch .* `git lfs pull`$"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "a film"),
    ],
)
def test_what_is_not_read_is_called_what_it_is(monkeypatch, head, words):
    without(monkeypatch, "rawpy", "OpenImageIO")
    with pytest.raises(ImageError, match=rf"^a is .*{words}") as caught:
        load_image(head + bytes(64), name="a")
    assert "no image" not in str(caught.value)
    assert "eplace" not in str(caught.value)


# --- folders with everything in them ---------------------------------------------------------------------


def mixed(folder):
    folder.mkdir(exist_ok=True)
    for name in ("a.heic", "b.HEIC", "c.jxl", "d.exr", "e.psd", "README", "captions.txt", ".hidden.psd"):
        (folder / name).write_bytes(b"x")
    two_colours().save(folder / "f.jpg")
    two_colours().save(folder / "g.mpo", save_all=True, append_images=[two_colours()])
    return folder


def test_a_link_to_nothing_is_counted(tmp_path):
    two_colours().save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    left_out = Counter()
    assert find_images(tmp_path, left_out) == [tmp_path / "a.png"]
    assert kinds.describe(left_out) == "left out: 1 behind broken links"


def test_what_a_folder_leaves_out_is_counted_by_type(tmp_path, monkeypatch, caplog):
    without(monkeypatch, "pillow_heif", "pillow_jxl", "OpenImageIO")
    monkeypatch.delitem(Image.EXTENSION, ".jxl", raising=False)
    left_out = Counter()
    found = find_images(mixed(tmp_path / "all"), left_out)
    assert [path.name for path in found] == ["f.jpg", "g.mpo"]
    assert left_out == {".heic": 2, ".jxl": 1, ".exr": 1, ".psd": 1, "": 1}
    heif, jxl, hdr = (kinds.remedy(module) for module in ("pillow_heif", "pillow_jxl", "OpenImageIO"))
    said = f"left out: 2 .heic ({heif}), 1 without a suffix, 1 .exr ({hdr}), 1 .jxl ({jxl}), 1 .psd"
    assert kinds.describe(left_out) == said
    assert kinds.wants_extra(left_out)
    with caplog.at_level(logging.WARNING):
        find_images(tmp_path / "all")
    assert "left out: 2 .heic" in caplog.text
    for path in found:
        path.unlink()
    with pytest.raises(ImageError, match=r"no image in the folder .*left out: 2 \.heic"):
        find_images(tmp_path / "all")


# --- colours ---------------------------------------------------------------------------------------------


def srgb(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def inserted(path, *chunks: tuple[bytes, bytes], before: bytes = b"IDAT"):
    """Put chunks into a PNG."""
    data = path.read_bytes()
    place = data.index(before) - 4
    path.write_bytes(data[:place] + b"".join(chunk(*each) for each in chunks) + data[place:])
    return path


def test_png_gamma_and_primaries_are_applied_unless_srgb_says_otherwise(tmp_path):
    path = tmp_path / "a.png"
    gamma = (b"gAMA", struct.pack(">I", 100_000))
    linear = np.array(RED) / 255
    two_colours().save(path)
    inserted(path, gamma)
    assert np.abs(levels(path)[0, 0] - srgb(linear)).max() <= 1
    assert notes(path) == ["converted from gamma 1"]
    two_colours().save(path)
    inserted(path, gamma, (b"sRGB", b"\0"))
    assert levels(path)[0, 0].tolist() == list(RED)
    xy = (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046)
    two_colours().save(path)
    inserted(path, gamma, (b"cHRM", struct.pack(">8I", *(round(v * 100_000) for v in xy))))
    matrix = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
    assert np.abs(levels(path)[0, 0] - srgb(matrix @ linear)).max() <= 1  # BT.2087's matrix
    two_colours().save(path)
    inserted(path, (b"gAMA", struct.pack(">I", 45455)))  # what is written for sRGB
    assert levels(path)[0, 0].tolist() == list(RED)
    assert notes(path) == []
    two_colours().save(path)
    inserted(path, (b"gAMA", b"\0\0\0\0"))
    assert notes(path) == ["its gAMA or cHRM was passed over (a gamma of 0)"]
    grey = png(tmp_path / "b.png", np.full((2, 3, 1), 13107), 0, gamma)
    assert np.abs(levels(grey) - srgb(np.array(0.2))).max() <= 1


def eetf(nits: float) -> float:
    """ITU-R BT.2390, section 5.4.1, from 1,000 to 203 nits; as light of which 1 is white."""

    def pq(light: float) -> float:
        power = (light / 10_000) ** (2610 / 16384)
        return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)

    level, most = pq(nits) / pq(1000), pq(203) / pq(1000)
    knee = 1.5 * most - 0.5
    t = (level - knee) / (1 - knee)
    bent = (
        (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    )
    power = ((level if level < knee else bent) * pq(1000)) ** (32 / 2523)
    linear = max(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)
    return 10_000 * linear ** (16384 / 2610) / 203


def test_hdr_is_tone_mapped_relative_to_203_nits(tmp_path):
    nits = np.array([0.5, 10, 50, 100, 203, 500, 1000])
    power = (nits / 10_000) ** (2610 / 16384)
    pq = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    grey = np.round(pq * 65535)[None, :, None].repeat(3, 2)
    path = png(tmp_path / "a.png", grey, 2, (b"cICP", bytes((9, 16, 0, 1))))
    want = srgb(np.array([eetf(each) for each in nits]))
    assert want[-1] == pytest.approx(255, abs=0.1)  # 1,000 nits are white
    assert np.abs(levels(path)[0, :, 1] - want).max() <= 1
    assert notes(path) == [
        "HDR (PQ, BT.2020) tone-mapped to SDR (BT.2390, 1000 nits to 203, which are white)"
    ]
    # of HLG three quarters are what 203 nits are of PQ, on a display of 1,000
    hlg = from_cicp(9, 18).to_srgb(np.full((1, 1), 0.75, np.float32))
    assert 255 * float(hlg[0, 0]) == pytest.approx(float(srgb(np.array(eetf(203)))), abs=1)
    assert from_cicp(1, 13) is None
    assert from_cicp(2, 2) is None
    with pytest.raises(ValueError, match="span no colours"):
        from_gamma(None, ((0.3, 0.3),) * 3 + ((0.3127, 0.329),))


def test_avif_and_heic_colours_and_frame_are_obeyed(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (64, 32), RED).save(stream, "AVIF", quality=100, subsampling="4:4:4")
    data = stream.getvalue()
    assert np.abs(levels(data) - RED).max() <= 3
    wide = data.replace(b"nclx\0\1\0\x0d", b"nclx\0\x0c\0\x0d")
    assert wide != data
    as_png = tmp_path / "a.png"
    Image.new("RGB", (1, 1), RED).save(as_png)
    inserted(as_png, (b"cICP", bytes((12, 13, 0, 1))))
    assert np.abs(levels(wide)[0, 0] - levels(as_png)[0, 0]).max() <= 3
    assert notes(wide) == notes(as_png) == ["converted from Display P3"]
    hdr = heic(tmp_path / "a.heic", two_colours(), color_primaries=9, transfer_characteristics=16)
    assert notes(hdr)[0].startswith("HDR (PQ, BT.2020)")


def test_the_clean_aperture_of_an_avif_is_what_is_shown():
    assert headers._clean((64, 32), (32, 1, 16, 1, -16, 1, -8, 1)) == (0, 0, 32, 16)
    assert headers._clean((64, 32), (64, 1, 32, 1, 0, 1, 0, 1)) is None
    assert headers._clean((64, 32), (64, 1, 32, 1, 9, 1, 0, 1)) is None  # outside
    stream = io.BytesIO()
    two_colours().save(stream, "AVIF", quality=100, subsampling="4:4:4")
    data = stream.getvalue()
    # one more property, in the place of the colours' among those of the image
    clap = struct.pack(">I4sIIIIiIiI", 40, b"clap", 64, 1, 16, 1, 0, 1, 8, 1)
    end = data.index(b"ipma") - 4
    whole = data[:end] + clap + data[end:]
    sizes = [(name, -4) for name in (b"meta", b"iprp", b"ipco")]
    for name, shift in [*sizes, (b"iloc", 4 + 14)]:  # sizes of boxes, and where the pixels are
        place = whole.index(name) + shift
        number = int.from_bytes(whole[place : place + 4], "big") + len(clap)
        whole = whole[:place] + struct.pack(">I", number) + whole[place + 4 :]
    place = whole.index(b"ipma") + 4 + 14
    whole = whole[:place] + bytes((0x85,)) + whole[place + 1 :]
    picture = levels(whole)
    assert picture.shape == (16, 64, 3)
    assert np.abs(picture[2:] - GREEN).max() <= 6  # the lower half


def test_an_avif_with_a_list_of_properties_for_each_item_is_read(tmp_path) -> None:
    """Alpha as early encoders wrote it: libavif refuses two such lists of one version."""
    image, stream = two_colours((48, 32)).convert("RGBA"), io.BytesIO()
    image.putalpha(Image.linear_gradient("L").resize((48, 32)))
    image.save(stream, "AVIF", quality=95, subsampling="4:4:4")
    one = stream.getvalue()
    at = one.index(b"ipma") + 4
    length = int.from_bytes(one[at - 8 : at - 4], "big") - 8
    flags, entries = one[at : at + 4], one[at + 8 : at + length]
    first = 3 + entries[2]  # item, count, numbers
    lists = b"".join(
        (12 + 4 + len(part)).to_bytes(4, "big") + b"ipma" + flags + (1).to_bytes(4, "big") + part
        for part in (entries[:first], entries[first:])
    )
    two = one[: at - 8] + lists + one[at + length :]
    grown = len(two) - len(one)
    for name in (b"meta", b"iprp"):  # whose sizes stand before their names
        place = two.index(name) - 4
        size = int.from_bytes(two[place : place + 4], "big") + grown
        two = two[:place] + size.to_bytes(4, "big") + two[place + 4 :]
    place = two.index(b"iloc") + 12 + 6  # where the data of both items lie
    for start in (place, place + 14):
        where = int.from_bytes(two[start : start + 4], "big") + grown
        two = two[:start] + where.to_bytes(4, "big") + two[start + 4 :]
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(io.BytesIO(two))
    for name, data in (("one", one), ("two", two)):
        (tmp_path / f"{name}.avif").write_bytes(data)
    pictures = [load_image_with_info(tmp_path / f"{name}.avif") for name in ("one", "two")]
    assert torch.equal(pictures[0][0], pictures[1][0])
    assert pictures[1][1].notes == ["transparent pixels composited on white"]
    assert read_size(tmp_path / "two.avif") == (48, 32)
    (tmp_path / "cut.avif").write_bytes(two[:-60])
    with pytest.raises(ImageError, match="AVIF"):
        load_image(tmp_path / "cut.avif")


def test_a_gain_map_is_not_applied_and_said_so(tmp_path):
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x xmlns:hdrgm='http://ns.adobe.com/hdr-gain-map/1.0/'/>"
    two_colours().save(tmp_path / "a.jpg", quality=100, subsampling=0)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(
        data[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + data[2:]
    )
    assert notes(tmp_path / "b.jpg") == [reading.GAIN_MAP_NOTE]
    assert (levels(tmp_path / "b.jpg") == levels(tmp_path / "a.jpg")).all()


def test_an_orientation_in_xmp_is_called_that(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
    two_colours().save(tmp_path / "a.png", pnginfo=text(("XML:com.adobe.xmp", xmp.decode())))
    assert notes(tmp_path / "a.png") == ["rotated by XMP orientation 6"]
    assert levels(tmp_path / "a.png").shape == (64, 32, 3)


# --- metadata never costs a picture ----------------------------------------------------------------------


def text(*entries: tuple[str, str], compressed: bool = False) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, value in entries:
        info.add_itxt(key, value, zip=compressed)
    return info


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "after", "damaged", "profile", "short"])
def test_broken_or_large_metadata_does_not_refuse_a_sound_png(tmp_path, kind):
    path, long = tmp_path / "a.png", "workflow " * 200_000
    two_colours().save(path, pnginfo=text(("prompt", long), compressed=True) if kind == "iTXt" else None)
    packed = b"prompt\0\0" + zlib.compress(long.encode())
    if kind == "zTXt":
        inserted(path, (b"zTXt", packed))
    elif kind == "after":
        inserted(path, (b"zTXt", packed), before=b"IEND")
    elif kind == "damaged":
        inserted(path, (b"zTXt", packed[:900]))
        data = path.read_bytes()
        path.write_bytes(data[:60] + b"\xff" + data[61:])
    elif kind == "profile":
        inserted(path, (b"iCCP", b"Test\0\1" + zlib.compress(bytes(100))))
    elif kind == "short":
        inserted(path, (b"pHYs", b"\0"))
    with pytest.raises(Exception, match=r"\S") as refused, Image.open(path) as image:
        image.load()
    assert not isinstance(refused.value, ImageError)
    assert (levels(path) == np.asarray(two_colours())).all()
    said = "unusable ICC profile ignored" if kind == "profile" else "metadata passed over ("
    assert notes(path)[0].startswith(said)


def test_a_long_profile_is_used_and_a_torn_picture_still_refused(tmp_path):
    profile = rgb_profile(P3, 2.2)
    long = profile[:0] + struct.pack(">I", len(profile) + 2_000_000) + profile[4:] + bytes(2_000_000)
    two_colours().save(tmp_path / "a.png", icc_profile=long)
    two_colours().save(tmp_path / "b.png", icc_profile=profile)
    with pytest.raises(ValueError, match="too large"):
        Image.open(tmp_path / "a.png")
    assert (levels(tmp_path / "a.png") == levels(tmp_path / "b.png")).all()
    torn = (tmp_path / "b.png").read_bytes()
    with pytest.raises(ImageError, match=r"torn cannot be read as PNG: .* If another program opens it"):
        load_image(torn[: len(torn) - 40], name="torn")


# --- memory and messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["decoding", "converting", "compositing"])
def test_a_full_memory_is_said_as_such(tmp_path, monkeypatch, where):
    path = tmp_path / "a.png"
    two_colours().save(path, icc_profile=rgb_profile(P3, 2.2))

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    if where == "decoding":
        monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    elif where == "converting":  # where any other error means that the profile cannot be used
        monkeypatch.setattr("latentvae.images.pixels.icc_conversion", refuse)
    else:
        monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(
        NoMemoryError, match=r"a\.png could not be read: the machine's memory was full"
    ) as caught:
        load_image(path)
    assert "eplace" not in str(caught.value)


def test_libtiff_is_silent_and_the_error_names_file_and_format(tmp_path):
    two_colours().save(tmp_path / "a.tif", compression="tiff_lzw")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[8:40] = bytes(range(200, 232))
    (tmp_path / "a.tif").write_bytes(bytes(data))
    code = (
        "import sys; from latentvae.images.reading import load_image\n"
        "try: load_image(sys.argv[1])\nexcept Exception as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.tif"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "a.tif cannot be read as TIFF" in done.stdout


def test_a_bare_key_is_explained():
    assert reading._reason(KeyError(320)) == "the value 320 in it has no meaning"
    assert reading._reason(OSError(b"Input/output error")) == "Input/output error"  # as LibRaw's are
    assert reading._reason(ValueError("Bad box\n (at 7).\n")) == "Bad box (at 7)"  # as libheif's end


@pytest.mark.slow
def test_reading_takes_less_than_18_bytes_a_pixel(tmp_path):
    """Of 12 in the result; measured in a process of its own, as the most that was ever in memory."""
    code = (
        "import sys, torch; from latentvae.images.reading import load_image\n"
        "def status(name):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))\n"
        "load_image(sys.argv[1])\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = status('VmRSS'); image = load_image(sys.argv[2])\n"
        "print((status('VmHWM') - before) / image[0].numel())"
    )
    two_colours().convert("RGBA").save(tmp_path / "small.png")
    large = two_colours((2000, 2000)).convert("RGBA")
    large.putalpha(100)
    large.save(tmp_path / "large.png", compress_level=1)
    command = [sys.executable, "-c", code, tmp_path / "small.png", tmp_path / "large.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 22  # and 50 by whole arrays
