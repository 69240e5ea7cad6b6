"""The latent spaces that people's pipelines use, and autoencoders of any class that speak them.

A diffusion model sees *scaled* latents, `(latents - shift_factor) * scaling_factor`, and is bound to the VAE
that made them. An AutoencoderKL gives unscaled ones; an AutoencoderTiny (TAESD and its siblings) gives scaled
ones and no variance. The functions here speak scaled latents with both.
"""

from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from latentvae.models.formats.stored import CONFIG_NAME
from latentvae.models.latents import scale, unscale
from latentvae.models.loading import (
    SUBFOLDERS,
    from_pretrained,
    hub_config,
    is_hub_id,
    load,
    spatial_compression_ratio,
)
from latentvae.models.presets import SPACES, LatentSpace

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny


def space_of(vae: Autoencoder) -> LatentSpace | None:
    """The space that a config's channels and factors are those of; None for a space of its own.

    The factors are what a pipeline reads, so they tell what a model claims: whether its latents are really
    those of the space is for `latentvae.agree` to measure. An AutoencoderTiny does not say.
    """
    if isinstance(vae, AutoencoderTiny):
        return None
    config, names = vae.config, ("latent_channels", "scaling_factor", "shift_factor")
    own = tuple(config.get(name) or 0.0 for name in names)  # other classes have not all of them
    for space in SPACES.values():
        if own == (space.latent_channels, space.scaling_factor, space.shift_factor):
            return space
    return None


def space_name(vae: Autoencoder) -> str:
    """What messages call a model's latent space; it is told by the factors that its config claims."""
    if isinstance(vae, AutoencoderTiny):
        folder = Path(str(vae.config.get("_name_or_path") or "")).name
        return f"an AutoencoderTiny{f' ({folder})' * bool(folder)}, which does not name its space"
    if space := space_of(vae):
        return space.name
    config = vae.config
    factors = f"scaling_factor {config['scaling_factor']:g}, shift_factor {config.get('shift_factor') or 0:g}"
    return f"no known space ({config['latent_channels']} channels, {factors})"


def load_autoencoder(
    source: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Autoencoder:
    """`latentvae.load`, which also takes an AutoencoderTiny: a folder of diffusers, of it or of a pipeline
    with one, or a hub id, of which a cached copy goes before the hub's.

    Raises:
        ModelError: nothing there, another class, or weights that do not fit.
    """
    found = None if source is None else _tiny_subfolder(str(source))
    if found is None:
        return load(source, dtype=dtype, device=device)
    return from_pretrained(AutoencoderTiny, str(source), dtype, found).to(device).eval()


def _tiny_subfolder(source: str) -> str | None:
    """Where in a folder or a hub repository an AutoencoderTiny is ("" or "vae"); None where there is none."""
    if is_hub_id(source):
        subfolder, config = hub_config(source)
        return subfolder if config.get("_class_name") == "AutoencoderTiny" else None
    places = [name for name in SUBFOLDERS if (Path(source) / name / CONFIG_NAME).is_file()]
    if not places:
        return None
    try:
        config = AutoencoderTiny.load_config(source, subfolder=places[0])
    except (OSError, ValueError):  # not a model: `load` says what is wrong
        return None
    return places[0] if config.get("_class_name") == "AutoencoderTiny" else None


def latent_shape(vae: Autoencoder) -> tuple[int, int]:
    """Latent channels, and how many pixels one latent spans along each side."""
    if isinstance(vae, AutoencoderTiny):
        return vae.config["latent_channels"], 2 ** (len(vae.config["encoder_block_out_channels"]) - 1)
    return vae.config["latent_channels"], spatial_compression_ratio(vae)


def encode_scaled(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """Scaled latents of images, the mode where there is a distribution.

    Args:
        vae: on the images' device; its dtype is used.
        images: (B, C, H, W) in [-1, 1], sides multiples of the compression ratio.

    Returns:
        (B, c, h, w), float32 (float64 of a float64 model).
    """
    images = images.to(vae.device, vae.dtype)
    if isinstance(vae, AutoencoderTiny):
        latents = vae.encode(images).latents
    else:
        mean, _ = vae.encode(images).latent_dist.parameters.chunk(2, dim=1)  # means, then log-variances
        latents = scale(vae, mean)
    return latents.to(torch.promote_types(latents.dtype, torch.float32))


def decode_scaled(vae: Autoencoder, scaled_latents: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) near [-1, 1] of scaled latents (B, c, h, w); float32, or float64 of such models."""
    latents = scaled_latents.to(vae.device, vae.dtype)
    if not isinstance(vae, AutoencoderTiny):
        latents = unscale(vae, latents)
    images = vae.decode(latents).sample
    return images.to(torch.promote_types(images.dtype, torch.float32))


def take_factors(vae: AutoencoderKL, space: LatentSpace) -> AutoencoderKL:
    """Write a space's factors into a model's config, in place; its weights must already speak the space."""
    settings: dict[str, Any] = {"latents_mean": None, "latents_std": None}
    vae.register_to_config(scaling_factor=space.scaling_factor, shift_factor=space.shift_factor, **settings)
    return vae
