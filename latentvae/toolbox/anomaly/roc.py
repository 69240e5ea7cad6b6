"""How well scores tell odd images from normal ones: the ROC curve and the area under it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from latentvae.base.errors import LatentVAEError

SIDE, MARGIN = 480, 40  # pixels of the picture
INK, GREY, CURVE = (51, 51, 51), (190, 190, 190), (129, 37, 129)


def auroc(scores: Sequence[float], odd: Sequence[bool]) -> float:
    """The chance that an odd image scores above a normal one; ties count half (Hanley & McNeil 1982).

    Raises:
        LatentVAEError: labels that do not match the scores, or of one kind only.
    """
    rates = roc_curve(scores, odd)
    return float(np.trapezoid(rates[:, 1], rates[:, 0]))


def roc_curve(scores: Sequence[float], odd: Sequence[bool]) -> np.ndarray:
    """(N, 2): the share of normal images and of odd ones above each threshold, from (0, 0) to (1, 1).

    Raises:
        LatentVAEError: labels that do not match the scores, or of one kind only.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(odd, dtype=bool)
    if values.shape != labels.shape or values.ndim != 1 or not np.isfinite(values).all():
        raise LatentVAEError(
            f"{values.size} scores came with {labels.size} labels; wanted one label for each finite score."
        )
    if labels.all() or not labels.any():
        raise LatentVAEError(
            f"{labels.sum()} of {labels.size} images are labelled odd; a ROC needs odd and normal ones."
        )
    order = np.argsort(-values, kind="stable")
    values, labels = values[order], labels[order]
    last = np.append(values[1:] != values[:-1], True)  # of equal scores all pass a threshold together
    above = np.stack([np.cumsum(~labels) / (~labels).sum(), np.cumsum(labels) / labels.sum()], 1)
    return np.concatenate([np.zeros((1, 2)), above[last]])


def draw_roc(rates: np.ndarray, title: str) -> Image.Image:
    """Draw a ROC curve above its diagonal of chance."""
    picture = Image.new("RGB", (SIDE + 2 * MARGIN, SIDE + 2 * MARGIN), (255, 255, 255))
    draw = ImageDraw.Draw(picture)

    def place(point: Sequence[float]) -> tuple[float, float]:
        return MARGIN + SIDE * point[0], MARGIN + SIDE * (1 - point[1])

    draw.rectangle((*place((0, 1)), *place((1, 0))), outline=GREY)
    draw.line([place((0, 0)), place((1, 1))], fill=GREY)
    draw.line([place(point) for point in rates.tolist()], fill=CURVE, width=3)
    draw.text((MARGIN, MARGIN / 4), title, fill=INK, font_size=18)
    draw.text((MARGIN, SIDE + MARGIN * 1.2), "share of normal images above", fill=INK, font_size=14)
    draw.text((MARGIN + 6, MARGIN + 6), "share of odd images above", fill=INK, font_size=14)
    return picture
