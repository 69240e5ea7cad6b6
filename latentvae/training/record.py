"""What a run writes down while it goes: metrics.jsonl, a tracker, and the figures beside the progress bar."""

import importlib.util
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from latentvae.metrics import MetricsSummary
from latentvae.training.checkpoint import TrainingState
from latentvae.training.config import Config

logger = logging.getLogger(__name__)


class Record:
    """Writes one run's figures; on a resume, those after the checkpoint are dropped first.

    Args:
        folder: of the run.
        accelerator: only its main process writes; it knows the tracker.
        first_step: the step that the run continues from.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, first_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.accelerator = accelerator
        self.mark, self.mark_step = time.perf_counter(), first_step
        self.waiting = 0.0
        self.seconds = 0.0
        self.reported: set[str] = set()
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            self._truncate(first_step)
        self.tracker: Any = None
        if accelerator.log_with:
            accelerator.init_trackers("tensorboard")
            self.tracker = accelerator.get_tracker(accelerator.log_with[0].value)

    def step(self, state: TrainingState, terms: dict[str, torch.Tensor], global_batch: int) -> dict[str, str]:
        """Write the terms (means over processes) and the speed since the last call; return a few."""
        gathered = self.accelerator.reduce(
            torch.stack([terms[name].float() for name in terms]), reduction="mean"
        )
        figures = dict(zip(terms, gathered.tolist(), strict=True))
        elapsed = time.perf_counter() - self.mark
        figures["lr"] = state.optimizer.param_groups[0]["lr"]
        figures["images_per_second"] = (state.step - self.mark_step) * global_batch / elapsed
        figures["data_wait"] = self.waiting / elapsed
        figures["skipped_images"] = state.skipped_images
        self.seconds += elapsed
        self._write({"step": state.step, **figures, "seconds": self.seconds})
        if self.tracker is not None:
            self.accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=state.step)
        self.mark, self.mark_step, self.waiting = time.perf_counter(), state.step, 0.0
        return {
            "total": f"{figures['total']:.4f}",
            "lpips": f"{figures['perceptual_loss']:.3f}",
            "images/s": f"{figures['images_per_second']:.1f}",
        }

    def validation(self, step: int, summary: MetricsSummary, picture: Image.Image) -> None:
        """Write the mean figures of a validation, and show its picture to the tracker."""
        figures = summary.as_dict()["mean"]
        self._write({"step": step, **{f"val_{name}": value for name, value in figures.items()}})
        if self.tracker is not None:
            self.accelerator.log({f"val/{k}": v for k, v in figures.items() if v is not None}, step=step)
            self.tracker.log_images({"validation": np.asarray(picture)[None]}, step=step, dataformats="NHWC")

    def skipped(self, names: list[str]) -> None:
        """Warn of each unusable training image once."""
        for name in names:
            if name not in self.reported:
                self.reported.add(name)
                logger.warning("training image passed over: %s", name)

    def waited(self, seconds: float) -> None:
        """Count time in which the model had nothing to do."""
        self.waiting += seconds

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what happens inside out of the images per second."""
        start = time.perf_counter()
        yield
        self.mark += time.perf_counter() - start

    def _truncate(self, first_step: int) -> None:
        kept: list[str] = []
        if first_step and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first_step]
            self.seconds = max((json.loads(line).get("seconds", 0.0) for line in kept), default=0.0)
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _write(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def tracker_name(config: Config) -> str | None:
    """The tracker that Accelerate is to start, or None; says so where its package is missing."""
    if config.train.tracker == "none":
        return None
    if importlib.util.find_spec("tensorboard") is None:
        logger.warning("TensorBoard is not installed: figures go to metrics.jsonl only. Extra: [train].")
        return None
    return config.train.tracker
