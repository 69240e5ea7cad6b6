"""Which VAEs other programs can load: ComfyUI and A1111 (stable-diffusion-webui) build the model themselves.

Sources: ComfyUI's `comfy/sd.py` (class VAE) and `comfy/diffusers_convert.py`; stable-diffusion-webui's
`modules/sd_vae.py`, which loads strictly into the VAE of the checkpoint in use.
"""

from typing import Any

from latentvae.models.formats.deriving import LDM_GROUPS, SD_SCALING, SD_WIDTHS

COMFY_WIDTHS = (SD_WIDTHS, SD_WIDTHS[:3])  # the second: the x4 upscaler's
COMFY_OTHER_MODEL = 64  # latent channels by which ComfyUI takes a file for another kind of VAE


def why_not_comfyui(config: dict[str, Any]) -> str | None:
    """The first reason why ComfyUI cannot load a VAE in LDM's names; None where it can."""
    if config["use_quant_conv"] != config["use_post_quant_conv"]:
        return "one of the two quant convolutions alone (wanted both or neither)"
    if config["latent_channels"] == COMFY_OTHER_MODEL:
        return f"{COMFY_OTHER_MODEL} latent channels, by which it takes a file for another kind of VAE"
    # of any number of latent channels but that: ComfyUI reads them off the tensors
    return _other_layers(config, COMFY_WIDTHS)


def why_not_a1111(config: dict[str, Any]) -> str | None:
    """The first reason why A1111 cannot load a VAE in LDM's names; None where it can."""
    if not (config["use_quant_conv"] and config["use_post_quant_conv"]):
        return "no quant convolutions"
    if config["latent_channels"] != 4:
        return f"{config['latent_channels']} latent channels (wanted 4)"
    return _other_layers(config, (SD_WIDTHS,))


def _other_layers(config: dict[str, Any], known: tuple[tuple[int, ...], ...]) -> str | None:
    widths = tuple(config["block_out_channels"])
    if widths not in known:
        wanted = " or ".join("-".join(map(str, some)) for some in known)
        return f"widths {'-'.join(map(str, widths))} (wanted {wanted})"
    if config["layers_per_block"] != 2:
        return f"layers_per_block={config['layers_per_block']} (wanted 2)"
    if config["norm_num_groups"] != LDM_GROUPS:
        return f"norm_num_groups={config['norm_num_groups']} (wanted {LDM_GROUPS})"
    if not config["mid_block_add_attention"]:
        return "no attention in the middle"
    if config["act_fn"] not in ("silu", "swish"):
        return f"act_fn={config['act_fn']} (wanted silu)"
    channels = {config["in_channels"], config["out_channels"]}
    return None if channels == {3} else f"images of {max(channels - {3})} channels (wanted 3)"


def program_notes(config: dict[str, Any]) -> list[str]:
    """What to tell a person who takes this VAE to ComfyUI or A1111, in LDM's names: a sentence each."""
    notes = []
    for program, reason in (("ComfyUI", why_not_comfyui(config)), ("A1111", why_not_a1111(config))):
        if reason is None:
            notes.append(f"{program} can load it, in LDM's names (`latentvae convert --to ldm`).")
        else:
            notes.append(f"{program} cannot load it: {reason}.")
    if why_not_comfyui(config) is None and (config["scaling_factor"], config["shift_factor"] or 0.0) != (
        SD_SCALING,
        0.0,
    ):
        notes.append(
            "These programs scale latents by the diffusion model's factors, not by this model's "
            f"scaling_factor={config['scaling_factor']:g}: right only with a diffusion model of the same."
        )
    return notes
