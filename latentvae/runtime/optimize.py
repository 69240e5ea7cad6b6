"""The same numbers from an `AutoencoderKL`, sooner.

Every transformation is a function of its own, that patches the forwards of single modules and changes results
by no more than rounding. What is derived from weights (folded, transformed) is made again in every call, for
about a hundredth of its time: so it cannot go stale, however weights were changed, and gradients are right.
"""

import logging
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from latentvae.base.errors import ModelError
from latentvae.models.loading import cast
from latentvae.runtime import forwards
from latentvae.runtime.choosing import use_fastest
from latentvae.runtime.graphs.backend import check_openvino, use_openvino
from latentvae.runtime.patches import (
    check_autoencoder,
    name_patches,
    on_restore,
    patch,
    restore,
)
from latentvae.runtime.plain import change, is_3x3, is_nearest, is_simple

logger = logging.getLogger(__name__)

Backend = Literal["torch", "openvino", "fastest"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def optimize(
    vae: AutoencoderKL,
    *,
    upsample: bool = True,
    norm: bool = True,
    residual: bool = True,
    winograd: bool = True,
    channels_last: bool = True,
    compile: bool = False,
    dtype: torch.dtype | None = None,
    backend: Backend = "torch",
) -> AutoencoderKL:
    """Make encode and decode faster, with the same results to rounding; `restore` undoes it.

    The same object is returned: class, config, state dict, `save_pretrained`, offloading hooks and gradients
    stay as they were. Blocks of an unknown kind stay stock; the log names them.

    Args:
        upsample: nearest x2 upsampling and its convolution as one transposed convolution.
        norm: SiLU in resnets overwrites its norm's output; on a CPU norms measure large maps by blocks, as
            torch's own channels_last norm loses three digits there. Without gradients.
        residual: resnets without steps that do nothing, and their sums in place (without gradients).
        winograd: 3x3 convolutions with a quarter of the products, on a CPU without gradients: in kernels that
            a C++ compiler makes (float32, bfloat16), or wide ones in torch's operations (float32, float64).
            Wants channels_last. Keeps buffers: up to 40 MB, and 5 to 12 MB for each thread.
        channels_last: weights and maps in that memory format; what comes out is contiguous.
        compile: `torch.compile` both halves for sizes that vary, or warn where that cannot work.
        dtype: convert the weights first, which `restore` does not undo.
        backend: "openvino": graphs of OpenVINO (extra `openvino`) compute, on a CPU, in float32 or bfloat16;
            compiled with the first call, and again when weights have changed. What a graph cannot give
            (gradients, hooks, exact tiling's tiles) torch computes. It keeps its memory until `restore`.
            "fastest": on a CPU, torch with the faster kernel for each layer, or OpenVINO, as is measured with
            a first call of each size, and kept. Last bits, but for files' of ours, depend on the machine.

    Raises:
        ModelError: not an AutoencoderKL, a dtype that no VAE computes in, a backend that cannot compute it.
        LatentVAEError: the backend's package is not installed.
    """
    check_autoencoder(vae)
    _check(vae, compile, dtype, backend)
    restore(vae, "optimize")  # the new choice replaces the old one, not only what both name
    if dtype is not None:
        cast(vae, dtype)
    if channels_last:
        use_channels_last(vae)
    if winograd:
        use_winograd(vae)
    if upsample:
        fold_upsamplers(vae, winograd=winograd)
    if norm:
        replace_norms(vae)
    if residual:
        simplify_resnets(vae)
    if compile:
        compile_halves(vae)
    if backend != "torch":
        for half in halves(vae):
            (use_openvino if backend == "openvino" else use_fastest)(half)
    name_patches(vae)
    return vae


def _check(vae: AutoencoderKL, compile: bool, dtype: torch.dtype | None, backend: Backend) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype} came; wanted one of {', '.join(map(str, DTYPES))}.")
    if backend not in get_args(Backend):
        raise ModelError(f"backend {backend!r} came; wanted one of {', '.join(get_args(Backend))}.")
    if compile and backend != "torch":
        raise ModelError(f"compile=True came with backend={backend!r}: both compile. Choose one of them.")
    if backend == "openvino":
        check_openvino(vae.device, dtype or vae.dtype)


def halves(vae: AutoencoderKL) -> list[Any]:
    """Encoder and decoder, or the one that is left: who only decodes deletes the other."""
    found = [getattr(vae, name, None) for name in ("encoder", "decoder")]
    return [half for half in found if isinstance(half, Encoder | Decoder)]


