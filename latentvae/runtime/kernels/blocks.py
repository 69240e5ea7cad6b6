"""Work in blocks that stay in a core's cache: one block per thread, no barrier between a block's steps."""

import ctypes
import functools
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

import torch

from latentvae.base.threads import pool

MAX_THREADS = 16  # Python starts each step, and one Python cannot feed more
_HUGE_PAGE = 2**21
_MADV_HUGEPAGE = 14  # mman.h of Linux

Job = TypeVar("Job")


class Affine(NamedTuple):
    """What a norm does to each channel of each image: x * scale + shift, (B, C) each, float32 at least."""

    scale: torch.Tensor
    shift: torch.Tensor


def suits_blocks(module: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether what `module` does to x may be computed so."""
    dtypes = (torch.float32, torch.float64)
    return goes_unseen(module, x) and x.dtype in dtypes and torch.get_num_threads() <= MAX_THREADS


def goes_unseen(module: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether kernels of ours may do it: x is channels_last on a CPU, and nothing records what happens."""
    if torch.compiler.is_compiling():  # first: what follows would be traced
        return False
    parameters = list(module.parameters(recurse=False))
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.ndim == 4
        and x.stride(1) == 1  # channels_last: a block of rows is one piece of memory
        and all(each.dtype == x.dtype and each.device == x.device for each in parameters)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters)))
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.is_autocast_enabled("cpu")
        and torch.get_float32_matmul_precision()
        == "highest"  # what others allow is too coarse for transforms
    )


def share_out(jobs: Iterable[Job], worker: Callable[[], Callable[[Job], None]]) -> None:
    """Do all jobs on torch's number of threads, without gradients, each thread computing alone.

    Args:
        worker: makes what does jobs, once in each thread, so that each has buffers of its own.
    """
    waiting = deque(jobs)  # popleft is atomic, so that no lock is needed
    inference = torch.is_inference_mode_enabled()  # modes belong to threads

    def work() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            do = worker()
            while True:
                try:
                    job = waiting.popleft()
                except IndexError:
                    return
                do(job)

    threads = min(torch.get_num_threads(), len(waiting))
    if threads == 1:
        return work()
    futures = [all_threads().submit(work) for _ in range(threads)]
    try:
        for future in futures:
            future.result()
    finally:  # after an error or an interruption nobody may go on writing to the caller's buffers
        waiting.clear()
        wait(futures)


def all_threads() -> ThreadPoolExecutor:
    """As many threads as torch's, each of one core."""
    return _pool(os.getpid(), torch.get_num_threads())


@functools.lru_cache(maxsize=1)  # in the key, the process: a forked one has none of its parent's threads
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return pool(threads, "latentvae")


def new_map(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """An uninitialised tensor; a large one on Linux in huge pages, the first touch of which costs half."""
    result = like.new_empty(shape)
    start = -(-result.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    size = (result.data_ptr() + result.nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
    if size > 0 and (madvise := _madvise()) is not None:
        madvise(start, size, _MADV_HUGEPAGE)  # a request: where it is refused, nothing changes
    return result


class Buffers:
    """Buffers kept from call to call: to get a large one anew costs as much as to fill it twice more."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """The buffer of that name, as an uninitialised tensor; what was taken before is overwritten."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, like.dtype))
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):  # or it could not be written outside of that mode
                buffer = self._buffers[name, like.dtype] = new_map(like, size)
        return buffer[:size].view(shape)


class ThreadBuffers(Buffers, threading.local):
    """Buffers of each thread's own."""


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
