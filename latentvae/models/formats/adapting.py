"""A VAE as another program computes it: quant convolutions folded away, or neutral layers added."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from latentvae.base.errors import ModelError
from latentvae.models.formats.programs import Program, judge, mended, readers_of
from latentvae.models.formats.writing import cast_copy

VISIBLE = 0.5  # of 255: what rounding to 8 bits may swallow
ROUNDING = 1e-3  # of the largest moment, in float32

State = dict[str, torch.Tensor]


def adapt(vae: AutoencoderKL, program: Program) -> tuple[AutoencoderKL, list[str]]:
    """A stock float32 copy that `program` computes as diffusers computes `vae`, and what was done to it.

    Quant convolutions that the program has not are folded into their neighbours. That is exact for
    quant_conv, 1x1 after encoder.conv_out, and for post_quant_conv's weight; its bias is not at the edges,
    where decoder.conv_in pads with zeros that it has not been added to. What the program wants beyond that
    (quant convolutions, attention in the middle, a second resnet in each level) is added as neutral layers.

    Args:
        vae: any AutoencoderKL; not changed.
        program: who shall read the result in LDM's names.

    Raises:
        ModelError: the program reads no VAE of that shape, or would show other pictures.
    """
    config = {key: value for key, value in vae.config.items() if key != "_name_or_path"}
    target = target_config(config, program)
    plain = cast_copy(vae, torch.float32)
    if target == config:
        return plain, []
    state, done = _fold(plain.state_dict(), config, target)
    with torch.device("meta"):
        adapted = AutoencoderKL.from_config(target)
    places = adapted.state_dict()
    added = [key for key in places if key not in state]
    if added:
        done.append(f"added {_layers(added)}, which change nothing")
    adapted.load_state_dict({**state, **{key: _neutral(key, places[key]) for key in added}}, assign=True)
    adapted = adapted.eval().requires_grad_(False)
    return adapted, [*done, *_check(plain, adapted, program)]


def target_config(config: dict[str, Any], program: Program) -> dict[str, Any]:
    """The config under which a program reads such a model right.

    Raises:
        ModelError: there is none.
    """
    target = mended(config, program)
    if target is not None:
        return target
    readers = readers_of(program)
    suited = [reader for reader in readers if reader.channels in (None, config["latent_channels"])]
    reason = judge(config, (suited or readers)[0])[1]
    raise ModelError(f"{readers[0].name} cannot be made to read this model right: {reason}.")


def _fold(state: State, config: dict[str, Any], target: dict[str, Any]) -> tuple[State, list[str]]:
    """The weights without the quant convolutions that the target has not, in float64 where they meet."""
    state, done = dict(state), []
    if config["use_quant_conv"] and not target["use_quant_conv"]:
        quant, bias = _pop(state, "quant_conv")
        weight, before = _pop(state, "encoder.conv_out")
        state["encoder.conv_out.weight"] = torch.einsum("om,mihw->oihw", quant, weight).float()
        state["encoder.conv_out.bias"] = (quant @ before + bias).float()
        done.append("folded quant_conv into encoder.conv_out")
    if config["use_post_quant_conv"] and not target["use_post_quant_conv"]:
        quant, bias = _pop(state, "post_quant_conv")
        weight, after = _pop(state, "decoder.conv_in")
        state["decoder.conv_in.weight"] = torch.einsum("omhw,mi->oihw", weight, quant).float()
        state["decoder.conv_in.bias"] = (weight.sum(dim=(2, 3)) @ bias + after).float()
        done.append("folded post_quant_conv into decoder.conv_in")
    return state, done


def _pop(state: State, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution in float64; one of 1x1 as a matrix."""
    weight, bias = state.pop(f"{name}.weight").double(), state.pop(f"{name}.bias").double()
    return (weight[:, :, 0, 0] if weight.shape[-1] == 1 else weight), bias


def _neutral(key: str, like: torch.Tensor) -> torch.Tensor:
    """A weight of a layer that changes nothing: an identity between latents, else a branch that adds zero."""
    if key in ("quant_conv.weight", "post_quant_conv.weight"):
        return torch.eye(like.shape[0])[:, :, None, None]
    return torch.ones(like.shape) if "norm" in key and key.endswith(".weight") else torch.zeros(like.shape)


def _layers(keys: list[str]) -> str:
    kinds = {"quant_conv": "quant convolutions", ".attentions.": "attention", ".resnets.": "resnets"}
    return ", ".join(kind for part, kind in kinds.items() if any(part in key for key in keys))


@torch.no_grad()
def _check(plain: AutoencoderKL, adapted: AutoencoderKL, program: Program) -> list[str]:
    """Both on a small smooth picture: nothing where they agree to rounding, else a note of what differs.

    Raises:
        ModelError: pictures would differ visibly, or moments at all.
    """
    config = plain.config
    size = 8 * 2 ** (len(config["block_out_channels"]) - 1)
    coarse = torch.rand(1, config["in_channels"], 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture = F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)
    wanted, found = (each.encode(picture).latent_dist for each in (plain, adapted))
    error = (wanted.parameters - found.parameters).abs().max() / wanted.parameters.abs().max().clamp(min=1)
    if not error <= ROUNDING:
        raise ModelError(f"folded for {program}, the encoder is off by {error:.2g} of its largest moment.")
    shown, there = (each.decode(wanted.mean).sample for each in (plain, adapted))
    off = (shown - there).abs().max().item() * 127.5
    if not off <= VISIBLE:
        raise ModelError(
            f"for {program}, post_quant_conv has to be folded into decoder.conv_in, and at the edges, which "
            f"conv_in pads with zeros, its bias cannot be: pictures would be off by up to {off:.2g} of 255 "
            f"(measured at {size} px). ComfyUI reads such a model as it is (--for comfyui); or train one "
            "without, by model.overrides: use_quant_conv and use_post_quant_conv false."
        )
    kept = config["use_post_quant_conv"] == adapted.config["use_post_quant_conv"]
    if kept or not config["use_post_quant_conv"] or not plain.post_quant_conv.bias.any():
        return []
    return [f"post_quant_conv's bias is not exact at the edges: up to {off:.2g} of 255 at {size} px"]
