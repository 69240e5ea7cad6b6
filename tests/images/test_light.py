"""OpenEXR and Radiance HDR: linear light to sRGB, and what is refused."""

import re
from pathlib import Path

import numpy as np
import OpenImageIO as oiio
import pytest
import torch

from latentvae.base.errors import ImageError, TooManyPixels
from latentvae.images import kinds
from latentvae.images.colour import PRIMARIES
from latentvae.images.reading import find_images, load_image, load_image_with_info, read_size

RAMP = np.linspace(0, 1, 40 * 24 * 3, dtype=np.float32).reshape(24, 40, 3)


def write(path: Path, light: np.ndarray, channels: str = "RGBA", **attributes: object) -> Path:
    """A file of light (H, W, C); attributes of OpenImageIO's spec, of which `window` places the pixels."""
    height, width, count = light.shape
    spec = oiio.ImageSpec(width, height, count, "float")
    spec.channelnames = tuple(channels[:count]) if "." not in channels else tuple(channels.split())
    if window := attributes.pop("window", None):
        spec.x, spec.y, spec.full_x, spec.full_y, spec.full_width, spec.full_height = window
    for name, value in attributes.items():
        spec.attribute(name, oiio.TypeDesc("float[8]"), value)
    output = oiio.ImageOutput.create(str(path))
    assert output.open(str(path), spec)
    assert output.write_image(np.ascontiguousarray(light))
    output.close()
    return path


def shown(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, in [-1, 1]."""
    return 2 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) - 1


def pixels(path: Path) -> np.ndarray:
    return load_image(path).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("ending", "error"), [(".exr", 1e-5), (".hdr", 0.01)])
def test_what_is_no_brighter_than_white_is_what_a_screen_shows(tmp_path, ending, error):
    path = write(tmp_path / f"a{ending}", RAMP)
    images, info = load_image_with_info(path)
    assert np.abs(images.permute(1, 2, 0).numpy() - shown(RAMP)).max() < error
    assert info.notes == [f"converted from {'OpenEXR' if ending == '.exr' else 'Radiance HDR'}, linear light"]
    assert read_size(path) == (40, 24)
    assert find_images([tmp_path]) == [path]


def test_what_is_brighter_is_tone_mapped_and_keeps_its_hue(tmp_path):
    light = np.stack([np.linspace(0.001, 4, 64)] * 3, -1, dtype=np.float32)[None]
    light[..., 1] *= 0.5
    path = write(tmp_path / "a.exr", light)
    images, info = load_image_with_info(path)
    assert info.notes == [
        "HDR (OpenEXR, linear light) tone-mapped to SDR (BT.2390, 812 nits to 203, which are white)"
    ]
    red, green, _ = images[:, 0].numpy()
    assert (np.diff(red) > -1e-6).all()  # flat at the top
    assert red[-1] == pytest.approx(1, abs=1e-3)
    linear = (((red + 1) / 2 + 0.055) / 1.055) ** 2.4, (((green + 1) / 2 + 0.055) / 1.055) ** 2.4
    assert np.allclose(linear[1][32:] / linear[0][32:], 0.5, atol=1e-3)


def test_one_bright_pixel_does_not_darken_the_rest_without_end(tmp_path):
    light = np.full((4, 4, 3), 0.2, np.float32)
    dim = light.copy()
    light[0, 0], dim[0, 0] = 1e6, 5
    images = pixels(write(tmp_path / "a.exr", light))
    assert np.allclose(images, pixels(write(tmp_path / "b.exr", dim)))
    assert images[3, 3] == pytest.approx(shown(np.float32(0.2)), abs=0.01)


def test_grey_alpha_windows_primaries_and_numbers_that_are_none(tmp_path):
    grey = pixels(write(tmp_path / "grey.exr", RAMP[..., :1], "Y"))
    assert np.abs(grey - shown(RAMP[..., :1])).max() < 1e-5

    half = np.concatenate([RAMP * 0.5, np.full((24, 40, 1), 0.5, np.float32)], -1)  # stored times alpha
    path = write(tmp_path / "alpha.exr", half)
    over_black = load_image(path, background=(0, 0, 0)).permute(1, 2, 0).numpy()
    assert np.abs(over_black - (shown(RAMP) + 1) / 2 + 1).max() < 1e-4

    framed = pixels(write(tmp_path / "framed.exr", RAMP, window=(2, 3, 0, 0, 50, 30)))
    assert framed.shape == (30, 50, 3)
    assert np.abs(framed[3:27, 2:42] - shown(RAMP)).max() < 1e-5
    assert (framed[:3] == -1).all()
    inside = pixels(write(tmp_path / "inside.exr", RAMP, window=(-2, -3, 0, 0, 10, 8)))
    assert np.abs(inside - shown(RAMP[3:11, 2:12])).max() < 1e-5

    flat = [number for point in PRIMARIES[12][1] for number in point]
    red = np.zeros((2, 2, 3), np.float32)
    red[..., 0] = 0.5
    wide = pixels(write(tmp_path / "p3.exr", red, chromaticities=flat))
    assert (wide[..., 0] > shown(np.float32(0.5)) + 0.05).all()  # P3's red is redder than sRGB's

    broken = RAMP.copy()
    broken[0, 0], broken[1, 1] = np.nan, -1
    assert (pixels(write(tmp_path / "nan.exr", broken))[[0, 1], [0, 1]] == -1).all()


def test_bytes_and_wrong_names_are_read_by_content(tmp_path):
    path = write(tmp_path / "a.exr", RAMP)
    wrong = tmp_path / "a.png"
    wrong.write_bytes(path.read_bytes())
    assert torch.equal(load_image(wrong), load_image(path))
    assert torch.equal(load_image(path.read_bytes()), load_image(path))


@pytest.mark.parametrize("ending", [".exr", ".hdr"])
def test_damaged_files_are_named(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", RAMP)
    whole = path.read_bytes()
    for length in (len(whole) // 2, 40):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError, match=rf"a\{ending}.* cannot be read as "):
            load_image(path)


def test_what_is_no_picture_or_too_large_is_refused(tmp_path):
    layers = write(tmp_path / "layers.exr", RAMP, "depth.Z normal.X normal.Y")
    with pytest.raises(ImageError, match=r"layers\.exr has the channels .*depth\.Z.*, and R, G and B or Y"):
        load_image(layers)
    with pytest.raises(TooManyPixels):
        load_image(write(tmp_path / "a.exr", RAMP), max_pixels=100)


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.hdr", RAMP)
    monkeypatch.setattr(kinds, "optional", lambda module: None)
    with pytest.raises(
        ImageError, match=rf"a\.hdr is a Radiance HDR image: {re.escape(kinds.remedy('OpenImageIO'))}"
    ):
        load_image(path)
    assert read_size(path) is None
