"""Whether two VAEs speak the same latent space: could a diffusion model trained on the one use the other?"""

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from latentvae.base.errors import LatentVAEError
from latentvae.images.reading import load_image
from latentvae.images.tensors import crop_padding, pad_to_multiple
from latentvae.measure.activations import stock_copy
from latentvae.measure.diagnosis import synthetic_probes
from latentvae.models.latents import Scaling
from latentvae.models.shipped import SAMPLE_PICTURE
from latentvae.models.spaces import Autoencoder, latent_shape, space_name
from latentvae.runtime.patches import check_autoencoder

PROBE_SIZE = 96  # pixels a side: two VAEs of SD's size take seconds on a CPU; f16 still has 6 x 6 latents

# An unstructured error of latents that scores 0.95 costs the bundled model 2.4 dB, 0.9 costs 3.9 [measured].
MIN_SCORE = 0.95
MAX_LOSS = 3.0  # dB: the squared error doubles
MAX_PSNR = 60.0  # dB: below half an 8-bit level
# Shares of variance, where one VAE stands in for another: decoders of other spaces score below 0.1 on
# photographs, a student after ten minutes 0.8 [measured].
MIN_PICTURE_SCORE = 0.8
MIN_LATENT_SCORE = 0.8
MAX_CONTRAST = 0.06  # off 1: a scaling_factor that was measured anew on other images shows as paler pictures

Use = Literal["decode", "both"]


@dataclass(frozen=True)
class Agreement:
    """How well VAE B does in the place of VAE A, whose latents a diffusion model was trained on.

    `score` is 1 minus the mean squared difference of scaled latents over the variance of A's: 1 where they
    are the same, 0 where B's tell no more than A's mean, below 0 where they are unrelated. `correlation` is
    the mean over channels, blind to scale and shift; `scale_ratio` is the standard deviation of B's over A's.
    PSNR in dB, images clamped to [-1, 1], averaged over images.

    Each direction has a figure of its own, 1 minus the squared difference of pictures over their variance,
    both against what A makes of its own latents: `decode_score` where B decodes A's latents (text to image
    needs no more), `encode_score` where A decodes B's (image to image and cached latents need it too).
    `contrast` is the standard deviation of B's pictures of A's latents over A's.
    """

    score: float
    correlation: float
    scale_ratio: float
    psnr_a: float  # A decodes its own latents
    psnr_b: float
    psnr_b_decodes_a: float
    psnr_a_decodes_b: float
    decode_score: float
    encode_score: float
    contrast: float
    image_count: int
    spaces: tuple[str, str]  # of A and B, as their configs name them

    @property
    def loss(self) -> float:
        """What decoding the other's latents costs against decoding the own, in dB, in the worse direction."""
        return max(self.psnr_b - self.psnr_b_decodes_a, self.psnr_a - self.psnr_a_decodes_b, 0.0)

    @property
    def same(self) -> bool:
        """Whether a diffusion model trained on A's latents can use B."""
        alike = self.score >= MIN_SCORE and abs(self.scale_ratio - 1) <= MAX_CONTRAST
        return alike and self.loss <= MAX_LOSS and self.decodes

    @property
    def decodes(self) -> bool:
        """Whether B draws A's latents as A does: enough for text to image."""
        return self.decode_score >= MIN_PICTURE_SCORE and abs(self.contrast - 1) <= MAX_CONTRAST

    @property
    def encodes(self) -> bool:
        """Whether A, and so a diffusion model of A's, understands B's latents: for image to image."""
        return self.encode_score >= MIN_PICTURE_SCORE and self.score >= MIN_LATENT_SCORE

    def fits(self, use: Use) -> bool:
        """Whether B can take A's place where it only decodes, or where it encodes too."""
        return self.decodes and (use == "decode" or self.encodes)

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        limits = {"min_score": MIN_SCORE, "max_loss": MAX_LOSS}
        limits |= {"min_picture_score": MIN_PICTURE_SCORE, "min_latent_score": MIN_LATENT_SCORE}
        limits |= {"max_contrast": MAX_CONTRAST}
        verdicts = {"same": self.same, "decodes": self.decodes, "encodes": self.encodes}
        return {**asdict(self), "loss": self.loss, **verdicts, **limits}

    def __str__(self) -> str:
        return (
            f"A's space is {self.spaces[0]}, B's {self.spaces[1]}; agreement {self.score:.3f} of 1 (wanted: "
            f"{MIN_SCORE} or more), correlation {self.correlation:.3f}, scale x {self.scale_ratio:.3g}; "
            f"decoding the other's latents costs {self.loss:.1f} dB (wanted: {MAX_LOSS:g} or less); B's "
            f"pictures of A's latents {self.decode_score:.2f} of 1 and x {self.contrast:.3f} in contrast, "
            f"A's of B's {self.encode_score:.2f} (wanted: {MIN_PICTURE_SCORE:g} or more)"
        )


class Pair(NamedTuple):
    """One batch through both VAEs: its images, and the latents that each gives a denoiser."""

    images: torch.Tensor
    scaled: tuple[torch.Tensor, torch.Tensor]
    own: tuple[torch.Tensor, torch.Tensor]  # each decodes its own latents
    crossed: tuple[torch.Tensor, torch.Tensor]  # B decodes A's; A decodes B's


