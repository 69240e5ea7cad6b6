"""Looking at the averaged model while it trains, and exporting it at the end."""

import json
import logging
import platform
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from PIL import Image

from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.base.files import whole_file
from latentvae.images.drawing import grid
from latentvae.images.saving import save_picture
from latentvae.images.sources import ImageSource
from latentvae.measure.diagnosis import wants_upcast
from latentvae.measure.evaluate import Evaluator
from latentvae.measure.lpips import LPIPS, load_lpips
from latentvae.measure.metrics import ImageMetrics, MetricsSummary
from latentvae.measure.spaces import WAYS, compare_spaces
from latentvae.models.card import Provenance
from latentvae.models.exporting import export
from latentvae.models.latents import LatentStatistics, compute_latent_statistics
from latentvae.training.checkpoint import TrainingState
from latentvae.training.config import Config, DataConfig
from latentvae.training.data.crops import centre_crops, validation_images
from latentvae.training.data.sources import Selection, evenly
from latentvae.training.distillation import Teacher

logger = logging.getLogger(__name__)

GRID_IMAGES = 6  # a picture that fits a screen
# Images that are measured together. Processes take whole batches, so their number changes no figure.
BATCH = 8
TEACHER_ALONE = "teacher_teacher"  # of WAYS
STATISTICS_IMAGES = 200  # latent statistics move by under 1 % from there on


@dataclass(frozen=True)
class Lineage:
    """What a stage is a part of.

    Args:
        run: the whole run, with its stages.
        number: of the stage, from 0.
        earlier: what the stages before did, in words.
    """

    run: Config
    number: int
    earlier: tuple[str, ...]

    MARK = "done.json"  # in a stage's folder once it is over

    @property
    def is_last(self) -> bool:
        """Whether the run ends with it."""
        return self.number == len(self.run.stages) - 1

    def finish(self, folder: Path, words: str) -> None:
        """Mark the stage as over, with what it did in words."""
        with whole_file(folder / self.MARK) as partial:
            partial.write_text(json.dumps({"training": words}), encoding="utf-8")


