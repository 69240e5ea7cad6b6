"""TIFFs of every make: what tifffile writes is read to the last bit, or with a note of what was lost."""

import itertools
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from image_files import dng

from latentvae.base.errors import ImageError, TooManyPixels
from latentvae.images import kinds, tiffs
from latentvae.images.reading import find_images, load_image, load_image_with_info, read_size
from latentvae.images.sources import open_source
from latentvae.images.tensors import to_uint8

CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}
PHOTOMETRIC = {"L": "minisblack", "LA": "minisblack", "CMYK": "separated"}
WHITE = {"u1": 255, "u2": 65535, "u4": 4294967295, "f2": 1, "f4": 1, "f8": 1}


def samples(mode: str, kind: str) -> np.ndarray:
    """Random samples (5, 7, C) with the whole range in them."""
    draw = np.random.default_rng(0).random((5, 7, CHANNELS[mode]))
    draw[0, 0], draw[0, 1] = 1, 0
    return draw.astype(kind) if kind[0] == "f" else np.round(draw * WHITE[kind]).astype(kind)


def write(path, values: np.ndarray, mode: str, planar: bool, **options) -> None:
    if "A" in mode:
        options["extrasamples"] = ["unassalpha"]
    if values.shape[2] > 1:
        options["planarconfig"] = "separate" if planar else "contig"
        values = np.moveaxis(values, -1, 0) if planar else values
    else:
        values = values[..., 0]
    tifffile.imwrite(path, np.ascontiguousarray(values), photometric=PHOTOMETRIC.get(mode, "rgb"), **options)


def wanted(values: np.ndarray, mode: str, kind: str) -> np.ndarray:
    """The picture in 0..1 on white, (5, 7, 1 or 3), in float64."""
    scaled = values.astype(np.float64) / WHITE[kind]
    if mode == "CMYK":
        return (1 - scaled[..., :3]) * (1 - scaled[..., 3:])
    if "A" in mode:
        return scaled[..., :-1] * scaled[..., -1:] + 1 - scaled[..., -1:]
    return scaled


@pytest.mark.parametrize("mode", CHANNELS)
def test_every_tiff_that_tifffile_writes(tmp_path, mode):
    path, checked = tmp_path / "a.tif", 0
    for kind, planar, order, compression in itertools.product(
        ("u1", "u2", "f2", "f4", "f8", "u4"), (False, True), "<>", (None, "zlib", "predicted")
    ):
        if (mode == "L" and planar) or (mode == "CMYK" and kind[0] in "f") or (mode != "L" and kind == "u4"):
            continue
        values = samples(mode, kind)
        options = {"byteorder": order}
        if compression is not None:
            # of floats the predictor needs a package that we do not
            options |= {"compression": "zlib", "rowsperstrip": 2}
            options["predictor"] = compression == "predicted" and kind[0] == "u"
        write(path, values, mode, planar, **options)
        image, info = load_image_with_info(path)
        got = (image.permute(1, 2, 0).double().numpy() + 1) / 2
        rounded = any("read as 8" in note for note in info.notes)
        # inks are mixed at 8 bits by Pillow, whose formula rounds twice
        level = 2 / 255 if mode == "CMYK" else 1 / 255 if rounded else 1e-6
        about = (mode, kind, planar, order, compression, info.notes)
        assert np.abs(got - wanted(values, mode, kind)).max() <= level, about
        assert not rounded or kind == "u2", about  # only 16 bits lose any, and they say so
        assert not (rounded and planar and mode != "CMYK"), about
        checked += 1
    assert checked >= 24


def test_planes_packed_in_a_way_that_only_libtiff_knows_keep_8_bits_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tiffs, "DEFLATE", set())  # as if it were LZW
    values = samples("RGB", "u2")
    write(tmp_path / "a.tif", values, "RGB", True, compression="zlib")
    image, info = load_image_with_info(tmp_path / "a.tif")
    assert info.notes == ["16 bits per channel read as 8"]
    assert np.abs((image.permute(1, 2, 0).numpy() + 1) / 2 - values / 65535).max() <= 1 / 255


