"""Which VAEs can be tiled exactly: those whose every block is one that `layers.py` knows to read by boxes.

And as long as nothing is attached to what tiling does not call, or calls with a tile in place of the map.
"""

from collections.abc import Iterator
from typing import Any

from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from latentvae.base.errors import ModelError
from latentvae.runtime.forwards import conv_of
from latentvae.runtime.plain import attachment, class_name

ACTIVATIONS = (nn.SiLU, nn.GELU, nn.Mish, nn.ReLU)  # of one value at a time
PADDINGS = ("zeros", "circular", "reflect", "replicate")
REMEDY = (
    "Remove the hook or the forward; merge the adapter; for textures that tile, latentvae.make_seamless(vae) "
    "in place of forwards of your own; or allow more memory, or latentvae.restore(vae, 'tiling'): both "
    "compute it whole."
)


def check_structure(vae: AutoencoderKL) -> None:
    """Refuse blocks that would not be computed as they should be, though somebody's hooks may come off again.

    Raises:
        ModelError: names the first such block and what was wanted in its place.
    """
    halves = [(name, getattr(vae, name, None)) for name in ("encoder", "decoder")]
    for name, half in halves:
        for problem in structural_problems(name, half) if half is not None else ():
            raise ModelError(
                f"exact tiling does not support {problem}. It takes encoders and decoders like those of "
                "Stable Diffusion, SDXL, SD3 and FLUX, of any depth and width, with adapters merged. "
                "vae.enable_tiling() of diffusers takes more, with seams."
            )


def problems(name: str, half: Any) -> Iterator[str]:
    """What in a half could not be tiled exactly as it is now, attachments of any kind included."""
    yield from structural_problems(name, half)
    for path, module in uncalled_or_cut(half):
        found = attachment(module)
        if found is not None:
            yield f"{name}.{path}, which {found}"


def uncalled_or_cut(half: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules, by name, that are called with tiles or not at all: all but the half and its attention."""
    for path, module in half.named_modules():
        whole = path == "" or ".attentions." in path or isinstance(module, nn.ModuleList)
        if not whole:
            yield path, module


def uncalled(half: Any) -> Iterator[nn.Module]:
    """The modules that have weights, or contain such, and are not called: their hooks are not run either."""
    yield half.mid_block
    blocks = half.up_blocks if isinstance(half, Decoder) else half.down_blocks
    yield from blocks
    for block in (half.mid_block, *blocks):
        for resnet in block.resnets:
            yield from (resnet, resnet.norm1, resnet.norm2)
    yield half.conv_norm_out


def structural_problems(name: str, half: Any) -> Iterator[str]:
    """What in a half is not of the kind that `layers.py` knows."""
    decodes = name == "decoder"
    yield from _other(name, half, Decoder if decodes else Encoder)
    yield from _conv(f"{name}.conv_in", half.conv_in)
    yield from _conv(f"{name}.conv_out", half.conv_out)
    yield from _norm(f"{name}.conv_norm_out", half.conv_norm_out)
    yield from _activation(f"{name}.conv_act", half.conv_act)
    yield from _other(f"{name}.mid_block", half.mid_block, UNetMidBlock2D)
    yield from _resnets(f"{name}.mid_block", half.mid_block)
    kind, sampler = (UpDecoderBlock2D, Upsample2D) if decodes else (DownEncoderBlock2D, Downsample2D)
    for number, block in enumerate(half.up_blocks if decodes else half.down_blocks):
        path = f"{name}.{'up' if decodes else 'down'}_blocks.{number}"
        yield from _other(path, block, kind)
        yield from _resnets(path, block)
        samplers = "upsamplers" if decodes else "downsamplers"
        yield from _samplers(f"{path}.{samplers}", getattr(block, samplers), sampler)


def _other(name: str, module: Any, *wanted: type) -> Iterator[str]:
    if type(module) not in wanted:  # not isinstance: a subclass may compute something else
        yield f"{name}, a {class_name(type(module))}; wanted {' or '.join(kind.__name__ for kind in wanted)}"


def _conv(name: str, conv: Any, padding: int = 1, stride: int = 1, size: int = 3) -> Iterator[str]:
    yield from _other(name, conv, nn.Conv2d)
    found = [conv.kernel_size, conv.stride, conv.padding, conv.dilation]
    wanted = [(size, size), (stride, stride), (padding, padding), (1, 1)]
    if found != wanted or conv.padding_mode not in PADDINGS:
        yield (
            f"{name}, {conv}; wanted a {size}x{size} convolution of stride {stride} with {padding} px of "
            "zeros around it (or of its border, or of its other side)"
        )


def _norm(name: str, norm: Any) -> Iterator[str]:
    yield from _other(name, norm, nn.GroupNorm)
    if not norm.affine:
        yield f"{name} without weights; wanted a GroupNorm with them"


def _activation(name: str, activation: Any) -> Iterator[str]:
    yield from _other(name, activation, *ACTIVATIONS)


def _resnets(name: str, block: Any) -> Iterator[str]:
    for number, resnet in enumerate(block.resnets):
        path = f"{name}.resnets.{number}"
        yield from _other(path, resnet, ResnetBlock2D)
        yield from _conv(f"{path}.conv1", resnet.conv1)
        yield from _conv(f"{path}.conv2", resnet.conv2)
        if resnet.conv_shortcut is not None:
            yield from _conv(f"{path}.conv_shortcut", resnet.conv_shortcut, padding=0, size=1)
        yield from _norm(f"{path}.norm1", resnet.norm1)
        yield from _norm(f"{path}.norm2", resnet.norm2)
        yield from _activation(f"{path}.nonlinearity", resnet.nonlinearity)
        # an embedding or a resampling would be skipped: Residual computes norms, convolutions and the sum
        for part in ("time_emb_proj", "upsample", "downsample"):
            if getattr(resnet, part) is not None:
                yield f"{path} with its {part}; wanted none"
        yield from _other(f"{path}.dropout", resnet.dropout, nn.Dropout)
        if resnet.dropout.p:  # it would draw other numbers for every tile
            yield f"{path} with dropout {resnet.dropout.p}; wanted none"


def _samplers(name: str, samplers: Any, wanted: type) -> Iterator[str]:
    if samplers is None:
        return
    if len(samplers) != 1:
        yield f"{name}, {len(samplers)} of them; wanted one"
    sampler = samplers[0]
    yield from _other(f"{name}.0", sampler, wanted)
    if sampler.norm is not None or not sampler.use_conv or getattr(sampler, "use_conv_transpose", False):
        yield f"{name}.0 with a norm or without a convolution; wanted {wanted.__name__} as it comes"
    if wanted is Downsample2D:
        # padding 0: stock adds one line of zeros right and below by hand
        yield from _conv(f"{name}.0.conv", sampler.conv, padding=0, stride=2)
        if sampler.padding != 0:
            yield f"{name}.0 with padding {sampler.padding}; wanted 0"
    else:
        yield from _conv(f"{name}.0.conv", conv_of(sampler))
        if not sampler.interpolate:
            yield f"{name}.0 without interpolation"
