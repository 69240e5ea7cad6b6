"""Maps of images as pictures: dots with a legend, and the images themselves at their places."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

from latentvae.base.optional import need
from latentvae.images.drawing import GREY, WHITE
from latentvae.toolbox.atlas.page import NO_LABEL, Card, colours, natural, shrink

WIDTH, HEIGHT = 1800, 1300  # pixels
NAMED = 24  # groups in a legend; more are counted
UNLABELLED = "#b5bac0"
EDGE = 3  # pixels of a picture's coloured frame


def draw_scatter(cards: Sequence[Card], title: str, axes: tuple[str, str]) -> Image.Image:
    """Draw the images as dots, coloured by label, or by cluster where there are no labels.

    Args:
        title: above the map.
        axes: what to write along them.
    """
    # not by pyplot, which keeps every figure and may want a screen
    figure = need("matplotlib.figure").Figure(figsize=(10, 7.2), layout="constrained")
    plot = figure.add_subplot()
    names, shades = groups(cards)
    points = np.array([card.point for card in cards])
    found = dict.fromkeys(sorted(set(names), key=natural))
    size = float(np.clip(9000 / len(cards), 10, 60))  # of a dot, in square points
    edge = 0.4 if len(cards) < 1000 else 0.0  # between thousands of dots white rims would be all there is
    for name in found:  # one call for each group: the legend takes its rows from them
        chosen = np.array([each == name for each in names])
        label = plain(f"{name or NO_LABEL} ({chosen.sum()})") if len(found) <= NAMED else None
        style = {"s": size, "color": shades[name], "linewidths": edge, "edgecolors": "white"}
        plot.scatter(*points[chosen].T, label=label, **style)
    plot.set_aspect("equal", adjustable="datalim")  # distances mean something, so axes share a scale
    plot.spines[["top", "right"]].set_visible(False)
    plot.set_title(plain(title), fontsize=11, loc="left")
    plot.set_xlabel(axes[0], fontsize=9)
    plot.set_ylabel(axes[1], fontsize=9)
    plot.tick_params(labelsize=8)
    if len(found) <= NAMED:
        scale = (40 / size) ** 0.5  # of the legend's dots: always as large
        figure.legend(loc="outside right upper", fontsize=9, frameon=False, markerscale=scale)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return Image.open(buffer).convert("RGB")


def plain(text: str) -> str:
    """Text that matplotlib takes as it is: no formulas."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def groups(cards: Sequence[Card]) -> tuple[list[str], dict[str, str]]:
    """The group of each image, and the colour of each group, as the page has them."""
    if any(card.label for card in cards):
        names = [card.label for card in cards]
        known = sorted(set(names) - {""}, key=natural)
    else:
        names = [f"cluster {card.cluster}" for card in cards]
        known = [f"cluster {number}" for number in range(max(card.cluster for card in cards) + 1)]
    return names, {**dict(zip(known, colours(len(known)), strict=True)), "": UNLABELLED}


def draw_pictures(cards: Sequence[Card]) -> Image.Image | None:
    """Draw the images themselves at their places, framed in their group's colour; None where none has one.

    Where they would cover each other one is shown, and the others are dots.
    """
    if all(card.picture is None for card in cards):
        return None
    longest = int(np.clip(1200 / np.sqrt(len(cards)), 40, 140))  # pixels: so that most find room
    names, shades = groups(cards)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), WHITE)
    draw = ImageDraw.Draw(canvas)
    places = _places(np.array([card.point for card in cards]), longest)
    taken: list[tuple[int, int, int, int]] = []
    shown = []
    for card, name, (x, y) in zip(cards, names, places.tolist(), strict=True):
        picture = None if card.picture is None else _cell(card.picture, longest)
        if picture is not None:
            left, top = x - picture.width // 2, y - picture.height // 2
            box = (left - EDGE, top - EDGE, left + picture.width + EDGE, top + picture.height + EDGE)
            if not any(_overlap(box, other) for other in taken):
                taken.append(box)
                shown.append((picture, box, shades[name]))
                continue
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=shades[name])
    for picture, box, shade in shown:  # last, over the dots
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=shade)
        canvas.paste(picture, (box[0] + EDGE, box[1] + EDGE))
    note = f"{len(shown)} of {len(cards)} images drawn; dots: images that these would cover"
    draw.text((16, HEIGHT - 30), note, fill=GREY, font_size=16)
    return canvas


def _cell(picture: Image.Image, longest: int) -> Image.Image:
    """At most `longest` pixels; small ones enlarged by a whole number, so that pixels stay squares."""
    small = shrink(picture, longest)
    factor = max(1, longest // max(small.size))
    return small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)


def _places(points: np.ndarray, longest: int) -> np.ndarray:
    """Points to pixels of the canvas, one scale for both axes, int (N, 2)."""
    low, high = points.min(0), points.max(0)
    room = np.array([WIDTH, HEIGHT]) - longest - 60  # half a picture on each side, and the note below
    scale = (room / np.maximum(high - low, 1e-12)).min()
    # y turned over: pictures count rows downwards
    placed = (points - (low + high) / 2) * (scale, -scale) + np.array([WIDTH, HEIGHT]) / 2
    return np.round(placed).astype(int)


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
