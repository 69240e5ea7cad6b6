"""The machine that a run finds: its processes, its precision and its memory."""

import ctypes
import logging
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType

from latentvae.base.errors import ConfigError
from latentvae.base.optional import install_command
from latentvae.runtime.devices import has_fast_bfloat16
from latentvae.runtime.processes import before_group
from latentvae.training.checks import check_compiler
from latentvae.training.config import Config

logger = logging.getLogger(__name__)


def start_processes(config: Config) -> tuple[Config, Accelerator]:
    """Join the run's processes; return the configuration with its precision decided, and the accelerator.

    Raises:
        ConfigError: train.compile where nothing can be compiled, fp16 without a GPU, or another precision
            than that of an earlier training of this process.
    """
    keep_freed_memory()
    torch.backends.cudnn.benchmark = config.train.cudnn_benchmark
    config = with_precision(config)
    precision = config.train.precision
    mixed = precision if precision in ("bf16", "fp16") else "no"
    if is_initialized() and (earlier := AcceleratorState().mixed_precision) != mixed:
        raise ConfigError(
            f"train.precision={precision} came, and an earlier training of this process had "
            f"{'fp32' if earlier == 'no' else earlier}, which Accelerate keeps to its end: train with that, "
            "or in a new process."
        )
    before_group()
    accelerator = Accelerator(
        mixed_precision=mixed,
        cpu=not torch.accelerator.is_available(),  # else torchrun on a CPU starts without gloo
        log_with=installed_tracker(config.train.tracker),
        project_dir=Path(config.output),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=config.train.timeout_minutes))],
    )
    if torch.cuda.is_available():  # torch has one switch for all devices, and CPUs are to be exact
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
    check_scaler(accelerator)
    if config.train.compile:  # on this process's own device, which is known only now
        check_compiler(accelerator.device)
    return config, accelerator


def check_scaler(accelerator: Accelerator) -> None:
    """Refuse fp16 where Accelerate scales no losses: it would compute in fp32, and not say so.

    Raises:
        ConfigError: names what computes as fast there.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ConfigError(
            f"train.precision=fp16 is for GPUs, and this process runs on {accelerator.device}; use auto, "
            "which is bf16 where that is fast, and fp32 elsewhere."
        )


def is_first_process() -> bool:
    """Whether this process is the one that speaks for all."""
    return bool(PartialState().is_main_process)


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


def with_precision(config: Config) -> Config:
    """The configuration with precision "auto" decided for this machine: bf16 where it is fast, else fp32."""
    if config.train.precision != "auto":
        return config
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    precision = "bf16" if has_fast_bfloat16(device) else "fp32"
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def installed_tracker(name: str) -> str | None:
    """The tracker that Accelerate is to start, or None; says so where its package is missing."""
    if name == "none":
        return None
    if LoggerType(name) not in get_available_trackers():
        # of the trackers our extra brings one
        install = install_command("train") if name == "tensorboard" else f"pip install {name}"
        logger.warning(
            "tracker %s is not installed: figures go to metrics.jsonl only. To install it: %s", name, install
        )
        return None
    return name


def peak_memory() -> int:
    """The most bytes in use so far: of the GPU if there is one, else of this process; 0 if nobody tells."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # bytes on macOS, kilobytes elsewhere
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def usable_memory() -> int:
    """Bytes that this process may have in all: of the GPU, else what others leave it of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss
