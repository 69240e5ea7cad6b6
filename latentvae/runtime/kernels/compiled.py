"""Kernels in C++, compiled for this machine at first use: convolutions with their norm, activation and sum.

Where there is no compiler, those in torch's operations serve: `winograd` and `groupnorm`. The library is kept
in the user's cache folder, for each text, compiler and processor one.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from latentvae.base.errors import LatentVAEError
from latentvae.base.files import cache_folder, whole_file
from latentvae.runtime.kernels import blocks, winograd
from latentvae.runtime.measurements import capabilities, processor

logger = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
PATIENCE = 300  # seconds that a compiler may take; 2.3 on an idle core
TILES = 48  # of a block: fewer read the factors too often, more leave the cache
# of output; below, transforming the weights costs more than it saves
MIN_PIXELS = {torch.float32: 256, torch.bfloat16: 1024}
DTYPES = (torch.float32, torch.bfloat16)

_buffers = blocks.ThreadBuffers()
# of what kernels write to: torch's defaults may be another dtype, and a device that has no such memory
_like = torch.empty(0, dtype=torch.float32, device="cpu")


_POINTERS = "x plus out weight bias scale shift factors means variances counts"
_NUMBERS = (
    "batch height width inside outside x_image x_row x_pixel plus_image plus_row plus_pixel "
    "weight_out weight_in weight_row weight_column rows columns upsample bf16 activate prepared done next"
)


class Work(ctypes.Structure):
    """What a kernel works on: as in convolution.cpp, which says what each field is."""

    _fields_ = (  # a tuple, as nobody may change it
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int64) for name in _NUMBERS.split()),
    )


class Statistics(NamedTuple):
    """Means and variances of a map's blocks, (B, blocks, C), and the blocks' pixels, (blocks), in float64."""

    means: torch.Tensor
    variances: torch.Tensor
    counts: torch.Tensor


# --- the library


@functools.cache
def library() -> Any:
    """The compiled kernels, or None where they cannot be had; the log says why.

    The environment's CXX names the compiler; empty, none is wanted.
    """
    compiler = os.environ.get("CXX")
    if compiler is None:
        compiler = next(filter(None, map(shutil.which, COMPILERS)), "")
    if not compiler:
        logger.info("no C++ compiler is here: convolutions are computed in torch's operations.")
        return None
    try:
        found = ctypes.CDLL(str(_compiled(compiler, _text())))
    except (OSError, LatentVAEError, subprocess.SubprocessError) as error:
        logger.info(
            "%s gave no kernels (%s): convolutions are computed in torch's operations.", compiler, error
        )
        return None
    for name in ("lanes", "room", "factors", "blocks"):
        getattr(found, name).restype = ctypes.c_int64
    return found


def _compiled(compiler: str, text: str) -> Path:
    key = hashlib.sha256(repr((text, compiler, FLAGS, processor())).encode()).hexdigest()[:16]
    place = cache_folder() / "kernels" / f"{key}.so"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    # processes and threads that start together compile once. No fallback: where the system has no locks, a
    # file that stands for one would outlive a kill, and all would wait for it
    with FileLock(place.with_suffix(".lock"), PATIENCE, fallback_to_soft=False):
        if not place.exists():
            # durable: half a file, left by a power cut, would be found and never made anew
            with whole_file(place, durable=True) as path:
                _compile([*compiler.split(), *FLAGS, "-x", "c++", "-", "-o", str(path)], text)
    return place


def _compile(line: list[str], text: str) -> None:
    try:
        done = subprocess.run(line, input=text, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except OSError as error:  # as an error of ours, or it would read as if the file could not be written
        raise LatentVAEError(f"it did not start: {error}") from error
    if done.returncode:
        raise LatentVAEError(done.stderr.strip()[-500:] or f"ended with {done.returncode}")


def _text() -> str:
    """The kernels' text, with the schemes' matrices as constants, so that zeros and ones cost nothing."""
    schemes = (winograd.CONVOLUTION, winograd.UPSAMPLING_OF_TWO)
    given = "\n".join(_constants(number, scheme) for number, scheme in enumerate(schemes))
    return given + "\n" + Path(__file__).with_name("convolution.cpp").read_text(encoding="utf-8")


def _constants(number: int, scheme: winograd.Scheme) -> str:
    sizes = {"POINTS": len(scheme.g), "REACH": scheme.b.shape[1], "OUTPUTS": scheme.outputs}
    sizes |= {"STEP": scheme.step, "OFFSET": scheme.offset}
    lines = [f"static constexpr int {name} = {size};" for name, size in sizes.items()]
    for name in "abg":
        matrix = getattr(scheme, name)
        values = ", ".join("{" + ", ".join(f"{value!r}f" for value in row) + "}" for row in matrix.tolist())
        lines.append(f"static constexpr float {name}[{len(matrix)}][{matrix.shape[1]}] = {{{values}}};")
    return "\n".join([f"struct Scheme{number} {{", *lines, "};"])


# --- what they compute


def suits(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether the kernels compute what a module does to x (B, C, H, W), channels_last on a CPU."""
    if not blocks.goes_unseen(module, x) or x.dtype not in DTYPES or x.numel() == 0:
        return False
    return library() is not None and x.shape[1] % library().lanes() == 0


