"""The shapes of VAE that we train, as configs of stock `diffusers.AutoencoderKL`; latent spaces by name."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from diffusers import AutoencoderKL
from diffusers.models.activations import ACT2CLS

from latentvae.base.errors import ModelError

# The published Stable Diffusion shape; every preset says only how it differs from it.
_BASE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    # diffusers derives the tile size of its own tiling from sample_size: less than 256 makes tiny tiles
    "sample_size": 256,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
# One layer per level: a second costs a fifth of the training speed on a CPU and a third more parameters.
# No attention: it is the one layer whose cost grows with the square of the area.
# 8 groups: 32 groups of a 32-channel layer are one channel each, which would erase every channel's mean.
_SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64, 128, 256),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
# One group: its two anchors serve all channels. 96: of 128, at the level that costs most, half the time
# for 1.5 dB before the first step. Three channels each are spent on the anchors and their balance.
_DEEP: dict[str, Any] = {
    "block_out_channels": (16, 96, 112, 128),
    "layers_per_block": 5,
    "norm_num_groups": 1,
    "mid_block_add_attention": False,
}
_NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}  # as SD3's and FLUX's VAEs

PRESETS: dict[str, dict[str, Any]] = {
    "f8c4": _BASE,
    "f8c16": {**_BASE, "latent_channels": 16},
    "f16c16": {**_BASE, "latent_channels": 16, "block_out_channels": (128, 128, 256, 512, 512)},
    "f8c4-small": {**_BASE, **_SMALL},
    "f8c16-small": {**_BASE, **_SMALL, "latent_channels": 16},
    # narrow and deep: there is room for the layers of a small teacher (latentvae/training/transplant.py)
    "f8c4-deep": {**_BASE, **_DEEP},
    "f8c16-deep": {**_BASE, **_DEEP, "latent_channels": 16, **_NO_QUANT},
    "tiny": {**_BASE, **_SMALL, "block_out_channels": (16, 16, 32, 32)},
}


def block_types(
    block_out_channels: tuple[int, ...] | list[int], down: Collection[int] = (), up: Collection[int] = ()
) -> dict[str, tuple[str, ...]]:
    """The block names of an AutoencoderKL of that many levels, with attention in those of `down` and `up`."""
    levels = range(len(block_out_channels))
    return {
        "down_block_types": tuple(f"{'Attn' if i in down else ''}DownEncoderBlock2D" for i in levels),
        "up_block_types": tuple(f"{'Attn' if i in up else ''}UpDecoderBlock2D" for i in levels),
    }


def preset_config(preset: str, **overrides: Any) -> dict[str, Any]:
    """The `AutoencoderKL` arguments of a preset, with `overrides` applied.

    Raises:
        ModelError: unknown preset, or an override that is no argument of AutoencoderKL or of another type.
    """
    if preset not in PRESETS:
        raise ModelError(
            f"unknown preset {preset!r}.{nearest(preset, PRESETS)} Presets: {', '.join(PRESETS)}."
        )
    for key, value in overrides.items():
        if key not in _BASE:
            raise ModelError(
                f"unknown model setting {key!r}.{nearest(key, _BASE)} Settings: {', '.join(_BASE)}."
            )
        if not _is_like(value, _BASE[key]):
            raise ModelError(
                f"model setting {key}={value!r} is of the wrong type; wanted one like {_BASE[key]!r}."
            )
    if (act_fn := overrides.get("act_fn")) is not None and act_fn not in ACT2CLS:
        raise ModelError(f"unknown act_fn {act_fn!r}.{nearest(act_fn, ACT2CLS)} Known: {', '.join(ACT2CLS)}.")
    config = {**PRESETS[preset], **overrides}
    config["block_out_channels"] = tuple(config["block_out_channels"])
    groups = config["norm_num_groups"]
    bad = [width for width in config["block_out_channels"] if width % groups]
    if bad:
        raise ModelError(
            f"block_out_channels {bad} cannot be divided into norm_num_groups={groups} groups. "
            "Choose widths that are multiples of norm_num_groups, or fewer groups."
        )
    return {**config, **block_types(config["block_out_channels"])}


def _is_like(value: Any, example: Any) -> bool:
    """Whether a setting has the example's type; whole numbers count things, so they start at 1."""
    if isinstance(example, tuple):
        return isinstance(value, list | tuple) and len(value) > 0 and all(_is_like(v, 1) for v in value)
    if isinstance(example, float):  # `scaling_factor: 1` is how people write 1.0
        return isinstance(value, float) or type(value) is int
    # by type and not isinstance: True is an int, and no number of layers
    return type(value) is type(example) and (type(value) is not int or value > 0)


def build(preset: str, **overrides: Any) -> AutoencoderKL:
    """An untrained `AutoencoderKL` of a preset's shape, drawn from torch's default generator.

    Args:
        preset: a name in `PRESETS`.
        overrides: arguments of AutoencoderKL that differ from the preset, such as `latent_channels=8`.

    Raises:
        ModelError: unknown preset or setting, or widths that the norm groups do not divide.
    """
    return AutoencoderKL(**preset_config(preset, **overrides))


def nearest(word: str, known: Iterable[str]) -> str:
    """A question naming the closest known word, to end a message with; empty where none is close."""
    match = get_close_matches(word, list(known), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


@dataclass(frozen=True)
class LatentSpace:
    """What a family of pipelines agrees on: the shape of latents, and how they are scaled."""

    name: str
    latent_channels: int
    scaling_factor: float
    shift_factor: float
    used_by: str


# Factors as in the configs of the original VAEs; all have 8 x 8 pixels to one latent.
SPACES = {
    space.name: space
    for space in (
        LatentSpace("sd", 4, 0.18215, 0.0, "Stable Diffusion 1.x and 2.x, DiT, PixArt-alpha, LCM"),
        LatentSpace("sdxl", 4, 0.13025, 0.0, "SDXL, PixArt-Sigma, AuraFlow, Kolors, Playground"),
        LatentSpace("sd3", 16, 1.5305, 0.0609, "Stable Diffusion 3 and 3.5"),
        LatentSpace("flux", 16, 0.3611, 0.1159, "FLUX.1, Chroma, HiDream, Lumina 2, Z-Image"),
    )
}


def find_space(name: str) -> LatentSpace:
    """A space by its name.

    Raises:
        ModelError: no such space; names the known ones.
    """
    if name not in SPACES:
        raise ModelError(f"unknown latent space {name!r}.{nearest(name, SPACES)} Known: {', '.join(SPACES)}.")
    return SPACES[name]
