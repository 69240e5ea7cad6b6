"""What one process holds while it trains, and how it is set up: whatever can be wrong is checked first."""

import fnmatch
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import AutoencoderKL
from torch import nn

from latentvae.errors import ConfigError
from latentvae.losses import VAELoss
from latentvae.model import cast, load, spatial_compression_ratio
from latentvae.perceptual import load_lpips
from latentvae.presets import build, nearest
from latentvae.training import checkpoint
from latentvae.training.adversary import Adversary
from latentvae.training.checkpoint import TrainingState
from latentvae.training.checks import check_crop, starting_point
from latentvae.training.config import Config, LossConfig
from latentvae.training.data import CropSequence, split_sources
from latentvae.training.ema import EMA
from latentvae.training.memory import keep_freed_memory
from latentvae.training.module import TrainableVAE
from latentvae.training.optim import build_optimizer
from latentvae.training.precision import resolve_precision
from latentvae.training.record import Record, tracker_name
from latentvae.training.sharing import settle, wrap
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
    loss = build_loss(config.loss)
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


def build_loss(config: LossConfig) -> VAELoss:
    """The loss with its LPIPS network.

    Raises:
        MissingWeightsError: the perceptual term is asked for and its weights are not there.
    """
    lpips = load_lpips(config.perceptual_net, config.perceptual_weights) if config.perceptual_weight else None
    return VAELoss(config.pixel, lpips, config.perceptual_weight, config.kl_weight)


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
