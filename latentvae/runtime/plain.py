"""Whether a module is still what our forwards take it for: asked at every call, as all may attach anything.

Where it is not, that module runs as stock, and so do its neighbours in what they would have done together.
"""

import functools
import logging
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from latentvae.runtime.offloading import WRAPPERS, foreign_hook
from latentvae.runtime.patches import innermost, is_ours, is_patched, patches_of

logger = logging.getLogger(__name__)

# Classes whose forward is known here, and that forward: a class may be patched as well as an instance.
_FORWARDS: dict[type, Any] = {
    kind: kind.forward
    for kind in (
        *(nn.Conv2d, nn.Linear, nn.GroupNorm, nn.SiLU, nn.GELU, nn.Mish, nn.ReLU, nn.Dropout),
        *(ResnetBlock2D, Upsample2D, Downsample2D, Attention),
        *(DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D, Encoder, Decoder),
    )
}
_CONV_FORWARD = nn.Conv2d._conv_forward
_WEIGHTS = (nn.Parameter, torch.Tensor)  # a tensor's subclass may be quantised or spread over devices


def change(module: nn.Module) -> str | None:
    """What makes a module compute other things than its class as it comes, in words that follow its name."""
    kind, ours = type(module), patches_of(module)
    if kind not in _FORWARDS:  # not isinstance: a subclass, as a parametrised module is, may compute anything
        return f"is a {class_name(kind)}"
    if ours is not None and ours.kind is not kind:
        return f"is a {class_name(kind)}, and was a {class_name(ours.kind)}"
    if kind.forward is not _FORWARDS[kind] or nn.Conv2d._conv_forward is not _CONV_FORWARD:
        return f"is of the class {kind.__name__}, whose forward was replaced"
    if (ours is not None and ours.original is not None) or "_conv_forward" in module.__dict__:
        return "has a forward of its own"
    tensors = [tensor for tensor in module._parameters.values() if tensor is not None]
    if any(type(tensor) not in _WEIGHTS for tensor in tensors) or (kind is nn.Conv2d and not tensors):
        return "has weights that are no plain parameters"
    return None


def class_name(kind: type) -> str:
    """A class's name, with its module where that is neither torch's nor diffusers'."""
    known = kind.__module__.partition(".")[0] in ("torch", "diffusers")
    return kind.__name__ if known else f"{kind.__module__}.{kind.__qualname__}"


def attachment(module: nn.Module) -> str | None:
    """What would see, or change, that a module is not called as stock calls it, or what `change` says."""
    hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    if hooks or _has_any_global_hook():
        return "has hooks"
    if module._compiled_call_impl is not None:
        return "is compiled by itself"
    forward = module.__dict__.get("forward")
    if forward is not None and not is_ours(forward):
        found = _foreign_forward(module, forward)
        if found is not None:
            return found
    return change(module)


def _foreign_forward(module: nn.Module, forward: Any) -> str | None:
    """What stands around a module's own forward, apart from hooks that bring its weights."""
    if isinstance(forward, functools.partial) and forward.func.__module__ in WRAPPERS:
        hook = foreign_hook(module)
        if hook is not None:
            return f"has a {hook}"
        forward = _innermost(module)
    stock = getattr(forward, "__func__", None) is type(module).forward
    return None if stock or is_ours(forward) else "has a forward of its own"


def _innermost(module: nn.Module) -> Any:
    """A module's forward underneath every hook."""
    holder, name = innermost(module)
    return getattr(holder, name)


def is_plain(module: nn.Module) -> bool:
    """Whether nobody has attached anything to this module but us, and hooks that bring its weights."""
    return attachment(module) is None


def takes_ours(*modules: Any) -> bool:
    """Whether these may be given our own arguments; the log says once of each that may no longer."""
    for module in modules:
        if not isinstance(module, nn.Module) or not is_patched(module, "optimize"):
            return False
        found = attachment(module)
        if found is None and not is_ours(module.__dict__.get("forward")) and not is_ours(_innermost(module)):
            found = "has its class's forward back"
        if found is not None:
            say(module, found)
            return False
    return True


def is_changed(module: nn.Module) -> bool:
    """Whether a module computes other things than its class; the log says so once."""
    found = change(module)
    if found is not None:
        say(module, found)
    return found is not None


def say(module: nn.Module, found: str) -> None:
    """Log once that a module runs as stock: a warning for the first of a VAE, as there may be a hundred."""
    ours = patches_of(module)
    if ours is None or ours.name in ours.said or torch.compiler.is_compiling():
        return
    level = logging.INFO if ours.said else logging.WARNING
    ours.said.add(ours.name)
    logger.log(level, "runs as stock: %s %s.", ours.name or f"a {type(module).__name__}", found)


def is_3x3(conv: nn.Module) -> bool:
    """Whether a Conv2d is of 3x3, of stride 1, and with a border of zeros."""
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return found == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and not is_patched(conv, "seamless")


def is_simple(resnet: ResnetBlock2D) -> bool:
    """Whether a ResnetBlock2D neither takes an embedding nor resamples."""
    return (
        resnet.upsample is None
        and resnet.downsample is None
        and resnet.time_emb_proj is None
        and resnet.time_embedding_norm != "scale_shift"
    )


def is_nearest(upsampler: Upsample2D) -> bool:
    """Whether an Upsample2D is nearest upsampling by 2 and a convolution."""
    # a transposed convolution of the model's own, or a norm in between, is not what we fold
    return (
        upsampler.use_conv
        and upsampler.interpolate
        and not upsampler.use_conv_transpose
        and not upsampler.norm
    )
