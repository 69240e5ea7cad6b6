"""The fastest way to compute an encoder or a decoder on this CPU: measured once, kept, then looked up.

Ways are our kernels by their rule (the usual way, and what it falls back to), our kernels with the faster one
for each layer as it was measured, and OpenVINO where it is installed. All give the same numbers to rounding.
"""

import functools
import hashlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from latentvae.base import repeatable
from latentvae.base.errors import LatentVAEError
from latentvae.models.loading import spatial_compression_ratio
from latentvae.runtime import measurements
from latentvae.runtime.graphs import backend
from latentvae.runtime.kernels import choices, compiled
from latentvae.runtime.patches import on_restore, patch, underlying

logger = logging.getLogger(__name__)

USUAL, LAYERS, OPENVINO = "usual", "layers", "openvino"
REPEATS = 3
SMALLEST = 14  # log2 of pixels, 128 x 128: what is timed first
LONGEST = 2.0  # seconds: a larger image that takes more is judged by a smaller one
GAIN = 0.95  # of the usual way's time: less is not worth leaving it, and may be chance


@dataclass(frozen=True)
class Choice:
    """What was found for one half and size.

    Attributes:
        way: the fastest.
        seconds: of each way, for the image that was timed.
        pixels: log2 of that image's pixels.
        layers: whether Winograd is faster, by layer.
    """

    way: str
    seconds: dict[str, float]
    pixels: int
    layers: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: dict[str, Any] | None) -> "Choice | None":
        """The one that was kept, or None where an entry is missing or nothing that was written so."""
        try:
            found = cls(**entry)  # type: ignore[arg-type]  # None is no mapping
            whole = found.way in found.seconds and found.way in (USUAL, LAYERS, OPENVINO)
            whole &= all(isinstance(each, int | float) for each in found.seconds.values())
            whole &= all(isinstance(value, bool) for value in found.layers.values())
        except (TypeError, AttributeError):
            return None
        return found if whole and isinstance(found.pixels, int) else None


Way = Callable[[torch.Tensor], torch.Tensor]
Key = tuple[int, torch.dtype, int]  # log2 of pixels, the weights' dtype, threads
_found: weakref.WeakKeyDictionary[nn.Module, dict[Key, Choice]] = weakref.WeakKeyDictionary()
_measuring = threading.RLock()


def use_fastest(half: nn.Module) -> None:
    """Have an encoder or a decoder computed in the fastest way, measured with its first call of a size."""
    patch(half, by_fastest, "optimize")
    on_restore(half, _forget, "optimize")


def _forget(half: nn.Module) -> None:
    _found.pop(half, None)
    backend.forget(half)


