"""What one process holds while it trains, and how it is set up: whatever can be wrong is checked first."""

import ctypes
import fnmatch
import os
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from diffusers import AutoencoderKL
from torch import nn

from latentvae.base.errors import ConfigError
from latentvae.measure.lpips import LPIPS
from latentvae.models.exporting import SIDECAR
from latentvae.models.loading import cast, load, spatial_compression_ratio
from latentvae.models.presets import build, nearest
from latentvae.training import checkpoint
from latentvae.training.adversary import Adversary
from latentvae.training.checkpoint import TrainingState
from latentvae.training.config import Config
from latentvae.training.data.crops import CropSequence, split_sources
from latentvae.training.data.sources import parts
from latentvae.training.losses import VAELoss
from latentvae.training.module import TrainableVAE
from latentvae.training.optim import EMA, build_optimizer
from latentvae.training.record import Record, tracker_name
from latentvae.training.validation import Validation

logger = get_logger(__name__)


FACTORS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of a latent space


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
    keep_freed_memory()
    folder = Path(config.output)
    config = with_precision(config)
    accelerator = Accelerator(
        mixed_precision="bf16" if config.train.precision == "bf16" else "no",
        cpu=not torch.accelerator.is_available(),  # else torchrun on a CPU starts without gloo
        log_with=tracker_name(config),
        project_dir=folder,
    )
    start = starting_point(config, resume)
    train_images, val_images = split_sources(config.data)
    loss = VAELoss.build(config.loss)
    vae, teacher = models(config, accelerator.device)
    check_crop(config, vae, loss.lpips)
    channels = vae.config["in_channels"]
    state = restored_state(config, vae, start, accelerator)
    run = Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        state=state,
        model=wrap(config, TrainableVAE(vae, teacher), accelerator),
        loss=loss.to(accelerator.device, config.train.dtype).to(memory_format=config.train.memory_format),
        sequence=CropSequence(train_images, config.data, channels, config.seed),
        validation=Validation(config, train_images, val_images, channels),
        record=Record(folder, accelerator, state.step),
    )
    if state.adversary is not None:
        state.adversary.prepare(accelerator)
    if start is not None and accelerator.num_processes > 1:
        settle(config, state, run.model, accelerator)
    announce(run)
    return run


def restored_state(
    config: Config, vae: AutoencoderKL, start: Path | None, accelerator: Accelerator
) -> TrainingState:
    """What the run continues from: fresh, or as a checkpoint has it."""
    state = TrainingState(
        vae=vae,
        ema=EMA(vae, config.train.ema_decay),
        optimizer=build_optimizer(vae, config.optim),
        adversary=Adversary.build(config, vae.config["in_channels"], accelerator.device),
    )
    if start is not None:
        checkpoint.load(state, start, accelerator)
        logger.info("continuing from %s", start)
    return state


