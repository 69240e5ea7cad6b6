"""Whether two VAEs speak the same latent space: could a diffusion model trained on the one use the other?"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from latentvae.base.errors import LatentVAEError
from latentvae.images.reading import load_image
from latentvae.models.latents import Scaling, decode, encode
from latentvae.models.loading import SAMPLE_PICTURE, spatial_compression_ratio
from latentvae.pipelines.doctor.activations import stock_copy
from latentvae.pipelines.doctor.diagnosis import synthetic_probes
from latentvae.runtime.patches import check_autoencoder

PROBE_SIZE = 96  # pixels a side: two VAEs of SD's size take seconds on a CPU; f16 still has 6 x 6 latents

# An unstructured error of latents that scores 0.95 costs the bundled model 2.4 dB, 0.9 costs 3.9 [measured].
MIN_SCORE = 0.95
MAX_LOSS = 3.0  # dB: the squared error doubles
MAX_PSNR = 60.0  # dB: below half an 8-bit level


@dataclass(frozen=True)
class Agreement:
    """How well VAE B does in the place of VAE A, whose latents a diffusion model was trained on.

    `score` is 1 minus the mean squared difference of scaled latents over the variance of A's: 1 where they
    are the same, 0 where B's tell no more than A's mean, below 0 where they are unrelated. `correlation` is
    the mean over channels, blind to scale and shift; `scale_ratio` is the standard deviation of B's over A's.
    PSNR in dB, images clamped to [-1, 1], averaged over images.
    """

    score: float
    correlation: float
    scale_ratio: float
    psnr_a: float  # A decodes its own latents
    psnr_b: float
    psnr_b_decodes_a: float
    psnr_a_decodes_b: float
    image_count: int

    @property
    def loss(self) -> float:
        """What decoding the other's latents costs against decoding the own, in dB, in the worse direction."""
        return max(self.psnr_b - self.psnr_b_decodes_a, self.psnr_a - self.psnr_a_decodes_b, 0.0)

    @property
    def same(self) -> bool:
        """Whether a diffusion model trained on A's latents can use B."""
        return self.score >= MIN_SCORE and self.loss <= MAX_LOSS

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        limits = {"min_score": MIN_SCORE, "max_loss": MAX_LOSS}
        return {**asdict(self), "loss": self.loss, "same": self.same, **limits}

    def __str__(self) -> str:
        return (
            f"agreement {self.score:.3f} of 1 (wanted: {MIN_SCORE} or more), correlation "
            f"{self.correlation:.3f}, scale x {self.scale_ratio:.3g}; decoding the other's latents costs "
            f"{self.loss:.1f} dB (wanted: {MAX_LOSS:g} or less)"
        )


class Pair(NamedTuple):
    """One batch through both VAEs: its images, and the latents that each gives a denoiser."""

    images: torch.Tensor
    scaled: tuple[torch.Tensor, torch.Tensor]
    own: tuple[torch.Tensor, torch.Tensor]  # each decodes its own latents
    crossed: tuple[torch.Tensor, torch.Tensor]  # B decodes A's; A decodes B's


def agree(
    vae_a: AutoencoderKL, vae_b: AutoencoderKL, images: torch.Tensor | Iterable[torch.Tensor] | None = None
) -> Agreement:
    """Encode images with both VAEs, decode each other's latents, and say how far that works.

    In float32, from the posteriors' modes, scaled as each config says (shift_factor and scaling_factor).
    Neither model is changed; speed-ups and tiling of theirs are not used.

    Args:
        vae_a: the one whose latents a diffusion model was trained on.
        vae_b: the one that would take its place.
        images: (B, C, H, W) in [-1, 1], or batches of them of any size. Default: `probe_images`.

    Raises:
        ModelError: not an AutoencoderKL.
        LatentVAEError: latents of another shape, which cannot be the same, or no images.
    """
    for vae in (vae_a, vae_b):
        check_autoencoder(vae)
    check_same_shape(vae_a, vae_b)
    scalings = (Scaling.of(vae_a.config), Scaling.of(vae_b.config))
    return measure_agreement(vae_a, vae_b, scalings, images)


def check_same_shape(vae_a: AutoencoderKL, vae_b: AutoencoderKL) -> None:
    """Refuse two VAEs whose latents or images have other shapes.

    Raises:
        LatentVAEError: with both shapes.
    """
    shapes = [
        (f"{vae.config['latent_channels']} channels at 1/{spatial_compression_ratio(vae)} of the side")
        + f", of images of {vae.config['in_channels']} channels"
        for vae in (vae_a, vae_b)
    ]
    if shapes[0] != shapes[1]:
        raise LatentVAEError(
            f"the two VAEs have latents of different shapes ({shapes[0]}; {shapes[1]}): they cannot be one "
            "latent space. Compare VAEs of the same latent_channels and number of levels."
        )


