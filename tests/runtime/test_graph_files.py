"""Graphs on disk: what engines read gives torch's numbers at any size, or nothing is written."""

import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from vaes import assert_close, build, inputs

from latentvae.base.errors import LatentVAEError, ModelError
from latentvae.runtime.graphs import backend, files
from latentvae.runtime.graphs.files import Engine, export_graphs
from latentvae.runtime.optimize import optimize

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
needs_onnx = pytest.mark.skipif(find_spec("onnxscript") is None, reason="needs onnx")
ENGINES = [
    pytest.param("openvino", marks=needs_openvino),
    pytest.param("onnx", marks=(needs_onnx, pytest.mark.slow)),  # torch.export takes seconds
]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def openvino_graph(path: Path) -> tuple[list[str], list[str], int, Callable[[np.ndarray], np.ndarray]]:
    """Names of inputs and outputs, the number of transposed convolutions, and the graph."""
    model = backend._core().read_model(path / "openvino_model.xml")
    names = [[each.any_name for each in side] for side in (model.inputs, model.outputs)]
    count = sum(each.get_type_name() == "ConvolutionBackpropData" for each in model.get_ops())
    request = backend.compiled(model, "f32").create_infer_request()
    return *names, count, lambda x: request.infer([x])[0]


def onnx_graph(path: Path) -> tuple[list[str], list[str], int, Callable[[np.ndarray], np.ndarray]]:
    import onnx
    import onnxruntime

    model = onnx.load(path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", files.OPSET)]
    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [[each.name for each in side] for side in (session.get_inputs(), session.get_outputs())]
    count = sum(node.op_type == "ConvTranspose" for node in model.graph.node)
    return *names, count, lambda x: session.run(None, {names[0][0]: x})[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("attention", "quant"), [(True, True), (False, False)])
def test_graphs_give_torchs_numbers_at_any_size(
    engine: Engine, attention: bool, quant: bool, tmp_path: Path
) -> None:
    vae = build(3, 1, attention, quant).float()
    weights = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    differences = export_graphs(vae, tmp_path / "out", engine)
    assert list(differences) == ["vae_encoder", "vae_decoder"]
    assert all(0 < value < 2e-5 for value in differences.values())
    read = openvino_graph if engine == "openvino" else onnx_graph
    inputs_of, outputs_of, _, encode = read(tmp_path / "out" / "vae_encoder")
    assert (inputs_of, outputs_of) == (["sample"], ["latent_parameters"])
    inputs_of, outputs_of, transposed, decode = read(tmp_path / "out" / "vae_decoder")
    assert (inputs_of, outputs_of) == (["latent_sample"], ["sample"])
    assert transposed == 2  # each upsampling with its convolution
    # of sizes that the export has not tried, with sides that no ratio divides
    for height, width, batch in ((3, 7, 1), (11, 2, 3)):
        images, latents = inputs(vae, height, width, batch)
        found = [torch.from_numpy(run(x.numpy())) for run, x in ((encode, images), (decode, latents))]
        wanted = [vae.encode(images).latent_dist.parameters, vae.decode(latents).sample]
        assert_close(found, wanted, 2e-5)
    for part in differences:
        config = json.loads((tmp_path / "out" / part / "config.json").read_text())
        assert config["_class_name"] == "AutoencoderKL"
        assert config["scaling_factor"] == vae.config["scaling_factor"]
    sidecar = json.loads((tmp_path / "out" / "latentvae.json").read_text())
    assert sidecar["differences"] == differences
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vae.state_dict().items())


@needs_openvino
@pytest.mark.parametrize("fault", ["number", "shape", "nan"])
def test_other_numbers_are_refused_and_nothing_is_written(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(path: Path) -> Callable[[np.ndarray], np.ndarray]:
        run = right(path)
        if fault == "number":
            return lambda x: run(x) + 3e-4 * np.ptp(run(x)) * (path.parent.name == "vae_decoder")
        if fault == "shape":
            return lambda x: run(x)[..., :1]
        return lambda x: run(x) * np.nan

    right = files._run_openvino
    vae = build(1).float()
    export_graphs(vae, tmp_path / "out", "openvino")
    before = (tmp_path / "out" / "latentvae.json").read_text()
    monkeypatch.setattr(files, "_run_openvino", wrong)
    part = "vae_decoder" if fault == "number" else "vae_encoder"
    with pytest.raises(LatentVAEError, match=rf"{part} gives other numbers than torch.*Nothing was written"):
        export_graphs(vae, tmp_path / "out", "openvino", overwrite=True)
    assert (tmp_path / "out" / "latentvae.json").read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@needs_openvino
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = build(1).float()
    hook = vae.decoder.conv_out.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ModelError, match=r"would not hold decoder\.conv_out, which has hooks"):
        export_graphs(vae, tmp_path / "out", "openvino")
    hook.remove()
    vae.quant_conv.forward = lambda x: x
    with pytest.raises(ModelError, match="would not hold quant_conv, which has a forward of its own"):
        export_graphs(vae, tmp_path / "out", "openvino")
    del vae.quant_conv.forward
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(LatentVAEError, match="no earlier export"):
        export_graphs(vae, tmp_path / "mine", "openvino", overwrite=True)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(LatentVAEError, match=r"export to onnx needs onnxscript, .*pip install .*onnx"):
        export_graphs(vae, tmp_path / "out", "onnx")
    del vae.encoder
    with pytest.raises(ModelError, match="has no encoder"):
        export_graphs(vae, tmp_path / "out", "openvino")
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


@needs_openvino
def test_an_optimized_vae_is_exported_as_it_is_without(tmp_path: Path) -> None:
    vae = optimize(build(2).float(), dtype=torch.bfloat16)
    assert max(export_graphs(vae.float(), tmp_path / "out", "openvino").values()) < 2e-5