def with_precision(config: Config) -> Config:
    """The configuration with precision "auto" decided for this machine."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    precision = resolve_precision(config.train.precision, device)
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def models(config: Config, device: torch.device) -> tuple[AutoencoderKL, AutoencoderKL | None]:
    """The VAE to train, with what is not to be trained frozen; and the teacher, if there is one."""
    torch.manual_seed(config.seed)  # the only draw from torch's own generator: the first weights
    model = config.model
    for name in ("init", "teacher"):
        check_exported(name, getattr(model, name))
    vae = load(model.init) if model.init else build(model.preset, **model.overrides)
    cast(vae.to(device), config.train.dtype).to(memory_format=config.train.memory_format)
    teacher = None
    if model.teacher is not None:
        teacher = load(model.teacher, dtype=config.train.dtype, device=device).requires_grad_(False)
        check_latent_shapes(vae, teacher)
        # the student speaks the teacher's latent space, so it is scaled like the teacher
        vae.register_to_config(**{key: teacher.config[key] for key in FACTORS})
    patterns = ["encoder.*", "quant_conv.*"] if model.mode == "decoder_only" else []
    freeze(vae, [*patterns, *model.freeze])
    if config.train.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return vae.train(), teacher


def check_exported(name: str, path: str | None) -> None:
    """Refuse a checkpoint in place of a model: the scale of its latents has not been measured.

    Raises:
        ConfigError: with the way to export it.
    """
    if path is None or not Path(path).exists():
        return
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / checkpoint.MANIFEST).is_file() and (folder / "state.json").is_file():
        raise ConfigError(
            f"model.{name}={path} is of a checkpoint, whose config has no scale of its latents yet. Export "
            f"it first, by `latentvae export {folder} -o FOLDER`, and name that folder."
        )


def check_latent_shapes(vae: AutoencoderKL, teacher: AutoencoderKL) -> None:
    """Refuse a teacher whose latents the student cannot have.

    Raises:
        ConfigError: names both shapes.
    """
    shapes = [(each.config["latent_channels"], spatial_compression_ratio(each)) for each in (vae, teacher)]
    if shapes[0] != shapes[1]:
        (student_channels, student_ratio), (channels, ratio) = shapes
        raise ConfigError(
            f"the student has {student_channels} latent channels at a ratio of {student_ratio}, the teacher "
            f"{channels} at {ratio}. Choose a preset f{ratio}c{channels}, or set "
            f"model.overrides.latent_channels={channels}."
        )
    images = [each.config["in_channels"] for each in (vae, teacher)]
    if images[0] != images[1]:
        raise ConfigError(
            f"the student's images have {images[0]} channels, the teacher's {images[1]}. Set "
            f"model.overrides.in_channels and out_channels to {images[1]}."
        )


def freeze(vae: AutoencoderKL, patterns: list[str]) -> None:
    """Take the parameters that match any pattern ("encoder.*", "*.norm*.weight") out of training.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing left to train.
    """
    names = dict(vae.named_parameters())
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching and pattern != "quant_conv.*":  # some models have none
            raise ConfigError(f"model.freeze: no parameter matches {pattern!r}.{nearest(pattern, names)}")
        for name in matching:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ConfigError(f"model.freeze={patterns} leaves nothing to train. Remove a pattern.")


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


def starting_point(config: Config, resume: str | None) -> Path | None:
    """The checkpoint to continue from, or None to start anew, once the output is known to be usable.

    Raises:
        ConfigError: nothing to resume, or an output that is another run's, not writable, or in the way.
    """
    folder = Path(config.output)
    _check_apart(folder, config)
    own = folder / "checkpoints"
    start = checkpoint.resolve(resume, own) if resume else None
    if checkpoint.listing(own) and (start is None or start.resolve().parent != own.resolve()):
        raise ConfigError(
            f"{folder} holds a run's checkpoints. Add --resume latest, or choose another output."
        )
    _check_writable(folder)
    exported = folder / "vae"
    if exported.is_file() or _holds_something_else(exported):
        raise ConfigError(
            f"{exported} is there and no earlier export, so the model could not be written to it. "
            "Choose another output."
        )
    return start


def check_crop(config: Config, vae: AutoencoderKL, lpips: LPIPS | None) -> None:
    """Refuse crops that the networks cannot take; a parent's shape is known only once it is loaded.

    Raises:
        ConfigError: names the size that fits.
    """
    crop, ratio = config.data.crop, spatial_compression_ratio(vae)
    if crop % ratio:
        raise ConfigError(
            f"data.crop={crop} is not a multiple of the compression ratio {ratio} of {config.model.init}; "
            f"use {(crop // ratio + 1) * ratio}."
        )
    if lpips is not None and crop < lpips.min_size:
        raise ConfigError(
            f"data.crop={crop} is too small for loss.perceptual_net={lpips.net}, which needs "
            f"{lpips.min_size} pixels. Use larger crops, or another network."
        )


def _check_apart(folder: Path, config: Config) -> None:
    """Pictures that a run writes among its images would be some of them when it is resumed."""
    for setting, spec in (("data.train", config.data.train), ("data.val", config.data.val)):
        places = [] if spec is None else [part.resolve() for part in parts(spec)]
        for place in (place for place in places if folder.resolve().is_relative_to(place)):
            raise ConfigError(
                f"output={folder} lies in {place}, the folder of {setting}: the pictures of a run would be "
                "taken for images when it is resumed. Choose an output elsewhere, such as "
                f"--set output={place.parent / 'runs'}."
            )


def _check_writable(folder: Path) -> None:
    """Look at the nearest folder that exists, so that nothing is made for a run that is refused later."""
    try:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        usable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    except OSError:  # a folder on the way that may not be entered
        usable = False
    if not usable:
        raise ConfigError(f"output={folder} cannot be written to. Choose another output.")


def _holds_something_else(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir()) and not (folder / SIDECAR).is_file()


def is_first_process() -> bool:
    """Whether this process is the one that speaks for all."""
    return bool(PartialState().is_main_process)


def wrap(config: Config, module: TrainableVAE, accelerator: Accelerator) -> nn.Module:
    """The module as processes share it, its blocks compiled if asked."""
    if config.train.compile:
        compile_blocks(module.vae, accelerator.device)
    return accelerator.prepare_model(module)


def compile_blocks(vae: AutoencoderKL, device: torch.device) -> None:
    """Compile the blocks in place; the layers at both ends stay, as the adaptive weight looks at the last.

    Raises:
        ConfigError: this machine cannot compile.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # a missing compiler shows in many ways
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"train.compile=true, but this machine cannot compile ({reason}). Install a C++ compiler (and, "
            "for a GPU, triton), or set train.compile=false."
        ) from error
    encoder, decoder = vae.encoder, vae.decoder
    for block in (*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks):
        block.compile()


def settle(config: Config, state: TrainingState, model: nn.Module, accelerator: Accelerator) -> None:
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


# of torch.cpu.get_capabilities(): x86 with AVX-512 or AMX, Arm with its own
_CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 pays on a device: CPUs without instructions for it are slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return any(_cpu_capabilities().get(name) for name in _CPU_INSTRUCTIONS)
    return False


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means on a device: bf16 where it is fast, else fp32; other names stay."""
    if precision != "auto":
        return precision
    return "bf16" if has_fast_bfloat16(device) else "fp32"


def _cpu_capabilities() -> dict[str, object]:
    """What torch knows of this CPU; older versions know only two things."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    known = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return {name: getattr(torch.cpu, test, bool)() for name, test in known.items()}


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
