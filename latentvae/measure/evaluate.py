"""Measuring a VAE's reconstructions of many images."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import LatentVAEError
from latentvae.measure.lpips import LPIPS
from latentvae.measure.metrics import ImageMetrics, LatentsMode, Metrics, MetricsSummary
from latentvae.measure.rfid import RFID, Inception, RFIDProtocol
from latentvae.models.latents import reconstruct, seeded_generator
from latentvae.models.loading import window_of


@dataclass(frozen=True)
class Evaluation(MetricsSummary):
    """The figures of every image and their means, and rFID, which is one figure of all images together."""

    rfid: float | None = None
    rfid_protocol: RFIDProtocol | None = None
    rfid_missing_reason: str | None = None  # None when rFID was measured, or not asked for

    @property
    def notes(self) -> tuple[str, ...]:
        """Say why figures are missing or not finite, and what rFID must not be compared with."""
        if self.rfid_missing_reason is not None:
            return (*super().notes, f"rFID was not measured: {self.rfid_missing_reason}")
        return (*super().notes, *(self.rfid_protocol.notes if self.rfid_protocol else ()))

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values: as MetricsSummary, with `rfid` and `rfid_protocol` (None without it)."""
        protocol = asdict(self.rfid_protocol) if self.rfid_protocol else None
        return {**super().as_dict(), "rfid": self.rfid, "rfid_protocol": protocol}

    def table(self) -> str:
        """Return the table of MetricsSummary, with rFID on a line of its own."""
        table = super().table()
        if self.rfid is None or self.rfid_protocol is None:
            return table
        biased = f": biased, fewer than {self.rfid_protocol.feature_count:,} images"
        count = f"n = {self.rfid_protocol.image_count:,}{biased if self.rfid_protocol.biased else ''}"
        # between the figures and their foot, for it is one of the set and no column
        figures, foot = table.rsplit("\n\n", 1)
        how = f"rFID: {self.rfid_protocol.extractor}; {self.rfid_protocol.resize}."
        return f"{figures}\n\nrFID {self.rfid:.3f} ({count})\n{how}\n{foot}"


class Group(Protocol):
    """Processes that evaluate together, each a share of the images; as `runtime.processes.Processes`."""

    def share(self, value: Any) -> list[Any]:
        """What all processes bring, by rank."""


class Evaluator:
    """Reconstruct images and compare them with the originals; `metrics` gathers the figures.

    They are of 8 bits, or of the depth of the model's intensity range where it has one.

    Args:
        vae: any AutoencoderKL.
        lpips: network from `load_lpips`, or None to leave LPIPS out.
        lpips_missing_reason: why it is left out, for the report.
        latents: decode the posterior's mode or a sample of it.
        seed: of the samples, each of which depends on the image's name too, and on nothing else.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        lpips: LPIPS | None = None,
        lpips_missing_reason: str | None = None,
        latents: LatentsMode = "mode",
        seed: int = 0,
    ) -> None:
        self.vae, self.sample, self.seed = vae, latents == "sample", seed
        window = window_of(vae)
        self.metrics = Metrics(lpips, lpips_missing_reason, latents, window.steps if window else 255)

    def add(self, name: str, image: torch.Tensor) -> tuple[torch.Tensor, ImageMetrics]:
        """The reconstruction (1, C, H, W), float32, of an image (C, H, W) in [-1, 1], and its figures.

        Raises:
            LatentVAEError: another number of channels, or values that are not finite; begins with the name.
        """
        try:
            rebuilt, (figures,) = self.add_batch([name], image[None])
        except LatentVAEError as error:
            raise LatentVAEError(f"{name}: {error}") from error
        return rebuilt, figures

    def add_batch(
        self, names: list[str], images: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[ImageMetrics, ...]]:
        """As `add`, of images of one size, (B, C, H, W)."""
        # on the CPU and by name: the same samples on every device, in any order, in any process
        generator = seeded_generator(self.seed, names[0], 0) if self.sample else None
        result = reconstruct(self.vae, images, sample=self.sample, generator=generator)
        rebuilt = result.reconstructions.float()
        figures = self.metrics.add(names, images.to(rebuilt.device), rebuilt, result.posterior.known_kl())
        return rebuilt, figures


@torch.no_grad()
def evaluate(
    vae: AutoencoderKL,
    images: Iterable[tuple[str, torch.Tensor]],
    lpips: LPIPS | None = None,
    lpips_missing_reason: str | None = None,
    latents: LatentsMode = "mode",
    seed: int = 0,
    inception: Inception | None = None,
    rfid_missing_reason: str | None = None,
    group: Group | None = None,
    order: Sequence[str] = (),
) -> Evaluation:
    """Reconstruct images one by one, each at its own size, and compare them with the originals.

    Args:
        vae: any AutoencoderKL.
        images: (name, (C, H, W) in [-1, 1]) pairs.
        lpips, lpips_missing_reason, latents, seed: as of `Evaluator`.
        inception: network from `load_inception`, or None to leave rFID out.
        rfid_missing_reason: why it is left out although asked for, for the report.
        group: processes that each evaluate some of the images; all get the figures of all.
        order: with a group: the names of the images of all processes, in the order of the report.
    """
    evaluator = Evaluator(vae, lpips, lpips_missing_reason, latents, seed)
    rfid = RFID(inception) if inception else None
    for name, image in images:
        reconstructions, _ = evaluator.add(name, image)
        if rfid is not None:
            rfid.add(image[None], reconstructions)
    if group is not None:
        evaluator.metrics.images = _rows_of_all(evaluator.metrics.images, group, order)
        rfid = _rfid_of_all(rfid, group) if rfid is not None else None
    figures = vars(evaluator.metrics.summary())
    if rfid is None:
        return Evaluation(**figures, rfid_missing_reason=rfid_missing_reason)
    if rfid.count < 2:  # one image has no covariance
        return Evaluation(**figures, rfid_missing_reason="it takes two images or more, got one")
    return Evaluation(**figures, rfid=rfid.value(), rfid_protocol=rfid.protocol())


def _rows_of_all(own: list[ImageMetrics], group: Group, order: Sequence[str]) -> list[ImageMetrics]:
    """The figures of every process's images, in the order of their names."""
    parts = group.share([asdict(row) for row in own])
    place = {name: number for number, name in enumerate(order)}
    rows = (ImageMetrics(**row) for part in parts for row in part)
    return sorted(rows, key=lambda row: place[row.name])


def _rfid_of_all(own: RFID, group: Group) -> RFID:
    """The statistics of every process's features as one."""
    first, *others = group.share((own.originals, own.rebuilt))
    own.originals, own.rebuilt = first
    for originals, rebuilt in others:
        own.originals.merge(originals)
        own.rebuilt.merge(rebuilt)
    return own
