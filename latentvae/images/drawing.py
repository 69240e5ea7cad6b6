"""Pictures for people: a reconstruction beside its original with the error, and grids of reconstructions."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from latentvae.base.errors import ImageError
from latentvae.images.saving import to_pil

WHITE, INK, GREY, LINE = (255, 255, 255), (51, 51, 51), (122, 122, 122), (224, 224, 224)
ERROR_WHITE = 32  # of 255: fixed, so that two pictures compare; a visible but small error reaches the middle
HEAT_WHITE = 2  # times the worst place of usual images, which has the middle colour
PANEL_MIN, PANEL_MAX = 320, 1200  # display pixels of a panel's longer side
COLUMN_MIN = 280  # room for the captions of a narrow picture
CELL_MIN, CELL_MAX = 128, 512  # the same in a grid
# Anchors of matplotlib's "magma" (CC0), equally spaced, its cream end made white.
MAGMA_HEX = "000004 1c1044 4f127b 812581 b5367a e55064 fb8761 fec287 ffffff"
MAGMA = np.frombuffer(bytes.fromhex(MAGMA_HEX), dtype=np.uint8).reshape(-1, 3)
# Pillow's own font has no accents, Greek or Cyrillic; these are looked for by name in the system's folders.
SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc"),
)

Style = tuple[int, tuple[int, int, int]]  # size in pixels, colour
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class _Scale:
    """How large a picture is shown, and how to say it."""

    width: int
    height: int
    factor: float

    @property
    def caption(self) -> str:
        if self.factor == 1:
            return ""
        return f"shown x {self.factor:g}" if self.factor > 1 else f"shown at {100 * self.factor:.3g} %"


def comparison(
    original: torch.Tensor, reconstruction: torch.Tensor, figures: dict[str, str], title: str
) -> Image.Image:
    """Draw original, reconstruction and error map side by side, with captions, a title and figures.

    Args:
        original: (C, H, W) or (1, C, H, W) in [-1, 1], C of 1 or 3.
        reconstruction: the same shape.
        figures: name to value with its unit, for instance {"PSNR": "31.2 dB"}.
        title: usually the file's name; shortened in the middle where it is too long.

    Raises: ImageError, where the shapes differ or a value is NaN.
    """
    if original.shape != reconstruction.shape:
        raise ImageError(
            f"the original is {tuple(original.shape)}, the reconstruction {tuple(reconstruction.shape)}: "
            "crop the padding off (crop_padding) before comparing"
        )
    before, after = to_pil(original).convert("RGB"), to_pil(reconstruction).convert("RGB")
    scale = _scale(before.width, before.height, PANEL_MIN, PANEL_MAX)
    size = f"{before.width} x {before.height} px"
    panels = [
        ("Original", ", ".join(filter(None, (size, scale.caption))), _resize(before, scale)),
        ("Reconstruction", "", _resize(after, scale)),
        (
            "Error",
            f"mean of channels, black = 0, white = {ERROR_WHITE}/255",
            _error_panel(before, after, scale),
        ),
    ]
    return _draw_comparison(panels, figures, title)


def grid(rows: Sequence[Sequence[torch.Tensor]], column_titles: Sequence[str]) -> Image.Image:
    """Draw rows of images (C, H, W) in [-1, 1] under column titles; small ones are enlarged."""
    if not rows or any(len(row) != len(column_titles) for row in rows) or not column_titles:
        raise ImageError(
            f"rows of {[len(row) for row in rows]} images came for {len(column_titles)} column titles: "
            "pass at least one row, each with one image per title"
        )
    cells = [[_cell(image) for image in row] for row in rows]
    # as wide and as high as the largest of a column or row: images need not have one size
    widths = [max(row[i].width for row in cells) for i in range(len(column_titles))]
    heights = [max(cell.height for cell in row) for row in cells]
    gap, margin, text = 8, 24, _text_size(sum(widths))
    top = margin + round(text * 1.6)  # a line of titles
    lefts = [margin + sum(widths[:i]) + gap * i for i in range(len(widths))]
    tops = [top + sum(heights[:i]) + gap * i for i in range(len(heights))]
    canvas = Image.new("RGB", (lefts[-1] + widths[-1] + margin, tops[-1] + heights[-1] + margin), WHITE)
    draw = ImageDraw.Draw(canvas)
    for title, left, width in zip(column_titles, lefts, widths, strict=True):
        _write(draw, (left, margin), title, (text, INK), width)
    for row, y in zip(cells, tops, strict=True):
        for cell, x in zip(row, lefts, strict=True):
            canvas.paste(cell, (x, y))
    return canvas


def sheet(images: Sequence[torch.Tensor]) -> Image.Image:
    """Draw images (C, H, W) of one size in a grid that is about as wide as high; white where none is left."""
    columns = math.ceil(math.sqrt(len(images)))
    cells = [*images, *[torch.ones_like(images[0])] * (-len(images) % columns)]
    return grid([cells[at : at + columns] for at in range(0, len(cells), columns)], [""] * columns)


def error_map(original: Image.Image, reconstruction: Image.Image) -> np.ndarray:
    """Return the absolute error of 8-bit RGB values, averaged over channels: float32 (H, W) in 0..255."""
    # int16: in uint8 a negative difference would wrap to a large one
    difference = np.asarray(original).astype(np.int16) - np.asarray(reconstruction)
    return np.abs(difference).mean(-1, dtype=np.float32)


def colour_error(error: np.ndarray) -> np.ndarray:
    """Colour an error in 0..255 from black to white at ERROR_WHITE: uint8 (H, W, 3)."""
    level = np.clip(error / ERROR_WHITE, 0, 1)
    stops = np.linspace(0, 1, len(MAGMA))
    return np.stack([np.interp(level, stops, MAGMA[:, i]) for i in range(3)], -1).round().astype(np.uint8)


def colour_heat(heat: np.ndarray) -> np.ndarray:
    """Colour how odd places are, from black at 0 to white at HEAT_WHITE: uint8 (H, W, 3)."""
    return colour_error(heat * (ERROR_WHITE / HEAT_WHITE))


def _error_panel(original: Image.Image, reconstruction: Image.Image, scale: _Scale) -> Image.Image:
    # Averaged first, coloured then: colours do not average.
    error = _resize(Image.fromarray(error_map(original, reconstruction)), scale)
    return Image.fromarray(colour_error(np.asarray(error)))


def _draw_comparison(
    panels: list[tuple[str, str, Image.Image]], figures: dict[str, str], title: str
) -> Image.Image:
    """Place title, captions, panels and figures on three columns; everything starts on a left edge of one."""
    # all measures are multiples of the text's height, so that pictures of any size are laid out alike
    column = max(panels[0][2].width, COLUMN_MIN)
    text = _text_size(3 * column)
    margin, gap = 2 * text, round(1.25 * text)
    width = 3 * column + 2 * gap + 2 * margin
    captions = margin + round(2.8 * text)
    top = captions + round(2.8 * text)
    below = top + panels[0][2].height
    places, added = _figure_places(figures, text, width - 2 * margin)
    canvas = Image.new("RGB", (width, below + margin + added), WHITE)
    draw = ImageDraw.Draw(canvas)
    _write(draw, (margin, margin), title, (round(1.4 * text), INK), width - 2 * margin)
    for i, (name, note, panel) in enumerate(panels):
        left = margin + i * (column + gap)
        _write(draw, (left, captions), name, (text, INK), column)
        _write(draw, (left, captions + round(1.3 * text)), note, (round(0.8 * text), GREY), column)
        canvas.paste(panel, (left, top))
    bar = _bar(6 * text, round(0.7 * text))
    canvas.paste(bar, (left + column - bar.width, captions + round(0.25 * text)))
    for (x, y, room), (name, value) in zip(places, figures.items(), strict=True):
        _write(draw, (margin + x, below + y), name, (round(0.8 * text), GREY), room)
        _write(draw, (margin + x, below + y + round(1.1 * text)), value, (round(1.2 * text), INK), room)
    return canvas


def _figure_places(figures: dict[str, str], text: int, width: int) -> tuple[list[tuple[int, int, int]], int]:
    """Return left, top and room of each figure, in rows of equal slots, and the height of it all."""
    if not figures:
        return [], 0
    small, large = round(0.8 * text), round(1.2 * text)
    longest = max(max(_length(name, small), _length(value, large)) for name, value in figures.items())
    slot = min(width, round(max(longest + 2 * text, 7 * text)))
    per_row, line = max(1, width // slot), round(3.4 * text)
    places = [
        (slot * (i % per_row), line * (i // per_row) + round(1.6 * text), slot - text)
        for i in range(len(figures))
    ]
    return places, text + line * -(-len(figures) // per_row)


def _bar(width: int, height: int) -> Image.Image:
    """Draw the colours of the error map, framed so that white has an end."""
    ramp = np.broadcast_to(np.linspace(0, ERROR_WHITE, width), (height, width))
    bar = Image.fromarray(colour_error(ramp))
    ImageDraw.Draw(bar).rectangle((0, 0, width - 1, height - 1), outline=LINE)
    return bar


def _scale(width: int, height: int, least: int, most: int) -> _Scale:
    """Enlarge by a whole number up to `least`, so that pixels stay squares, or shrink to `most`."""
    longer = max(width, height)
    factor = float(-(-least // longer)) if longer < least else min(1.0, most / longer)
    return _Scale(max(1, round(width * factor)), max(1, round(height * factor)), factor)


def _resize(image: Image.Image, scale: _Scale) -> Image.Image:
    if scale.factor == 1:
        return image
    method = Image.Resampling.NEAREST if scale.factor > 1 else Image.Resampling.BOX
    return image.resize((scale.width, scale.height), method)


def _cell(image: torch.Tensor) -> Image.Image:
    drawn = to_pil(image).convert("RGB")
    return _resize(drawn, _scale(drawn.width, drawn.height, CELL_MIN, CELL_MAX))


def _text_size(width: int) -> int:
    """Let text grow with the picture, which is shrunk to the screen when looked at."""
    return min(36, max(15, width // 100))


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], words: str, style: Style, room: int) -> None:
    size, fill = style
    font, words = _font_for(words, size)
    draw.text(place, _shorten(words, font, room), fill=fill, font=font, anchor="la")


def _length(words: str, size: int) -> float:
    font, words = _font_for(words, size)
    return font.getlength(words)


def _shorten(words: str, font: Font, room: float) -> str:
    """Replace the middle by an ellipsis until it fits: a file name's beginning and suffix both matter."""
    if font.getlength(words) <= room:
        return words
    for kept in range(len(words) - 1, 0, -1):
        tail = kept // 3
        short = f"{words[: kept - tail]}\N{HORIZONTAL ELLIPSIS}{words[len(words) - tail :]}"
        if font.getlength(short) <= room:
            return short
    return "\N{HORIZONTAL ELLIPSIS}"


def _font_for(words: str, size: int) -> tuple[Font, str]:
    """Return the font with the most of the letters, and the words, what it lacks made plain or '?'."""
    # composed, since one letter with its accent is drawn better than two; macOS names files the other way
    words = " ".join(unicodedata.normalize("NFC", words).split())
    name = max(("", *SYSTEM_FONTS), key=lambda name: sum(_has(name, letter) for letter in words))
    drawn = "".join(letter if _has(name, letter) else _plain(name, letter) for letter in words)
    return _font(name, size) or ImageFont.load_default(size), drawn


def _plain(name: str, letter: str) -> str:
    base = unicodedata.normalize("NFKD", letter)[0]
    return base if _has(name, base) else "?"


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> Font | None:
    if not name:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def _has(name: str, letter: str) -> bool:
    """Tell whether a font has a letter: a missing one is drawn like a code point that no font has."""
    font = _font(name, 24)
    if font is None or not letter.isprintable():
        return False
    # a space is drawn as nothing, and in some fonts so is what they lack
    return letter == " " or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))
