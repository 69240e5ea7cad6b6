"""Finding, refusing, padding and saving images; what kinds of file load is in test_reading.py."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import png
from PIL import Image, ImageFile, features

from latentvae.base.errors import ImageError
from latentvae.images.reading import MAX_PIXELS, find_images, load_image, load_image_with_info
from latentvae.images.saving import save_image, to_pil
from latentvae.images.tensors import Padding, crop_padding, from_uint8, pad_to_multiple, to_uint8


def noise(*shape: int) -> torch.Tensor:
    """Random images in [-1, 1] that 8 bits hold exactly."""
    return from_uint8(
        torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    )


def photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(noise(3, 32, 32)).save(path)
    return path


def test_a_folder_is_searched_recursively_sorted_and_without_hidden_files(tmp_path):
    wanted = [photo(tmp_path / name) for name in ("a.png", "b/c.JPG", "b/日本 é.webp", "d.tiff")]
    for name in (".hidden.png", ".cache/e.png"):
        photo(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert find_images(tmp_path) == sorted(wanted)
    assert find_images(str(tmp_path / "a.png")) == [tmp_path / "a.png"]
    assert find_images([tmp_path / "d.tiff", tmp_path]) == [tmp_path / "d.tiff", *sorted(wanted)[:3]]


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path):
    photo(tmp_path / "set/a.png")
    photo(tmp_path / "set/sub/d.png")
    photo(tmp_path / "above.png")
    photo(tmp_path / "elsewhere/b.png")
    (tmp_path / "set/alias").symlink_to(tmp_path / "set/sub")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set")
    (tmp_path / "set/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/up").symlink_to(tmp_path)
    (tmp_path / "set/one").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/two").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/c.png").symlink_to(tmp_path / "set/c.png")  # a link to itself is no file
    wanted = [tmp_path / "set" / name for name in ("a.png", "one/b.png", "sub/d.png")]
    assert find_images(tmp_path / "set") == wanted


def test_paths_without_images_say_which_and_what_is_accepted(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ImageError, match=r"gone\.png does not exist: name .*\.jpg"):
        find_images(tmp_path / "gone.png")
    with pytest.raises(ImageError, match=r"no image in the folder .*: put files there .*\.png"):
        find_images(tmp_path)
    with pytest.raises(ImageError, match=r"a\.txt ends in '\.txt'.*\.webp"):
        find_images(tmp_path / "a.txt")
    with pytest.raises(ImageError, match="no path came"):
        find_images([])
    with pytest.raises(ImageError, match="cannot be read"):
        find_images(tmp_path / ("x" * 300 + ".png"))


def test_every_suffix_that_is_found_is_also_read(tmp_path):
    suffixes = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"]
    suffixes += [".avif"] if features.check("avif") else []
    for suffix in suffixes:
        path = tmp_path / f"é{suffix}"
        Image.new("L" if suffix == ".pgm" else "RGB", (20, 10), 128).save(path)
        image, info = load_image_with_info(path)
        assert image.shape == (3, 10, 20)
        assert image.dtype == torch.float32
        assert (info.width, info.height) == (20, 10)
        assert find_images(path) == [path]
    assert len(find_images(tmp_path)) == len(suffixes)


def test_the_first_frame_of_an_animation_is_read_and_stated(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif", "a.mpo"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        image, info = load_image_with_info(tmp_path / name)
        assert (image.mean((1, 2)) - torch.tensor([1.0, -1, -1])).abs().max() < 0.05, name
        assert info.notes == ["first of 2 frames"], name


def test_a_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\x08IDAT12345678")
    gif = tmp_path / "bomb.gif"
    gif.write_bytes(b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + b"\0\0\0,\0\0\0\0\x60\xea\x60\xea\0")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the bomb was decoded"))
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match=rf"bomb\.png is 50000 x 50000 .* at most {MAX_PIXELS} .* shrink it"):
        load_image(path)
    with pytest.raises(ImageError, match=r"bomb\.gif"):
        load_image(gif)
    assert before == Image.MAX_IMAGE_PIXELS


def test_max_pixels_is_the_limit_and_pillows_is_neither_obeyed_nor_changed(tmp_path, monkeypatch):
    path = photo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="32 x 32 = 1024 pixels, but at most 1023"):
        load_image(path, max_pixels=1023)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert load_image(path, max_pixels=1024).shape == (3, 32, 32)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif", ".webp", ".jpg", ".bmp"])
def test_pillows_bomb_warning_never_surfaces(tmp_path, monkeypatch, suffix):
    path = photo(tmp_path / f"a{suffix}")
    if suffix == ".gif":  # a frame larger than its screen: Pillow warns while it opens the file
        path.write_bytes(path.read_bytes()[:6] + b"\1\0\1\0" + path.read_bytes()[10:])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # 1024 pixels warn, but are no error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filters = list(warnings.filters)
        assert load_image(path).shape == (3, 32, 32)
        assert warnings.filters == filters


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif", ".gif", ".ppm"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    whole = photo(tmp_path / f"a{suffix}").read_bytes()
    for length in (17, len(whole) // 2):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError, match=rf"cut\{suffix}") as caught:
            load_image(path)
        assert caught.value.__cause__ is not None or "no image" in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_flipped_bits_give_a_picture_or_an_image_error(tmp_path):
    draw = np.random.default_rng(0)
    for suffix in (".png", ".jpg", ".webp", ".tif", ".gif", ".bmp", ".ppm"):
        whole = np.frombuffer(photo(tmp_path / f"a{suffix}").read_bytes(), dtype=np.uint8)
        for _ in range(30):
            broken = whole.copy()
            broken[draw.integers(0, min(400, len(whole)), 4)] = draw.integers(0, 256, 4)
            (tmp_path / "b").write_bytes(broken.tobytes())
            try:
                image = load_image(tmp_path / "b", max_pixels=10**6)
            except ImageError as error:
                assert str(tmp_path / "b") in str(error)  # noqa: PT017
            else:
                assert image.shape[0] == 3
                assert image.abs().max() <= 1


def test_what_is_no_picture_is_refused_with_its_name_and_reason(tmp_path):
    (tmp_path / "text.png").write_text("this is a text")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    png(tmp_path / "flat.png", np.zeros((4, 0, 1)), 0)
    for name, reason in {
        "text.png": "no image by its content",
        "empty.png": r"empty \(0 bytes\)",
        # Pillow knows it, and would run Ghostscript
        "page.eps": r"page\.eps is a PostScript document, which is not read: convert",
        "flat.png": r"flat\.png",
        "gone.png": "does not exist",
        ".": "is no file",
    }.items():
        with pytest.raises(ImageError, match=reason) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_what_the_system_refuses_is_an_image_error_with_its_cause(tmp_path, monkeypatch):
    path = photo(tmp_path / "a.png")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match=r"a\.png cannot be read: .*Permission denied") as caught:
        load_image(path)
    assert isinstance(caught.value.__cause__, PermissionError)


def test_bytes_load_like_the_file_they_come_from(tmp_path, monkeypatch):
    (tmp_path / "deep.png").write_bytes(
        png(tmp_path / "x", noise(8, 8, 3).numpy() * 100 + 999, 2).read_bytes()
    )
    for suffix in (".png", ".jpg", ".webp", ".bmp", ".tif", ".gif", ".ppm"):
        photo(tmp_path / f"a{suffix}")
    for path in find_images(tmp_path):
        image, info = load_image_with_info(path.read_bytes(), name="shard.tar:a")
        assert torch.equal(image, load_image(path)), path
        assert info == load_image_with_info(path)[1]
    with pytest.raises(ImageError, match=r"^shard\.tar:a\.png cannot be read"):
        load_image((tmp_path / "a.png").read_bytes()[:100], name="shard.tar:a.png")
    with pytest.raises(ImageError, match=r"^image bytes is empty \(0 bytes\)"):
        load_image(b"")


@pytest.mark.parametrize("suffix", [".bmp", ".ppm", ".tif"])
def test_the_name_of_bytes_never_opens_a_file(tmp_path, suffix):
    """Pillow maps uncompressed pictures from the file of that name."""
    Image.new("L", (8, 8), 10).save(tmp_path / f"secret{suffix}")
    Image.new("L", (8, 8), 200).save(tmp_path / f"sent{suffix}")
    sent = (tmp_path / f"sent{suffix}").read_bytes()
    assert (to_uint8(load_image(sent, name=str(tmp_path / f"secret{suffix}"))) == 200).all()


def test_8_bits_survive_the_round_trip_and_rounding_clamps():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert (to_uint8(from_uint8(every)) == every).all()
    assert to_uint8(torch.tensor([-7.0, -1, 0.0, 1, 7])).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(torch.tensor([0.5, 0.5039]).bfloat16()).dtype == torch.uint8
    halfway = torch.tensor([(99.6 / 127.5) - 1, (99.4 / 127.5) - 1])
    assert to_uint8(halfway).tolist() == [100, 99]
    array = every[0, 0].numpy()
    assert from_uint8(array).shape == (1, 16, 16)
    assert from_uint8(np.zeros((2, 5, 4, 3), np.uint8)).shape == (2, 3, 5, 4)
    with pytest.raises(ImageError, match="float64 values came, but uint8"):
        from_uint8(np.zeros((2, 2)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused(bad):
    with pytest.raises(ImageError, match="1 of 12 values are NaN or infinite"):
        to_uint8(torch.tensor([bad] + [0.0] * 11).reshape(3, 2, 2))


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_saving_and_loading_is_bitwise(tmp_path, suffix, channels):
    images = noise(channels, 13, 7)
    path = tmp_path / f"日本 é{suffix}"
    save_image(images, path)
    assert torch.equal(to_uint8(load_image(path, channels=channels)), to_uint8(images))
    save_image(images[None] * 0, path)  # replaces
    assert (to_uint8(load_image(path)) == 128).all()
    assert list(tmp_path.iterdir()) == [path]


def test_jpeg_keeps_the_colour_resolution(tmp_path):
    save_image(noise(3, 32, 32), tmp_path / "a.JPG")
    with Image.open(tmp_path / "a.JPG") as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
        assert image.format == "JPEG"


def test_saving_says_what_is_wrong_and_leaves_nothing(tmp_path):
    image = noise(3, 4, 4)
    with pytest.raises(ImageError, match=r"a\.gif ends in '\.gif'"):
        save_image(image, tmp_path / "a.gif")
    with pytest.raises(ImageError, match=r"b\.png cannot be written \(No such file"):
        save_image(image, tmp_path / "gone" / "b.png")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ImageError, match="cannot be written"):
        save_image(image, tmp_path / "file" / "b.png")
    with pytest.raises(ImageError, match=r"shape \(2, 3, 4, 4\) came"):
        save_image(noise(2, 3, 4, 4), tmp_path / "b.png")
    with pytest.raises(ImageError, match="NaN"):
        save_image(image * float("nan"), tmp_path / "b.png")
    with pytest.raises(ImageError, match="cannot be written"):
        save_image(torch.zeros(1, 1, 20_000), tmp_path / "b.webp")  # wider than WebP goes
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("multiple", [8, 16])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 5), (2, 33), (127, 65)])
def test_padding_reflects_to_the_multiple_and_crops_back_bitwise(size, multiple):
    images = noise(2, 3, *size)
    padded, padding = pad_to_multiple(images, multiple)
    height, width = (-(-side // multiple) * multiple for side in size)
    assert padded.shape == (2, 3, height, width)
    want = np.pad(images.numpy(), ((0, 0), (0, 0), (0, height - size[0]), (0, width - size[1])), "reflect")
    assert (padded.numpy() == want).all()
    assert torch.equal(padding.crop(padded), images)
    assert torch.equal(crop_padding(padded, padding), images)
    assert padding == Padding(0, 0, width - size[1], height - size[0], *size)


def test_no_padding_is_no_copy_and_any_dtype_pads():
    images = noise(3, 16, 32)
    assert pad_to_multiple(images, 8)[0] is images
    assert pad_to_multiple(to_uint8(images), 24)[0].shape == (3, 24, 48)
    assert pad_to_multiple(noise(3, 5).bfloat16(), 8)[0].dtype == torch.bfloat16


def test_cropping_another_size_is_refused():
    padding = pad_to_multiple(noise(3, 127, 65), 8)[1]
    with pytest.raises(ImageError, match=r"\(3, 120, 64\), but this padding was made for 128 x 72"):
        padding.crop(noise(3, 120, 64))
    with pytest.raises(ImageError, match="0 x 4 pixels cannot be padded"):
        pad_to_multiple(torch.zeros(3, 0, 4), 8)
