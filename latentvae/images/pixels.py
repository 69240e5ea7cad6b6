"""A decoded picture to `images`, float32 (C, H, W) in [-1, 1]: upright, in sRGB, without alpha.

A picture gives its samples in bands of rows, so that beside what the decoder made and the result there are
never more than a few rows: 16 bytes a pixel for 8 bits and three channels, alpha or not, and 20 for 16 bits.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms

from latentvae.base.errors import ImageError, TooManyPixels, ran_out_of_memory
from latentvae.images.colour import Encoding, icc_conversion
from latentvae.images.given import array_samples
from latentvae.images.tensors import channels_first_tensor, channels_last_array, from_uint8

BITS_TAG, PHOTOMETRIC_TAG = 258, 262  # of TIFF 6.0
UNUSABLE = "unusable ICC profile ignored"
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what Pillow's mode "L" means
BAND = 1 << 18  # pixels that are worked on at once

Colour = tuple[int, int, int]
Rows = Callable[[int, int], np.ndarray]


@dataclass
class Picture:
    """One picture, as it is stored.

    Attributes:
        colour: rows from the first number to before the second: (h, W) or (h, W, 3) in 0..white.
        alpha: the same of how opaque they are, (h, W) in 0..1; None: all are.
        orientation: as EXIF has it, 1 to 8.
        frames: of an animation or a file of several pages; this is the first.
        encoding: what the colours are where they are not sRGB.
        inks: rows of cyan, magenta, yellow and black, where `colour` was made from these.
    """

    width: int
    height: int
    colour: Rows
    white: float = 255.0
    alpha: Rows | None = None
    mode: str = ""
    format: str = ""
    notes: list[str] = field(default_factory=list)
    frames: int = 1
    orientation: int = 1
    encoding: Encoding | None = None
    inks: Rows | None = None

    @classmethod
    def of_array(cls, samples: np.ndarray, white: float, **about: object) -> "Picture":
        """A picture of samples (H, W) or (H, W, C) in 0..white."""
        if samples.ndim == 3 and samples.shape[2] == 1:
            samples = samples[..., 0]
        return cls(samples.shape[1], samples.shape[0], lambda top, end: samples[top:end], white, **about)  # type: ignore[arg-type]

    def set_alpha(self, alpha: np.ndarray, multiplied: bool) -> None:
        """Take alpha (H, W) in 0..1; `multiplied`: colours were stored times it."""
        self.alpha = lambda top, end: alpha[top:end]
        if multiplied:
            stored, white = self.colour, self.white

            def divided(top: int, end: int) -> np.ndarray:
                part = np.maximum(alpha[top:end], 1e-6)
                colour = stored(top, end).astype(np.float32)
                return np.clip(colour / (part if colour.ndim == 2 else part[..., None]), 0, white)

            self.colour = divided

    def eight_bits(self) -> Rows:
        """The colour as uint8, rounded."""
        stored, white = self.colour, self.white

        def rounded(top: int, end: int) -> np.ndarray:
            return np.round(stored(top, end).astype(np.float64) * (255 / white)).astype(np.uint8)

        return rounded

    def use_inks(self) -> None:
        """Read four channels as inks, for which Pillow's formula, like its profiles, is for 8 bits."""
        if self.white != 255:
            self.notes.append("16 bits per channel read as 8")
        inks, self.white = self.eight_bits(), 255.0
        self.inks = inks
        self.colour = lambda top, end: np.asarray(Image.fromarray(inks(top, end), "CMYK").convert("RGB"))

    def apply_profile(self, profile: bytes, mode: str) -> None:
        """Convert by an ICC profile, at 8 bits where it changes anything."""
        transform, wanted = profile_conversion(profile, mode, self.notes)
        if transform is None:
            return
        stored = self.inks or self.eight_bits()
        if self.white != 255:
            self.notes[-1] += " at 8 bits"

        def converted(top: int, end: int) -> np.ndarray:
            part = Image.fromarray(stored(top, end), mode).convert(wanted)
            return np.asarray(ImageCms.applyTransform(part, transform))

        self.colour, self.white = converted, 255.0

    def bands(self) -> Iterator[tuple[int, int]]:
        """First row and the one after the last, of parts of the picture that are worked on at once."""
        rows = max(1, BAND // self.width)
        return ((top, min(top + rows, self.height)) for top in range(0, self.height, rows))

    def is_transparent(self) -> bool:
        """Whether any pixel is."""
        alpha = self.alpha
        return alpha is not None and any(alpha(*band).min() < 1 for band in self.bands())

    def assemble(self, background: Colour, channels: int) -> torch.Tensor:
        """The picture upright, (channels, H, W) in [-1, 1], on the background where it is transparent."""
        height, width = (
            (self.width, self.height) if self.orientation in range(5, 9) else (self.height, self.width)
        )
        images = torch.empty(channels, height, width)
        back = {6: 8, 8: 6}.get(self.orientation, self.orientation)
        stored = upright(images.permute(1, 2, 0).numpy(), back)  # a view (h, w, C) as the file has its rows
        transparent = self.is_transparent()
        for top, end in self.bands():
            part = self._part(top, end, background if transparent else None)
            stored[top:end] = _with_channels(part, channels).permute(1, 2, 0).numpy()
        if transparent:
            name = {(255, 255, 255): "white", (0, 0, 0): "black"}.get(background, f"rgb{background}")
            self.notes.append(f"transparent pixels composited on {name}")
        return images

    def _part(self, top: int, end: int, background: Colour | None) -> torch.Tensor:
        """Some rows in [-1, 1], (1 or 3, h, W)."""
        colour, white = self.colour(top, end), np.float32(self.white)
        if self.encoding is not None:
            colour, white = self.encoding.to_srgb(colour.astype(np.float32) / white), np.float32(1)
        if background is not None and self.alpha is not None:
            behind = np.asarray(background, dtype=np.float32) / 255
            weight = self.alpha(top, end)[..., None]
            mixed = channels_last_array(colour).astype(np.float32) / white
            return channels_first_tensor(mixed * weight + behind * (1 - weight)).mul_(2).sub_(1)
        if colour.dtype == np.uint8:  # the usual case, by the same formula as everywhere else
            return from_uint8(colour)
        return channels_first_tensor(colour.astype(np.float32)).mul_(2 / float(white)).sub_(1)


def _with_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    if images.shape[0] == channels:
        return images
    if channels == 3:
        return images.expand(3, -1, -1)
    return torch.einsum("chw,c->hw", images, images.new_tensor(LUMA))[None].clamp_(-1, 1)


def upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Bring the samples upright, as a view."""
    if orientation in (5, 7):  # transposed: a mirror image of 8 and 6
        samples, orientation = samples[:, ::-1], {5: 8, 7: 6}[orientation]
    if orientation in (2, 4):
        samples, orientation = samples[:, ::-1], {2: 1, 4: 3}[orientation]
    return np.rot90(samples, {3: 2, 6: -1, 8: 1}.get(orientation, 0))


def check_size(path: object, width: int, height: int, max_pixels: int) -> None:
    """Raises ImageError where there is no pixel, TooManyPixels where there are too many."""
    if width < 1 or height < 1:
        raise ImageError(f"{path} is {width} x {height} pixels: it holds no picture; leave it out")
    if width * height > max_pixels:
        raise TooManyPixels(
            f"{path} is {width} x {height} = {width * height} pixels, but at most {max_pixels} are read: "
            "shrink it"
        )


def picture_of_array(given: np.ndarray | torch.Tensor, path: object, max_pixels: int) -> Picture:
    """The picture that an array or tensor holds; raises ImageError as `array_samples` and `check_size`."""
    colour, white, alpha = array_samples(given)
    check_size(path, colour.shape[1], colour.shape[0], max_pixels)
    picture = Picture.of_array(colour, white, mode=str(given.dtype), format="array")
    if alpha is not None:
        picture.set_alpha(alpha, multiplied=False)
    return picture


def picture_of(
    image: Image.Image,
    rawmode: str,
    tags: Mapping[int, Any],
    path: object,
    reopen: Callable[[str], Image.Image],
) -> Picture:
    """The samples of a loaded Pillow image, whatever its mode.

    Args:
        rawmode: how they were stored, for instance "RGB;16B".
        tags: of a TIFF.
        reopen: the same image, read as another rawmode.
    """
    if image.mode == "F":
        return _float_grey(image, path)
    if image.mode.startswith("I"):
        return _integer_grey(image, tags, path)
    swapped = re.fullmatch(r"(RGB|RGBA|RGBX);16([BLN])", rawmode)
    if swapped:
        return _deep_colour(image, reopen(f"{swapped[1]};16{_other_order(swapped[2])}"))
    picture = _eight_bits(image, rawmode)
    if ";16" in rawmode:
        picture.notes.append("16 bits per channel read as 8")
    return picture


def _rows(image: Image.Image, top: int, end: int) -> Image.Image:
    # as `crop` does it, which asks about bombs once more, by a number that is the whole process's
    return image._new(image.im.crop((0, top, image.width, end)))


def _band_range(picture: Picture) -> tuple[float, float]:
    """The smallest and the largest value; NaN where one is that."""
    found = [(part.min(), part.max()) for part in (picture.colour(*band) for band in picture.bands())]
    return float(np.min([low for low, _ in found])), float(np.max([high for _, high in found]))


def white_of_floats(path: object, low: float, high: float) -> float:
    """What white is among floats, 1; ImageError where they are not between black and that."""
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise ImageError(
            f"{path} holds floats from {low:g} to {high:g}, but floats in [0, 1] (black to white) were "
            "wanted: scale them to that range, or save 16-bit integers"
        )
    return 1.0


def _float_grey(image: Image.Image, path: object) -> Picture:
    picture = Picture(*image.size, lambda top, end: np.asarray(_rows(image, top, end), dtype=np.float32))
    picture.white = white_of_floats(path, *_band_range(picture))
    picture.notes = _unapplied_profile(image)
    return picture


def _integer_grey(image: Image.Image, tags: Mapping[int, Any], path: object) -> Picture:
    """Scale instead of clipping: Pillow's convert("RGB") turns 99.6 % of a 16-bit ramp white."""
    bits = tags.get(BITS_TAG, (16,))[0]
    white = 4095 if bits == 12 else 65535

    def stored(top: int, end: int) -> np.ndarray:
        return np.asarray(_rows(image, top, end))

    picture = Picture(*image.size, stored, float(white), notes=_unapplied_profile(image))
    low, high = _band_range(picture)
    if low < 0 or high > white:
        raise ImageError(
            f"{path} holds integers from {low:.0f} to {high:.0f}, but 0 to {white} were wanted: "
            "scale them to 16 bits"
        )
    key = image.info.get("transparency")
    if isinstance(key, int):
        picture.alpha = lambda top, end: _keyed_alpha(stored(top, end), key)
    if tags.get(PHOTOMETRIC_TAG) == 0:  # "white is zero", which Pillow leaves as it is at 16 bits
        picture.colour = lambda top, end: white - stored(top, end).astype(np.int64)
    return picture


def _unapplied_profile(image: Image.Image) -> list[str]:
    profile = image.info.get("icc_profile")
    if not profile or profile_conversion(profile, "L", [])[0] is None:
        return []
    return ["ICC profile not applied (it is for 8 bits only)"]


def _other_order(order: str) -> str:
    native = "L" if sys.byteorder == "little" else "B"
    return "L" if (native if order == "N" else order) == "B" else "B"


def _deep_colour(image: Image.Image, again: Image.Image) -> Picture:
    """Read 16-bit colour in full: Pillow keeps the high bytes, or in the wrong byte order the low ones."""

    def stored(top: int, end: int) -> np.ndarray:
        # (h, W, 3 or 4): the high bytes of one reading, the low ones of the other
        return np.asarray(_rows(image, top, end)).astype(np.uint16) << 8 | np.asarray(_rows(again, top, end))

    def colour(top: int, end: int) -> np.ndarray:
        return stored(top, end)[..., :3]

    picture = Picture(*image.size, colour, 65535.0)
    key = image.info.get("transparency")
    if image.mode == "RGBA":
        picture.alpha = lambda top, end: stored(top, end)[..., 3].astype(np.float32) / 65535
    elif isinstance(key, tuple):
        picture.alpha = lambda top, end: _keyed_alpha(colour(top, end), key)
    if profile := image.info.get("icc_profile"):
        picture.apply_profile(profile, "RGB")
    return picture


def _eight_bits(image: Image.Image, rawmode: str) -> Picture:
    """Undo palettes, split alpha off, convert to sRGB."""
    key = image.info.get("transparency") if image.mode in ("1", "L", "RGB") else None
    if isinstance(key, int):
        key *= {"L;2": 85, "L;4": 17}.get(rawmode, 1)  # Pillow scales these samples, but not their key
    base = {"1": "L", "L": "L", "LA": "L", "La": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    whole = {"LA": "LA", "La": "LA"}.get(image.mode, "RGBA")  # with alpha
    has_alpha = image.mode in ("LA", "La", "P", "PA", "RGBA", "RGBa") and image.has_transparency_data
    notes: list[str] = []
    transform, wanted = profile_conversion(image.info.get("icc_profile"), base, notes)

    def plain(top: int, end: int) -> Image.Image:
        part = _rows(image, top, end)
        if has_alpha:
            part = part.convert(whole)
        return part if part.mode == base else part.convert(base)

    def colour(top: int, end: int) -> np.ndarray:
        part = plain(top, end)
        if transform is not None:
            part = ImageCms.applyTransform(part.convert(wanted), transform) or part
        return np.asarray(part.convert("RGB") if part.mode == "CMYK" else part)

    picture = Picture(*image.size, colour, notes=notes)
    if has_alpha:
        picture.alpha = lambda top, end: (
            np.asarray(_rows(image, top, end).convert(whole).getchannel("A"), dtype=np.float32) / 255
        )
    elif isinstance(key, int | tuple):
        picture.alpha = lambda top, end: _keyed_alpha(np.asarray(plain(top, end)), key)
    return picture


def _keyed_alpha(colour: np.ndarray, key: int | tuple[int, ...]) -> np.ndarray:
    """Make the one colour transparent that a PNG's tRNS names."""
    same = colour == np.asarray(key)
    return np.where(same.all(-1) if same.ndim == 3 else same, 0, 1).astype(np.float32)


def profile_conversion(
    profile: bytes | None, mode: str, notes: list[str]
) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The transform to sRGB by an embedded profile and the mode it is for; None where it changes nothing."""
    if profile:
        try:
            name, wanted, transform = icc_conversion(profile, mode)
            if transform is not None:
                notes.append(f"converted from ICC profile '{name}'")
            return transform, wanted
        except Exception as error:  # LittleCMS through Pillow: PyCMSError, OSError, ValueError, TypeError
            if ran_out_of_memory(error):
                raise
            notes.append(f"{UNUSABLE} ({error})")
    return None, mode