def _plain_conv(module: Any) -> bool:
    """Whether it is a 3x3 convolution of stride 1 with a border of zeros, as its class computes it."""
    return type(module) is nn.Conv2d and change(module) is None and is_3x3(module)


def _plain_resnet(module: Any) -> bool:
    """Whether it neither takes an embedding nor resamples, and is as its class computes it."""
    return type(module) is ResnetBlock2D and change(module) is None and is_simple(module)


def fold_upsamplers(vae: AutoencoderKL, *, winograd: bool = True) -> None:
    """Compute nearest x2 upsampling and the 3x3 convolution after it as one: 16 products instead of 36, or 9.

    Two patches for each, so that a hook that brings the convolution's weights does so: the upsampler hands
    its input on as it is, and tells the convolution. Upsamplers of another kind stay stock.
    """
    for name, module in vae.named_modules():
        if type(module) is not Upsample2D:
            continue
        if change(module) is None and is_nearest(module) and _plain_conv(forwards.conv_of(module)):
            patch(forwards.conv_of(module), forwards.conv if winograd else forwards.folding_conv, "optimize")
            patch(module, forwards.upsample, "optimize")
        else:
            logger.warning("left as stock: %s is not nearest upsampling and a plain 3x3 convolution", name)


def replace_norms(vae: AutoencoderKL) -> None:
    """Measure large maps by blocks, and let each SiLU in a resnet overwrite its norm's output."""
    norms = [half.conv_norm_out for half in halves(vae)]
    for resnet in filter(_plain_resnet, vae.modules()):
        norms += [resnet.norm1, resnet.norm2]
        if type(resnet.nonlinearity) is nn.SiLU and change(resnet.nonlinearity) is None:
            patch(resnet.nonlinearity, forwards.silu, "optimize")
    for norm in norms:
        if type(norm) is nn.GroupNorm and change(norm) is None:
            patch(norm, forwards.group_norm, "optimize")


def simplify_resnets(vae: AutoencoderKL) -> None:
    """Run resnets without the steps that do nothing, the sum written over the second convolution's output."""
    for name, module in vae.named_modules():
        if _plain_resnet(module):
            patch(module, forwards.resnet, "optimize")
        elif isinstance(module, ResnetBlock2D | ResnetBlockCondNorm2D):
            logger.warning("left as stock: %s takes an embedding, resamples, or was changed", name)


def use_winograd(vae: AutoencoderKL) -> None:
    """Compute the 3x3 convolutions of resnets with a quarter of the products, where that is faster."""
    for resnet in filter(_plain_resnet, vae.modules()):
        for conv in filter(_plain_conv, (resnet.conv1, resnet.conv2)):
            patch(conv, forwards.conv, "optimize")


def use_channels_last(vae: AutoencoderKL) -> None:
    """Convert the weights to channels_last, and each half's input on its way in and output on its way out."""
    kernels = [parameter for parameter in vae.parameters() if parameter.ndim == 4]
    if any(not kernel.is_contiguous() for kernel in kernels):
        logger.debug("weights are channels_last already, and stay so after restore")
    else:
        _set_memory_format(vae, torch.channels_last)
        on_restore(vae, _use_contiguous, "optimize")
    # convolutions keep the layout of their input, so converting once on the way in is enough
    for half in halves(vae):
        patch(half.conv_in, forwards.conv_in, "optimize")
        patch(half.conv_out, forwards.conv_out, "optimize")


def _set_memory_format(vae: nn.Module, memory_format: torch.memory_format) -> None:
    for parameter in vae.parameters():
        if parameter.ndim == 4:  # kernels of convolutions: nothing else has a layout
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _use_contiguous(vae: nn.Module) -> None:
    _set_memory_format(vae, torch.contiguous_format)


def compile_halves(vae: AutoencoderKL) -> None:
    """Compile encoder and decoder for sizes that vary. Pipelines call `decode`, which calls these."""
    problem = _compiler_problem(vae.device)
    if problem:
        logger.warning("not compiled: %s. Everything else is as fast as it was.", problem)
        return
    for half in halves(vae):
        # the class's function, since a patch must hold no module; dynamic: one compilation for all sizes
        patch(half, torch.compile(type(half).forward, dynamic=True), "optimize")


def _compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton  # private: other builds of torch may lack it

        return None if has_triton() else "triton is not installed"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import

        get_cpp_compiler()
    except Exception as error:  # torch has no public question; what is raised depends on the platform
        return f"there is no C++ compiler ({error})"
    return None
