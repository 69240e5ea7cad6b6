"""What is trained, and what Accelerate wraps: the VAE with its teacher, from images to reconstructions."""

import fnmatch
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.functional import interpolate

from latentvae.base.errors import ConfigError
from latentvae.models.latents import Posterior
from latentvae.models.loading import cast, load, spatial_compression_ratio, window_of
from latentvae.models.presets import build, nearest
from latentvae.models.spaces import Autoencoder, latent_shape
from latentvae.training.alignment import Alignment, Balance
from latentvae.training.config import Config
from latentvae.training.data.teacher_cache import TeacherCrop
from latentvae.training.distillation import Teacher, frozen_half
from latentvae.training.transplant import stays_fixed

# of one compiled block: sizes of batches and pictures, with and without gradients, in training or not
VERSIONS = 8


def models(config: Config, device: torch.device) -> tuple[AutoencoderKL, Teacher | None]:
    """The VAE to train, with what is not to be trained frozen; and the teacher, if there is one.

    Raises:
        LatentVAEError: a model that cannot be loaded, crops that it would cut, a teacher of other latents, or
            patterns to freeze that fit nothing.
    """
    torch.manual_seed(config.seed)  # the only draw from torch's own generator: the first weights
    model = config.model
    vae = load(model.init) if model.init else build(model.preset, **model.overrides)
    # fp32 whatever a file holds: bf16 master weights would round most of a small update away
    cast(vae.to(device), config.train.dtype).to(memory_format=config.train.memory_format)
    _check_crop(config, vae)
    _check_range(config, vae)
    teacher = None
    if model.teacher is not None:
        teacher = Teacher.load(config, device)
        _check_latent_shapes(vae, teacher.model)
        # the student speaks the teacher's latent space, so it is scaled like the teacher
        teacher.lend_factors(vae, model.space)
    # what comes before the latents; with it frozen they stay as they are, bit for bit
    patterns = ["encoder.*", "quant_conv.*"] if model.mode == "decoder_only" else []
    patterns += frozen_half(config.distil) if teacher is not None else []
    freeze(vae, [*patterns, *model.freeze])
    if config.distil.transplant:
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not stays_fixed(name))
    if config.train.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return vae.train(), teacher


def _check_crop(config: Config, vae: AutoencoderKL) -> None:
    """A parent's compression ratio is known only once it is loaded."""
    crop, ratio = config.data.crop, spatial_compression_ratio(vae)
    if crop % ratio:
        raise ConfigError(
            f"data.crop={crop} is not a multiple of the compression ratio {ratio} of {config.model.init}; "
            f"use {(crop // ratio + 1) * ratio}."
        )


def _check_range(config: Config, vae: AutoencoderKL) -> None:
    """A parent's channels and intensity range are known only once it is loaded."""
    stated, channels = window_of(vae), vae.config["in_channels"]
    limits = config.data.range
    if limits is not None and channels != 1:
        raise ConfigError(
            f"data.range={list(limits)} is of one channel, and {config.model.init} has {channels}: leave "
            "data.range out, or begin from a model of one channel"
        )
    if stated is not None and limits is None:
        raise ConfigError(
            f"{config.model.init} was trained on samples from {stated}, and data.range is not set: images "
            f"would be read as photographs. Add --set data.range=[{stated.low:g},{stated.high:g}], or another"
        )


def _check_latent_shapes(vae: AutoencoderKL, teacher: Autoencoder) -> None:
    """Refuse a teacher whose latents the student cannot have.

    Raises:
        ConfigError: names both shapes.
    """
    shapes = [latent_shape(each) for each in (vae, teacher)]
    if shapes[0] != shapes[1]:
        (student_channels, student_ratio), (channels, ratio) = shapes
        raise ConfigError(
            f"the student has {student_channels} latent channels at a ratio of {student_ratio}, the teacher "
            f"{channels} at {ratio}. Choose a preset f{ratio}c{channels}, or set "
            f"model.overrides.latent_channels={channels}."
        )
    images = [each.config["in_channels"] for each in (vae, teacher)]
    if images[0] != images[1]:
        raise ConfigError(
            f"the student's images have {images[0]} channels, the teacher's {images[1]}. Set "
            f"model.overrides.in_channels and out_channels to {images[1]}."
        )


def freeze(vae: AutoencoderKL, patterns: list[str]) -> None:
    """Take the parameters that match any pattern ("encoder.*", "*.norm*.weight") out of training.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing left to train.
    """
    names = dict(vae.named_parameters())
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching and pattern not in ("quant_conv.*", "post_quant_conv.*"):  # some models have none
            raise ConfigError(f"model.freeze: no parameter matches {pattern!r}.{nearest(pattern, names)}")
        for name in matching:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ConfigError(f"model.freeze={patterns} leaves nothing to train. Remove a pattern.")


