"""How one process's part of a run is set up, and what it then holds."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import AutoencoderKL
from torch import nn

from latentvae.base.errors import ConfigError
from latentvae.images.scans import Window
from latentvae.images.sources import FolderSource, ImageSource, open_source
from latentvae.models.fingerprint import weight_hash
from latentvae.models.loading import set_window, spatial_compression_ratio
from latentvae.models.spaces import latent_shape
from latentvae.training.checkpoint import TrainingState
from latentvae.training.checks import check_start
from latentvae.training.config import Config
from latentvae.training.data.batches import BatchLoader, training_batches
from latentvae.training.data.crops import CropSequence, split_sources, validation_images
from latentvae.training.data.listing import scan_together
from latentvae.training.data.sources import Selection, evenly, measured_range
from latentvae.training.data.teacher_cache import TeacherCache, provenance
from latentvae.training.distillation import Teacher, start_linearly
from latentvae.training.losses import VAELoss
from latentvae.training.machine import start_processes
from latentvae.training.module import TrainableVAE
from latentvae.training.processes import agree_on_start
from latentvae.training.progress import split_line
from latentvae.training.record import Record
from latentvae.training.transplant import transplant
from latentvae.training.validation import Lineage, Validation

LINEAR_START_IMAGES = 48  # some 50,000 latent pixels, for a map of a few hundred numbers
TRANSPLANT_IMAGES, TRANSPLANT_SIDE = 8, 128  # the sizes of maps, and fits of a thousand numbers an output

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
    batches: BatchLoader  # from the step that the run continues from
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


def set_up(config: Config, resume: str | None, lineage: Lineage | None = None) -> Run:
    """Check, build and restore one process's part of a run, or of one of its stages.

    Raises:
        LatentVAEError: bad data, missing weights, an output that is taken, or models that do not fit.
    """
    # 1. Check whatever needs no weights: nothing is loaded or written for a run that cannot be.
    check_start(config)

    # 2. The machine: processes, device and precision; and where all of them start from.
    config, accelerator = start_processes(config)
    start = agree_on_start(config, resume, accelerator)
    device, folder = accelerator.device, Path(config.output)

    # 3. The images, before any network: a wrong path shows at once.
    config = with_measured_range(config)
    train_images, val_images = split_sources(config.data, scan_together)

    # 4. The networks: LPIPS, then the VAE and its teacher.
    loss = VAELoss.build(config.loss).to(device, config.train.dtype)
    loss.to(memory_format=config.train.memory_format)
    module = TrainableVAE.build(config, device)

    if module.teacher is not None and start is None:
        start_from_teacher(config, module.vae, module.teacher, train_images)

    # 5. What training changes: weights, their average, optimizers and counters, fresh or from a checkpoint.
    state = TrainingState.build(config, module.vae, start, device, module.alignment, accelerator.scaler)
    if config.data.range is not None:
        set_window(state.ema.model, Window(*config.data.range))  # what is measured and exported

    # 6. Batches, validation and records.
    channels = module.vae.config["in_channels"]
    rank, world = accelerator.process_index, accelerator.num_processes
    step_images = config.train.batch_size * config.train.accumulation * world
    ratio = spatial_compression_ratio(module.vae)
    sequence = CropSequence(train_images, config.data, channels, config.seed, ratio, step_images)
    if module.teacher is not None and config.distil.cache is not None:
        sequence.cache = keep_teacher(config, module.teacher, sequence, accelerator)
    batches = training_batches(config, sequence, state.step, rank, world)
    validation = Validation(config, train_images, val_images, channels, module.teacher, rank, world, lineage)
    record = Record(folder, accelerator, state.step, config.model_dump(mode="json"))

    # 7. Wrap what processes share; from here on gradients are averaged in its backward.
    if config.train.compile:
        module.compile_blocks()
    model = accelerator.prepare_model(module)
    if state.adversary is not None:
        state.adversary.prepare(accelerator)
    if start is not None and world > 1:
        settle_buckets(config, state, model, accelerator)

    # 8. Say what is about to happen.
    run = Run(config, accelerator, folder, state, model, loss, sequence, batches, validation, record)
    announce(run, start, len(val_images))
    return run


def start_from_teacher(
    config: Config, vae: AutoencoderKL, teacher: Teacher, train_images: ImageSource
) -> None:
    """Give a student, before its first step, what can be had of its teacher without learning."""
    channels = vae.config["in_channels"]
    if config.distil.transplant:
        some = Selection(train_images, evenly(len(train_images), TRANSPLANT_IMAGES))
        data = config.data.model_copy(update={"val_size": TRANSPLANT_SIDE})
        crops = [crop for _, crop in validation_images(some, data, channels)]
        whole = [crop for crop in crops if crop.shape[-2:] == (TRANSPLANT_SIDE, TRANSPLANT_SIDE)]
        if not whole:
            raise ConfigError(
                f"distil.transplant measures maps of {TRANSPLANT_SIDE} x {TRANSPLANT_SIDE} pixels, and none "
                f"of {len(crops)} training images is as large; give larger images"
            )
        r2 = transplant(vae, teacher, torch.stack(whole))
        logger.info("once its first level has learned, the encoder begins at an R2 of %.3f", r2)
    elif config.model.init and config.distil.linear_start:
        some = Selection(train_images, evenly(len(train_images), LINEAR_START_IMAGES))
        r2 = start_linearly(vae, teacher, validation_images(some, config.data, channels))
        logger.info("latents of %s begin at an R2 of %.3f of the teacher's", config.model.init, r2)


def with_measured_range(config: Config) -> Config:
    """The configuration with `data.percentiles` turned into the `data.range` that they are of the images."""
    data = config.data
    if data.percentiles is None or data.train is None:
        return config
    source = open_source(data.train, data.column, scan_together)
    if not isinstance(source, FolderSource):
        return config  # refused with its reason where the sources are opened
    limits = measured_range(source, data.percentiles)
    logger.info("data.range=[%g, %g]: percentiles %g and %g", *limits, *data.percentiles)
    measured = data.model_copy(update={"range": limits, "percentiles": None})
    return config.model_copy(update={"data": measured})


def keep_teacher(
    config: Config, teacher: Teacher, sequence: CropSequence, accelerator: Accelerator
) -> TeacherCache:
    """What the teacher makes of all training images, on disk; each process computes a share of it."""
    ratio = latent_shape(teacher.model)[1]
    cache = TeacherCache(Path(str(config.distil.cache)), ratio)
    made = provenance(sequence.source, config, weight_hash(teacher.model), ratio)
    rank, world = accelerator.process_index, accelerator.num_processes
    if accelerator.is_main_process:
        cache.claim(made, write=True)
    accelerator.wait_for_everyone()
    cache.claim(made, write=False)
    with accelerator.autocast():
        cache.fill(teacher, sequence, accelerator.device, config.train.dtype, slice(rank, None, world))
    accelerator.wait_for_everyone()  # all will read what each has made
    return cache


def settle_buckets(config: Config, state: TrainingState, model: nn.Module, accelerator: Accelerator) -> None:
    """Two backward passes without an update, so that a resumed run adds gradients up in the old order.

    DistributedDataParallel sorts parameters into buckets anew after its first backward pass. With three or
    more processes the buckets decide the order of sums, and so the last bits.
    """
    side, shape, batch = config.data.crop, state.vae.config, config.train.batch_size
    small = side // spatial_compression_ratio(state.vae)
    # as in a step: compiled blocks would be compiled once more for any other size or layout
    images = torch.zeros(
        *(batch, shape["in_channels"], side, side), device=accelerator.device, dtype=config.train.dtype
    ).to(memory_format=config.train.memory_format)
    noise = images.new_zeros(batch, shape["latent_channels"], small, small)
    adversary = state.adversary
    for _ in range(2):
        outputs = model(images, noise)
        given = (outputs.reconstructions, outputs.moments, outputs.projected)
        maps = [each for each in given if each is not None and each.requires_grad]
        accelerator.backward(torch.stack([each.sum() for each in maps]).sum())
        if adversary is not None and adversary.ramp(state.step - 1) > 0:  # it has had its first pass
            accelerator.backward(adversary.model(images).sum())
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)


def announce(run: Run, start: Path | None, held_out: int) -> None:
    """Write the resolved configuration, and say what is about to happen."""
    if not run.is_main:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    resolved = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False)
    (run.folder / "config.yaml").write_text(resolved, encoding="utf-8")
    trained = sum(p.numel() for p in run.state.vae.parameters() if p.requires_grad) / 1e6
    data = run.config.data
    split = split_line(len(run.sequence), held_out, data.val is not None, data.val_images)
    if start is not None:
        logger.info("continuing from %s", start)
    logger.info(
        "%.1f M parameters to train; %s; images a step: %d (per pass: %d; passes: %d; processes: %d); %s, %s",
        *(trained, split, run.global_batch, run.config.train.batch_size, run.config.train.accumulation),
        *(run.accelerator.num_processes, run.accelerator.device),
        run.config.train.precision,
    )