def suits_conv(conv: nn.Conv2d, x: torch.Tensor, plus: torch.Tensor | None) -> bool:
    """Whether they compute a 3x3 `conv` of x, with `plus` added."""
    fits = x.ndim == 4 and x.shape[1] == conv.in_channels
    if plus is not None:
        shape = (len(x), conv.out_channels, *x.shape[2:])
        fits &= plus.shape == shape and plus.dtype == x.dtype and plus.stride(1) == 1
        fits &= plus.device == x.device
    return fits and suits(conv, x) and conv.out_channels % library().lanes() == 0


@functools.cache
def _direct_bfloat16_is_faster() -> bool:
    """Whether this CPU has instructions for matrices of bfloat16, of many times the rate."""
    return any(capabilities().get(name) for name in ("amx_bf16", "bf16", "sve_bf16"))


def is_likely_faster(conv: nn.Conv2d, x: torch.Tensor, scheme: winograd.Scheme) -> bool:
    """Whether `convolve` is likely faster than a 3x3 `conv` of x in torch, if it can stand in."""
    enough = winograd.pixels(x, scheme) >= MIN_PIXELS[x.dtype]
    return enough and not (x.dtype == torch.bfloat16 and _direct_bfloat16_is_faster())


def convolve(
    x: torch.Tensor,
    conv: nn.Conv2d,
    upsample: bool = False,
    before: tuple[torch.Tensor, torch.Tensor] | None = None,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `conv` makes of x (B, C, H, W), or of x upsampled to nearest x2, as a channels_last map.

    Args:
        before: scale and shift of each channel, float32 (B, C): normalise x so, and apply SiLU, first.
        plus: add this to the result.
    """
    scheme = winograd.UPSAMPLING_OF_TWO if upsample else winograd.CONVOLUTION
    times, channels = 2 if upsample else 1, conv.out_channels
    height, width = x.shape[2] * times, x.shape[3] * times
    output = blocks.new_map(x.detach(), len(x), height, width, channels)
    bias = x.new_zeros(channels, dtype=torch.float32) if conv.bias is None else _floats(conv.bias)
    work, weight = _work(x), conv.weight.detach()
    work.out, work.weight, work.bias = output.data_ptr(), weight.data_ptr(), bias.data_ptr()
    work.weight_out, work.weight_in, work.weight_row, work.weight_column = weight.stride()
    work.outside, work.upsample = channels, upsample
    if before is not None:
        work.scale, work.shift = before[0].data_ptr(), before[1].data_ptr()
    if plus is not None:
        work.plus = plus.data_ptr()
        work.plus_image, _, work.plus_row, work.plus_pixel = plus.stride()
    down, along = (-(-(side + scheme.offset) // scheme.outputs) for side in (height, width))
    # four blocks at least, that two and four threads have equal shares; never by threads, or bits would vary
    work.rows, work.columns = winograd.block_of_tiles(down, along, min(TILES, max(1, down * along // 4)))
    statistics = _new_statistics(work, len(x), library().blocks(ctypes.byref(work)), channels)
    with winograd.factors_buffer(bias, library().factors(ctypes.byref(work))) as factors:
        work.factors = factors.data_ptr()
        jobs = max(channels // library().lanes(), len(x) * len(statistics.counts))
        _run(library().convolve, work, library().room(ctypes.byref(work)), jobs)
    result = output.permute(0, 3, 1, 2)
    if before is not None or upsample:  # else the convolution stands alone: hooks may change what it gives
        _statistics[result] = None if result.is_inference() else result._version, statistics
    return result


def _floats(values: torch.Tensor) -> torch.Tensor:
    return values.detach().float().contiguous()


def _work(x: torch.Tensor) -> Work:
    work = Work(x=x.data_ptr(), bf16=x.dtype == torch.bfloat16)
    work.batch, work.inside, work.height, work.width = x.shape
    work.x_image, _, work.x_row, work.x_pixel = x.stride()
    return work


def _new_statistics(work: Work, batch: int, count: int, channels: int) -> Statistics:
    """Room for statistics, which the work will fill."""
    means, variances = _like.new_empty((2, batch, count, channels), dtype=torch.float64)
    counts = _like.new_empty(count, dtype=torch.float64)
    work.means, work.variances, work.counts = means.data_ptr(), variances.data_ptr(), counts.data_ptr()
    return Statistics(means, variances, counts)


def _run(function: Callable[[Any, Any], None], work: Work, room: int, jobs: int) -> None:
    """Have all threads do a work of so many jobs, this one among them: they take jobs until none is left."""

    def join() -> None:
        buffer = _buffers.take("compiled", _like, room + 16)
        function(ctypes.byref(work), ctypes.c_void_p(-(-buffer.data_ptr() // 64) * 64))

    others = min(torch.get_num_threads(), jobs) - 1
    pool = blocks.all_threads() if others else None
    futures = [pool.submit(join) for _ in range(others)] if pool else []
    try:
        join()
    finally:
        # who has not begun, as another call has the threads, would find no job
        wait([each for each in futures if not each.cancel()])


# --- norms

# What `convolve` measured, with the version of the map that it measured (none in inference mode).
_statistics: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def forget_statistics(x: torch.Tensor) -> None:
    """Forget what was measured of a map, which others may now change without a trace."""
    _statistics.pop(x, None)


def statistics_of(x: torch.Tensor) -> Statistics:
    """The statistics of a map's blocks: those that a convolution measured, or measured now."""
    version, found = _statistics.get(x, (-1, None))
    if found is not None and version == (None if x.is_inference() else x._version):
        return found
    work = _work(x)
    work.rows = max(1, min(2**15 // (x.shape[1] * x.shape[3]), -(-x.shape[2] // 4)))
    statistics = _new_statistics(work, len(x), -(-x.shape[2] // work.rows), x.shape[1])
    room = 4 * x.shape[1]  # 2 C values in float64
    _run(library().measure, work, room, len(x) * len(statistics.counts))
    return statistics


def affine(norm: nn.GroupNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and shift of every channel that normalise x (B, C, H, W): float32 (B, C) each."""
    statistics, (batch, channels) = statistics_of(x), x.shape[:2]
    weight, bias = _floats(norm.weight), _floats(norm.bias)
    scale, shift = _like.new_empty((2, batch, channels))
    pointers = [ctypes.c_void_p(each.data_ptr()) for each in (*statistics, weight, bias, scale, shift)]
    sizes = map(ctypes.c_int64, (batch, len(statistics.counts), channels, norm.num_groups))
    library().normalise(*pointers[:3], *sizes, ctypes.c_double(norm.eps), *pointers[3:])
    return scale, shift


def apply(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *, silu: bool) -> torch.Tensor:
    """x (B, C, H, W) normalised, and activated if asked for, as a new channels_last map."""
    output = blocks.new_map(x.detach(), len(x), *x.shape[2:], x.shape[1])
    work = _work(x)
    work.out, work.scale, work.shift = output.data_ptr(), scale.data_ptr(), shift.data_ptr()
    work.activate = silu
    _run(library().apply, work, 0, len(x) * x.shape[2])
    return output.permute(0, 3, 1, 2)
