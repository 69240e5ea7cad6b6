"""The model at work on batches: one at a time on a GPU, on a CPU one in each core.

On a CPU the bits of a convolution depend on how many threads share it. So each batch has one thread, and
batches run side by side: the result is the same for any number of cores and processes.
"""

import threading
import time
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL

from latentvae.errors import StoreError
from latentvae.store import threads
from latentvae.store.loading import Loaded


class Moments(NamedTuple):
    """Of a batch: (B, 2C, h, w) in the store's dtype on the CPU, and those of the mirror images."""

    plain: torch.Tensor
    flipped: torch.Tensor | None


class Computer:
    """Runs a VAE's encoder in threads of its own; use it in a `with` block.

    Args:
        vae: the model; its forward must be safe to call from several threads, as the stock ones are.
        dtype: of the moments that come out.
        count: batches at once, on a CPU; elsewhere it is one.
    """

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, count: int) -> None:
        self.vae, self.dtype = vae, dtype
        self.count = count if vae.device.type == "cpu" else 1
        self._pool = threads.pool(self.count, "latentvae-encode")
        self._room = threading.Semaphore(self.count + 1)
        self.encoded = 0  # images
        self._lock, self._start = threading.Lock(), time.perf_counter()
        self._busy, self._since = 0.0, dict[int, float]()  # seconds done with; when each thread began

    def __enter__(self) -> "Computer":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def waiting(self) -> float:
        """The share of the time in which the model had nothing to do."""
        with self._lock:
            now = time.perf_counter()
            busy = self._busy + sum(now - since for since in self._since.values())
        return max(0.0, 1 - busy / (self.count * (now - self._start)))

    def submit(self, images: list[Loaded]) -> Future[Moments]:
        """Encode a batch as soon as the model can; waits where enough batches wait already."""
        self._room.acquire()
        future = self._pool.submit(self._encode, images)
        future.add_done_callback(lambda _: self._room.release())
        return future

    def alone(self, images: list[Loaded], within: AbstractContextManager[object]) -> Future[Moments]:
        """Encode a batch while nothing else runs, inside of a context; what comes back is done."""
        for _ in range(self.count + 1):
            self._room.acquire()
        try:
            with within:
                future = self._pool.submit(self._encode, images)
                wait([future])
                return future
        finally:
            self._room.release(self.count + 1)

    @torch.inference_mode()
    def _encode(self, images: list[Loaded]) -> Moments:
        thread = threading.get_ident()
        with self._lock:
            self._since[thread] = time.perf_counter()
        try:
            plain = self._moments([one.image for one in images])
            mirrored = [one.flipped for one in images if one.flipped is not None]
            return Moments(plain, self._moments(mirrored) if mirrored else None)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            shape = " x ".join(map(str, images[0].image.shape[1:]))
            raise StoreError(
                f"{len(images)} images of {shape} pixels (H x W) do not fit into memory at once, first "
                f"{images[0].entry.source}. Give a smaller --batch-size, and on a CPU fewer --threads."
            ) from error
        finally:
            with self._lock:
                self._busy += time.perf_counter() - self._since.pop(thread)
                self.encoded += len(images)

    def _moments(self, images: list[torch.Tensor]) -> torch.Tensor:
        batch = torch.stack(images).to(self.vae.device, self.vae.dtype)
        moments = self.vae.encode(batch).latent_dist.parameters
        return moments.to(self.dtype).cpu()
