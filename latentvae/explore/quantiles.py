"""Quantiles of normal images' terms, and where a value lies among them."""

import numpy as np

LEVELS = np.linspace(0, 1, 101)  # of the stored quantiles
MIDDLE, HIGH = 50, 95  # places in LEVELS: a term counts in units of the distance between them


def quantiles_of(values: list[float]) -> list[float]:
    """Quantiles at LEVELS, linear between the values."""
    found: list[float] = np.quantile(np.asarray(values, dtype=np.float64), LEVELS).tolist()
    return found


def share_below(value: float, quantiles: list[float]) -> float:
    """The share of normal images with a lower value, 0..1, linear between the stored quantiles."""
    below, above = (np.searchsorted(quantiles, value, side=side) for side in ("left", "right"))
    if below != above:  # on one quantile, or on several that are equal: their middle
        return float(LEVELS[below] + LEVELS[above - 1]) / 2
    return float(np.interp(value, quantiles, LEVELS))


def excess(value: float, quantiles: list[float]) -> float:
    """How far a value is above the median, in units of the distance from there to the 95 % quantile."""
    spread = quantiles[HIGH] - quantiles[MIDDLE]
    return (value - quantiles[MIDDLE]) / max(spread, 1e-9 * abs(quantiles[MIDDLE]), 1e-12)
