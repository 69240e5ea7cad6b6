"""One picture of a run's curves."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentvae.training.record import read_records

logger = logging.getLogger(__name__)

# panel title, and the figures of metrics.jsonl that it shows
PANELS: tuple[tuple[str, Sequence[str]], ...] = (
    ("total loss", ("total",)),
    ("pixel loss per image", ("rec_loss",)),
    ("LPIPS of the batch", ("perceptual_loss",)),
    ("KL per image, nats", ("kl_loss",)),
    ("validation PSNR, dB", ("val_psnr",)),
    ("validation LPIPS", ("val_lpips",)),
    ("adversarial losses", ("g_loss", "d_loss")),
    ("gradient norms", ("grad_norm", "d_grad_norm")),
    ("images per second", ("images_per_second",)),
)
WINDOW = 0.05  # of all points, for the line drawn over the raw figures


def draw_curves(metrics: Path, picture: Path) -> Path | None:
    """Draw the curves of a metrics.jsonl as a PNG; None where matplotlib is not installed.

    Args:
        metrics: written by `Record`.
        picture: path of the PNG.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed: no picture of the curves. Extra: [train].")
        return None
    records = read_records(metrics)
    panels = [(title, found) for title, names in PANELS if (found := series(records, names))]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(12, 2.8 * rows), layout="constrained")
    for number, (title, lines) in enumerate(panels):
        axes = figure.add_subplot(rows, 3, number + 1)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        for name, (steps, values) in lines.items():
            raw = axes.plot(steps, values, alpha=0.3 if len(values) > 30 else 1, linewidth=1)
            if len(values) > 30:
                axes.plot(steps, smooth(values), color=raw[0].get_color(), linewidth=1.5, label=name)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.savefig(picture, dpi=100)
    return picture


def series(records: list[dict[str, Any]], names: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each figure that was recorded and ever differed from zero."""
    found = {}
    for name in names:
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if any(value for _, value in points):
            found[name] = ([step for step, _ in points], [value for _, value in points])
    return found


def smooth(values: list[float]) -> list[float]:
    """Mean over a window around each point, cut at the ends."""
    reach = max(1, round(len(values) * WINDOW / 2))
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
