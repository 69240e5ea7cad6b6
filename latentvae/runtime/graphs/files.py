"""Encoder and decoder as files that ONNX Runtime or OpenVINO read, compared with torch before they are kept.

Two folders, as optimum's pipelines want them: vae_encoder (sample to latent_parameters, the moments) and
vae_decoder (latent_sample to sample). Graphs take any batch, height and width. Latents are unscaled.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from latentvae.base.errors import LatentVAEError, ModelError
from latentvae.base.files import check_folder, whole_folder
from latentvae.base.optional import need
from latentvae.models.loading import SIDECAR, spatial_compression_ratio
from latentvae.runtime.graphs import backend, tracing
from latentvae.runtime.plain import attachment

Engine = Literal["onnx", "openvino"]
OPSET = 18  # norms are InstanceNormalization there, which ONNX Runtime has a kernel for
FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
SIZES = ((1, 8, 8), (2, 5, 9), (1, 16, 12))  # batch, height and width in latents, of the comparison
TOLERANCE = 1e-4  # of the range of what torch gives


@dataclass(frozen=True)
class Part:
    """One of the two graphs: its folder, the names of its input and output, what it computes."""

    folder: str
    takes: str
    gives: str
    module: nn.Module
    channels: int
    ratio: int  # of the input's side to that of the latents

    def example(self, batch: int, height: int, width: int) -> torch.Tensor:
        """Random inputs of latents of that size, the same ones in every call: images, or latents."""
        random = torch.Generator().manual_seed(0)
        shape = (batch, self.channels, height * self.ratio, width * self.ratio)
        return torch.randn(shape, generator=random).clamp(-1, 1)


def export_graphs(
    vae: AutoencoderKL, folder: str | Path, to: Engine, *, overwrite: bool = False
) -> dict[str, float]:
    """Write encoder and decoder as graphs of `to`, and run them beside torch at three sizes.

    Args:
        vae: with both halves, and nothing attached to them; not changed.
        folder: becomes the export: vae_encoder, vae_decoder, latentvae.json.
        overwrite: replace an earlier export.

    Returns:
        The largest difference of each part from torch, as a share of the range of what torch gives.

    Raises:
        LatentVAEError: a package is missing, the folder holds other things, or cannot be written; or a graph
            gives other numbers than torch, and then nothing is written.
        ModelError: the VAE has something that a graph would lack.
    """
    folder = Path(folder)
    for package in ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ("openvino",):
        tracing.openvino() if package == "openvino" else need(package, what=f"export to {to}")
    check_folder(folder, "export", SIDECAR, overwrite=overwrite, instead="Choose another folder")
    parts = _parts(vae)
    write, runner = (_write_onnx, _run_onnx) if to == "onnx" else (_write_openvino, _run_openvino)
    differences = {}
    with whole_folder(folder) as partial, torch.no_grad():
        for part in parts:
            place = partial / part.folder
            place.mkdir()
            write(part, place / FILES[to])
            vae.save_config(place)
            differences[part.folder] = _largest_difference(part, runner(place / FILES[to]))
        sidecar = {"graphs": to, "opset": OPSET if to == "onnx" else None, "differences": differences}
        (partial / SIDECAR).write_text(json.dumps(sidecar, indent=1), encoding="utf-8")
    return differences


def _parts(vae: AutoencoderKL) -> list[Part]:
    """Encoder and decoder, each with the convolution between it and the latents.

    Raises:
        ModelError: one is missing, or something is attached that a graph would not hold.
    """
    for half in ("encoder", "decoder"):
        if getattr(vae, half, None) is None:
            raise ModelError(f"this VAE has no {half}; both halves are exported.")
    for found in _attachments(vae):
        raise ModelError(f"a graph would not hold {found}. Remove it, or merge it, and export again.")
    encoder, decoder = (
        nn.Sequential(*(tracing.traceable(module) for module in modules if module is not None)).eval()
        for modules in ((vae.encoder, vae.quant_conv), (vae.post_quant_conv, vae.decoder))
    )
    ratio = spatial_compression_ratio(vae)
    return [
        Part("vae_encoder", "sample", "latent_parameters", encoder, vae.config["in_channels"], ratio),
        Part("vae_decoder", "latent_sample", "sample", decoder, vae.config["latent_channels"], 1),
    ]


def _attachments(vae: AutoencoderKL) -> Iterator[str]:
    for half in ("encoder", "decoder"):
        yield from backend.attachments(half, getattr(vae, half))
    for name in ("quant_conv", "post_quant_conv"):
        module = getattr(vae, name)
        found = attachment(module) if module is not None else None
        if found is not None:
            yield f"{name}, which {found}"


def _write_onnx(part: Part, path: Path) -> None:
    dynamic = {0: "batch_size", 2: "height", 3: "width"}
    axes = {axis: torch.export.Dim(name) for axis, name in dynamic.items()}
    for chatty in ("onnxscript", "onnx_ir", "torch.onnx"):  # a line for each step of theirs
        logging.getLogger(chatty).setLevel(logging.WARNING)
    torch.onnx.export(
        part.module,
        (part.example(2, 6, 7),),  # sizes that differ: equal ones would be taken for one
        path,
        input_names=[part.takes],
        output_names=[part.gives],
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        dynamic_shapes=(axes,),
        verbose=False,
    )


def _write_openvino(part: Part, path: Path) -> None:
    model = tracing.openvino_model(part.module, part.example(1, 4, 4))
    model.inputs[0].get_tensor().set_names({part.takes})
    model.outputs[0].get_tensor().set_names({part.gives})
    tracing.openvino().save_model(model, path, compress_to_fp16=False)


Run = Callable[[np.ndarray], np.ndarray]


def _run_onnx(path: Path) -> Run:
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


def _run_openvino(path: Path) -> Run:
    request = backend.compiled(str(path), "f32").create_infer_request()
    return lambda x: request.infer([x])[0]


def _largest_difference(part: Part, run: Run) -> float:
    """Of the graph from torch, over all sizes, as a share of torch's range.

    Raises:
        LatentVAEError: it is above `TOLERANCE`.
    """
    worst = 0.0
    for size in SIZES:
        x = part.example(*size)
        wanted, found = part.module(x), torch.from_numpy(run(x.numpy()))
        difference = (found - wanted).abs().max() / (wanted.max() - wanted.min())
        # so that NaN is refused as well
        if found.shape != wanted.shape or not difference <= TOLERANCE:
            raise LatentVAEError(
                f"the graph {part.folder} gives other numbers than torch, by {difference:.2g} of the range "
                f"for latents of {size[1]}x{size[2]}; wanted at most {TOLERANCE:g}. Nothing was "
                "written. Try another release of the engine."
            )
        worst = max(worst, difference.item())
    return worst
