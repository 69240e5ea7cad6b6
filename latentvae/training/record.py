"""What a run writes down while it goes: metrics.jsonl, a tracker, figures beside the bar, curves."""

import json
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from latentvae.base.errors import ConfigError
from latentvae.base.files import make_folder
from latentvae.base.optional import install_command
from latentvae.measure.metrics import MetricsSummary
from latentvae.training.checkpoint import TrainingState
from latentvae.training.machine import peak_memory

logger = logging.getLogger(__name__)

ACTIVE_NATS = 0.01  # per latent pixel: a channel that costs less says nothing (Burda et al. 2016)


class Record:
    """Writes one run's figures; on a resume, those after the checkpoint are dropped first.

    Args:
        folder: of the run.
        accelerator: only its main process writes; it knows the tracker.
        first_step: the step that the run continues from.
        config: of the run, for the tracker.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, first_step: int, config: dict[str, Any] | None = None
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.accelerator = accelerator
        # where the speed is counted from; `pause` moves it on
        self.mark, self.mark_step = time.perf_counter(), first_step
        self.waiting = 0.0
        self.seconds = 0.0
        self.reported: set[str] = set()
        if accelerator.is_main_process:
            make_folder(folder, ConfigError)
            self._truncate(first_step)
        self.tracker: Any = None
        if accelerator.log_with:
            name = accelerator.log_with[0].value
            settings, board = flat(config or {}), name == "tensorboard"
            # the project's name; TensorBoard makes it a folder, and of a config another for each start
            accelerator.init_trackers(
                "tensorboard" if board else "latentvae",
                config=None if board else settings,
                init_kwargs=self._same_run(name),
            )
            self.tracker = accelerator.get_tracker(name)
            if board and accelerator.is_main_process:
                lines = "\n".join(f"    {key}: {value}" for key, value in settings.items())
                self.tracker.writer.add_text("config", lines, first_step)

    def _same_run(self, tracker: str) -> dict[str, dict[str, Any]]:
        """What makes a tracker that keeps runs apart by an id go on with this folder's after a resume."""
        if tracker != "wandb" or not self.accelerator.is_main_process:
            return {}
        place = self.path.with_name("tracker-id")
        if not place.is_file():
            place.write_text(uuid.uuid4().hex, encoding="utf-8")
        return {tracker: {"id": place.read_text(encoding="utf-8"), "resume": "allow"}}

    def step(self, state: TrainingState, terms: dict[str, torch.Tensor], global_batch: int) -> dict[str, str]:
        """Write the terms (means over processes) and the speed since the last call; return a few."""
        per_channel = terms.pop("kl_per_channel", None)
        # one reduction for all scalars; kl_per_channel (c,) is a mean over processes already
        values = torch.stack([terms[name].to(torch.float32) for name in terms])
        figures = dict(zip(terms, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True))
        if per_channel is not None:
            figures["active_channels"] = int((per_channel > ACTIVE_NATS).sum())
        elapsed = time.perf_counter() - self.mark
        figures["lr"] = state.optimizer.param_groups[0]["lr"]
        figures["images_per_second"] = (state.step - self.mark_step) * global_batch / elapsed
        figures["data_wait"] = self.waiting / elapsed
        figures["memory_gb"] = peak_memory() / 1e9
        figures["skipped_images"] = state.skipped_images
        figures["skipped_steps"] = state.skipped_steps
        figures["realigned"] = state.realigned
        self.seconds += elapsed
        channels = {} if per_channel is None else {"kl_per_channel": per_channel.tolist()}
        self._write({"step": state.step, **figures, **channels, "seconds": self.seconds})
        if self.tracker is not None:
            self.accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=state.step)
        self.mark, self.mark_step, self.waiting = time.perf_counter(), state.step, 0.0
        # where LPIPS is left out of the loss its term is 0
        lpips = {"lpips": f"{figures['perceptual_loss']:.3f}"} if figures["perceptual_loss"] else {}
        speed = f"{figures['images_per_second']:.1f}"
        return {"total": f"{figures['total']:.4f}", **lpips, "images/s": speed}

    def validation(
        self,
        step: int,
        summary: MetricsSummary,
        picture: Image.Image | None,
        more: dict[str, float] | None = None,
    ) -> None:
        """Write the mean figures of a validation and `more`, and show its picture to the tracker."""
        figures = {**summary.as_dict()["mean"], **(more or {})}
        self._write({"step": step, **{f"val_{name}": value for name, value in figures.items()}})
        if self.tracker is not None:
            self.accelerator.log({f"val/{k}": v for k, v in figures.items() if v is not None}, step=step)
            if picture is not None and hasattr(self.tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if self.tracker.name == "tensorboard" else {}
                shown = np.asarray(picture)  # these two take one image, the others several
                shown = shown if self.tracker.name in ("aim", "clearml") else shown[None]
                self.tracker.log_images({"validation": shown}, step=step, **layout)

    def has_validation(self, step: int) -> bool:
        """Whether a step's validation has been written; asked of the main process."""
        return any(line["step"] == step and "val_psnr" in line for line in read_records(self.path))

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
            # a line without its end was cut by a kill
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first_step]
            self.seconds = max((json.loads(line).get("seconds", 0.0) for line in kept), default=0.0)
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def _write(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their whole names, as `--set` takes them; what is no number or truth value, as text."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, (bool, int, float)) else str(value)
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, less one that a kill has cut."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


# panel title, and the figures of metrics.jsonl that it shows
PANELS: tuple[tuple[str, Sequence[str]], ...] = (
    ("total loss", ("total",)),
    ("pixel loss per image", ("rec_loss",)),
    ("LPIPS of the batch", ("perceptual_loss",)),
    ("KL per image, nats", ("kl_loss",)),
    ("validation PSNR, dB", ("val_psnr",)),
    ("validation LPIPS", ("val_lpips",)),
    ("latents and the vision model's features", ("align_cosine", "align_distance")),
    ("latents and the teacher's", ("distil_loss",)),
    ("R2 of the teacher's latents", ("latent_r2", "val_r2")),
    ("adversarial losses", ("g_loss", "d_loss")),
    ("the discriminator's logits", ("logits_real", "logits_fake")),
    ("gradient norms", ("grad_norm", "d_grad_norm")),
    ("images per second", ("images_per_second",)),
)
WINDOW = 0.05  # of all points, for the line drawn over the raw figures


def draw_curves(metrics: Path, picture: Path) -> Path | None:
    """Draw the curves of a metrics.jsonl as a PNG; None where matplotlib is not installed.

    Args:
        metrics: written by `Record`.
        picture: path of the PNG.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(
            "matplotlib is not installed: no picture of the curves. To install it: %s",
            install_command("train"),
        )
        return None
    records = read_records(metrics)
    panels = [(title, found) for title, names in PANELS if (found := series(records, names))]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(12, 2.8 * rows), layout="constrained")
    for number, (title, lines) in enumerate(panels):
        axes = figure.add_subplot(rows, 3, number + 1)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        for name, (steps, values) in lines.items():
            noisy = len(values) > 30
            raw = axes.plot(
                steps, values, alpha=0.3 if noisy else 1, linewidth=1, label=None if noisy else name
            )
            if noisy:
                axes.plot(steps, smooth(values), color=raw[0].get_color(), linewidth=1.5, label=name)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.savefig(picture, dpi=100)
    return picture


def series(records: list[dict[str, Any]], names: Sequence[str]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each figure that was recorded and ever differed from zero."""
    found = {}
    for name in names:
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if any(value for _, value in points):
            found[name] = ([step for step, _ in points], [value for _, value in points])
    return found


def smooth(values: list[float]) -> list[float]:
    """Mean over a window around each point, cut at the ends."""
    reach = max(1, round(len(values) * WINDOW / 2))
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
