"""A VAE into a diffusers pipeline: checked first, then put in with all that depends on it, or not at all."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderTiny
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.image_processor import VaeImageProcessor

from latentvae.models.loading import cast
from latentvae.models.spaces import Autoencoder, latent_shape, load_autoencoder
from latentvae.pipelines import checks
from latentvae.pipelines.agree import Use
from latentvae.runtime.patches import check_autoencoder

logger = logging.getLogger(__name__)

CHANNEL_ATTRIBUTES = ("latent_channels", "vae_latent_channels")


def swap(
    pipe: Any,
    vae: Autoencoder | str,
    allow_new_latent_space: bool = False,
    *,
    use: Use | None = None,
) -> Any:
    """Put a VAE into a diffusers pipeline, which then works as if built with it; or say why it cannot.

    Moves `vae` to the device and dtype of the one it replaces. Sets vae_scale_factor, image and mask
    processors, and the record that `save_pretrained` writes; carries slicing, tiling and CPU offloading over.
    A shift_factor of None becomes 0.0, which is what it means, where the pipeline adds it. A refused swap
    changes nothing.

    Args:
        pipe: any diffusers pipeline with an AutoencoderKL or AutoencoderTiny (as `vae`, or `vqvae` in LDM's).
        vae: what to put in, or what `latentvae.load` takes, such as "sd-small"; `optimize` and
            `enable_exact_tiling` may be on, and stay on. An AutoencoderTiny (a model, folder or hub id) keeps
            its factors of 1 and 0: its latents come scaled, and so every pipeline leaves them as they are.
        allow_new_latent_space: skip the comparison of latents with those of the present VAE, for a denoiser
            that is or will be trained on the latents of this one.
        use: "decode" where this VAE need only draw the denoiser's latents (text to image), "both" where its
            own latents must be the denoiser's too (image to image, inpainting). None: as the pipeline does;
            pipelines made of its parts later, such as by `AutoPipelineForImage2Image.from_pipe`, are not
            looked at.

    Returns:
        The VAE that was there, without hooks; None if there was none.

    Raises:
        ModelError: neither an AutoencoderKL nor an AutoencoderTiny.
        SwapError: the pipeline would fail with this VAE or use it wrongly; a LatentSpaceError where its
            denoiser was trained on other latents.
    """
    if isinstance(vae, str):
        vae = load_autoencoder(vae)
    if not isinstance(vae, AutoencoderTiny):
        check_autoencoder(vae)
    if use not in (None, "decode", "both"):
        raise checks.SwapError(
            f"use={use!r} came; wanted 'decode', 'both', or None for what the pipeline does."
        )
    name, old = checks.find_vae(pipe)
    if vae is old:  # it may carry this pipeline's own hooks, which the checks would refuse
        return old
    checks.check_fit(pipe, vae, old)
    with without_offloading(pipe) as device:
        if not allow_new_latent_space:
            checks.check_latent_space(pipe, vae, old, device, use or checks.usual_use(pipe))
        _put_in(pipe, name, vae, old)
    return old


@contextmanager
def without_offloading(pipe: Any) -> Iterator[torch.device]:
    """Take diffusers' offloading hooks off, and put them on again after it, over the components then there.

    Yields where models compute.

    Raises:
        SwapError: parts are spread or offloaded in a way that cannot be put back.
    """
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    if pipe.hf_device_map is not None:
        raise checks.SwapError(
            "the pipeline is spread by a device map. Call pipe.reset_device_map() before swapping."
        )
    if any(_is_group_offload_enabled(part) for part in parts):
        raise checks.SwapError(
            "the pipeline offloads groups of layers, whose hooks cannot be moved to another VAE. Swap before "
            "calling pipe.enable_group_offload()."
        )
    device = torch.device(pipe._execution_device)
    if getattr(pipe, "_all_hooks", []):  # set by model offloading only
        enable = pipe.enable_model_cpu_offload
    elif any(hasattr(part, "_hf_hook") for part in parts):
        enable = pipe.enable_sequential_cpu_offload
    else:
        yield device
        return
    place = getattr(pipe, "_offload_device", device)  # as the user chose it
    pipe.remove_all_hooks()
    try:
        yield place  # the caller changes components here: hooks then go over what is there
    finally:
        enable(device=place)


def _put_in(pipe: Any, name: str, vae: Autoencoder, old: Any) -> None:
    """Everything that may fail first; then the pipeline's attributes, which cannot."""
    beside = old if old is not None else checks.find_denoiser(pipe)[1]  # whose device and dtype it gets
    vae.to(beside.device).eval()
    if vae.dtype != beside.dtype:
        cast(vae, beside.dtype)
    derived = derived_attributes(pipe, vae, old)
    if "shift_factor" in checks.names_read(type(pipe)) and vae.config["shift_factor"] is None:
        vae.register_to_config(shift_factor=0.0)
    _carry_over(vae, old)
    _warn_of_overflow(pipe, vae)
    pipe.register_modules(**{name: vae})
    for attribute, value in derived.items():
        setattr(pipe, attribute, value)


def derived_attributes(pipe: Any, vae: Autoencoder, old: Any) -> dict[str, Any]:
    """What the pipeline's constructor computes from its VAE, for this one; processors keep other options."""
    channels, factor = latent_shape(vae)
    # some pipelines have none, or None: then nothing is to be rescaled
    old_factor = getattr(pipe, "vae_scale_factor", None) or factor
    derived: dict[str, Any] = {"vae_scale_factor": factor} if hasattr(pipe, "vae_scale_factor") else {}
    derived |= {attribute: channels for attribute in CHANNEL_ATTRIBUTES if hasattr(pipe, attribute)}
    old_channels = old.config.get("latent_channels") if old is not None else None
    for attribute, processor in vars(pipe).items():
        if not isinstance(processor, VaeImageProcessor):
            continue
        config = dict(processor.config)
        own = config["vae_scale_factor"]  # twice the VAE's in Flux
        config["vae_scale_factor"] = own * factor // old_factor
        if config.get("vae_latent_channels") == old_channels:
            config["vae_latent_channels"] = channels
        if config != dict(processor.config):
            # a new one: nothing of the pipeline may change before all that can fail is done
            derived[attribute] = type(processor).from_config(config)
    return derived


def _carry_over(vae: Autoencoder, old: Any) -> None:
    """Slicing and diffusers' own tiling, as pipe.enable_vae_slicing and enable_vae_tiling set them."""
    for flag in ("use_slicing", "use_tiling"):
        setattr(vae, flag, getattr(vae, flag) or getattr(old, flag, False))


def _warn_of_overflow(pipe: Any, vae: Autoencoder) -> None:
    """Say that float16 may overflow, where the VAE says so and the pipeline does not look."""
    overflows = vae.dtype == torch.float16 and vae.config["force_upcast"]
    if overflows and "force_upcast" not in checks.names_read(type(pipe)):
        logger.warning(
            "this VAE says that float16 overflows (force_upcast), and %s computes in float16 all the same: "
            "use bfloat16, or look with `latentvae doctor`.",
            type(pipe).__name__,
        )
