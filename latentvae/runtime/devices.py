"""A model on a device, both by the names that people give, and what to do where it does not fit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import LatentVAEError
from latentvae.models import loading
from latentvae.runtime.measurements import capabilities
from latentvae.runtime.optimize import optimize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(model: str | None, device: str | None, precision: str) -> AutoencoderKL:
    """The model, optimized, at this precision.

    Raises:
        LatentVAEError: no such model or device, or no room on it.
    """
    place = usable_device(device)
    with fitting_on(place):
        return optimize(loading.load(model, dtype=DTYPES[precision], device=place))


@contextmanager
def fitting_on(place: torch.device) -> Iterator[None]:
    """Turn what a device says when a model does not fit into an error that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LatentVAEError(f"the model does not fit on {place}: {error}. Try --device cpu.") from error


def usable_device(device: str | None) -> torch.device:
    """The device that was named, or the best one.

    Raises:
        LatentVAEError: it is not there.
    """
    device = device or best_device()
    # each process of a machine gets a GPU of its own: torchrun and accelerate launch set LOCAL_RANK
    named = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
    try:
        place = torch.device(named)
        torch.empty(1, device=place)  # a name that torch knows may be of a GPU that is not there
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
        if named.partition(":")[0] not in ("cpu", "cuda", "mps"):  # torch would list twenty kinds
            words = f"there is no device {device!r}: wanted cpu, cuda, cuda:1 or mps."
            raise LatentVAEError(words) from error
        raise LatentVAEError(f"device {device!r} cannot be used: {error}. Try --device cpu.") from error
    return place


def best_device() -> str:
    """cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# of `capabilities`: x86 with AVX-512 or AMX, Arm with its own
_CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 pays on a device: CPUs without instructions for it are slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return any(capabilities().get(name) for name in _CPU_INSTRUCTIONS)
    return False