class Validation:
    """The validation images, and what is measured and drawn of them.

    Args:
        config: of the run.
        train: trained on; some give the latent statistics of the export.
        val: measured.
        channels: of the model.
        teacher: whose latent space the model is to speak.
        rank, world: this process and how many there are; each reads and measures a share of the images.
        lineage: of a stage; None of a run that is not in stages.

    Raises:
        ImageError: no process can read any validation image.
    """

    def __init__(
        self,
        config: Config,
        train: ImageSource,
        val: ImageSource,
        channels: int,
        teacher: Teacher | None = None,
        rank: int = 0,
        world: int = 1,
        lineage: Lineage | None = None,
    ) -> None:
        self.config = config
        self.lineage = lineage
        self.teacher = teacher
        self.teacher_alone: dict[str, float] = {}  # figures of its own pictures, once they are measured
        self.train = train
        self.is_main = rank == 0
        starts = range(rank * BATCH, len(val), world * BATCH)
        shares = (range(start, min(start + BATCH, len(val))) for start in starts)
        self.batches = [[*centre_crops(val, share, config.data, channels)] for share in shares]
        if not any(gather_object([len(batch) for batch in self.batches])):
            raise ImageError(
                f"none of the {len(val)} validation images can be read; the first is {val.name(0)}"
            )
        self.lpips, self.reason = _load_lpips(config)

    def __call__(
        self, vae: AutoencoderKL, step: int, folder: Path
    ) -> tuple[MetricsSummary, Image.Image | None]:
        """Figures over all validation images, and a grid of some, saved as samples/step-00000500.png.

        All processes call it and get the figures; the first has the grid and saves it.
        """
        summary, pairs = self.measure(vae)
        if not self.is_main or not pairs:
            return summary, None
        columns = 2 if len(pairs) > 1 else 1
        rows = [[*chain(*pairs[i : i + columns])] for i in range(0, len(pairs) - columns + 1, columns)]
        picture = grid(rows, ["original", f"step {step}"] * columns)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        save_picture(picture, folder / "samples" / f"step-{step:08d}.png")
        return summary, picture

    @torch.no_grad()
    def measure(self, vae: AutoencoderKL) -> tuple[MetricsSummary, list[list[torch.Tensor]]]:
        """Figures over the images of all processes; some of this one's, each with its reconstruction."""
        lpips = self.lpips.to(vae.device) if self.lpips is not None else None
        evaluator = Evaluator(vae, lpips, self.reason)
        pairs: list[list[torch.Tensor]] = []  # of (C, H, W) each
        measured = []  # per batch, in its order
        for batch in self.batches:
            for _, alike in groupby(batch, lambda item: item[1].shape):
                names, images = zip(*alike, strict=True)
                rebuilt, _ = evaluator.add_batch([*names], torch.stack(images))
                more = zip(images, rebuilt.cpu(), strict=True)
                pairs += [[*pair] for pair in more][: GRID_IMAGES - len(pairs)]
            measured.append(evaluator.metrics.images)
            evaluator.metrics.images = []
        evaluator.metrics.images = [*chain.from_iterable(_in_turn(measured))]
        return evaluator.metrics.summary(), pairs

    def beside_teacher(self, vae: AutoencoderKL) -> dict[str, float]:
        """How well the model speaks its teacher's latent space; nothing without a teacher.

        R2 and correlation of scaled latents, the offset of each channel and the largest of them, and PSNR and
        LPIPS of the pictures that each decodes of the other's latents, and the teacher of its own. What the
        student makes of its own are the usual figures.
        """
        if self.teacher is None:
            return {}
        lpips = self.lpips.to(vae.device) if self.lpips is not None else None
        # the teacher stays as it is, and so do its own pictures: once a run
        ways = tuple(way for way in WAYS[1:] if way != TEACHER_ALONE or not self.teacher_alone)
        images = chain.from_iterable(self.batches)
        found = compare_spaces(vae, self.teacher.model, images, lpips, self.reason, ways, gather_object)
        figures = {"r2": found.r2, "correlation": found.correlation}
        figures["offset"] = max(map(abs, found.offsets))
        figures |= {f"offset_{channel}": offset for channel, offset in enumerate(found.offsets)}
        for way, summary in found.pictures.items():
            measured = {f"{way}_psnr": summary.psnr}
            if summary.lpips is not None:
                measured[f"{way}_lpips"] = summary.lpips
            if way == TEACHER_ALONE:
                self.teacher_alone = measured
            figures |= measured
        return figures | self.teacher_alone

    def export(self, state: TrainingState, folder: Path, seconds: float) -> Path:
        """Export the averaged weights to `folder`/vae, with latent statistics unless they are a parent's.

        All processes call it, to measure; the first exports.
        """
        vae = state.ema.model
        summary, _ = self.measure(vae)
        if not self.is_main:
            return folder / "vae"
        # a parent's or teacher's factors stay, so that its latents still fit; a stage's is the whole run's
        origin = self.config if self.lineage is None else self.lineage.run
        statistics, model = None, self.config.model
        if origin.model.init is None and model.teacher is None and model.mode != "decoder_only":
            statistics = training_statistics(vae, self.train, self.config.data)
        earlier = () if self.lineage is None else self.lineage.earlier
        provenance = Provenance(
            name=f"latentvae {_name(origin)}",
            base_model=origin.model.init,
            trained_on=f"{len(self.train)} images of {Path(self.config.data.train or '').name!r}",
            training=f"{'; '.join([*earlier, self.words(state, seconds)])}.",
            metrics=summary.as_dict(),
            config=origin.model_dump(mode="json"),
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

    def words(self, state: TrainingState, seconds: float) -> str:
        """What was done, for the card."""
        device = (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"CPU, {torch.get_num_threads()} threads"
        )
        stage = "" if self.lineage is None else f"{self.lineage.run.stages[self.lineage.number].name}: "
        return f"{stage}{state.step} steps in {seconds / 60:.0f} minutes on {device} ({platform.machine()})"


def training_statistics(vae: AutoencoderKL, source: ImageSource, config: DataConfig) -> LatentStatistics:
    """Latent statistics over evenly chosen training images, cropped as those of a validation."""
    some = Selection(source, evenly(len(source), STATISTICS_IMAGES))
    images = validation_images(some, config, vae.config["in_channels"])
    return compute_latent_statistics(vae, (image[None] for _, image in images))


def _in_turn(own: list[list[ImageMetrics]]) -> list[list[ImageMetrics]]:
    """The figures of all processes' batches in the order of the images."""
    shares = gather_object([own])  # of process 0: batches 0, world, 2 world, ...
    return [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]


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
