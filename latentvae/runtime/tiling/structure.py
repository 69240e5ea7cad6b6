"""Which VAEs can be tiled exactly: those whose every block is one that `layers.py` knows to read by boxes."""

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


def check_structure(vae: AutoencoderKL) -> None:
    """Refuse blocks that would not be computed as they should be.

    Raises:
        ModelError: names the first such block and what was wanted in its place.
    """
    for problem in _problems(vae):
        raise ModelError(
            f"exact tiling does not support {problem}. It takes encoders and decoders like those of Stable "
            "Diffusion, SDXL, SD3 and FLUX, of any depth and width. vae.enable_tiling() of diffusers takes "
            "more, with seams."
        )


def _problems(vae: AutoencoderKL) -> Iterator[str]:
    encoder, decoder = vae.encoder, vae.decoder
    yield from _other("encoder", encoder, Encoder)
    yield from _other("decoder", decoder, Decoder)
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        yield from _conv(f"{name}.conv_in", module.conv_in)
        yield from _conv(f"{name}.conv_out", module.conv_out)
        yield from _other(f"{name}.conv_norm_out", module.conv_norm_out, nn.GroupNorm)
        yield from _other(f"{name}.mid_block", module.mid_block, UNetMidBlock2D)
        yield from _resnets(f"{name}.mid_block", module.mid_block)
    for number, block in enumerate(encoder.down_blocks):
        name = f"encoder.down_blocks.{number}"
        yield from _other(name, block, DownEncoderBlock2D)
        yield from _resnets(name, block)
        yield from _samplers(f"{name}.downsamplers", block.downsamplers, Downsample2D)
    for number, block in enumerate(decoder.up_blocks):
        name = f"decoder.up_blocks.{number}"
        yield from _other(name, block, UpDecoderBlock2D)
        yield from _resnets(name, block)
        yield from _samplers(f"{name}.upsamplers", block.upsamplers, Upsample2D)


def _other(name: str, module: Any, wanted: type) -> Iterator[str]:
    if type(module) is not wanted:  # not isinstance: a subclass may compute something else
        yield f"{name}, a {type(module).__name__}; wanted {wanted.__name__}"


def _conv(name: str, conv: Any, padding: int = 1, stride: int = 1) -> Iterator[str]:
    found = [
        getattr(conv, key, None) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    ]
    wanted = [(3, 3), (stride, stride), (padding, padding), (1, 1), "zeros"]
    if found != wanted:
        yield f"{name}, {conv}; wanted a 3x3 convolution of stride {stride} with {padding} px of zeros"


def _resnets(name: str, block: Any) -> Iterator[str]:
    for number, resnet in enumerate(block.resnets):
        path = f"{name}.resnets.{number}"
        yield from _other(path, resnet, ResnetBlock2D)
        yield from _conv(f"{path}.conv1", resnet.conv1)
        yield from _conv(f"{path}.conv2", resnet.conv2)
        for norm in ("norm1", "norm2"):
            yield from _other(f"{path}.{norm}", getattr(resnet, norm), nn.GroupNorm)
        # an embedding or a resampling would be skipped: Residual computes norms, convolutions and the sum
        for part in ("time_emb_proj", "upsample", "downsample"):
            if getattr(resnet, part) is not None:
                yield f"{path} with its {part}; wanted none"
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
    else:
        yield from _conv(f"{name}.0.conv", sampler.conv)
        if not sampler.interpolate:
            yield f"{name}.0 without interpolation"