def agree(
    vae_a: Autoencoder, vae_b: Autoencoder, images: torch.Tensor | Iterable[torch.Tensor] | None = None
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
        if not isinstance(vae, AutoencoderTiny):
            check_autoencoder(vae)
    check_same_shape(vae_a, vae_b)
    scalings = (Scaling.of(vae_a.config), Scaling.of(vae_b.config))
    return measure_agreement(vae_a, vae_b, scalings, images)


def check_same_shape(vae_a: Autoencoder, vae_b: Autoencoder) -> None:
    """Refuse two VAEs whose latents or images have other shapes.

    Raises:
        LatentVAEError: with both shapes.
    """
    shapes = [
        "{} channels at 1/{} of the side".format(*latent_shape(vae))
        + f", of images of {vae.config['in_channels']} channels"
        for vae in (vae_a, vae_b)
    ]
    if shapes[0] != shapes[1]:
        raise LatentVAEError(
            f"the two VAEs have latents of different shapes ({shapes[0]}; {shapes[1]}): they cannot be one "
            f"latent space. By their configs A's is {space_name(vae_a)}, B's {space_name(vae_b)}. Compare "
            "VAEs of the same latent_channels and number of levels."
        )


def measure_agreement(
    vae_a: Autoencoder,
    vae_b: Autoencoder,
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
    pairs = [both_ways(vaes, scalings, batch.to(place)) for batch in batches]
    return agreement_of(pairs, (space_name(vae_a), space_name(vae_b)))


def plain_copy(vae: Autoencoder) -> Autoencoder:
    """A float32 copy without hooks or patches."""
    if any(parameter.is_meta for parameter in vae.parameters()):
        raise LatentVAEError(
            "the weights of a VAE are on the meta device: it is offloaded. Call remove_all_hooks() on its "
            "pipeline."
        )
    if isinstance(vae, AutoencoderTiny):  # nothing of ours is ever put on one
        tiny = copy.deepcopy(vae).float().eval().requires_grad_(False)
        tiny.disable_tiling()
        tiny.disable_slicing()
        return tiny
    return stock_copy(vae)


def probe_images(channels: int, size: int = PROBE_SIZE) -> list[torch.Tensor]:
    """Crops of a photograph at two scales, (1, C, size, size) each, in [-1, 1].

    Photographs only: what no photograph is like (noise, flat colours) dominates squared errors, and models
    that learned a space from pictures do not know it. Synthetic images for channels that files do not have.
    """
    if channels not in (1, 3):
        return list(synthetic_probes(channels, size).values())
    photo = load_image(SAMPLE_PICTURE, channels=channels)[None]
    height, width = photo.shape[-2:]
    top, left = ((side - 2 * size) // 2 for side in (height, width))
    places = [
        (y * (height - size) // 4, x * (width - size) // 4) for y, x in ((1, 1), (1, 3), (3, 1), (3, 3))
    ]
    return [
        F.avg_pool2d(photo[..., top : top + 2 * size, left : left + 2 * size], 2),
        *(photo[..., y : y + size, x : x + size] for y, x in places),
    ]


@torch.no_grad()
def both_ways(vaes: tuple[Any, ...], scalings: tuple[Scaling, Scaling], images: torch.Tensor) -> Pair:
    """Encode images with both VAEs; decode each one's latents with both."""
    padded, padding = pad_to_multiple(images, latent_shape(vaes[0])[1])
    scaled = tuple(scaling.scale(_mode(vae, padded)) for vae, scaling in zip(vaes, scalings, strict=True))
    decoded = [
        # each decoder gets the other's latents through its own scaling, as a denoiser would give them
        [
            crop_padding(vae.decode(scaling.unscale(latents)).sample.float(), padding).clamp(-1, 1)
            for latents in scaled
        ]
        for vae, scaling in zip(vaes, scalings, strict=True)
    ]
    (a_of_a, a_of_b), (b_of_a, b_of_b) = decoded  # whose decoder, of whose latents
    return Pair(images, (scaled[0], scaled[1]), (a_of_a, b_of_b), (b_of_a, a_of_b))


def _mode(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """Unscaled latents; an AutoencoderTiny's are scaled as they come, and its config says a factor of 1."""
    if isinstance(vae, AutoencoderTiny):
        return vae.encode(images).latents
    return vae.encode(images).latent_dist.mode()


def agreement_of(pairs: list[Pair], spaces: tuple[str, str]) -> Agreement:
    """The figures over all batches together; `spaces` are the names of both (`space_name`).

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
    decode_score, encode_score = (
        _picture_score([(pair.crossed[i], pair.own[0]) for pair in pairs]) for i in range(2)
    )
    return Agreement(
        1 - float((a - b).square().mean() / variance),
        float((product / norms.clamp(min=tiny)).mean()),
        float((centred_b.square().mean() / variance).sqrt()),
        psnr[0],
        psnr[1],
        psnr[2],
        psnr[3],
        decode_score,
        encode_score,
        _spread([pair.crossed[0] for pair in pairs]) / max(_spread([pair.own[0] for pair in pairs]), 1e-6),
        sum(len(pair.images) for pair in pairs),
        spaces,
    )


def _by_channel(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) as float64 (C, B h w), on the CPU because MPS has no float64."""
    return latents.cpu().double().transpose(0, 1).flatten(1)


def _mean_psnr(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Over images, of values in [-1, 1], in dB, at most MAX_PSNR: an exact image must not hide the others."""
    errors = torch.cat([(x.cpu().double() - y.cpu().double()).square().mean((1, 2, 3)) for x, y in pairs])
    return float((10 * (4 / errors.clamp(min=1e-12)).log10()).clamp(max=MAX_PSNR).mean())


def _picture_score(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """1 minus the squared error of all pictures over their variance about each channel's mean."""
    errors = [float((found - wanted).double().square().sum()) for found, wanted in pairs]
    return 1 - sum(errors) / max(_spread([wanted for _, wanted in pairs]) ** 2, 1e-12)


def _spread(pictures: list[torch.Tensor]) -> float:
    """Root of the summed squares of all pictures about each channel's mean."""
    squares = [(each - each.mean((2, 3), keepdim=True)).square().sum().item() for each in pictures]
    return sum(squares) ** 0.5
