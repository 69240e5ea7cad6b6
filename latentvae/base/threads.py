"""Threads of one core each, whose results do not depend on how many there are; processes by their numbers."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from latentvae.base.errors import StoreError


def pool(count: int, name: str) -> ThreadPoolExecutor:
    """Threads in which torch uses no others."""
    # all have begun before any work comes: a thread that started later would reset what is set at the end
    ready, before = threading.Barrier(count + 1), torch.get_num_threads()

    def start() -> None:
        torch.get_num_threads()  # torch sets a thread's number when it first looks, over what was set before
        torch.set_num_threads(1)
        ready.wait()

    threads = ThreadPoolExecutor(count, name, initializer=start)
    for _ in range(count):
        threads.submit(int)  # an executor starts a thread only when work comes and none is idle
    ready.wait()
    torch.set_num_threads(before)  # what threads set is also the default of those to come
    return threads


def environment_number(name: str, default: int) -> int:
    """A number by which a launcher tells processes apart.

    Raises:
        StoreError: something else stands in the environment.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise StoreError(f"{name}={text!r} is in the environment; wanted a number, or unset it.")
    return int(text)
