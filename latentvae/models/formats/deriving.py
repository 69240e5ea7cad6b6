"""What the shapes of a file's tensors say about its model, and what they do not."""

import re
from typing import Any

from latentvae.base.errors import ModelError
from latentvae.models.formats.layout import Layout
from latentvae.models.formats.stored import StoredVAE
from latentvae.models.presets import SPACES, block_types, nearest

SD_WIDTHS = (128, 256, 512, 512)
LDM_GROUPS = 32  # LDM's code has no other
SD_SCALING = SPACES["sd"].scaling_factor
SAMPLE_SIZE = 512

# Part of a key that only whole checkpoints of that kind have: name, and latent space
FAMILIES = {
    "conditioner.embedders.": ("Stable Diffusion XL", SPACES["sdxl"]),
    ".joint_blocks.": ("Stable Diffusion 3", SPACES["sd3"]),
    "double_blocks.": ("Flux", SPACES["flux"]),
    "cond_stage_model.": ("Stable Diffusion", SPACES["sd"]),
}
_LEVELS = {
    "ldm": r"encoder\.down\.(\d+)\.block\.(\d+)\..+",
    "diffusers": r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\..+",
}
_FIRST = {
    "ldm": "encoder.down.{}.block.0.conv1.weight",
    "diffusers": "encoder.down_blocks.{}.resnets.0.conv1.weight",
}
_ATTENTION = {"ldm": "encoder.mid.attn_1.", "diffusers": "encoder.mid_block.attentions."}
# within the levels; LDM numbers those of both halves alike, diffusers by the order in which they run
_LEVEL_ATTENTION = {
    "ldm": (r"encoder\.down\.(\d+)\.attn\..+", r"decoder\.up\.(\d+)\.attn\..+"),
    "diffusers": (
        r"encoder\.down_blocks\.(\d+)\.attentions\..+",
        r"decoder\.up_blocks\.(\d+)\.attentions\..+",
    ),
}


def derive_config(stored: StoredVAE) -> tuple[dict[str, Any], str]:
    """The config of a VAE that comes without one, and a note on what of it is not in the tensors.

    Raises:
        ModelError: a tensor that says the shape is missing or of another rank, or the widths are not those of
            a model with LDM's 32 norm groups.
    """
    names = [key.removeprefix(stored.prefix) for key in stored.tensors]
    found = [match.groups() for name in names if (match := re.fullmatch(_LEVELS[stored.layout], name))]
    # counted, not the largest number: a stray key must not make a model of a million levels
    levels = len({level for level, _ in found})
    widths = tuple(_shape(stored, _FIRST[stored.layout].format(level))[0] for level in range(max(levels, 1)))
    _check_groups(stored, widths)
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": _shape(stored, "encoder.conv_in.weight")[1],
        "out_channels": _shape(stored, "decoder.conv_out.weight")[0],
        "latent_channels": _shape(stored, "decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "layers_per_block": len({block for _, block in found}),
        "norm_num_groups": LDM_GROUPS,
        "act_fn": "silu",
        "mid_block_add_attention": any(name.startswith(_ATTENTION[stored.layout]) for name in names),
        "use_quant_conv": any(name.startswith("quant_conv.") for name in names),
        "use_post_quant_conv": any(name.startswith("post_quant_conv.") for name in names),
        "sample_size": SAMPLE_SIZE,  # in no tensor; diffusers' tiling derives its tiles from it
        **block_types(widths, *_attention_levels(stored.layout, names, levels)),
    }
    scaling, shift, note = _factors(stored, config)
    return {**config, "scaling_factor": scaling, "shift_factor": shift}, note


def _attention_levels(layout: Layout, names: list[str], levels: int) -> tuple[set[int], set[int]]:
    """The levels with attention in encoder and decoder, each counted as its half runs through them."""
    down, up = (
        {int(match[1]) for name in names if (match := re.fullmatch(pattern, name))}
        for pattern in _LEVEL_ATTENTION[layout]
    )
    return down, {levels - 1 - level for level in up} if layout == "ldm" else up


def _shape(stored: StoredVAE, name: str) -> tuple[int, ...]:
    key = stored.prefix + name
    if key not in stored.tensors:
        raise ModelError(
            f"{stored.path} is no complete VAE: it lacks {key!r}.{nearest(key, stored.tensors)} "
            "Download it again."
        )
    shape = tuple(stored.tensors[key].shape)
    if len(shape) != 4:
        raise ModelError(
            f"{stored.path} has {key!r} of shape {shape}; wanted a convolution of four dimensions. "
            "It is no AutoencoderKL."
        )
    return shape


def _check_groups(stored: StoredVAE, widths: tuple[int, ...]) -> None:
    """Refuse widths that LDM's groups do not divide, or divide into single channels: those had others."""
    # a group of one channel would erase its mean, so whoever trained that had fewer groups
    odd = [width for width in widths if width % LDM_GROUPS or width < 2 * LDM_GROUPS]
    if odd:
        raise ModelError(
            f"{stored.path} does not say how many norm groups it has: no config in its metadata, and "
            f"no config.json beside it; LDM's {LDM_GROUPS} do not suit a width of {odd[0]}. Put the model's "
            "config.json beside it."
        )


def _factors(stored: StoredVAE, config: dict[str, Any]) -> tuple[float, float, str]:
    """scaling_factor, shift_factor, and where they come from."""
    start = f"{stored.path} has no config; it was derived from the tensors' shapes. "
    end = " Put a config.json beside it to say otherwise."
    for part, (name, space) in FAMILIES.items():
        # both: a merged file may carry keys of one family and the VAE of another
        fits = is_sd_shaped(config) and config["latent_channels"] == space.latent_channels
        if fits and any(part in key for key in stored.others):
            scaling, shift = space.scaling_factor, space.shift_factor
            factors = (
                f"scaling_factor={scaling:g}, shift_factor={shift:g}: those of {name}, whose keys it has."
            )
            return scaling, shift, start + factors + end
    if is_sd_shaped(config) and config["latent_channels"] == 4:
        factors = (
            f"Not in them: scaling_factor={SD_SCALING:g} is Stable Diffusion's, whose shape it has. "
            "SDXL's VAE has the same shape and 0.13025."
        )
        return SD_SCALING, 0.0, start + factors + end
    factors = (
        f"Not in them, and unknown: scaling_factor=1, shift_factor=0; norm_num_groups={LDM_GROUPS} is LDM's."
    )
    return 1.0, 0.0, start + factors + end


def is_sd_shaped(config: dict[str, Any]) -> bool:
    """Whether a config has the layers of Stable Diffusion's VAE, of whatever latent channels."""
    return (
        tuple(config["block_out_channels"]) == SD_WIDTHS
        and config["layers_per_block"] == 2
        and config["norm_num_groups"] == LDM_GROUPS
        and config["act_fn"] in ("silu", "swish")
        and config["in_channels"] == config["out_channels"] == 3
        and bool(config["mid_block_add_attention"])
        and not has_level_attention(config)
    )


def has_level_attention(config: dict[str, Any]) -> bool:
    """Whether attention stands within the levels too, as in CompVis' kl-f16 and kl-f32."""
    return any(block.startswith("Attn") for block in (*config["down_block_types"], *config["up_block_types"]))
