"""What each weight is called: diffusers' names, those it had before 2023, and LDM's."""

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch

Layout = Literal["diffusers", "ldm"]

# The last matches every file, so it comes last. Text encoders have "encoder." too, but never at the start.
PREFIXES = ("first_stage_model.", "vae.", "")

# diffusers' name today: its name before, and LDM's (ldm/modules/diffusionmodules/model.py)
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_LDM_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_LDM_KINDS = {"resnets": "block", "attentions": "attn"}
# in the middle, or after each resnet of a level (AttnDownEncoderBlock2D, AttnUpDecoderBlock2D)
_ATTENTION = re.compile(r"(.+)\.attentions\.(\d+)\.(.+)\.(weight|bias)")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(.+)")
_LEVEL = re.compile(
    r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def ldm_name(key: str, levels: int) -> str:
    """What LDM calls the weight that diffusers calls `key`, in a VAE of that many levels.

    LDM numbers the decoder's levels by their resolution, as the encoder's, so its last one runs first.
    """
    if match := _ATTENTION.fullmatch(key):
        block, number, layer, kind = match.groups()
        if block.endswith(".mid_block"):
            return f"{block.removesuffix('_block')}.attn_{int(number) + 1}.{_LDM_ATTENTION[layer]}.{kind}"
        key = f"{block}.attentions.{number}.{_LDM_ATTENTION[layer]}.{kind}"
    if match := _MIDDLE.fullmatch(key):
        part, number, rest = match.groups()
        return f"{part}.mid.block_{int(number) + 1}.{_shortcut(rest)}"
    if match := _LEVEL.fullmatch(key):
        part, level, kind, number, rest = match.groups()
        # diffusers counts the decoder's levels as they run, from the smallest
        place = int(level) if part == "encoder.down" else levels - 1 - int(level)
        if kind in _LDM_KINDS:
            return f"{part}.{place}.{_LDM_KINDS[kind]}.{number}.{_shortcut(rest)}"
        return f"{part}.{place}.{kind.removesuffix('rs')}.{rest}"
    return key.replace(".conv_norm_out.", ".norm_out.")


def ldm_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of a VAE, under LDM's names, as its config has them: no model is built."""
    widths, layers, z = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    down, up = ([name.startswith("Attn") for name in config[f"{way}_block_types"]] for way in ("down", "up"))
    middle, top = config["mid_block_add_attention"], len(widths) - 1
    shapes = {
        **_conv("encoder.conv_in", config["in_channels"], widths[0]),
        **_half("encoder", widths[-1], widths[-1], 2 * z, middle),
        **_conv("decoder.conv_in", z, widths[-1]),
        **_half("decoder", widths[-1], widths[0], config["out_channels"], middle),
    }
    for level, width in enumerate(widths):
        below, above = widths[max(level - 1, 0)], widths[min(level + 1, top)]
        shapes |= _level(f"encoder.down.{level}", below, width, layers, down[level])
        shapes |= _level(f"decoder.up.{level}", above, width, layers + 1, up[top - level])
        shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width) if level < top else {}
        shapes |= _conv(f"decoder.up.{level}.upsample.conv", width, width) if level > 0 else {}
    if config["use_quant_conv"]:
        shapes |= _conv("quant_conv", 2 * z, 2 * z, 1)
    if config["use_post_quant_conv"]:
        shapes |= _conv("post_quant_conv", z, z, 1)
    return shapes


Shapes = dict[str, tuple[int, ...]]


def _conv(name: str, channels: int, out: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (out, channels, size, size), f"{name}.bias": (out,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def _resnet(name: str, channels: int, out: int) -> Shapes:
    shortcut = _conv(f"{name}.nin_shortcut", channels, out, 1) if channels != out else {}
    first = _norm(f"{name}.norm1", channels) | _conv(f"{name}.conv1", channels, out)
    return first | _norm(f"{name}.norm2", out) | _conv(f"{name}.conv2", out, out) | shortcut


def _attention(name: str, channels: int) -> Shapes:
    shapes = _norm(f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.{part}", channels, channels, 1)
    return shapes


def _level(name: str, channels: int, width: int, blocks: int, attention: bool) -> Shapes:
    shapes: Shapes = {}
    for number in range(blocks):
        shapes |= _resnet(f"{name}.block.{number}", width if number else channels, width)
        shapes |= _attention(f"{name}.attn.{number}", width) if attention else {}
    return shapes


def _half(name: str, middle: int, last: int, out: int, attention: bool) -> Shapes:
    """The middle and the end of encoder or decoder."""
    shapes = _resnet(f"{name}.mid.block_1", middle, middle) | _resnet(f"{name}.mid.block_2", middle, middle)
    shapes |= _attention(f"{name}.mid.attn_1", middle) if attention else {}
    return shapes | _norm(f"{name}.norm_out", last) | _conv(f"{name}.conv_out", last, out)


def _shortcut(rest: str) -> str:
    return rest.replace("conv_shortcut", "nin_shortcut")


def old_name(key: str) -> str:
    """What diffusers called a weight before 2023: files such as SD's name attention so."""
    match = _ATTENTION.fullmatch(key)
    if match is None or match[3] not in _OLD_ATTENTION:
        return key
    return f"{match[1]}.attentions.{match[2]}.{_OLD_ATTENTION[match[3]]}.{match[4]}"


def file_names(
    keys: Iterable[str], layout: Layout, prefix: str, levels: int, there: Iterable[str]
) -> dict[str, str]:
    """What a file of that layout and prefix, with the keys `there`, calls each of a model's weights."""
    present = set(there)

    def name(key: str) -> str:
        if layout == "ldm":
            return prefix + ldm_name(key, levels)
        # files have the one or the other, or both for different layers: which one is asked of the file
        old = prefix + old_name(key)
        return old if old in present else prefix + key

    return {key: name(key) for key in keys}


def is_attention_weight(key: str) -> bool:
    """Whether diffusers' `key` is a matrix that LDM keeps as a 1x1 convolution."""
    match = _ATTENTION.fullmatch(key)
    return match is not None and match[4] == "weight" and match[3] != "group_norm"


def to_convolution(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix, or a kernel of one tap in one dimension, as a 1x1 convolution; others as they are."""
    if tensor.ndim == 3 and tensor.shape[2] == 1:
        return tensor[..., None]
    return tensor[..., None, None] if tensor.ndim == 2 else tensor


def find_prefix(keys: Iterable[str]) -> str | None:
    """The prefix under which a file has a VAE; None where it has none."""
    names = list(keys)
    for prefix in PREFIXES:
        if any(name.startswith((f"{prefix}encoder.", f"{prefix}decoder.")) for name in names):
            return prefix
    return None


def find_layout(keys: Iterable[str], prefix: str) -> Layout:
    """Whose names the weights below that prefix have."""
    parts = ("encoder.down.", "encoder.mid.", "decoder.up.", "decoder.mid.")
    return (
        "ldm" if any(key.startswith(tuple(prefix + part for part in parts)) for key in keys) else "diffusers"
    )
