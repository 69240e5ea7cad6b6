"""A copy of a VAE with the same outputs and smaller values inside, so that fp16 does not overflow.

A GroupNorm undoes the scale of what enters it, and a linear layer can undo that of the one before it. So the
layers between may give smaller values. Powers of two make that exact in floating point; only the norms' eps,
which no config holds, counts for more where the variance is small. So the result is measured, not believed.
"""

import math
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

from latentvae.base.errors import LatentVAEError
from latentvae.measure.activations import LOGITS, ProbeOutputs, stock_copy
from latentvae.measure.diagnosis import FP16_MAX, MIN_PSNR, Diagnosis, Overflow, diagnose

TOLERANCE = 1e-4  # of the range of the original's outputs
HEADROOMS = (8.0, 4.0, 2.0)  # tried in this order: the less is scaled, the less a norm's eps counts


class UnfixableError(LatentVAEError):
    """No rescaled copy is finite in fp16 and the same in fp32. `diagnosis` is the model's own."""

    def __init__(self, message: str, diagnosis: Diagnosis) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis


@dataclass(frozen=True)
class Rescaling:
    """A rescaled copy and how it compares with the model it was made of."""

    vae: AutoencoderKL = field(repr=False)  # fp32, force_upcast False
    headroom: float  # FP16_MAX over the largest value that the scales allow
    scales: dict[str, float]  # by the first layer of those scaled together; those left alone are not in it
    images_error: float  # largest, over the range of the original's reconstructions
    moments_error: float  # the same of the posterior's means or log-variances, whichever is larger
    before: Diagnosis
    after: Diagnosis


@dataclass
class Knob:
    """Layers whose outputs can be scaled together."""

    outputs: list[str]  # all that carry the scale, to be measured
    scaled: list[str]  # weight and bias times the scale
    undone: list[str] = field(default_factory=list)  # weight over the scale: its input carries it


@torch.no_grad()
def rescale(vae: AutoencoderKL, probes: dict[str, torch.Tensor] | None = None) -> Rescaling:
    """A copy whose fp32 outputs agree to TOLERANCE on the probes, and whose fp16 is finite.

    Args:
        vae: any AutoencoderKL; not changed.
        probes: as `diagnose` takes them.

    Raises:
        UnfixableError: there is none; the message says which layer or which error is in the way.
        LatentVAEError: as `diagnose`.
    """
    before = diagnose(vae, probes)
    knobs = find_knobs(vae, before)
    largest = {layer.name: layer.largest for layer in before.layers}
    reason = ""
    for headroom in (*HEADROOMS, *((1.0,) if before.fp16_works else ())):  # 1 leaves all that is finite alone
        exponents = [_exponent(max(largest[name] for name in knob.outputs), headroom) for knob in knobs]
        copy = _turned(vae, knobs, exponents)
        after = diagnose(copy, probes)
        images_error, moments_error = _errors(before.outputs, after.outputs)
        reason = _objection(after, images_error, moments_error)
        if not reason:
            scales = {knob.outputs[0]: 2.0**e for knob, e in zip(knobs, exponents, strict=True) if e}
            return Rescaling(copy, headroom, scales, images_error, moments_error, before, after)
        if after.dtypes["fp16"].first_overflow is not None:
            break  # in a layer that no knob turns: less scaling does not help
    raise UnfixableError(f"no rescaling makes fp16 work and keeps fp32 as it is: {reason}", before)


def find_knobs(vae: AutoencoderKL, diagnosis: Diagnosis) -> list[Knob]:
    """All there is to turn in a model, from its layers in order of execution."""
    knobs, stream = [], Knob([], [])  # the residual stream: what resnets and attention add to
    for layer in diagnosis.layers:
        name = layer.name
        if layer.kind == LOGITS:
            continue
        module, parent = vae.get_submodule(name), vae.get_submodule(name.rpartition(".")[0])
        if name.endswith("coder.conv_in"):
            stream = Knob([name], [name])
            knobs.append(stream)
        elif layer.kind == "Conv2d" and isinstance(parent, Upsample2D | Downsample2D):
            stream = _branch(stream, name, knobs)
        elif isinstance(module, ResnetBlock2D):
            if module.conv_shortcut is not None:
                stream = _branch(stream, f"{name}.conv_shortcut", knobs)
            stream.outputs += [name, f"{name}.conv2"]
            stream.scaled.append(f"{name}.conv2")
            knobs.append(Knob([f"{name}.conv1"], [f"{name}.conv1"]))  # norm2 undoes it
        elif isinstance(module, Attention):
            stream.outputs += [name, f"{name}.to_out.0"]
            stream.scaled.append(f"{name}.to_out.0")
            knobs += _attention_knobs(name, module)
    return knobs + _latents_knobs(vae)


