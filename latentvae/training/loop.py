"""The training loop, top to bottom: set up, step, watch, save, export."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from latentvae.errors import LatentVAEError
from latentvae.latents import Posterior
from latentvae.losses import VAELoss
from latentvae.model import load, spatial_compression_ratio
from latentvae.perceptual import load_lpips
from latentvae.presets import build
from latentvae.training import checkpoint
from latentvae.training.checkpoint import TrainingState
from latentvae.training.checks import check_crop, starting_point
from latentvae.training.config import Config
from latentvae.training.data import Batch, CropSequence, split_sources, training_batches
from latentvae.training.optim import build_optimizer, set_learning_rate
from latentvae.training.record import Record, tracker_name
from latentvae.training.step import EMA, TrainableVAE, posterior_noise
from latentvae.training.validation import Validation

logger = get_logger(__name__)


class TrainingInterrupted(Exception):
    """A signal asked the run to stop; its state is in `checkpoint`."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"stopped by a signal; saved {checkpoint}. Continue with --resume latest.")
        self.checkpoint = checkpoint


@dataclass
class Run:
    """What one process holds while it trains."""

    config: Config
    accelerator: Accelerator
    folder: Path
    state: TrainingState
    model: nn.Module  # TrainableVAE as Accelerate wrapped it
    optimizer: Any  # as Accelerate wrapped it
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


def train(config: Config, resume: str | None = None) -> Path:
    """Train, validate, save and export; return the folder of the exported VAE.

    Args:
        config: of the whole run.
        resume: None to start, "latest" or a checkpoint folder to continue.

    Raises:
        LatentVAEError: nothing to train on, weights missing, output taken, or gradients not finite.
        TrainingInterrupted: SIGTERM or SIGINT came; the state is saved.
    """
    run = set_up(config, resume)
    batches = training_batches(
        config, run.sequence, run.state.step, run.accelerator.process_index, run.accelerator.num_processes
    )
    with stop_on_signal(run.stop):
        loop(run, batches)
    exported = (
        run.validation.export(run.state, run.folder, run.record.seconds)
        if is_main(run)
        else run.folder / "vae"
    )
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return exported


def set_up(config: Config, resume: str | None) -> Run:
    """Check everything that can be wrong, cheapest first; then build, and restore if asked."""
    folder = Path(config.output)
    precision = "bf16" if config.train.precision == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=precision, log_with=tracker_name(config), project_dir=folder)
    start = starting_point(config, resume)
    train_images, val_images = split_sources(config.data)
    lpips = None
    if config.loss.perceptual_weight > 0:
        lpips = load_lpips(config.loss.perceptual_net, config.loss.perceptual_weights)
    state = new_state(config, accelerator.device)
    check_crop(config, state.vae, lpips)
    if start is not None:
        checkpoint.load(state, start, accelerator)
        logger.info("continuing from %s", start)
    trainable: Any = TrainableVAE(state.vae)
    model, wrapped = accelerator.prepare(
        torch.compile(trainable) if config.train.compile else trainable, state.optimizer
    )
    loss = VAELoss(config.loss.pixel, lpips, config.loss.perceptual_weight, config.loss.kl_weight)
    channels = state.vae.config["in_channels"]
    run = Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        state=state,
        model=model,
        optimizer=wrapped,
        loss=loss.to(accelerator.device).to(memory_format=memory_layout(config)),
        sequence=CropSequence(train_images, config.data, channels, config.seed),
        validation=Validation(config, train_images, val_images, channels),
        record=Record(folder, accelerator, state.step),
    )
    _announce(run)
    return run


def new_state(config: Config, device: torch.device) -> TrainingState:
    """The model with its first weights, its average and its optimizer."""
    torch.manual_seed(config.seed)
    vae = (
        load(config.model.init) if config.model.init else build(config.model.preset, **config.model.overrides)
    )
    vae = vae.train().to(device, memory_format=memory_layout(config))
    if config.train.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return TrainingState(vae, EMA(vae, config.train.ema_decay), build_optimizer(vae, config.optim))


def memory_layout(config: Config) -> torch.memory_format:
    """How tensors lie in memory."""
    return torch.channels_last if config.train.channels_last else torch.contiguous_format


