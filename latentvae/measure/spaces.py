"""How well a student speaks its teacher's latent space: latents compared, and pictures crossed."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import LatentVAEError
from latentvae.images.tensors import crop_padding, pad_to_multiple
from latentvae.measure.lpips import LPIPS
from latentvae.measure.metrics import Metrics, MetricsSummary
from latentvae.models.loading import window_of
from latentvae.models.spaces import Autoencoder, decode_scaled, encode_scaled, latent_shape

# who encodes, then who decodes
WAYS = ("student_student", "teacher_student", "student_teacher", "teacher_teacher")


@dataclass(frozen=True)
class SpaceAgreement:
    """A student beside its teacher.

    `r2` is 1 minus the mean squared difference of scaled latents over the variance of the teacher's about
    each channel's mean: 1 where they are the same. `correlation` is the mean over channels, blind to scale
    and shift. `offsets` are the student's means minus the teacher's, one per channel, in scaled units (1 is
    about the spread of latents): a diffusion model shows an offset as a tint of the whole picture.
    """

    r2: float
    correlation: float
    offsets: tuple[float, ...]
    pictures: dict[str, MetricsSummary]  # of WAYS, each against the originals
    image_count: int

    def as_dict(self) -> dict[str, Any]:
        """JSON values; of the pictures their means only."""
        figures = asdict(self) | {"offsets": list(self.offsets)}
        figures["pictures"] = {way: found.as_dict()["mean"] for way, found in self.pictures.items()}
        return figures

    def table(self) -> str:
        """The figures for people."""
        lines = [f"{'encoder, decoder':24}{'PSNR dB':>9}{'SSIM':>8}{'LPIPS':>8}"]
        for way, found in self.pictures.items():
            lpips = "-" if found.lpips is None else f"{found.lpips:.3f}"
            name = way.replace("_", ", ")
            lines.append(f"{name:24}{found.psnr:9.2f}{found.ssim:8.3f}{lpips:>8}")
        offsets = " ".join(f"{offset:+.3f}" for offset in self.offsets)
        lines.append(f"R2 of scaled latents {self.r2:.4f}, correlation {self.correlation:.4f}")
        lines.append(f"offsets per channel: {offsets}")
        return "\n".join(lines)


class _Moments:
    """Sums over latent pixels that the figures follow from, so that no latents are kept; float64."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        # per channel: means of both, squares of both, their product, the squared difference
        self.sums = torch.zeros(6, channels, dtype=torch.float64)

    def add(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Latents (1, C, h, w) of one image."""
        s, t = (
            latents.cpu().double().transpose(0, 1).flatten(1) for latents in (student, teacher)
        )  # (C, hw)
        terms = (s, t, s * s, t * t, s * t, (s - t) ** 2)
        self.sums += torch.stack([term.sum(1) for term in terms])
        self.count += s.shape[1]

    def merge(self, other: "_Moments") -> None:
        """Add another's sums."""
        self.sums += other.sums
        self.count += other.count

    def figures(self) -> tuple[float, float, tuple[float, ...]]:
        """R2, correlation, offsets."""
        s, t, ss, tt, st, dd = self.sums / self.count
        tiny = torch.finfo(torch.float64).tiny  # a channel that never changes correlates with nothing
        variances = ((ss - s * s) * (tt - t * t)).clamp_min(tiny)
        r2 = 1 - dd.mean() / (tt - t * t).mean().clamp_min(tiny)
        return float(r2), float(((st - s * t) / variances.sqrt()).mean()), tuple((s - t).tolist())


@torch.no_grad()
def compare_spaces(
    student: Autoencoder,
    teacher: Autoencoder,
    images: Iterable[tuple[str, torch.Tensor]],
    lpips: LPIPS | None = None,
    lpips_missing_reason: str | None = None,
    ways: tuple[str, ...] = WAYS,
    gather: Callable[[list[Any]], list[Any]] = list,
) -> SpaceAgreement:
    """Encode images with both, and decode each one's latents with both, from the posteriors' modes.

    Args:
        student: the model that is to speak the teacher's space.
        teacher: AutoencoderKL or AutoencoderTiny.
        images: (name, (C, H, W) in [-1, 1]) pairs of any size.
        lpips: from `load_lpips`, or None to leave LPIPS out.
        lpips_missing_reason: why it is left out, for the report.
        ways: which of WAYS to make pictures of.
        gather: makes one list of the lists of several processes, each of which was given a share of the
            images; the figures are then of all.

    Raises:
        LatentVAEError: latents of another shape, or no images.
    """
    (channels, ratio), other = latent_shape(student), latent_shape(teacher)
    if (channels, ratio) != other:
        raise LatentVAEError(
            f"the student's latents have {channels} channels at 1/{ratio} of the side, the teacher's "
            f"{other[0]} at 1/{other[1]}: they cannot be one latent space."
        )
    models = {"student": student, "teacher": teacher}
    window = window_of(student) if isinstance(student, AutoencoderKL) else None
    steps = window.steps if window else 255
    metrics = {way: Metrics(lpips, lpips_missing_reason, steps=steps) for way in ways}
    moments = _Moments(channels)
    for name, image in images:
        padded, padding = pad_to_multiple(image[None], ratio)
        scaled = {who: encode_scaled(model, padded).cpu() for who, model in models.items()}
        moments.add(scaled["student"], scaled["teacher"])
        for way in ways:
            encoder, decoder = way.split("_")
            picture = crop_padding(decode_scaled(models[decoder], scaled[encoder]), padding)
            place = image[None].to(picture.device)
            metrics[way].add(name, place, picture)
    whole = _Moments(channels)
    for part in gather([moments]):
        whole.merge(part)
    if not whole.count:
        raise LatentVAEError("no images came to compare two autoencoders on; give at least one.")
    for each in metrics.values():
        each.images = gather(each.images)
    pictures = {way: metrics[way].summary() for way in ways}
    count = next(iter(pictures.values())).protocol.image_count
    return SpaceAgreement(*whole.figures(), pictures, count)
