"""How well scores tell odd images from normal ones, by scikit-learn: the ROC curve and the area under it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from latentvae.base.errors import LatentVAEError
from latentvae.base.optional import need

SIDE, MARGIN = 480, 40  # pixels of the picture
INK, GREY, CURVE = (51, 51, 51), (190, 190, 190), (129, 37, 129)


def auroc(scores: Sequence[float], odd: Sequence[bool]) -> float:
    """The chance that an odd image scores above a normal one; ties count half (Hanley & McNeil 1982).

    Raises:
        LatentVAEError: as `roc_curve`.
    """
    return float(need("sklearn.metrics").auc(*roc_curve(scores, odd).T))


def roc_curve(scores: Sequence[float], odd: Sequence[bool]) -> np.ndarray:
    """(N, 2): the share of normal images and of odd ones above each threshold, from (0, 0) to (1, 1).

    Raises:
        LatentVAEError: labels that do not match the scores, or of one kind only; no scikit-learn.
    """
    metrics = need("sklearn.metrics")
    if len(set(odd)) != 2:  # scikit-learn only warns, and gives NaN
        raise LatentVAEError(
            f"{sum(odd)} of {len(odd)} images are labelled odd; a ROC needs odd and normal ones."
        )
    try:  # all thresholds: scikit-learn drops those that a straight line does not need
        normal_rate, odd_rate, _ = metrics.roc_curve(odd, scores, drop_intermediate=False)
    except ValueError as error:
        raise LatentVAEError(
            f"{len(scores)} scores came with {len(odd)} labels; wanted one label for each finite score."
        ) from error
    return np.stack([normal_rate, odd_rate], 1)


def draw_roc(rates: np.ndarray, title: str) -> Image.Image:
    """Draw a ROC curve (N, 2) above its diagonal of chance."""
    picture = Image.new("RGB", (SIDE + 2 * MARGIN, SIDE + 2 * MARGIN), (255, 255, 255))
    draw = ImageDraw.Draw(picture)

    def place(point: Sequence[float]) -> tuple[float, float]:
        return MARGIN + SIDE * point[0], MARGIN + SIDE * (1 - point[1])  # pictures count rows downwards

    draw.rectangle((*place((0, 1)), *place((1, 0))), outline=GREY)
    draw.line([place((0, 0)), place((1, 1))], fill=GREY)
    draw.line([place(point) for point in rates.tolist()], fill=CURVE, width=3)
    draw.text((MARGIN, MARGIN / 4), title, fill=INK, font_size=18)
    draw.text((MARGIN, SIDE + MARGIN * 1.2), "share of normal images above", fill=INK, font_size=14)
    draw.text((MARGIN + 6, MARGIN + 6), "share of odd images above", fill=INK, font_size=14)
    return picture
