"""What the benchmarks share: the machine's name, its convolution roof, and memory that cannot be evicted."""

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from torch.nn.functional import conv2d

from latentvae.runtime.devices import has_fast_bfloat16

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """What the figures were measured on."""
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        bf16 = "with" if has_fast_bfloat16(DEVICE) else "without"
        name = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {bf16} bf16 instructions"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{name}, {versions}, Python {platform.python_version()}"


def seconds(call: Callable[[], object], repeats: int, warmup: int = 1) -> float:
    """Median time of a call."""
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def convolution_roof(dtype: torch.dtype) -> float:
    """FLOP per second of one large 3x3 convolution in the layout it runs fastest in."""
    x = torch.randn(1, 128, 256, 256, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        return 2 * 9 * 128 * 128 * 256 * 256 / seconds(lambda: conv2d(x, weight, padding=1), 5, 2)


class Peak:
    """The most memory used inside a `with` block above that at its start, in bytes.

    On a GPU what torch allocated; else this process's anonymous memory, which unlike a mapped file cannot be
    evicted, sampled a hundred times a second.
    """

    def __enter__(self) -> "Peak":
        self.bytes = 0
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        self.before, self.most, self.done = _anonymous(), 0, threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.01):
            self.most = max(self.most, _anonymous())

    def __exit__(self, *error: object) -> None:
        if DEVICE.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.done.set()
        self.thread.join()
        self.bytes = max(self.most, _anonymous()) - self.before


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
