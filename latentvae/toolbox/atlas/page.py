"""A map of images as one HTML file, pictures and all, that works without a network."""

import base64
import colorsys
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from latentvae.base.errors import LatentVAEError

# Longest side in pixels of a picture in a page of at most so many: about 25 MB at the most of each
SIDES = ((400, 192), (2_000, 96), (10_000, 64))
SMALLEST = 32
ALIGN = 16  # pixels: blocks of lossy WebP, so that no picture bleeds into the next one
SHEET = 2048  # pixels along a side of the sheets that the pictures are packed on
QUALITY = 80  # of WebP: sheets are looked at, not measured
NO_LABEL = "no label"

# of middle lightness, neighbours far apart in hue; blue and orange first, which all eyes tell apart
FIRST = (
    *("#3b7dd8", "#e8743b", "#2aa876", "#c9438f", "#d9a521", "#8d62d9"),
    *("#19a5b8", "#d14b4b", "#7a9a2c", "#a0705a", "#6f7f95", "#e58bb5"),
)
GOLDEN = 0.61803398875  # of a turn: each new hue falls into the largest gap


@dataclass(frozen=True)
class Card:
    """An image of the page.

    Attributes:
        key: its name.
        label: "" where it has none.
        cluster: 0 and up.
        point: where it lies.
        picture: any size, or None.
        neighbours: numbers of other images of the page, nearest first.
    """

    key: str
    label: str
    cluster: int
    point: tuple[float, float]
    picture: Image.Image | None
    neighbours: Sequence[int] = ()


def picture_side(count: int) -> int:
    """The longest side of a picture in a page of so many, so that the file stays of a size that opens."""
    return next((side for most, side in SIDES if count <= most), SMALLEST)


def write_page(
    cards: Sequence[Card], title: str, about: str = "", figures: Sequence[tuple[str, str, str]] = ()
) -> str:
    """The page's HTML. Names, labels and titles may hold anything: none of it is read as markup.

    Args:
        cards: in any order, at least one.
        title: of the page.
        about: a line below it.
        figures: rows of a table: what, of latents, of pixels.

    Raises:
        LatentVAEError: no card, or points that are not finite.
    """
    if not cards or not np.isfinite([card.point for card in cards]).all():
        raise LatentVAEError(f"{len(cards)} images came; a page needs one or more, with finite points.")
    content = {  # what the script in page.html reads; by columns: rows would repeat every name
        "title": title,
        "about": about,
        "figures": [list(row) for row in figures],
        "keys": [card.key for card in cards],
        "near": [[int(each) for each in card.neighbours] for card in cards],
        "groups": _groups(cards),
        **_placed(np.array([card.point for card in cards])),
        **_pictures([card.picture for card in cards]),
    }
    parts = {"TITLE": html.escape(_clean(title)), "DATA": _inline(content)}
    template = files("latentvae.toolbox.atlas").joinpath("page.html").read_text(encoding="utf-8")
    # in one pass, so that nothing in the data is taken for a place to fill
    return re.sub("@(TITLE|DATA)@", lambda found: parts[found[1]], template)


def _clean(text: str) -> str:
    """File names need not be valid Unicode."""
    return text.encode("utf-8", "replace").decode()


def _inline(content: dict[str, Any]) -> str:
    """JSON that no HTML parser sees markup in: `</script>` and `<!--` end or change a script element."""
    text = json.dumps(content, separators=(",", ":"))  # ASCII, so that no encoding can go wrong
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _groups(cards: Sequence[Card]) -> dict[str, Any]:
    """Clusters, and labels where there are any: each card's group, and the groups' names, sizes, colours."""
    clusters = [card.cluster for card in cards]  # 0 is the largest, so that it gets the first colour
    names = [f"cluster {number}" for number in range(max(clusters) + 1)]
    groups = {"cluster": _group(clusters, names, list(colours(len(names))))}
    labels = sorted({card.label for card in cards} - {""}, key=natural)
    if labels:
        # images without a label come last and have no colour of their own: the page draws them grey
        some_without = any(not card.label for card in cards)
        place = {label: number for number, label in enumerate([*labels, *[""] * some_without])}
        shades: list[str | None] = [*colours(len(labels)), *[None] * some_without]
        shown = [*labels, *[NO_LABEL] * some_without]
        groups["label"] = _group([place[card.label] for card in cards], shown, shades)
    return groups


def _group(of: list[int], names: list[str], shades: Sequence[str | None]) -> dict[str, Any]:
    counts = np.bincount(of, minlength=len(names)).tolist()
    return {"of": of, "names": names, "counts": counts, "colours": list(shades)}


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key: numbers in a text by their value, so that 2 comes before 10."""
    parts = [part for part in re.split(r"([0-9]+)", text) if part]
    return [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts]


def _placed(points: np.ndarray) -> dict[str, list[float]]:
    """Points about their middle, the longer side of what they span 1, one scale for both axes."""
    low, high = points.min(0), points.max(0)
    side = float((high - low).max()) or 1.0  # all in one place: any scale does
    placed = (points - (low + high) / 2) / side
    span = ((high - low) / side).tolist()
    return {"x": placed[:, 0].round(5).tolist(), "y": placed[:, 1].round(5).tolist(), "span": span}


def _pictures(pictures: Sequence[Image.Image | None]) -> dict[str, Any]:
    """Pack the pictures on sheets, as data URIs, with what is needed to find each again."""
    longest = picture_side(len(pictures))
    small = [None if each is None else shrink(each, longest) for each in pictures]
    used = max((max(each.size) for each in small if each is not None), default=1)
    side = -(-used // ALIGN) * ALIGN  # of a cell
    columns = max(1, min(SHEET // side, int(np.ceil(np.sqrt(len(pictures))))))  # few pictures: a small sheet
    per_sheet = columns * columns
    sheets = [
        _sheet(small[first : first + per_sheet], side, columns) for first in range(0, len(small), per_sheet)
    ]
    sizes = [[0, 0] if each is None else list(each.size) for each in small]
    cells = {"side": side, "columns": columns, "per_sheet": per_sheet}
    return {"sheets": sheets, "sizes": sizes, "cells": cells}


def shrink(picture: Image.Image, longest: int) -> Image.Image:
    """A picture in RGB with sides of at most `longest` pixels; smaller ones stay as they are."""
    made = picture.convert("RGB")
    made.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return made


def _sheet(pictures: Sequence[Image.Image | None], side: int, columns: int) -> str:
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (side * columns, side * rows))
    for number, picture in enumerate(pictures):
        if picture is not None:
            sheet.paste(picture, (side * (number % columns), side * (number // columns)))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def colours(count: int) -> list[str]:
    """`count` colours as #rrggbb, the first ones always the same."""
    # as many as there are groups: of three kinds of lightness, since hues alone get too close
    more = (
        colorsys.hls_to_rgb(GOLDEN * number % 1, 0.45 + 0.12 * (number % 3), 0.55)
        for number in range(count - len(FIRST))
    )
    made = ["#" + "".join(f"{round(255 * part):02x}" for part in parts) for parts in more]
    return [*FIRST[:count], *made]
