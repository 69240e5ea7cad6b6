"""Looking at the averaged model while it trains, and exporting it at the end."""

import logging
import platform
from itertools import chain
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image

from latentvae.errors import MissingWeightsError
from latentvae.evaluation import evaluate
from latentvae.export import Provenance, export
from latentvae.latents import compute_latent_statistics, reconstruct
from latentvae.metrics import MetricsSummary
from latentvae.perceptual import LPIPS, load_lpips
from latentvae.pictures import grid
from latentvae.training.checkpoint import TrainingState
from latentvae.training.config import Config
from latentvae.training.data import validation_images

logger = logging.getLogger(__name__)

GRID_IMAGES = 6  # a picture that fits a screen
STATISTICS_IMAGES = 200  # latent statistics move by under 1 % from there on


class Validation:
    """The validation images, and what is measured and drawn of them.

    Args:
        config: of the run.
        train_paths: for the latent statistics of the export.
        val_paths: measured.
        channels: of the model.
    """

    def __init__(self, config: Config, train_paths: list[Path], val_paths: list[Path], channels: int) -> None:
        self.config = config
        self.train_paths = train_paths[:: max(1, len(train_paths) // STATISTICS_IMAGES)][:STATISTICS_IMAGES]
        self.channels = channels
        self.images = validation_images(val_paths, config.data, channels)
        self.lpips, self.reason = _load_lpips(config)

    def __call__(self, vae: AutoencoderKL, step: int, folder: Path) -> tuple[MetricsSummary, Image.Image]:
        """Figures over all validation images, and a grid of some, saved as samples/step-00000500.png."""
        lpips = self.lpips.to(vae.device) if self.lpips is not None else None
        summary = evaluate(vae, self.images, lpips, self.reason)
        images = [image for _, image in self.images[:GRID_IMAGES]]
        pairs = [[image, reconstruct(vae, image[None]).reconstructions[0].float().cpu()] for image in images]
        columns = 2 if len(pairs) > 1 else 1
        rows = [[*chain(*pairs[i : i + columns])] for i in range(0, len(pairs) - columns + 1, columns)]
        picture = grid(rows, ["original", f"step {step}"] * columns)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        picture.save(folder / "samples" / f"step-{step:08d}.png")
        return summary, picture

    def export(self, state: TrainingState, folder: Path, seconds: float) -> Path:
        """Export the averaged weights to `folder`/vae, with latent statistics unless they are a parent's."""
        vae = state.ema.model
        summary = evaluate(vae, self.images, self.lpips, self.reason)
        statistics = None
        if self.config.model.init is None and self.config.model.teacher is None:
            batches = (
                image[None]
                for _, image in validation_images(self.train_paths, self.config.data, self.channels)
            )
            statistics = compute_latent_statistics(vae, batches)
        device = (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"CPU, {torch.get_num_threads()} threads"
        )
        provenance = Provenance(
            name=f"latentvae {self.config.model.preset}",
            base_model=self.config.model.init,
            trained_on=f"{len(self.train_paths)} image folder {Path(self.config.data.train or '').name!r}",
            training=f"{state.step} steps in {seconds / 60:.0f} minutes on {device} ({platform.machine()}).",
            metrics=summary.as_dict(),
            config=self.config.model_dump(mode="json"),
        )
        return export(vae, folder / "vae", statistics=statistics, provenance=provenance, overwrite=True)


def _load_lpips(config: Config) -> tuple[LPIPS | None, str | None]:
    """AlexNet's LPIPS, the usual one to report; else the training's own; else the reason for neither."""
    reason = None
    for net in ("alex", config.loss.perceptual_net):
        try:
            return load_lpips(net, config.loss.perceptual_weights), None
        except MissingWeightsError as error:
            reason = str(error)
    return None, reason
