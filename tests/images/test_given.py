"""Pictures that a program holds: Pillow images, arrays, bytes and open files give what their file gives."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import textured
from image_files import png
from PIL import Image, ImageCms

import latentvae
from latentvae.base.errors import ImageError
from latentvae.images.reading import load_image, load_image_with_info

MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(textured(23, 17, 0)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_bytes_open_files_and_pillow_images_give_what_the_file_gives(picture: Path) -> None:
    wanted, data = load_image(picture), picture.read_bytes()
    for given in (str(picture), data, bytearray(data), memoryview(data), io.BytesIO(data)):
        assert torch.equal(load_image(given), wanted)
    with picture.open("rb") as file:
        assert torch.equal(load_image(file), wanted)
    with Image.open(picture) as image:
        assert torch.equal(load_image(image), wanted)  # not loaded yet
        image.load()
        assert torch.equal(load_image(image), wanted)
        image.putpixel((0, 0), (1, 2, 3))  # what was changed since counts
        assert load_image(image)[0, 0, 0] == 1 / 127.5 - 1


@pytest.mark.parametrize("mode", MODES)
def test_a_pillow_image_of_any_mode_is_read_as_pillow_shows_it(mode: str) -> None:
    colours = Image.fromarray(textured(23, 17, 0))
    image = {"LAB": _lab, "PA": lambda each: each.convert("P").convert("PA")}.get(
        mode, lambda each: each.convert("RGBA").convert(mode) if mode == "RGBa" else _converted(each, mode)
    )(colours)
    found, info = load_image_with_info(image)
    shown = colours if mode == "LAB" else image.convert("LA" if mode == "La" else "RGBA").convert("RGB")
    wanted = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 127.5 - 1
    assert (found - wanted).abs().max() <= (0.1 if mode in ("LAB", "CMYK", "YCbCr") else 0.02)
    assert info.mode == mode


def _converted(image: Image.Image, mode: str) -> Image.Image:
    return image.convert("LA").convert("La") if mode == "La" else image.convert(mode)


def _lab(image: Image.Image) -> Image.Image:
    return ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )


def test_a_pillow_image_is_turned_and_its_transparent_colour_kept(picture: Path) -> None:
    with Image.open(picture) as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(picture.with_suffix(".jpg"), exif=exif)
        image.save(picture, transparency=image.getpixel((0, 0)))
    for path in (picture.with_suffix(".jpg"), picture):
        with Image.open(path) as image:
            image.load()
            assert torch.equal(load_image(image), load_image(path))


def test_sixteen_bits_survive_an_opened_file(tmp_path: Path) -> None:
    samples = np.arange(2 * 3 * 3, dtype=np.uint16).reshape(2, 3, 3) * 3001
    path = png(tmp_path / "deep.png", samples, 2)
    with Image.open(path) as image:
        assert torch.equal(load_image(image), load_image(path))
    assert torch.equal(load_image(samples), load_image(path))


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_any_layout_and_type_give_the_same(channels: int) -> None:
    pixels = textured(23, 17, 0)  # (H, W, C)
    wanted = load_image(Image.fromarray(pixels), channels=channels)
    chw = np.moveaxis(pixels, 2, 0)
    for array in (pixels, chw, pixels.astype(np.uint16) * 257, pixels / 255, chw.astype(np.float32) / 255):
        assert (load_image(array, channels=channels) - wanted).abs().max() < 1e-6
        assert (load_image(torch.from_numpy(array.copy()), channels=channels) - wanted).abs().max() < 1e-6


def test_grey_arrays_alpha_and_masks() -> None:
    grey = textured(23, 17, 0)[..., 0]
    for array in (grey, grey[..., None], grey[None]):
        assert torch.equal(load_image(array), load_image(Image.fromarray(grey)))
    assert torch.equal(load_image(grey > 99), load_image(Image.fromarray(grey > 99)))
    rgba = np.dstack([textured(23, 17, 0), grey])
    assert torch.allclose(load_image(rgba), load_image(Image.fromarray(rgba)), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((8, 8, 3), np.int64), "an array of int64 came; wanted the path"),
        (np.full((8, 8, 3), 255.0), r"floats from 255 to 255 came; wanted \[0, 1\]"),
        (np.full((8, 8, 3), np.nan), "an array of floats from nan"),
        (np.linspace(-1, 1, 192).reshape(3, 8, 8), r"in \[-1, 1\] already needs no loading"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"an array of shape \(2, 8, 8, 3\) came"),
        (np.zeros((0, 8), np.uint8), r"an array of shape \(0, 8\) came"),
        (np.zeros((8, 8, 2), np.uint8), "of 1, 3 or 4 channels"),
        (io.StringIO("text"), "a file opened as text came"),
        (7, "int came; wanted the path of an image file"),
        (None, "NoneType came"),
    ],
)
def test_what_is_no_picture_is_refused_with_what_was_wanted(given: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(given)  # type: ignore[arg-type]


def test_too_many_pixels_are_refused_in_arrays_too() -> None:
    with pytest.raises(ImageError, match="at most 100 are read"):
        load_image(np.zeros((20, 20), np.uint8), max_pixels=100)


# --- encode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "images of torch.uint8 came; wanted floats in"),
        (torch.full((1, 3, 16, 16), 255.0), r"images from 255 to 255 came; wanted \[-1, 1\]"),
    ],
)
def test_encode_refuses_images_of_another_scale(tiny_vae, images: torch.Tensor, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        latentvae.encode(tiny_vae, images)


def test_encode_warns_of_images_from_0_to_1(tiny_vae, recwarn: pytest.WarningsRecorder) -> None:
    for usual in (torch.ones(1, 3, 16, 16), torch.zeros(1, 3, 16, 16), torch.rand(1, 3, 16, 16) * 2.2 - 1.1):
        latentvae.encode(tiny_vae, usual)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"if these are in \[0, 1\], encode images \* 2 - 1"):
        latentvae.encode(tiny_vae, torch.rand(1, 3, 16, 16))
    with pytest.warns(UserWarning, match=r"normalised by a mean"):  # ImageNet's give -2.1 to 2.6
        latentvae.encode(tiny_vae, torch.full((1, 3, 16, 16), -2.1))
