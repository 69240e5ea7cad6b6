"""Probabilities of quantised values as integer tables, made by integer arithmetic alone.

A value is coded as its distance to a predicted one. Its distribution is Student's t, whose cumulative
function needs no transcendental function where the degrees of freedom are even: with
u = x / sqrt(nu s^2 + x^2) it is 1/2 plus an odd polynomial in u. So every machine makes the same tables.
"""

from functools import cache
from math import comb

import numpy as np

REACH = 64  # distances from -REACH to REACH have an entry; the outermost stand for all beyond
FRACTIONS = 8  # predictions are multiples of 1 / FRACTIONS
UNIT = 256  # scales are multiples of 1 / UNIT
TOTAL = 1 << 20  # what the counts of a table sum to
DEGREES = 6  # of freedom, even
SCALE_COUNT = 40


def scales() -> np.ndarray:
    """Widths of the distributions in 1 / UNIT, (SCALE_COUNT,), growing by a fifth each: 0.09 to about 75."""
    found = [24]
    while len(found) < SCALE_COUNT:
        found.append(found[-1] * 1189 // 1000)  # the fourth root of two
    return np.array(found, dtype=np.int64)


@cache
def tables() -> np.ndarray:
    """Counts of every distance, float32 whole numbers (SCALE_COUNT * FRACTIONS, 2 * REACH + 1).

    Row scale * FRACTIONS + fraction is for a prediction fraction / FRACTIONS - 1/2 above the base from which
    distances are counted. Every count is at least 1 and every row sums to TOTAL.
    """
    fractions = np.arange(FRACTIONS) - FRACTIONS // 2
    edges = np.arange(-REACH, REACH)  # the upper one of every distance but the last
    x = edges * UNIT + UNIT // 2 - (fractions * UNIT // FRACTIONS)[:, None]  # (FRACTIONS, 2 REACH)
    squares = x**2 + DEGREES * scales()[:, None, None] ** 2
    u = (x << 28) // _roots(squares << 16)  # in 2^-20
    below = np.maximum.accumulate(_cumulative(u).clip(0, TOTAL), axis=-1)  # rounding must not turn back
    room = TOTAL - (2 * REACH + 1)
    counted = (below * room >> 20) + np.arange(1, 2 * REACH + 1)
    counts = np.diff(counted, axis=-1, prepend=0, append=TOTAL)
    return counts.reshape(-1, 2 * REACH + 1).astype(np.float32)


def _cumulative(u: np.ndarray) -> np.ndarray:
    """Student's cumulative distribution in 2^-20 at u in 2^-20."""
    half = DEGREES // 2 - 1
    square = u * u >> 20
    terms = [(comb(half, i) * (-1) ** i, 2 * i + 1) for i in range(half + 1)]
    scale = 15 * 7 * 9 * 11  # makes all the fractions whole
    power, total, norm = u, np.zeros_like(u), 0
    for factor, odd in terms:
        total = total + power * (factor * scale // odd)
        norm += factor * scale // odd
        power = power * square >> 20
    return (1 << 19) + total // (2 * norm)


def _roots(squares: np.ndarray) -> np.ndarray:
    """Whole square roots, rounded down, of whole numbers below 2^62."""
    roots = np.sqrt(squares.astype(np.float64)).astype(np.int64)  # off by one at most, which is mended
    roots -= roots * roots > squares
    roots += (roots + 1) * (roots + 1) <= squares
    return roots