def loop(run: Run, batches: DataLoader) -> None:
    """Optimizer steps until the last one, with records, validation and checkpoints at their intervals."""
    config, state = run.config.train, run.state
    incoming = iter(batches)
    with tqdm(
        total=config.max_steps, initial=state.step, unit="step", disable=not is_main(run), smoothing=0.05
    ) as bar:
        while state.step < config.max_steps:
            terms = optimizer_step(run, incoming)
            bar.update()
            last = state.step == config.max_steps
            if state.step % config.log_every == 0 or last:
                bar.set_postfix(run.record.step(state, terms, run.global_batch))
            if (state.step % config.validate_every == 0 or last) and is_main(run):
                with run.record.pause(), run.accelerator.autocast():
                    run.record.validation(
                        state.step, *run.validation(state.ema.model, state.step, run.folder)
                    )
            stop = stop_requested(run)
            if state.step % config.save_every == 0 or last or stop:
                with run.record.pause():
                    saved = checkpoint.save(
                        state,
                        run.checkpoints,
                        run.config.model_dump(),
                        config.keep_checkpoints,
                        run.accelerator,
                    )
                if stop and not last:
                    raise TrainingInterrupted(saved)


def optimizer_step(run: Run, incoming: Iterator[Batch]) -> dict[str, torch.Tensor]:
    """One update from `accumulation` forward passes; returns the mean of each term, and grad_norm."""
    run.model.train()
    accumulation = run.config.train.accumulation
    sums: dict[str, torch.Tensor] = {}
    for forward_pass in range(accumulation):
        waiting = time.perf_counter()
        batch = next(incoming)
        run.record.waited(time.perf_counter() - waiting)
        run.state.skipped_images += len(batch.skipped)
        run.record.skipped(batch.skipped)
        more_to_come = forward_pass < accumulation - 1
        with run.accelerator.no_sync(run.model) if more_to_come else nullcontext():
            terms = losses(run, batch)
            run.accelerator.backward(terms["total"] / accumulation)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach() / accumulation

    sums["grad_norm"] = run.accelerator.clip_grad_norm_(
        run.model.parameters(), run.config.optim.max_grad_norm
    )
    if not torch.isfinite(sums["grad_norm"]):
        raise LatentVAEError(
            f"the gradient of step {run.state.step + 1} is not finite. The last checkpoint is intact: "
            "lower optim.lr, or use train.precision=fp32, and add --resume latest."
        )
    set_learning_rate(run.state.optimizer, run.config.optim, run.state.step, run.config.train.max_steps)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.state.step += 1
    run.state.ema.update(run.state.vae, run.state.step)
    return sums


def losses(run: Run, batch: Batch) -> dict[str, torch.Tensor]:
    """Loss terms of one batch on this process; "total" carries the graph."""
    device = run.accelerator.device
    images = batch.pixel_values.to(device, memory_format=memory_layout(run.config), non_blocking=True)
    side = images.shape[-1] // spatial_compression_ratio(run.state.vae)
    shape = (run.state.vae.config["latent_channels"], side, side)
    noise = posterior_noise(run.config.seed, batch.positions, shape).to(device, non_blocking=True)
    moments, reconstructions = run.model(images, noise)
    with run.accelerator.autocast():
        terms = run.loss(images, reconstructions, Posterior(moments))
    return {**terms.detached(), "total": terms.total}


@contextmanager
def stop_on_signal(stop: threading.Event) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into a request to stop after the current step; a second one acts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def request(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, request)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_requested(run: Run) -> bool:
    """Whether any process was asked to stop; all processes agree."""
    if run.accelerator.num_processes == 1:
        return run.stop.is_set()
    if run.stop.is_set():
        run.accelerator.set_trigger()
    return run.accelerator.check_trigger()


def is_main(run: Run) -> bool:
    """Whether this process is the one that writes."""
    return run.accelerator.is_main_process


def _announce(run: Run) -> None:
    if not is_main(run):
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    resolved = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False)
    (run.folder / "config.yaml").write_text(resolved, encoding="utf-8")
    parameters = sum(p.numel() for p in run.state.vae.parameters()) / 1e6
    logger.info(
        "%.1f M parameters; %d images; %d per process and pass x %d passes x %d processes = %d per step; %s",
        *(parameters, len(run.sequence), run.config.train.batch_size, run.config.train.accumulation),
        *(run.accelerator.num_processes, run.global_batch, run.accelerator.device),
    )