def measure_agreement(
    vae_a: AutoencoderKL,
    vae_b: AutoencoderKL,
    scalings: tuple[Scaling, Scaling],
    images: torch.Tensor | Iterable[torch.Tensor] | None = None,
    device: torch.device | None = None,
) -> Agreement:
    """`agree`, with the scaling that a pipeline does with each VAE, on `device` (default: A's)."""
    place = device or vae_a.device
    vaes = tuple(plain_copy(vae).to(place) for vae in (vae_a, vae_b))
    if images is None:
        images = probe_images(vae_a.config["in_channels"])
    batches = [images] if isinstance(images, torch.Tensor) else images
    return agreement_of([both_ways(vaes, scalings, batch.to(place)) for batch in batches])


def plain_copy(vae: AutoencoderKL) -> AutoencoderKL:
    """A float32 copy without hooks or patches."""
    if any(parameter.is_meta for parameter in vae.parameters()):
        raise LatentVAEError(
            "the weights of a VAE are on the meta device: it is offloaded. Call remove_all_hooks() on its "
            "pipeline."
        )
    return stock_copy(vae)


def probe_images(channels: int, size: int = PROBE_SIZE) -> list[torch.Tensor]:
    """A photograph, and images that no photograph is like: (1, C, size, size) each, in [-1, 1]."""
    probes = list(synthetic_probes(channels, size).values())
    if channels not in (1, 3):  # image files have no other
        return probes
    photo = load_image(SAMPLE_PICTURE, channels=channels)[None]
    top, left = ((side - 2 * size) // 2 for side in photo.shape[-2:])
    return [F.avg_pool2d(photo[..., top : top + 2 * size, left : left + 2 * size], 2), *probes]


@torch.no_grad()
def both_ways(vaes: tuple[Any, ...], scalings: tuple[Scaling, Scaling], images: torch.Tensor) -> Pair:
    """Encode images with both VAEs; decode each one's latents with both."""
    (posterior_a, padding), (posterior_b, _) = (encode(vae, images) for vae in vaes)
    modes = (posterior_a.mode(), posterior_b.mode())
    scaled = tuple(scaling.scale(mode) for scaling, mode in zip(scalings, modes, strict=True))
    decoded = [
        # each decoder gets the other's latents through its own scaling, as a denoiser would give them
        [decode(vae, scaling.unscale(latents), padding).clamp(-1, 1) for latents in scaled]
        for vae, scaling in zip(vaes, scalings, strict=True)
    ]
    (a_of_a, a_of_b), (b_of_a, b_of_b) = decoded  # whose decoder, of whose latents
    return Pair(images, (scaled[0], scaled[1]), (a_of_a, b_of_b), (b_of_a, a_of_b))


def agreement_of(pairs: list[Pair]) -> Agreement:
    """The figures over all batches together.

    Raises:
        LatentVAEError: no images, or latents that are not finite.
    """
    if not pairs:
        raise LatentVAEError("no images came to compare two VAEs on; give at least one.")
    a, b = (torch.cat([_by_channel(pair.scaled[i]) for pair in pairs], 1) for i in range(2))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise LatentVAEError("a VAE gives latents that are not finite in float32: its weights are broken.")
    # (C, N) each: what channels have in common, apart from a shift
    centred_a, centred_b = (x - x.mean(1, keepdim=True) for x in (a, b))
    variance, tiny = centred_a.square().mean().clamp(min=1e-12), torch.finfo(torch.float64).tiny
    product = (centred_a * centred_b).sum(1)
    norms = centred_a.square().sum(1).sqrt() * centred_b.square().sum(1).sqrt()
    images = [(pair.images, pair.own + pair.crossed) for pair in pairs]
    psnr = [_mean_psnr([(x, found[i]) for x, found in images]) for i in range(4)]
    return Agreement(
        1 - float((a - b).square().mean() / variance),
        float((product / norms.clamp(min=tiny)).mean()),
        float((centred_b.square().mean() / variance).sqrt()),
        psnr[0],
        psnr[1],
        psnr[2],
        psnr[3],
        sum(len(pair.images) for pair in pairs),
    )


def _by_channel(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) as float64 (C, B h w), on the CPU because MPS has no float64."""
    return latents.cpu().double().transpose(0, 1).flatten(1)


def _mean_psnr(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Over images, of values in [-1, 1], in dB, at most MAX_PSNR: an exact image must not hide the others."""
    errors = torch.cat([(x.cpu().double() - y.cpu().double()).square().mean((1, 2, 3)) for x, y in pairs])
    return float((10 * (4 / errors.clamp(min=1e-12)).log10()).clamp(max=MAX_PSNR).mean())
