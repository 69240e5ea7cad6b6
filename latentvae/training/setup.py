"""How one process's part of a run is set up, and what it then holds."""

import ctypes
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from torch import nn

from latentvae.models.loading import spatial_compression_ratio
from latentvae.training import checkpoint
from latentvae.training.adversary import Adversary
from latentvae.training.checkpoint import TrainingState
from latentvae.training.checks import check_compiler, check_start
from latentvae.training.config import Config
from latentvae.training.data.crops import CropSequence, split_sources
from latentvae.training.losses import VAELoss
from latentvae.training.module import TrainableVAE, models
from latentvae.training.optim import EMA, build_optimizer
from latentvae.training.record import Record, installed_tracker
from latentvae.training.validation import Validation

logger = get_logger(__name__)  # Accelerate's: the main process speaks for all


@dataclass
class Run:
    """One process's part of a training run."""

    config: Config
    accelerator: Accelerator
    folder: Path
    state: TrainingState
    model: nn.Module  # TrainableVAE as Accelerate wrapped it
    loss: VAELoss
    sequence: CropSequence
    validation: Validation
    record: Record
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def global_batch(self) -> int:
        """Images per optimizer step over all processes."""
        return self.config.train.batch_size * self.config.train.accumulation * self.accelerator.num_processes

    @property
    def smallest_side(self) -> int:
        """The smallest side of images that every loss can judge."""
        adversary = self.state.adversary
        return max(self.loss.min_size, adversary.discriminator.min_size if adversary else 1)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process


def set_up(config: Config, resume: str | None) -> Run:
    """Check, build and restore one process's part of a run.

    Raises:
        LatentVAEError: bad data, missing weights, an output that is taken, or models that do not fit.
    """
    # 1. Check whatever needs no weights: nothing is loaded or written for a run that cannot be.
    start = check_start(config, resume)

    # 2. The machine: its memory, precision and processes.
    keep_freed_memory()
    config = with_precision(config)
    folder = Path(config.output)
    accelerator = Accelerator(
        mixed_precision="bf16" if config.train.precision == "bf16" else "no",
        cpu=not torch.accelerator.is_available(),  # else torchrun on a CPU starts without gloo
        log_with=installed_tracker(config.train.tracker),
        project_dir=folder,
    )
    device = accelerator.device
    if config.train.compile:
        check_compiler(device)

    # 3. The images. Opened before any network: a wrong path is the most frequent mistake.
    train_images, val_images = split_sources(config.data)

    # 4. The networks: LPIPS first, whose weights are missing more often than a model's.
    loss = VAELoss.build(config.loss).to(device, config.train.dtype)
    loss.to(memory_format=config.train.memory_format)
    vae, teacher = models(config, device)
    channels = vae.config["in_channels"]

    # 5. What training changes, fresh or as the checkpoint has it.
    state = TrainingState(
        vae=vae,
        ema=EMA(vae, config.train.ema_decay),
        optimizer=build_optimizer(vae, config.optim),
        adversary=Adversary.build(config, channels, device),
    )
    if start is not None:
        checkpoint.restore(state, start, accelerator)
        logger.info("continuing from %s", start)

    # 6. What processes share: gradients, through what Accelerate wraps.
    model = wrap(config, TrainableVAE(vae, teacher), accelerator)
    run = Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        state=state,
        model=model,
        loss=loss,
        sequence=CropSequence(train_images, config.data, channels, config.seed),
        validation=Validation(config, train_images, val_images, channels),
        record=Record(folder, accelerator, state.step),
    )
    if state.adversary is not None:
        state.adversary.prepare(accelerator)
    if start is not None and accelerator.num_processes > 1:
        settle_buckets(config, state, model, accelerator)

    # 7. Say what is about to happen.
    announce(run)
    return run


# --- the parts of `set_up`, in its order -------------------------------------------------------------------


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


# of torch.cpu.get_capabilities(): x86 with AVX-512 or AMX, Arm with its own
_CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 pays on a device: CPUs without instructions for it are slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return any(_cpu_capabilities().get(name) for name in _CPU_INSTRUCTIONS)
    return False


def _cpu_capabilities() -> dict[str, object]:
    """What torch knows of this CPU; older versions know only two things."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    known = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return {name: getattr(torch.cpu, test, bool)() for name, test in known.items()}


def wrap(config: Config, module: TrainableVAE, accelerator: Accelerator) -> nn.Module:
    """The module as processes share it, its blocks compiled if asked."""
    if config.train.compile:
        encoder, decoder = module.vae.encoder, module.vae.decoder
        # in place; the layers at both ends stay as they are: the adaptive weight looks at the last
        for block in (*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks):
            block.compile()
    return accelerator.prepare_model(module)


def settle_buckets(config: Config, state: TrainingState, model: nn.Module, accelerator: Accelerator) -> None:
    """Two backward passes without an update, so that a resumed run adds gradients up in the old order.

    DistributedDataParallel sorts parameters into buckets anew after its first backward pass. With three or
    more processes the buckets decide the order of sums, and so the last bits.
    """
    side, shape = config.data.crop, state.vae.config
    small = side // spatial_compression_ratio(state.vae)
    images = torch.zeros(
        1, shape["in_channels"], side, side, device=accelerator.device, dtype=config.train.dtype
    )
    noise = images.new_zeros(1, shape["latent_channels"], small, small)
    adversary = state.adversary
    for _ in range(2):
        outputs = model(images, noise)
        maps = [each for each in (outputs.reconstructions, outputs.moments) if each.requires_grad]
        accelerator.backward(torch.stack([each.sum() for each in maps]).sum())
        if adversary is not None and adversary.ramp(state.step - 1) > 0:  # it has had its first pass
            accelerator.backward(adversary.model(images).sum())
    for optimizer in (state.optimizer, *([adversary.optimizer] if adversary else [])):
        optimizer.zero_grad(set_to_none=True)


def announce(run: Run) -> None:
    """Write the resolved configuration, and say what is about to happen."""
    if not run.is_main:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    resolved = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False)
    (run.folder / "config.yaml").write_text(resolved, encoding="utf-8")
    trained = sum(p.numel() for p in run.state.vae.parameters() if p.requires_grad) / 1e6
    logger.info(
        "%.1f M parameters to train; %d images; %d per pass x %d passes x %d processes = %d per step; %s, %s",
        *(trained, len(run.sequence), run.config.train.batch_size, run.config.train.accumulation),
        *(run.accelerator.num_processes, run.global_batch, run.accelerator.device),
        run.config.train.precision,
    )


def is_first_process() -> bool:
    """Whether this process is the one that speaks for all."""
    return bool(PartialState().is_main_process)
