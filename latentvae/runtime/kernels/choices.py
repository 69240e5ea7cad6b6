"""Which of two ways computes a layer: by a rule, or as was measured; and the measuring.

A choice belongs to the thread that asked for it, while it asks: whoever computes otherwise goes by the rule.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Table = dict[str, bool]  # whether the first way is the faster one, by layer and size
Run = Callable[[], torch.Tensor]
REPEATS = 3


class _Current(threading.local):
    """What this thread goes by: neither is the rule."""

    table: Table | None = None
    larger: int = 0
    times: dict[str, list[float]] | None = None


_current = _Current()


def run(layer: str, pixels: int, first: Run, second: Run, *, rule: bool) -> torch.Tensor:
    """What one of two ways gives.

    Args:
        layer: its name; with the pixels of its output, all that its time depends on.
        rule: whether it is the first where nothing was measured.
    """
    name = f"{layer}, 2^{round(math.log2(max(1, pixels))) - _current.larger} pixels"
    if _current.times is not None:
        return _timed(_current.times, name, first, second)
    chosen = rule if _current.table is None else _current.table.get(name, rule)
    return first() if chosen else second()


def _timed(times: dict[str, list[float]], layer: str, first: Run, second: Run) -> torch.Tensor:
    """Both in turns; the least time of each counts, over all layers of this name."""
    best = times.setdefault(layer, [float("inf"), float("inf")])
    for _ in range(REPEATS):
        for number, way in enumerate((first, second)):
            start = time.perf_counter()
            result = way()
            best[number] = min(best[number], time.perf_counter() - start)
    return result


@contextmanager
def using(table: Table, larger: int = 0) -> Iterator[None]:
    """Have this thread's layers computed as the table says, of an image 2^larger times as large."""
    before = _current.table, _current.larger
    _current.table, _current.larger = table, larger
    try:
        yield
    finally:
        _current.table, _current.larger = before


@contextmanager
def measuring() -> Iterator[Table]:
    """Time both ways of every layer that this thread computes; the table is full at the end."""
    table: Table = {}
    times: dict[str, list[float]] = {}
    _current.times = times
    try:
        yield table
    finally:
        _current.times = None
        table.update({layer: first < second for layer, (first, second) in times.items()})
