"""Training, top to bottom: set up, loop over steps (record, save, validate), export.

`train` names the phases, and what it calls stands below it in the order of the calls. What comes before the
first step is in setup.py, what happens in one in step.py.
"""

import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from tqdm import tqdm

from latentvae.base.errors import LatentVAEError
from latentvae.base.files import whole_file
from latentvae.training import checkpoint, progress
from latentvae.training.config import Config
from latentvae.training.data.batches import STOP_SIGNALS, BatchLoader, CropBatch
from latentvae.training.machine import peak_memory
from latentvae.training.processes import check_agreement
from latentvae.training.record import draw_curves
from latentvae.training.setup import Run, set_up
from latentvae.training.stages import train_stages
from latentvae.training.step import optimizer_step
from latentvae.training.validation import Lineage

logger = logging.getLogger(__name__)

STOP_WAIT = 20.0  # seconds after a request to stop; launchers kill after 30
SAME_SIGNAL = 2.0  # seconds in which launchers forward what their processes got as well


class TrainingInterrupted(Exception):
    """A signal or the clock asked the run to stop; its state is in `checkpoint`."""

    def __init__(self, checkpoint: Path, reason: str) -> None:
        super().__init__(f"stopped {reason}; saved {checkpoint}. Continue with --resume latest.")
        self.checkpoint = checkpoint


def train(
    config: Config, resume: str | None = None, lineage: Lineage | None = None, clock: "Clock | None" = None
) -> Path:
    """Train, validate, save and export; return the folder of the exported VAE.

    Args:
        config: of the whole run.
        resume: None to start, "latest" or a checkpoint folder to continue, "auto" to do whichever fits.
        lineage: of a stage: what it is a part of. clock: likewise, of the whole run.

    Raises:
        LatentVAEError: nothing to train on, weights missing, output taken, or losses not finite.
        TrainingInterrupted: a signal to stop came, or train.max_minutes are over; the state is saved.
    """
    # it counts the setting up too, as a machine that is lent is counted
    clock = clock or Clock(config.train.max_minutes)
    if config.stages:
        return train_stages(config, resume, lambda own, part: train(own, "auto", part, clock))
    # 1. Set up.
    run = set_up(config, resume, lineage)
    with status(run), stop_on_signal(run.stop), advice_on_memory(run), advice_on_compiling():
        # 2. Optimizer steps, from the first or from the checkpoint's, to the last.
        run.batches.while_waiting = StopWhileWaiting(run, clock)
        loop(run, run.batches, clock)
        # 3. Export the averaged weights: all measure, one writes.
        run.validation.export(run.state, run.folder, run.record.seconds)
        if run.is_main:
            if run.state.adversary is not None:
                run.state.adversary.save(run.folder / "discriminator")
            draw_curves(run.record.path, run.folder / "curves.png")
            logger.info(progress.summary(progress.read_points(run.record.path), lineage is not None))
            if lineage is not None:
                lineage.finish(run.folder, run.validation.words(run.state, run.record.seconds))
    # 4. End together: the others wait here while one exports.
    run.accelerator.wait_for_everyone()
    if lineage is not None and not lineage.is_last:
        end_stage(run, clock)
    else:
        run.accelerator.end_training()
    return run.folder / "vae"


def end_stage(run: Run, clock: "Clock") -> None:
    """Close what belongs to a stage; the processes stay together for the next.

    Raises:
        TrainingInterrupted: a signal came while it ended, which the next stage would not know of.
    """
    for tracker in run.accelerator.trackers:
        tracker.finish()
    if stop_requested(run, clock):
        raise TrainingInterrupted(checkpoint.listing(run.checkpoints)[-1], clock.reason(run.stop))


class Clock:
    """Runs from its making; with no limit it is never over."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.start = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the time is used up."""
        return self.minutes is not None and time.monotonic() - self.start >= 60 * self.minutes

    def reason(self, stop: threading.Event) -> str:
        """Why the run stops: this process's signal, else the time, which another process may see first."""
        by_signal = stop.is_set() or self.minutes is None
        return "by a signal" if by_signal else f"as train.max_minutes={self.minutes:g} are over"


