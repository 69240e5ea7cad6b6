"""A student learns a teacher's latent space: the encoder its latents, the decoder the pictures of them.

Both are functions to be fitted, with nothing to guess: the decoder is shown the teacher's latents and, to
begin with, the teacher's own picture of them as its target. So it becomes sharp without an adversary, and
each half learns apart.
"""

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from latentvae.base.errors import ConfigError
from latentvae.models.latents import Posterior, Scaling
from latentvae.models.presets import find_space
from latentvae.models.spaces import Autoencoder, latent_shape, load_autoencoder, take_factors
from latentvae.training.config import Config, DistilConfig

FACTORS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of a latent space

# A model that already speaks the space needs no map: fitted to noisy latents, one would only shrink them.
SPEAKS = 0.5  # R2


class Teacher:
    """A frozen autoencoder, in unscaled latents as its space has them, whatever its class.

    Args:
        model: AutoencoderKL, or an AutoencoderTiny, whose latents come scaled and without a variance.
        scaling: of the space.
        logvar: of the posteriors that an AutoencoderTiny does not have.
    """

    def __init__(self, model: Autoencoder, scaling: Scaling, logvar: float) -> None:
        self.model, self.scaling, self.logvar = model, scaling, logvar

    @classmethod
    def load(cls, config: Config, device: torch.device) -> "Teacher":
        """The one that a configuration names.

        Raises:
            ConfigError: an AutoencoderTiny without `model.space`, or a space that is not the teacher's.
        """
        source, name = str(config.model.teacher), config.model.space
        model = load_autoencoder(source, dtype=config.train.dtype, device=device)
        model.requires_grad_(False)
        if name is None:
            if isinstance(model, AutoencoderTiny):
                raise ConfigError(
                    f"model.teacher={source} is an AutoencoderTiny, which does not say how its latent space "
                    "is scaled: add model.space=sd, sdxl, sd3 or flux."
                )
            return cls(model, Scaling.of(model.config), config.distil.logvar)
        space = find_space(name)
        scaling = Scaling(space.shift_factor, space.scaling_factor)
        own = scaling if isinstance(model, AutoencoderTiny) else Scaling.of(model.config)
        if own != scaling or latent_shape(model)[0] != space.latent_channels:
            raise ConfigError(
                f"model.space={name} has {space.latent_channels} latent channels, scaling_factor "
                f"{scaling.factor} and shift_factor {scaling.shift}; the teacher {source} has "
                f"{latent_shape(model)[0]}, {own.factor} and {own.shift}. Leave it out, or correct it."
            )
        return cls(model, scaling, config.distil.logvar)

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """Of images (B, C, H, W): (B, 2c, h, w), unscaled."""
        if not isinstance(self.model, AutoencoderTiny):
            return self.model.encode(images).latent_dist.parameters
        mean = self.scaling.unscale(self.model.encode(images).latents)
        return torch.cat([mean, torch.full_like(mean, self.logvar)], 1)

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Of unscaled latents (B, c, h, w): (B, C, H, W) in [-1, 1]."""
        if isinstance(self.model, AutoencoderTiny):
            latents = self.scaling.scale(latents)
        return self.model.decode(latents).sample.clamp(-1, 1)

    def lend_factors(self, vae: AutoencoderKL, space: str | None) -> None:
        """Scale a student's latents as the teacher's are: it is to be exported as one of the space."""
        if space is not None:
            take_factors(vae, find_space(space))
        else:
            vae.register_to_config(**{key: self.model.config[key] for key in FACTORS})


def frozen_half(config: DistilConfig) -> list[str]:
    """Patterns of the parameters that stay as they are."""
    halves = {"encoder": ["decoder.*", "post_quant_conv.*"], "decoder": ["encoder.*", "quant_conv.*"]}
    return halves.get(config.learn, [])


def original_share(config: DistilConfig, step: int) -> float:
    """How much of the decoder's target is the original by now, 0 to 1; the rest is the teacher's picture."""
    if config.target == "original":
        return 1.0
    if config.turn_step is None:
        return 0.0
    return min(1.0, max(0.0, (step - config.turn_step) / config.turn_steps))


@torch.no_grad()
def linear_start(vae: AutoencoderKL, teacher: Teacher, images: Iterable[torch.Tensor]) -> float:
    """Give a trained model the latents of a teacher as far as one matrix can, before the first step.

    A least-squares map between the two spaces, one matrix and one offset for every latent pixel, is folded
    into quant_conv, and the one back into post_quant_conv; a model without them gets both in its encoder's
    last convolution and its decoder's first. Nothing is approximated but the fit (and in such a decoder
    the border of one latent, as zeros pad it before the offset). A model that speaks the space already
    stays as it is.

    Args:
        vae: changed in place.
        teacher: of latents of the same shape.
        images: batches (B, C, H, W) in [-1, 1], sides multiples of the compression ratio.

    Returns:
        R2 of the means of the latents after the map, over these images.
    """
    own, theirs = [], []
    for each in images:
        batch = each.to(vae.device, vae.dtype)
        own.append(_rows(vae.encode(batch).latent_dist.parameters))
        theirs.append(_rows(teacher.moments(batch)))
    x, y = torch.cat(own), torch.cat(theirs)
    spread = (y - y.mean(0)).square().sum()
    if (before := 1 - float((x - y).square().sum() / spread)) > SPEAKS:
        return before
    there, back = _affine(x, y), _affine(y, x)
    _fold(vae, there, back)
    return 1 - float((_extended(x) @ there - y).square().sum() / spread)


def _rows(moments: torch.Tensor) -> torch.Tensor:
    """The means of moments (B, 2c, h, w) as float64 rows (B h w, c)."""
    return Posterior(moments).mean.cpu().double().movedim(1, -1).flatten(0, 2)


def _extended(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)  # a last column of ones carries the offset


def _affine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The (c + 1, c) matrix that maps rows of x, with a one behind, to those of y, by least squares."""
    return torch.linalg.lstsq(_extended(x), y).solution


def _fold(vae: AutoencoderKL, there: torch.Tensor, back: torch.Tensor) -> None:
    """Means of the moments, and latents on their way into the decoder, mapped by (c + 1, c) matrices."""
    last, first = vae.quant_conv or vae.encoder.conv_out, vae.post_quant_conv or vae.decoder.conv_in
    means = slice(vae.config["latent_channels"])  # the other half are log-variances
    matrix, offset = there[:-1].T, there[-1]
    weight, bias = last.weight[means].cpu().double(), last.bias[means].cpu().double()
    last.weight[means] = torch.einsum("oc, cihw -> oihw", matrix, weight).to(last.weight)
    last.bias[means] = (matrix @ bias + offset).to(last.bias)
    matrix, offset = back[:-1].T, back[-1]
    weight, bias = first.weight.cpu().double(), first.bias.cpu().double()
    first.bias.copy_(bias + torch.einsum("ochw, c -> o", weight, offset))  # first: `weight` may be a view
    first.weight.copy_(torch.einsum("ochw, ci -> oihw", weight, matrix))


def start_linearly(vae: AutoencoderKL, teacher: Teacher, images: Iterable[tuple[str, torch.Tensor]]) -> float:
    """`linear_start` from named images (C, H, W) of any size, cut to multiples of the compression ratio."""
    ratio = latent_shape(vae)[1]

    def cut(image: torch.Tensor) -> torch.Tensor:
        height, width = (side // ratio * ratio for side in image.shape[-2:])
        return image[None, :, :height, :width]

    return linear_start(vae, teacher, (cut(image) for _, image in images))