def by_fastest(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A half's forward: in the fastest way, or in the usual one where that alone is right."""
    asked = torch.compiler.is_compiling() or args or kwargs or repeatable.wanted()
    if asked or not backend.computes(self, sample):
        return underlying(self, "optimize")(sample, *args, **kwargs)
    choice = _choice(self, sample)
    if choice.way == OPENVINO:
        return backend.compute(self, sample)
    if choice.way == USUAL:
        return underlying(self, "optimize")(sample)
    with choices.using(choice.layers, larger=_size(self, sample) - choice.pixels):
        return underlying(self, "optimize")(sample)


def speeds(vae: AutoencoderKL, side: int) -> dict[str, dict[str, Any]]:
    """What both halves use for an image of side x side pixels, as JSON values; measured if need be.

    Args:
        vae: stock or optimized, on a CPU.
    """
    images = torch.empty(1, vae.config["in_channels"], side, side, dtype=vae.dtype)
    latents = images[:, :, :: spatial_compression_ratio(vae), :: spatial_compression_ratio(vae)]
    found = {"encode": _choice(vae.encoder, images), "decode": _choice(vae.decoder, latents)}
    return {verb: {"timed_side": _side(choice.pixels), **asdict(choice)} for verb, choice in found.items()}


def _side(pixels: int) -> int:
    return round(2 ** (pixels / 2))


def _choice(half: Any, sample: torch.Tensor) -> Choice:
    """What was found for inputs of about this size: in this process, by an earlier one, or now."""
    size = _size(half, sample)
    key = (size, sample.dtype, torch.get_num_threads())
    found = _found.setdefault(half, {})
    if key not in found:
        with _measuring:  # one at a time, or they would measure each other
            if key not in found:
                name = f"{_name(half)} {sample.dtype} 2^{size} pixels"
                # a compiler may come or go between two processes, and the fastest way with it
                name += "" if compiled.library() else " without compiled kernels"
                kept = Choice.of(measurements.read(name))
                found[key] = kept or _measured(half, size, sample.dtype)
                if kept is None:
                    measurements.write(name, asdict(found[key]))
    return found[key]


def _size(half: Any, sample: torch.Tensor) -> int:
    """The class of an input: log2 of its pixels in images, and of the smallest ones together."""
    pixels = sample.shape[0] * sample.shape[2] * sample.shape[3]
    return max(SMALLEST - 2, round(math.log2(pixels)) + 2 * _doublings(half))


def _name(half: nn.Module) -> str:
    """A half's kind, and a hash of its layers and their shapes: weights do not matter."""
    shapes = [tuple(weight.shape) for weight in half.parameters()]
    layers = [(kind.__name__, sorted(values.items())) for kind, values in backend.settings(half)]
    return f"{type(half).__name__} {hashlib.sha256(repr((layers, shapes)).encode()).hexdigest()[:16]}"


def _doublings(half: Any) -> int:
    """How often a half makes its map twice as large: an encoder never."""
    return sum(block.upsamplers is not None for block in getattr(half, "up_blocks", ()))


def _measured(half: Any, size: int, dtype: torch.dtype) -> Choice:
    """Time every way with a made-up image of 2^size pixels, or of fewer where that takes long."""
    start = time.perf_counter()
    usual: Way = underlying(half, "optimize")
    with torch.no_grad():
        timed = min(size, SMALLEST)
        small = _stand_in(half, timed, dtype)
        usual(small)
        expected = 2 * _seconds(usual, small)  # of an image twice as large
        while timed < size and expected <= LONGEST:
            timed, expected = timed + 1, 2 * expected
        x = _stand_in(half, timed, dtype)
        with choices.measuring() as layers:
            usual(x)

        def by_layers(x: torch.Tensor) -> torch.Tensor:
            with choices.using(layers):
                return usual(x)

        ways: dict[str, Way] = {
            USUAL: usual,
            LAYERS: by_layers,
            OPENVINO: functools.partial(backend.compute, half),
        }
        if not layers:
            del ways[LAYERS]  # in this dtype there is nothing to choose
        try:
            backend.check_openvino(x.device, dtype)
        except LatentVAEError:
            del ways[OPENVINO]
        for way in ways.values():  # compiles, and fills what is kept from call to call
            way(x)
        seconds = dict.fromkeys(ways, math.inf)
        for _ in range(REPEATS):
            for name, way in ways.items():
                seconds[name] = min(seconds[name], _seconds(way, x))
    fastest = min(seconds, key=seconds.__getitem__)
    fastest = fastest if seconds[fastest] <= GAIN * seconds[USUAL] else USUAL
    if fastest != OPENVINO:
        backend.forget(half)  # its memory
    took = time.perf_counter() - start
    logger.info("%s: %s is the fastest way; measured in %.1f s.", type(half).__name__, fastest, took)
    return Choice(fastest, {name: round(value, 6) for name, value in seconds.items()}, timed, layers)


def _seconds(way: Way, x: torch.Tensor) -> float:
    start = time.perf_counter()
    way(x)
    return time.perf_counter() - start


def _stand_in(half: Any, size: int, dtype: torch.dtype) -> torch.Tensor:
    """A random input, always the same, of an image of 2^size pixels."""
    size = max(0, size - 2 * _doublings(half))
    height = 2 ** (size // 2)
    shape = (1, half.conv_in.in_channels, height, 2**size // height)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