@contextmanager
def status(run: Run) -> Iterator[None]:
    """Keep status.json: "running", then "finished", "interrupted" or "failed", with the step and the reason.

    A launcher hides its children's exit codes; this file tells what became of the run.
    """

    place = run.folder / "status.json"

    def write(state: str, reason: str = "") -> None:
        entry = {"state": state, "step": run.state.step, "reason": reason}
        with whole_file(place) as partial:  # other processes read it
            partial.write_text(json.dumps(entry), encoding="utf-8")

    if run.is_main:
        write("running")
    try:
        yield
    except TrainingInterrupted as stop:
        if run.is_main:
            write("interrupted", str(stop))
        raise
    except BaseException as error:
        # whichever process it is, the first: the others then fail too, as they wait for it in vain
        with suppress(OSError, ValueError, LatentVAEError):  # the error itself matters more
            if json.loads(place.read_text(encoding="utf-8"))["state"] == "running":
                several = run.accelerator.num_processes > 1
                rank = f"process {run.accelerator.process_index}: " if several else ""
                write("failed", f"{rank}{type(error).__name__}: {error}")
        raise
    if run.is_main:
        write("finished")


@contextmanager
def stop_on_signal(stop: threading.Event) -> Iterator[None]:
    """Turn STOP_SIGNALS into a request to stop after the current step; a second one acts as usual.

    It counts as a second one after SAME_SIGNAL seconds: launchers forward what their processes got too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    asked = math.inf

    def request(number: int, frame: Any) -> None:
        nonlocal asked
        stop.set()
        asked = min(asked, time.monotonic())
        if time.monotonic() - asked > SAME_SIGNAL:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, request)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def advice_on_compiling() -> Iterator[None]:
    """Turn a block that the compiler gives up on into an error; it would go on several times slower."""
    try:
        yield
    except FailOnRecompileLimitHit as error:
        raise LatentVAEError(
            f"train.compile=true, but a block was not compiled, as it came in too many versions ({error}). "
            "Set train.compile=false, or leave out what changes sizes (regularise.equivariance, "
            "data.max_aspect)."
        ) from error


@contextmanager
def advice_on_memory(run: Run) -> Iterator[None]:
    """Turn running out of GPU memory into an error that says what to set."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        config = run.config.train
        smaller = max(1, config.batch_size // 2)
        advice = [f"train.batch_size={smaller} with train.accumulation={config.accumulation * 2}"]
        advice += [] if config.gradient_checkpointing else ["train.gradient_checkpointing=true"]
        figures = f"batch {config.batch_size}, crop {run.config.data.crop}, peak {peak_memory() / 1e9:.1f} GB"
        raise LatentVAEError(
            f"out of memory in step {run.state.step + 1} ({figures}): {error}. Try "
            f"{', or '.join(advice)}, or see what fits with --find-batch-size."
        ) from error


def loop(run: Run, batches: BatchLoader, clock: Clock) -> None:
    """Optimizer steps until the last one, with records, validation and checkpoints at their intervals."""
    config, state = run.config.train, run.state
    if state.step and validate_if_due(run):  # whatever ended the run may have come between saving and this
        return
    incoming, first = iter(batches), state.step + 1
    with tqdm(
        total=config.max_steps, initial=state.step, unit="step", disable=not run.is_main, smoothing=0.05
    ) as bar:
        while state.step < config.max_steps:
            # 2a. One update of the weights; it counts `state.step` up.
            try:
                taken = take(run, incoming)
            except StoppedWaitingError as error:
                if run.accelerator.num_processes > 1:
                    raise
                raise TrainingInterrupted(save_checkpoint(run), clock.reason(run.stop)) from error
            terms = optimizer_step(run, taken)
            check_finite(run)
            if state.step == first:  # what drifts, drifts at once: not to be found at the first save only
                check_agreement(state, run.accelerator)
            bar.update()
            last = state.step == config.max_steps

            # 2b. Figures to metrics.jsonl, the tracker and the bar.
            logged = state.step % config.log_every == 0 or last
            if logged:
                bar.set_postfix(run.record.step(state, terms, run.global_batch))
            stop = stop_requested(run, clock)
            if stop and not logged:  # or its time would not be counted
                run.record.step(state, terms, run.global_batch)

            # 2c. A checkpoint, also of a step at which the run is to stop.
            if state.step % config.save_every == 0 or last or stop:
                saved = save_checkpoint(run)
            if stop and not last:  # not validated first: launchers give seconds to stop, the others end now
                raise TrainingInterrupted(saved, clock.reason(run.stop))

            # 2d. Validation comes after saving: what fails here costs no step. Enough? All end together.
            if validate_if_due(run):
                break


def validate_if_due(run: Run) -> bool:
    """Validate at the intervals and at the end, unless that is done; whether the run is to end early."""
    config, step = run.config.train, run.state.step
    due, last = step % config.validate_every == 0, step == config.max_steps
    if (due or last) and not known_to_all(run, run.is_main and run.record.has_validation(step)):
        validate(run)
    if config.patience is None or not due or last or not ends_early(run, config.patience):
        return False
    if step % config.save_every:
        save_checkpoint(run)
    return True


class StoppedWaitingError(LatentVAEError):
    """A run was asked to stop while it waited for images."""


class StopWhileWaiting:
    """Heeds a request to stop while a batch is waited for, which may be for ever.

    One process stops at once. Of several, the others may wait for this one's gradients and cannot save with
    it; so it stays STOP_WAIT seconds, then ends them all.

    Raises:
        StoppedWaitingError: the state is that of the last step.
    """

    def __init__(self, run: Run, clock: Clock) -> None:
        self.run, self.clock = run, clock
        self.asked = math.inf

    def __call__(self) -> None:
        if not (self.run.stop.is_set() or self.clock.over):
            return
        self.asked = min(self.asked, time.monotonic())
        waited = time.monotonic() - self.asked
        if self.run.accelerator.num_processes == 1 or waited > STOP_WAIT:
            saved = checkpoint.listing(self.run.checkpoints)
            kept = f"{saved[-1]} is intact" if saved else "nothing had been saved before"
            raise StoppedWaitingError(
                f"stopped while waiting for images after step {self.run.state.step}; {kept}. Look at what "
                "holds up the workers (disk, network, memory), and add --resume auto."
            )


def take(run: Run, incoming: Iterator[CropBatch]) -> list[CropBatch]:
    """The batches of one optimizer step; the time that they were waited for and what they lack is noted."""
    start = time.perf_counter()
    batches = [next(incoming) for _ in range(run.config.train.accumulation)]
    run.record.waited(time.perf_counter() - start)
    for batch in batches:
        run.record.skipped(batch.skipped)
    return batches


def check_finite(run: Run) -> None:
    """Stop after too many steps in a row that were skipped.

    Raises:
        LatentVAEError: with the remedy; nothing is saved over the last checkpoint.
    """
    if run.state.bad_steps >= run.config.train.max_bad_steps:
        saved = checkpoint.listing(run.checkpoints)
        onward = f"and add --resume latest: {saved[-1]} is intact" if saved else "and start again"
        raise LatentVAEError(
            f"loss or gradient was not finite in {run.state.bad_steps} steps in a row, the last of them "
            f"step {run.state.step}. Lower optim.lr, or use train.precision=fp32, {onward}."
        )


def stop_requested(run: Run, clock: Clock) -> bool:
    """Whether any process was asked to stop, or is out of time; all processes agree."""
    stop = run.stop.is_set() or clock.over
    if run.accelerator.num_processes == 1:
        return stop
    if stop:
        run.accelerator.set_trigger()
    return run.accelerator.check_trigger()


def save_checkpoint(run: Run) -> Path:
    """Write a checkpoint, outside the run's clock."""
    check_agreement(run.state, run.accelerator)
    settings, keep = run.config.model_dump(), run.config.train.keep_checkpoints
    with run.record.pause():
        return checkpoint.write_whole(run.state, run.checkpoints, settings, keep, run.accelerator)


def validate(run: Run) -> None:
    """Measure and draw the averaged model, outside the run's clock; each process takes a share."""
    with run.record.pause(), run.accelerator.autocast():
        vae, step = run.state.ema.model, run.state.step
        summary, picture = run.validation(vae, step, run.folder)
        run.record.validation(step, summary, picture, run.validation.beside_teacher(vae))
    points = progress.read_points(run.record.path) if run.is_main else []
    if points and points[-1].step == step:  # a PSNR that is infinite is no point
        tqdm.write(progress.line(points), file=sys.stderr)  # beside the bar and not in it


def ends_early(run: Run, patience: int) -> bool:
    """Whether the last validations were no better than those before; the main process knows, all learn it."""
    stop = run.is_main and progress.stalled(progress.read_points(run.record.path), patience)
    if stop:
        reason = f"Validations without a better figure: {patience} (train.patience)."
        tqdm.write(f"{reason} Ending at step {run.state.step}.", file=sys.stderr)
    return known_to_all(run, stop)


def known_to_all(run: Run, flag: bool) -> bool:
    """What one process has found out and the others have not."""
    found = torch.tensor(int(flag), device=run.accelerator.device)
    return bool(run.accelerator.reduce(found, "sum"))
