"""OpenVINO in the place of torch: an encoder's or a decoder's forward as one compiled graph, on a CPU.

A graph holds the weights rearranged. So every call compares the weights with those that were compiled, bit by
bit, for about a hundredth of its time, and compiles anew where they differ: a graph cannot go stale.
"""

import functools
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from latentvae.base.errors import ModelError
from latentvae.runtime.graphs import tracing
from latentvae.runtime.offloading import hooks_of
from latentvae.runtime.patches import is_patched, on_restore, patch, patches_of, underlying
from latentvae.runtime.plain import attachment, change, class_name
from latentvae.runtime.tiling.structure import problems

logger = logging.getLogger(__name__)

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def check_openvino(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a VAE on that device and of that dtype if OpenVINO cannot compute it here.

    Raises:
        LatentVAEError: OpenVINO is not installed.
        ModelError: says what it computes.
    """
    tracing.openvino()
    if device.type != "cpu":
        raise ModelError(
            f"a VAE on {device} came; OpenVINO computes on the CPU here. Call vae.to('cpu') first, or leave "
            "backend='openvino' out."
        )
    if dtype not in PRECISIONS:
        raise ModelError(
            f"a VAE in {dtype} came; OpenVINO computes in torch.float32 or torch.bfloat16 here. Pass one of "
            "them as dtype, or leave backend='openvino' out."
        )


def use_openvino(half: nn.Module) -> None:
    """Have OpenVINO compute an encoder or a decoder; it is compiled with the first call."""
    patch(half, by_openvino, "optimize")
    on_restore(half, forget, "optimize")


def by_openvino(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A half's forward: by OpenVINO, or by torch where only that gives what stock gives."""
    if torch.compiler.is_compiling() or args or kwargs or not computes(self, sample):
        return underlying(self, "optimize")(sample, *args, **kwargs)
    return compute(self, sample)


def computes(half: Any, sample: torch.Tensor) -> bool:
    """Whether a graph of `half` gives what stock gives for this input, here and now."""
    return _suits(half, sample) and not _is_attached_to(half) and _first_process() == os.getpid()


def compute(half: nn.Module, sample: torch.Tensor) -> torch.Tensor:
    """What OpenVINO makes of an input that it computes."""
    return _graphs.setdefault(half, Graph()).compute(half, sample)


@functools.cache
def _first_process() -> int:
    """The process that computed first: one forked from it would wait for OpenVINO's threads for ever."""
    return os.getpid()


class Graph:
    """The compiled graph of one encoder or decoder, and what it was compiled from."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # a request computes one input at a time, with all threads
        self.made_for: tuple[Any, ...] = ()
        self.weights: list[torch.Tensor] = []
        self.request: Any = None

    def compute(self, half: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What `half` makes of x (B, C, H, W), compiled first if it has to be."""
        with self.lock:
            made_for = (torch.get_num_threads(), x.dtype, settings(half))
            if made_for != self.made_for or not self._has_weights_of(half):
                self._compile(half, x.dtype)
                self.made_for = made_for
            self.request.infer([x.detach().float().contiguous().numpy()], share_inputs=True)
            # copied: the next call writes over it
            return torch.from_numpy(self.request.get_output_tensor(0).data.copy()).to(x.dtype)

    def _has_weights_of(self, half: nn.Module) -> bool:
        weights = list(half.parameters())
        same = len(weights) == len(self.weights)
        return same and all(torch.equal(old, new) for old, new in zip(self.weights, weights, strict=True))

    def _compile(self, half: nn.Module, dtype: torch.dtype) -> None:
        self.request, self.made_for = None, ()  # memory goes before more is taken; an error leaves nothing
        with torch.inference_mode(False), torch.no_grad():
            self.weights = [weight.detach().clone() for weight in half.parameters()]
            model = tracing.openvino_model(tracing.traceable(half), tracing.example_of(half))
        self.request = compiled(model, PRECISIONS[dtype]).create_infer_request()


def compiled(model: Any, precision: str) -> Any:
    """An `openvino.Model` compiled for one input at a time, with torch's number of threads."""
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }
    return _core().compile_model(model, "CPU", settings)


@functools.cache
def _core() -> Any:
    return tracing.openvino().Core()


_graphs: weakref.WeakKeyDictionary[nn.Module, Graph] = weakref.WeakKeyDictionary()


def forget(half: nn.Module) -> None:
    """Give back the memory of a half's graph."""
    _graphs.pop(half, None)


def settings(half: nn.Module) -> list[tuple[type, dict[str, Any]]]:
    """What a half's modules compute beside their weights: their classes, strides, eps and the like."""
    plain = (bool, int, float, str, tuple)
    return [
        (type(module), {k: v for k, v in vars(module).items() if k != "training" and isinstance(v, plain)})
        for module in half.modules()
    ]


def _suits(half: Any, sample: torch.Tensor) -> bool:
    """Whether a graph computes such an input and weights, and nobody wants gradients."""
    tensors = (sample, *half.parameters())
    return (
        not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch.is_autocast_enabled("cpu")
        and sample.dtype in PRECISIONS
        and all(tensor.device.type == "cpu" and tensor.dtype == sample.dtype for tensor in tensors)
        # what stock refuses, it refuses in its own words
        and sample.ndim == 4
        and sample.shape[1] == half.conv_in.in_channels
        and sample.numel() > 0
        and min(sample.shape[2:]) >> tracing.halvings(half) > 0
    )


def _is_attached_to(half: Any) -> bool:
    """Whether a half has something that a graph of it would lack; the log says so once."""
    found = next(attachments("decoder" if hasattr(half, "up_blocks") else "encoder", half), None)
    ours = patches_of(half)
    if found is not None and ours is not None and ours.name not in ours.said:
        ours.said.add(ours.name)
        logger.warning("computed by torch, not OpenVINO, because of %s.", found)
    return found is not None


def attachments(name: str, half: Any) -> Iterator[str]:
    """What in a half is not as its class computes it, or would not be seen by who attached it."""
    changed = change(half)
    if changed is not None:
        yield f"{name}, which {changed}"
    yield from problems(name, half)
    for path, module in half.named_modules():
        found = None
        if hooks_of(module):
            found = "has hooks that bring its weights"
        elif isinstance(module, nn.Conv2d) and (
            module.padding_mode != "zeros" or is_patched(module, "seamless")
        ):
            found = "pads with other things than zeros"
        elif ".attentions." in path:
            found = _attached_to_attention(module)
        if found is not None:
            yield f"{name}.{path}, which {found}"


def _attached_to_attention(module: nn.Module) -> str | None:
    """As `plain.attachment`, of a module in an attention, which exact tiling calls whole and never asks."""
    if isinstance(module, nn.ModuleList):
        return None
    processor = type(getattr(module, "processor", None))
    if isinstance(module, Attention) and processor not in (AttnProcessor, AttnProcessor2_0):
        return f"has a {class_name(processor)}"
    return attachment(module)