def test_32_bit_integers_state_their_white(tmp_path):
    for most, white in ((4294967295, 4294967295), (65535, 65535)):
        tifffile.imwrite(tmp_path / "a.tif", np.array([[0, most // 2, most]], dtype=np.uint32))
        image, info = load_image_with_info(tmp_path / "a.tif", channels=1)
        assert np.allclose(image[0, 0].numpy(), [-1, 0, 1], atol=1e-4)
        assert info.notes == [f"32-bit integers, {white} read as white"]


def test_what_tifffile_reads_is_turned_limited_and_refused_like_the_rest(tmp_path, monkeypatch):
    values = samples("RGB", "f4")
    tags = [(274, "H", 1, 6, True)]
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extratags=tags)
    image, info = load_image_with_info(tmp_path / "a.tif")
    assert (image.permute(1, 2, 0).numpy() == np.rot90(values, -1) * 2 - 1).all()
    assert info.notes == ["rotated by EXIF orientation 6"]
    with pytest.raises(TooManyPixels, match="7 x 5 = 35 pixels, but at most 34"):
        load_image(tmp_path / "a.tif", max_pixels=34)
    tifffile.imwrite(tmp_path / "b.tif", values * 2, photometric="rgb")
    with pytest.raises(ImageError, match=r"b\.tif holds floats from 0 to 2, but floats in \[0, 1\]"):
        load_image(tmp_path / "b.tif")


def test_a_part_that_inflates_beyond_the_picture_is_refused(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", np.zeros((512, 512, 3), np.float32), photometric="rgb", compression="zlib"
    )
    data = bytearray((tmp_path / "a.tif").read_bytes())
    for tag in (256, 257):  # now 16 x 16 pixels
        place = data.index(tag.to_bytes(2, "little") + b"\4\0\1\0\0\0")
        data[place + 8 : place + 12] = (16).to_bytes(4, "little")
    with pytest.raises(ImageError, match="inflate beyond its size"):
        load_image(bytes(data), name="a.tif")


def test_a_camera_s_raw_file_is_developed_or_refused_but_never_its_preview(tmp_path, monkeypatch):
    path = dng(tmp_path / "a.nef")
    image, info = load_image_with_info(path)
    assert image.shape[1:] != (8, 8)  # the preview
    assert info.format == "RAW"
    assert info.notes[0].startswith("developed from a camera's raw file")
    assert image.mean() > -0.9
    with pytest.raises(TooManyPixels):
        load_image(path, max_pixels=100)
    monkeypatch.setattr(kinds, "optional", lambda module: None)
    remedy = re.escape(kinds.remedy("rawpy"))
    with pytest.raises(ImageError, match=rf"a\.nef is a camera's raw file.*{remedy}"):
        load_image(path)


def sensor_begins(path, place: int) -> None:
    """Move where the samples of a DNG's sensor are said to begin."""
    with tifffile.TiffFile(path) as tiff:
        where = tiff.pages[0].pages[0].tags[tiffs.STRIPS].valueoffset
    data = path.read_bytes()
    path.write_bytes(data[:where] + struct.pack("<I", place) + data[where + 4 :])


@pytest.mark.parametrize("name", ["scan.nef", "scan.tif"])
def test_of_a_film_scanner_s_file_the_picture_is_read_and_not_its_preview(tmp_path, name, monkeypatch):
    values = samples("RGB", "u1")
    with tifffile.TiffWriter(tmp_path / name) as tiff:
        tiff.write(values[::2, ::2], photometric="rgb", subfiletype=1, subifds=1)
        tiff.write(values, photometric="rgb", subfiletype=0, compression="zlib")
    image, info = load_image_with_info(tmp_path / name)
    assert (to_uint8(image).permute(1, 2, 0).numpy() == values).all()
    assert info.notes == ["the full picture, which stands below a preview of it"]
    with pytest.raises(TooManyPixels):
        load_image(tmp_path / name, max_pixels=34)
    monkeypatch.setattr(tiffs, "DEFLATE", set())  # as if it were LZW
    with pytest.raises(ImageError, match=rf"{name} is a TIFF that shows a preview"):
        load_image(tmp_path / name)


def test_a_raw_file_that_ends_too_early_is_refused(tmp_path):
    path = dng(tmp_path / "a.dng")
    sensor_begins(path, path.stat().st_size)  # as in the first part of a download
    with pytest.raises(ImageError, match=r"a\.dng is a camera's raw file that ends too early"):
        load_image(path)


@pytest.mark.parametrize("find", [find_images, open_source])
def test_a_raw_file_that_is_named_without_the_extra_is_answered_with_it(tmp_path, monkeypatch, find):
    monkeypatch.setattr(kinds, "optional", lambda module: None)
    with pytest.raises(ImageError, match=r"a\.dng is a camera's raw file: pip install .*raw"):
        find(str(dng(tmp_path / "a.dng")))


@pytest.mark.slow
def test_what_libraw_says_of_a_damaged_file_names_it(tmp_path):
    """In a process of its own, where Pillow has not been asked for its formats yet."""
    path = dng(tmp_path / "a.nef")
    path.write_bytes(path.read_bytes()[:-8])
    flat = tmp_path / "b.tif"
    tifffile.imwrite(flat, samples("RGB", "f4"), photometric="rgb")
    flat.write_bytes(flat.read_bytes()[:-8])
    code = (
        "import sys; from latentvae.images.reading import load_image\n"
        "try: load_image(sys.argv[1])\nexcept Exception as error: print(error)"
    )
    for file, kind in ((path, "raw: Input/output error"), (flat, "TIFF: ")):
        done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
        assert f"{file} cannot be read as {kind}" in done.stdout
        assert all(line.startswith(str(file)) for line in done.stderr.splitlines())


def test_a_raw_file_is_developed_in_a_worker_without_a_word(tmp_path):
    path = dng(tmp_path / "a.dng")
    code = (
        "import multiprocessing, sys, torch; from latentvae.images.reading import load_image\n"
        "torch.set_num_threads(1)\n"
        "worker = multiprocessing.get_context('fork').Process(target=load_image, args=sys.argv[1:])\n"
        "worker.start(); worker.join(); print(worker.exitcode)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize(
    ("maker", "is_raw"), [(b"Phase One A/S", True), (b"Leaf", True), (b"Scanner", False)]
)
def test_a_digital_backs_file_is_raw_by_its_second_header_and_its_maker(tmp_path, maker, is_raw):
    tags = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 1}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    entries.insert(5, struct.pack("<HHII", tiffs.MAKE, 2, len(maker) + 1, 12 + 2 + 12 * 10 + 4))
    body = struct.pack("<H", 10) + b"".join(entries) + bytes(4) + maker + b"\0"
    data = b"II*\0" + struct.pack("<I", 12) + b"IIII" + body
    if is_raw:
        with pytest.raises(ImageError, match="a cannot be read as raw"):
            load_image(data, name="a")
    else:  # grey pixels of that value
        assert to_uint8(load_image(data)).flatten().tolist() == [ord("I")] * 3


def test_a_palette_of_8_bits_is_not_black(tmp_path):
    path = tmp_path / "a.tif"
    for scale in (1, 257):  # as some programs write it, and as TIFF has it
        colours = np.arange(768, dtype=np.uint16).reshape(3, 256) % 256 * scale
        tifffile.imwrite(path, np.arange(256, dtype=np.uint8)[None], photometric="palette", colormap=colours)
        assert to_uint8(load_image(path))[:, 0].tolist() == [list(range(256))] * 3


def test_an_orientation_of_one_byte_is_obeyed(tmp_path):
    values = samples("RGB", "u1")
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extratags=[(274, "B", 1, 6, True)])
    image, info = load_image_with_info(tmp_path / "a.tif")
    assert (to_uint8(image).permute(1, 2, 0).numpy() == np.rot90(values, -1)).all()
    assert info.notes == ["rotated by EXIF orientation 6"]
    assert read_size(tmp_path / "a.tif") == (5, 7)


@pytest.mark.parametrize("planar", [False, True])
def test_ycbcr_without_compression_is_refused_and_never_shown_as_rgb(tmp_path, planar):
    values = samples("RGB", "u1")
    values = np.moveaxis(values, -1, 0) if planar else values
    layout = "separate" if planar else "contig"
    tifffile.imwrite(
        tmp_path / "a.tif", np.ascontiguousarray(values), photometric="ycbcr", planarconfig=layout
    )
    with pytest.raises(ImageError, match=r"a\.tif is a TIFF of YCBCR .* save it as RGB"):
        load_image(tmp_path / "a.tif")


def test_what_pillow_refuses_and_tifffile_reads_is_read(tmp_path, capfd):
    values = samples("RGB", "u1")
    path = tmp_path / "big.tif"
    tifffile.imwrite(path, values, photometric="rgb", bigtiff=True, byteorder=">")
    assert (to_uint8(load_image(path)).permute(1, 2, 0).numpy() == values).all()
    with pytest.raises(TooManyPixels):
        load_image(path, max_pixels=1)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ImageError, match=r"big\.tif cannot be read as TIFF: Missing dimensions"):
        load_image(path)
    assert capfd.readouterr().err == ""


def test_nothing_is_said_of_tags_that_names_no_file(tmp_path):
    """Where nothing else has set up logging and warnings, both go to standard error."""
    tags = [(40000, "H", 1, 6, True)]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, samples("RGB", "f4"), photometric="rgb", extratags=tags)
    data = path.read_bytes()
    place = data.index(struct.pack("<HHI", 40000, 3, 1))
    path.write_bytes(data[: place + 4] + struct.pack("<II", 1000, 1 << 30) + data[place + 12 :])
    code = "import sys; from latentvae.images.reading import load_image; load_image(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stderr == ""
