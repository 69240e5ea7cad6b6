"""Defects painted into photographs, for finding them again: several kinds, sizes and places, by a seed."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SMALLEST, LARGEST = 24, 64  # pixels across
FEATHER = 1.5  # pixels over which a patch's edge fades

Paint = Callable[[Image.Image, Image.Image, np.random.Generator], Image.Image]


def scratch(photo: Image.Image, _: Image.Image, random: np.random.Generator) -> Image.Image:
    """A bent line, 1 to 3 pixels wide, light or dark."""
    damaged = photo.copy()
    length, angle = random.uniform(60, 150), random.uniform(0, 2 * np.pi)
    bends = angle + np.cumsum(random.normal(0, 0.15, 12))
    steps = length / 12 * np.stack([np.cos(bends), np.sin(bends)], 1)
    path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])
    middle = [random.uniform(0.3, 0.7) * side for side in photo.size]
    points = [tuple(point) for point in (path - path.mean(0) + middle).tolist()]
    level = int(random.choice([30, 225]))
    ImageDraw.Draw(damaged).line(points, fill=(level,) * 3, width=int(random.integers(1, 4)), joint="curve")
    return damaged


def blob(photo: Image.Image, _: Image.Image, random: np.random.Generator) -> Image.Image:
    """A stain of one colour that lets some of the photograph through."""
    colour = tuple(int(value) for value in random.integers(0, 256, 3))
    opacity = random.uniform(0.6, 0.9)
    return paste(photo, Image.blend(photo, Image.new("RGB", photo.size, colour), opacity), random)


def texture(photo: Image.Image, other: Image.Image, random: np.random.Generator) -> Image.Image:
    """A piece of another photograph."""
    return paste(photo, other.resize(photo.size), random)


def blur(photo: Image.Image, _: Image.Image, random: np.random.Generator) -> Image.Image:
    """A spot out of focus."""
    return paste(photo, photo.filter(ImageFilter.GaussianBlur(random.uniform(3, 6))), random)


def jpeg(photo: Image.Image, _: Image.Image, random: np.random.Generator) -> Image.Image:
    """A region of coarse JPEG blocks."""
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=int(random.integers(3, 9)))
    return paste(photo, Image.open(file).convert("RGB"), random)


def noise(photo: Image.Image, _: Image.Image, random: np.random.Generator) -> Image.Image:
    """A region of sensor noise."""
    levels = np.asarray(photo, dtype=np.float64)
    noisy = (levels + random.normal(0, random.uniform(30, 60), levels.shape)).clip(0, 255)
    return paste(photo, Image.fromarray(noisy.round().astype(np.uint8)), random)


KINDS: dict[str, Paint] = {paint.__name__: paint for paint in (scratch, noise, blur, blob, texture, jpeg)}


def paste(photo: Image.Image, change: Image.Image, random: np.random.Generator) -> Image.Image:
    """The photograph with the change inside an ellipse somewhere."""
    width, height = (min(random.uniform(SMALLEST, LARGEST), side / 2) for side in photo.size)
    left = random.uniform(0, photo.width - width)
    top = random.uniform(0, photo.height - height)
    mask = Image.new("L", photo.size)
    ImageDraw.Draw(mask).ellipse((left, top, left + width, top + height), fill=255)
    return Image.composite(change, photo, mask.filter(ImageFilter.GaussianBlur(FEATHER)))


def damage(photo: Image.Image, other: Image.Image, kind: str, seed: int) -> Image.Image:
    """Paint one defect into a photograph; the same one for the same seed and kind.

    Args:
        photo: RGB.
        other: RGB photograph that a texture is taken from.
        kind: a name in KINDS.
        seed: of size, place and strength.
    """
    return KINDS[kind](photo, other, np.random.default_rng([seed, list(KINDS).index(kind)]))
