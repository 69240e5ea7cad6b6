"""Results that have to be the same bits on every run: whoever could compute them in several ways asks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_open: list[int] = []  # the threads that opened a block, each as often as it did


@contextmanager
def same_bits() -> Iterator[None]:
    """Have every thread of this process compute in the usual way, whatever else was measured to be faster.

    Of the process and not of the thread, because what is made in such a block is made by several.
    """
    thread = threading.get_ident()
    _open.append(thread)
    try:
        yield
    finally:
        _open.remove(thread)


def wanted() -> bool:
    """Whether a `same_bits` block is open."""
    return bool(_open)
