"""The largest value that each layer of a VAE gives, in fp32, bf16 or fp16; not finite where it overflows."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from latentvae.models.latents import Posterior, decode, encode

LOGITS = "logits"
_SUMS = {F.conv2d, F.conv_transpose2d, F.linear, F.scaled_dot_product_attention}


class Call(NamedTuple):
    """One call of a layer: its number within the encoder's or decoder's run, and the layer."""

    number: int
    layer: str


class ProbeOutputs(NamedTuple):
    """What a model makes of one probe, and what its layers give on the way."""

    posterior: Posterior
    images: torch.Tensor
    largest: dict[str, float]  # absolute value of each layer, in order of execution
    encode_overflow: Call | None  # the first that is not finite
    decode_overflow: Call | None


class Watch(TorchFunctionMode):
    """Within it, `largest` gains the largest absolute value of every layer's output, in order of execution.
    `overflow` is the first call whose output is not finite (a resnet calls its nonlinearity twice).

    Layers are the modules without children, and two with: ResnetBlock2D and Attention stand for the sum they
    add to. `<attention>.logits` is what fp32 attention takes the softmax of.

    On a CPU, convolutions, matrix products and attention of half precision sum in fp32 and round the result,
    as GPUs do: the CPU's own fp16 convolution is a hundred times slower (110 s for 256 px of the bundled
    model against 1 s [measured]). All else runs in half precision as it is.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.largest: dict[str, float] = {}
        self.overflow: Call | None = None
        self._calls = 0
        self._vae = vae
        self._handles: list[Any] = []

    def __enter__(self) -> "Watch":
        for name, module in self._vae.named_modules():
            if next(module.children(), None) is None or isinstance(module, ResnetBlock2D | Attention):
                self._handles.append(module.register_forward_hook(partial(self._see, name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _see(self, name: str, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        low, high = output.aminmax()
        value = float(torch.maximum(-low, high))  # NaN where there is one
        self._calls += 1  # a number for each call: a layer that runs twice may overflow the second time only
        if not math.isfinite(value) and self.overflow is None:
            self.overflow = Call(self._calls, name)
        self.largest[name] = max(value, self.largest.get(name, 0.0))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}  # torch gives None where there are none
        if func is F.scaled_dot_product_attention and args[0].dtype == torch.float32:
            attention = next(reversed(self.largest)).rpartition(".")[0]  # from its to_v, seen last
            self.largest[f"{attention}.{LOGITS}"] = _largest_logit(*args[:2])
        narrow = func in _SUMS and args[0].dtype in (torch.float16, torch.bfloat16)
        if not narrow or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        wide = [arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return func(*wide, **kwargs).to(args[0].dtype)


def _largest_logit(query: torch.Tensor, key: torch.Tensor) -> float:
    """Of attention (B, heads, N, C), in blocks of rows: the whole is N x N."""
    # of a 1024 px image, 1024 rows of 16,384 are 64 MB in fp32; all of them would be 1 GB
    blocks = [(rows @ key.transpose(-1, -2)).abs().max() for rows in query.split(1024, dim=-2)]
    return float(torch.stack(blocks).max()) / math.sqrt(query.shape[-1])


def stock_copy(vae: AutoencoderKL, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """A new AutoencoderKL of the same weights and config: without hooks, tiling or speed-ups."""
    with torch.device("meta"):  # no memory for random weights that are replaced at once
        copy = AutoencoderKL.from_config(vae.config)
    weights = {key: tensor.detach().to(dtype, copy=True) for key, tensor in vae.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.eval().requires_grad_(False)


@torch.no_grad()
def run_watched(
    vae: AutoencoderKL,
    probes: Mapping[str, torch.Tensor],
    latents: Mapping[str, torch.Tensor] | None = None,
    title: str | None = None,
) -> dict[str, ProbeOutputs]:
    """Encode and decode probes, watching every layer.

    Args:
        vae: of any dtype, on any device.
        probes: images (B, C, H, W) in [-1, 1] by name.
        latents: what to decode in place of the posterior's mode, by the same names.
        title: of the progress bar.
    """
    outputs = {}
    for name, images in tqdm(probes.items(), desc=title, unit="probe", leave=False, delay=2):
        with Watch(vae) as encoding:
            posterior, padding = encode(vae, images)
        with Watch(vae) as decoding:
            decoded = decode(vae, posterior.mode() if latents is None else latents[name], padding)
        largest = encoding.largest | decoding.largest
        outputs[name] = ProbeOutputs(posterior, decoded, largest, encoding.overflow, decoding.overflow)
    return outputs
