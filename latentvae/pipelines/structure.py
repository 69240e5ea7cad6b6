"""How a diffusers pipeline is made: its VAE, its denoiser, and what it does to latents between them."""

import inspect
from types import CodeType
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from latentvae.errors import LatentVAEError
from latentvae.pipelines.agreement import Scaling, config_scaling

COMPONENTS = ("vae", "vqvae")  # the second: LDMTextToImagePipeline
DENOISERS = ("unet", "transformer")
TAKES_IMAGE_LATENTS = "StableDiffusionLatentUpscale"  # its UNet takes 2C channels and gives C + 1


class SwapError(LatentVAEError):
    """A VAE that cannot work in this pipeline."""


def find_vae(pipe: Any) -> tuple[str, Any]:
    """The name of a pipeline's VAE component, and what is there now.

    Raises:
        SwapError: not a diffusers pipeline, or one without a VAE.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise SwapError(f"{type(pipe).__name__} came; wanted a diffusers pipeline.")
    names = [name for name in COMPONENTS if name in pipe.components]
    if not names:
        raise SwapError(
            f"{type(pipe).__name__} has no VAE: its components are {', '.join(sorted(pipe.components))}. "
            "Wanted a pipeline of a latent diffusion model."
        )
    return names[0], getattr(pipe, names[0])


def names_read(pipeline: type) -> frozenset[str]:
    """Every attribute that the methods of a pipeline class name, its parents' below DiffusionPipeline too.

    Told from the compiled methods, so it holds for pipelines this package has never heard of.
    """
    found: set[str] = set()
    for parent in pipeline.__mro__:
        if not issubclass(parent, DiffusionPipeline) or parent is DiffusionPipeline:
            continue
        for value in vars(parent).values():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(function):  # torch.no_grad wraps __call__
                found |= _names(inspect.unwrap(function).__code__)
    return frozenset(found)


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def is_kind(pipe: Any, *starts: str) -> bool:
    """Whether the class of a pipeline, or one that it inherits from, has a name that starts so."""
    return any(cls.__name__.startswith(starts) for cls in type(pipe).__mro__)


def pipeline_scaling(pipe: Any, vae: AutoencoderKL) -> Scaling:
    """What this pipeline does to the latents of a VAE before its denoiser sees them.

    SD, SDXL, DiT, LDM and PixArt ignore shift_factor. SDXL uses latents_mean and latents_std where there are
    both, and scaling_factor besides.
    """
    reads, (mean, std) = names_read(type(pipe)), latent_moments(vae)
    scaling = config_scaling(vae)
    if "latents_mean" in reads and mean and std:
        means, stds = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return Scaling(means, scaling.factor / stds)
    return scaling if "shift_factor" in reads else Scaling(torch.zeros_like(scaling.shift), scaling.factor)


def latent_moments(vae: Any) -> tuple[Any, Any]:
    """latents_mean and latents_std of a config: a list each, or None."""
    return vae.config.get("latents_mean"), vae.config.get("latents_std")


def find_denoiser(pipe: Any) -> tuple[str, Any]:
    """The component that works on latents, and its name."""
    found = [(name, getattr(pipe, name, None)) for name in DENOISERS]
    return next(((name, model) for name, model in found if model is not None), ("unet", None))


def packs(pipe: Any) -> bool:
    """Whether the pipeline makes one token of 2 x 2 latent pixels, as Flux does."""
    return hasattr(type(pipe), "_pack_latents")


def latent_channels(pipe: Any) -> int:
    """How many latent channels the denoiser works on.

    It may take more (masks and images beside the latents: inpainting takes 2C + 1, upscaling C + 3) and may
    give more (DiT and PixArt a variance for each channel), but no pipeline does both.
    """
    config = find_denoiser(pipe)[1].config
    taken = config["in_channels"]
    if is_kind(pipe, TAKES_IMAGE_LATENTS):
        return taken // 2
    fewest = min(taken, config.get("out_channels") or taken)
    return fewest // 4 if packs(pipe) else fewest