@dataclass(frozen=True)
class Transform:
    """Resizing and rotation by quarter turns, of latents and images alike (EQ-VAE, Kouzelis et al. 2025)."""

    size: tuple[int, int]  # height and width of the scaled latents, before they are turned
    quarter_turns: int

    def latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Transform latents (B, c, h, w)."""
        return self._apply(latents, self.size)

    def images(self, images: torch.Tensor, ratio: int) -> torch.Tensor:
        """Transform the target images (B, C, H, W) to the size that the latents now stand for."""
        return self._apply(images, (self.size[0] * ratio, self.size[1] * ratio))

    def _apply(self, maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if size != maps.shape[-2:]:
            maps = interpolate(maps, size, mode="bicubic", antialias=True, align_corners=False)
        return torch.rot90(maps, self.quarter_turns, (-2, -1))


class TrainingOutputs(NamedTuple):
    """Of a training forward pass; the last two where there is a teacher.

    With a teacher, the half of the student that does not learn is not run, and what it would give is None.
    """

    moments: torch.Tensor | None  # (B, 2c, h, w)
    reconstructions: torch.Tensor | None  # (B, C, H, W), of the transformed size where there is a transform
    teacher_moments: torch.Tensor | None = None
    teacher_pictures: torch.Tensor | None = None  # of the latents that were decoded, as reconstructions
    aligned: torch.Tensor | None = None  # latents (B, c, h, w) to compare with features, where they are to be
    projected: torch.Tensor | None = None  # the same as wide as features, (B, D, h, w)


def _changed(
    latents: torch.Tensor, latent_noise: torch.Tensor | None, transform: Transform | None
) -> torch.Tensor:
    if latent_noise is not None:
        latents = latents + latent_noise
    return latents if transform is None else transform.latents(latents)


def _learns(*parts: nn.Module | None) -> bool:
    return any(
        parameter.requires_grad for part in parts if part is not None for parameter in part.parameters()
    )


class TrainableVAE(nn.Module):
    """Encode, sample, decode in one `forward`: only what goes through it is synchronised between ranks.

    Args:
        vae: trained in place.
        teacher: frozen; its latents are decoded instead of the student's, which only learns to match them.
        alignment: to a vision model; its projection is trained too.
    """

    def __init__(
        self, vae: AutoencoderKL, teacher: Teacher | None = None, alignment: Alignment | None = None
    ) -> None:
        super().__init__()
        self.vae = vae
        self.alignment = alignment  # no module: of it the projection alone learns
        self.projection = None if alignment is None else alignment.projection
        self.teacher = teacher  # no module: its weights are neither synchronised nor optimised

    @classmethod
    def build(cls, config: Config, device: torch.device) -> "TrainableVAE":
        """With the networks that a configuration names; raises what `models` does."""
        vae, teacher = models(config, device)
        return cls(vae, teacher, Alignment.build(config, vae.config["latent_channels"], device))

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor,
        latent_noise: torch.Tensor | None = None,
        transform: Transform | None = None,
        given: TeacherCrop | None = None,
        with_pictures: bool = True,
    ) -> TrainingOutputs:
        """Reconstruct images (B, C, H, W) from the latents that `noise` (B, c, h, w) picks.

        Args:
            images: what the encoder sees, in [-1, 1].
            noise: standard normal, for the posterior.
            latent_noise: added to the latents, for a decoder that must bear a diffusion model's errors.
            transform: applied to the latents.
            given: what the teacher made of these images earlier; None: it is asked.
            with_pictures: whether the teacher's pictures are wanted, and not the originals alone.
        """
        if self.teacher is not None:
            return self._distil(self.teacher, images, noise, latent_noise, transform, given, with_pictures)
        moments = self.vae.encode(images).latent_dist.parameters  # (B, 2c, h, w)
        latents, aligned, projected = Posterior(moments).at(noise), None, None  # (B, c, h, w)
        if self.alignment is not None and self.projection is not None:
            latents, aligned = Balance.apply(latents, self.alignment.config.weight)
            projected = self.projection(aligned)
        decoded = self.vae.decode(_changed(latents, latent_noise, transform)).sample
        return TrainingOutputs(moments, decoded, aligned=aligned, projected=projected)

    def _distil(
        self,
        teacher: Teacher,
        images: torch.Tensor,
        noise: torch.Tensor,
        latent_noise: torch.Tensor | None,
        transform: Transform | None,
        given: TeacherCrop | None,
        with_pictures: bool,
    ) -> TrainingOutputs:
        """The halves apart: the student's moments beside the teacher's, pictures of the teacher's latents."""
        teacher_moments = teacher.moments(images) if given is None else given.moments
        moments = reconstructions = pictures = None
        if _learns(self.vae.encoder, self.vae.quant_conv):
            moments = self.vae.encode(images).latent_dist.parameters
        if _learns(self.vae.decoder, self.vae.post_quant_conv):
            latents = _changed(Posterior(teacher_moments).at(noise), latent_noise, transform)
            reconstructions = self.vae.decode(latents).sample
            if given is not None:
                pictures = given.picture
            elif with_pictures:
                pictures = teacher.pictures(latents.to(images.dtype))
        return TrainingOutputs(moments, reconstructions, teacher_moments, pictures)

    def compile_blocks(self) -> None:
        """Compile in place; the layers at both ends stay, as the adaptive weight looks at the last."""
        encoder, decoder = self.vae.encoder, self.vae.decoder
        blocks = (*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks)
        # All blocks of one kind share the compiler's memory of a function, in which there is room for eight;
        # what finds none is not compiled, and by default a warning is all that says so.
        settings = torch._dynamo.config
        settings.recompile_limit = max(settings.recompile_limit, VERSIONS * len(blocks))
        settings.fail_on_recompile_limit_hit = True
        for block in blocks:
            block.compile()
