"""What a picture goes through in the tab Compare, there and back: models, peers, and files of equal bytes."""

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

from latentvae.codec import compression as codec
from latentvae.codec import rivals
from latentvae.demo.one_model import Model, Peer
from latentvae.images.reading import load_image
from latentvae.images.saving import to_pil
from latentvae.images.tensors import crop_padding, pad_to_multiple

SAMPLED = 0.002  # seconds between two looks at the memory

Result = TypeVar("Result")


@dataclass(frozen=True)
class Trip:
    """What came back.

    Attributes:
        name: of the way.
        how: what it took.
        image: (C, H, W) near [-1, 1], C as the picture's.
        file: what was written, where there is a file.
        encode_seconds, decode_seconds: of one time each, on this machine as busy as it is.
        peak_bytes: by which this process grew at most meanwhile.
    """

    name: str
    how: str
    image: torch.Tensor
    file: bytes | None
    encode_seconds: float
    decode_seconds: float
    peak_bytes: int


class Meter:
    """Time and memory of the steps of one way."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak_bytes = 0

    def __call__(self, step: Callable[[], Result]) -> Result:
        """Do one step."""
        if sys.platform == "linux":  # what the allocator keeps would be taken again without growing
            with suppress(AttributeError, OSError):
                ctypes.CDLL(None).malloc_trim(0)
        process, done = psutil.Process(), threading.Event()
        before = most = process.memory_info().rss

        def watch() -> None:
            nonlocal most
            while not done.wait(SAMPLED):
                most = max(most, process.memory_info().rss)

        watcher = threading.Thread(target=watch, name="memory", daemon=True)
        watcher.start()
        start = time.perf_counter()
        try:
            result = step()
        finally:
            self.seconds.append(time.perf_counter() - start)
            most = max(most, process.memory_info().rss)
            done.set()
            watcher.join()
        self.peak_bytes = max(self.peak_bytes, most - before)
        return result

    def trip(self, name: str, how: str, image: torch.Tensor, file: bytes | None = None) -> Trip:
        """What came back after both steps."""
        there, back = self.seconds
        return Trip(name, how, image, file, there, back, self.peak_bytes)


def by_lvae(name: str, model: Model, image: torch.Tensor, quality: int) -> Trip:
    """Through an .lvae file; image (C, H, W) in [-1, 1] with the model's channels."""
    meter = Meter()
    # exact encodes: the file does not depend on what this machine is fast at
    data = meter(lambda: codec.compress(model.exact, image[None], quality=quality))
    back = meter(lambda: codec.decode_payload(model.swift, *codec.unpack(data))[0])
    return meter.trip(name, f"{model.name}, quality {quality}", back, data)


def by_model(model: Model, image: torch.Tensor) -> Trip:
    """Through a model's latents, which are not quantised; image (C, H, W) in [-1, 1]."""
    meter, shown = Meter(), as_channels(image, model.channels)[None]
    posterior, padding = meter(lambda: model.encode(shown))
    back = meter(lambda: model.decode(posterior.mode(), padding)[0])
    return meter.trip(model.name, "latents, not quantised: no file", as_channels(back, image.shape[0]))


@torch.no_grad()
def by_peer(peer: Peer, image: torch.Tensor) -> Trip:
    """Through an AutoencoderTiny; image (C, H, W) in [-1, 1]."""
    meter, vae = Meter(), peer.vae
    padded, padding = pad_to_multiple(as_channels(image, peer.channels)[None], peer.ratio)
    vae.use_tiling = max(padded.shape[-2:]) > peer.tile_above  # its own tiles, which overlap
    latents = meter(lambda: vae.encode(padded).latents)
    back = meter(lambda: vae.decode(latents).sample)
    found = as_channels(crop_padding(back, padding)[0], image.shape[0])
    return meter.trip(peer.name, "latents, not quantised: no file", found)


def by_codec(image: torch.Tensor, name: str, budget: int) -> Trip:
    """Through the best file of a format of at most `budget` bytes, or the smallest there is.

    Args:
        image: (C, H, W) in [-1, 1], C of 1 or 3.
        name: one of rivals.WITHIN (JPEG is optimised, 4:2:0).
        budget: bytes.
    """
    picture, meter = to_pil(image), Meter()
    file, quality = rivals.best_within(picture, name, budget)
    # of the one that was found: searching is the comparison's matter
    data = meter(lambda: rivals.write(picture, name, quality))
    back = meter(lambda: load_image(data, name=name, channels=image.shape[0]))
    return meter.trip(
        name, f"quality {quality}" + (", its smallest" if len(file) > budget else ""), back, data
    )


def as_channels(image: torch.Tensor, channels: int) -> torch.Tensor:
    """Grey for a model of grey images, and grey shown as RGB."""
    if image.shape[0] == channels:
        return image
    return image.mean(0, keepdim=True) if channels == 1 else image.expand(3, -1, -1)
