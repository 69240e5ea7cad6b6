"""Looking at the averaged model while it trains, and exporting it at the end."""

import logging
import platform
from itertools import chain
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image

from latentvae.base.errors import LatentVAEError
from latentvae.images.drawing import grid
from latentvae.images.saving import save_picture
from latentvae.measure.diagnosis import wants_upcast
from latentvae.measure.evaluate import Evaluator, evaluate
from latentvae.measure.lpips import LPIPS, load_lpips
from latentvae.measure.metrics import MetricsSummary
from latentvae.measure.spaces import compare_spaces
from latentvae.models.card import Provenance
from latentvae.models.exporting import export
from latentvae.models.latents import LatentStatistics, compute_latent_statistics
from latentvae.training.checkpoint import TrainingState
from latentvae.training.config import Config, DataConfig
from latentvae.training.data.crops import validation_images
from latentvae.training.data.sources import ImageSource, Selection, evenly
from latentvae.training.distillation import Teacher

logger = logging.getLogger(__name__)

GRID_IMAGES = 6  # a picture that fits a screen
STATISTICS_IMAGES = 200  # latent statistics move by under 1 % from there on


class Validation:
    """The validation images, and what is measured and drawn of them.

    Args:
        config: of the run.
        train: trained on; some give the latent statistics of the export.
        val: measured.
        channels: of the model.
        teacher: whose latent space the model is to speak.
    """

    def __init__(
        self,
        config: Config,
        train: ImageSource,
        val: ImageSource,
        channels: int,
        teacher: Teacher | None = None,
    ) -> None:
        self.config = config
        self.teacher = teacher
        self.train = train
        self.images = validation_images(val, config.data, channels)
        self.lpips, self.reason = _load_lpips(config)

    def __call__(self, vae: AutoencoderKL, step: int, folder: Path) -> tuple[MetricsSummary, Image.Image]:
        """Figures over all validation images, and a grid of some, saved as samples/step-00000500.png."""
        lpips = self.lpips.to(vae.device) if self.lpips is not None else None
        evaluator = Evaluator(vae, lpips, self.reason)
        pairs: list[list[torch.Tensor]] = []  # of (C, H, W) each: an image and what becomes of it
        for name, image in self.images:
            rebuilt, _ = evaluator.add(name, image)
            if len(pairs) < GRID_IMAGES:
                pairs.append([image, rebuilt[0].cpu()])
        columns = 2 if len(pairs) > 1 else 1
        rows = [[*chain(*pairs[i : i + columns])] for i in range(0, len(pairs) - columns + 1, columns)]
        picture = grid(rows, ["original", f"step {step}"] * columns)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        save_picture(picture, folder / "samples" / f"step-{step:08d}.png")
        return evaluator.metrics.summary(), picture

    def beside_teacher(self, vae: AutoencoderKL) -> dict[str, float]:
        """How well the model speaks its teacher's latent space; nothing without a teacher.

        R2 and correlation of scaled latents, the largest offset of a channel, and PSNR and LPIPS of the
        pictures that each decodes of the other's latents.
        """
        if self.teacher is None:
            return {}
        lpips = self.lpips.to(vae.device) if self.lpips is not None else None
        ways = ("teacher_student", "student_teacher")
        found = compare_spaces(vae, self.teacher.model, self.images, lpips, self.reason, ways)
        figures = {"r2": found.r2, "correlation": found.correlation}
        figures["offset"] = max(map(abs, found.offsets))
        for way, summary in found.pictures.items():
            figures[f"{way}_psnr"] = summary.psnr
            if summary.lpips is not None:
                figures[f"{way}_lpips"] = summary.lpips
        return figures

    def export(self, state: TrainingState, folder: Path, seconds: float) -> Path:
        """Export the averaged weights to `folder`/vae, with latent statistics unless they are a parent's."""
        vae = state.ema.model
        summary = evaluate(vae, self.images, self.lpips, self.reason)
        # a parent's or teacher's factors stay, so that its latents still fit
        statistics = None
        if self.config.model.init is None and self.config.model.teacher is None:
            statistics = training_statistics(vae, self.train, self.config.data)
        device = (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"CPU, {torch.get_num_threads()} threads"
        )
        provenance = Provenance(
            name=f"latentvae {_name(self.config)}",
            base_model=self.config.model.init,
            trained_on=f"{len(self.train)} images of {Path(self.config.data.train or '').name!r}",
            training=f"{state.step} steps in {seconds / 60:.0f} minutes on {device} ({platform.machine()}).",
            metrics=summary.as_dict(),
            config=self.config.model_dump(mode="json"),
            intensity_range=self.config.data.range,
        )
        place, upcast = folder / "vae", wants_upcast(vae)
        if upcast:
            logger.warning("in fp16 the model overflows or is inexact: see `latentvae doctor %s`", place)
        return export(
            *(vae, place),
            statistics=statistics,
            provenance=provenance,
            overwrite=True,
            force_upcast=upcast,
        )


def training_statistics(vae: AutoencoderKL, source: ImageSource, config: DataConfig) -> LatentStatistics:
    """Latent statistics over evenly chosen training images, cropped as those of a validation."""
    some = Selection(source, evenly(len(source), STATISTICS_IMAGES))
    images = validation_images(some, config, vae.config["in_channels"])
    return compute_latent_statistics(vae, (image[None] for _, image in images))


def _name(config: Config) -> str:
    """What the model is called on its card: the preset, or what it was made from."""
    if config.model.teacher is not None:
        student = Path(config.model.init).name if config.model.init else config.model.preset
        return f"{student}, distilled from {Path(config.model.teacher).name}"
    if config.model.init is not None:
        return f"{Path(config.model.init).name}, fine-tuned"
    return config.model.preset


def _load_lpips(config: Config) -> tuple[LPIPS | None, str | None]:
    """AlexNet's LPIPS, the usual one to report; else the training's own; else the reason for neither."""
    reason = None
    for net in dict.fromkeys(("alex", config.loss.perceptual_net)):
        try:
            return load_lpips(net, config.loss.perceptual_weights), None
        except LatentVAEError as error:  # missing, or a file that holds another network
            reason = str(error)
    return None, reason