def _branch(stream: Knob, name: str, knobs: list[Knob]) -> Knob:
    """The stream behind a convolution that all of it passes through: it may have another scale from there."""
    stream.undone.append(name)
    knobs.append(Knob([name], [name]))
    return knobs[-1]


def _attention_knobs(name: str, module: Attention) -> list[Knob]:
    knobs = [Knob([f"{name}.to_v"], [f"{name}.to_v"], [f"{name}.to_out.0"])]
    if module.group_norm is not None:
        norm = f"{name}.group_norm"
        knobs.append(Knob([norm], [norm], [f"{name}.{part}" for part in ("to_q", "to_k", "to_v")]))
    return knobs


def _latents_knobs(vae: AutoencoderKL) -> list[Knob]:
    """Around the latents, where one linear layer follows another. The latents themselves keep their scale."""
    knobs = []
    if vae.quant_conv is not None:
        knobs.append(Knob(["encoder.conv_out"], ["encoder.conv_out"], ["quant_conv"]))
    if vae.post_quant_conv is not None:
        knobs.append(Knob(["post_quant_conv"], ["post_quant_conv"], ["decoder.conv_in"]))
    return knobs


def _exponent(largest: float, headroom: float) -> int:
    """Of the largest power of two, at most 1, that leaves this headroom."""
    limit = FP16_MAX / headroom
    return 0 if largest <= limit else math.floor(math.log2(limit / largest))


def _turned(vae: AutoencoderKL, knobs: list[Knob], exponents: list[int]) -> AutoencoderKL:
    copy = stock_copy(vae)
    for knob, exponent in zip(knobs, exponents, strict=True):
        for name in knob.scaled:
            for tensor in copy.get_submodule(name).parameters():
                tensor.mul_(2.0**exponent)
        for name in knob.undone:
            copy.get_submodule(name).get_parameter("weight").mul_(2.0**-exponent)
    copy.register_to_config(force_upcast=False)
    return copy


def _errors(before: dict[str, ProbeOutputs], after: dict[str, ProbeOutputs]) -> tuple[float, float]:
    """Largest error of the reconstructions and of the moments, each over the range of `before`."""
    images, mean, logvar = (
        _relative([read(before[name]) for name in before], [read(after[name]) for name in before])
        for read in (lambda o: o.images, lambda o: o.posterior.mean, lambda o: o.posterior.logvar)
    )
    return images, max(mean, logvar)


def _relative(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    span = max(float(tensor.max()) for tensor in before) - min(float(tensor.min()) for tensor in before)
    error = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    return error / span if error else 0.0


def _objection(after: Diagnosis, images_error: float, moments_error: float) -> str:
    """Why a copy will not do; empty if it will."""
    fp16 = after.dtypes["fp16"]
    if fp16.first_overflow is not None:
        return _overflow_objection(fp16.first_overflow)
    if max(images_error, moments_error) > TOLERANCE:
        return (
            f"with values small enough, GroupNorm's eps changes the fp32 outputs by "
            f"{max(images_error, moments_error):.2g} of their range (allowed: {TOLERANCE:g})."
        )
    if not after.fp16_works:
        return f"fp16 would be finite, but only {fp16.worst_psnr:.1f} dB from fp32 (wanted: {MIN_PSNR:g})."
    return ""


def _overflow_objection(overflow: Overflow) -> str:
    if overflow.in_weights:
        return f"the weights of {overflow.layer} ({overflow.kind}) would still be too large for fp16."
    return f"{overflow.layer} ({overflow.kind}) would still overflow, and nothing behind it undoes its scale."
