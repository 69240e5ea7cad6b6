"""Keeping freed memory instead of giving it back to the operating system after every step."""

import ctypes
import sys

# mallopt's parameters (malloc.h of glibc)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGE = 2**31 - 1  # an int's largest: never
_PAD = 512 * 2**20


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large blocks; returns whether it could be told.

    A training step on a CPU frees and allocates the same large maps again and again. By default glibc maps
    and unmaps each of them, and the page faults cost up to half of a step. Elsewhere this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, _LARGE), (_M_TOP_PAD, _PAD))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
