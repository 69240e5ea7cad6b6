"""An encoder or a decoder as a module that can be traced: as stock computes it, but for folded upsampling."""

import copy
import sys
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from latentvae.base.optional import need
from latentvae.runtime.forwards import conv_of, folded
from latentvae.runtime.patches import undo

SIDE = 4  # latents of the example that is traced; graphs are of any size


class FoldedUpsample(nn.Module):
    """Nearest x2 upsampling and the 3x3 convolution after it, as one transposed convolution of 4x4."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(folded(conv.weight.detach()))
        self.bias = conv.bias

    def forward(self, x: torch.Tensor, output_size: None = None) -> torch.Tensor:
        """(B, C, h, w) to (B, K, 2h, 2w); the size is what stock passes and does not want here."""
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


def traceable(half: nn.Module) -> Any:
    """A float32 copy of an encoder or decoder without patches, its upsampling folded.

    Args:
        half: of a structure that `tiling.structure` knows, with nothing attached.
    """
    twin: Any = copy.deepcopy(half)
    undo(twin)
    twin = twin.float().eval().requires_grad_(False)
    for block in getattr(twin, "up_blocks", ()):
        for number, upsampler in enumerate(block.upsamplers or ()):
            block.upsamplers[number] = FoldedUpsample(conv_of(upsampler))
    return twin


def example_of(half: Any) -> torch.Tensor:
    """A small input: of the encoder an image, of the decoder latents."""
    side = SIDE << halvings(half)
    return torch.zeros(1, half.conv_in.in_channels, side, side)


def halvings(half: Any) -> int:
    """How often a half makes its map half as large: a decoder never."""
    return sum(block.downsamplers is not None for block in getattr(half, "down_blocks", ()))


def openvino() -> Any:
    """The package openvino, without the report of its import that it would send to its makers.

    Raises:
        LatentVAEError: it is not installed.
    """
    reporter = "openvino_telemetry"
    if "openvino" in sys.modules or reporter in sys.modules:
        return need("openvino", what="the OpenVINO backend")
    sys.modules[reporter] = None  # type: ignore[assignment]  # openvino takes a stub where it is missing
    try:
        return need("openvino", what="the OpenVINO backend")
    finally:
        del sys.modules[reporter]


@torch.no_grad()
def openvino_model(module: nn.Module, example: torch.Tensor) -> Any:
    """An `openvino.Model` of a traceable module, for any batch, height and width. Keeps its weights alive."""
    package = openvino()
    decoders = need("openvino.frontend.pytorch.ts_decoder")
    with warnings.catch_warnings():
        # asserts about channels, which are the same at any size, become constants; torch.jit is deprecated
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, example, check_trace=False)
    decoder = decoders.TorchScriptPythonDecoder(traced, skip_freeze=True)
    frontend = package.frontend.FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(decoder))
