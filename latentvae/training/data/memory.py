"""All images decoded once and kept, in few large buffers."""

import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import torch
from tqdm import tqdm

logger = logging.getLogger(__name__)

Decoded = torch.Tensor | str  # uint8 or float32 (C, H, W), or the reason why an image cannot be used

BLOCK = 2**30  # bytes of a buffer: most sets are one


class ImageMemory:
    """Images by number, each as it was decoded: a view of a part of a buffer.

    Workers that are not forked are sent a file descriptor for each tensor, and a process may have some
    thousand of them: so images are no tensors of their own.
    """

    def __init__(self, images: Iterable[Decoded]) -> None:
        self.blocks: list[torch.Tensor] = []  # bytes, one-dimensional
        self.dtype = torch.uint8  # of all images
        self.reasons: dict[int, str] = {}
        places: list[tuple[int, int, int, int, int]] = []  # block, offset, C, H, W
        block, used = torch.empty(0, dtype=torch.uint8), 0
        for number, image in enumerate(images):
            if isinstance(image, str):
                self.reasons[number] = image
                places.append((0, 0, 0, 0, 0))
                continue
            self.dtype, size = image.dtype, image.nbytes
            if used + size > len(block):
                self._close(block, used)
                block, used = torch.empty(max(BLOCK, size), dtype=torch.uint8), 0
            block[used : used + size] = image.flatten().view(torch.uint8)
            places.append((len(self.blocks), used, *image.shape))
            used += size
        self._close(block, used)
        self.places = np.array(places, dtype=np.int64)

    def _close(self, block: torch.Tensor, used: int) -> None:
        if used:  # without its unused end, which costs nothing until it is sent to a worker
            self.blocks.append(block[:used].clone() if used < len(block) else block)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Decoded:
        """Raises IndexError past the last, as sequences do."""
        if index in self.reasons:
            return self.reasons[index]
        block, offset, *shape = self.places[index].tolist()
        size = int(np.prod(shape)) * self.dtype.itemsize
        return self.blocks[block][offset : offset + size].view(self.dtype).view(shape)


def fits_in_memory(count: int, decode: Callable[[int], Decoded]) -> bool:
    """Whether `count` images, judged by a few, take less than half of the memory that is free."""
    # eight of them, as they are kept
    some = [decode(index) for index in range(0, count, max(1, count // 8))]
    sizes = [image.nbytes for image in some if isinstance(image, torch.Tensor)]
    needed = count * sum(sizes) / max(1, len(sizes))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this machine: each holds all images
    if needed * processes < psutil.virtual_memory().available / 2:
        return True
    logger.warning(
        "data.in_memory: %d images would take about %.1f GB, so they are decoded as they are needed. Set "
        "data.workers to the cores that can be spared, or data.short_side to keep them smaller.",
        *(count, needed * processes / 1e9),
    )
    return False


def decode_all(count: int, decode: Callable[[int], Decoded]) -> ImageMemory:
    """All images, decoded by a thread per core."""
    with ThreadPoolExecutor() as pool:
        return ImageMemory(tqdm(pool.map(decode, range(count)), total=count, desc="decoding", leave=False))
