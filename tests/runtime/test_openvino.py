"""OpenVINO in torch's place: the same numbers, never of old weights, and torch where only that is right."""

import copy
import gc
import logging
import multiprocessing
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from vaes import assert_close, both, build, inputs

import latentvae
from latentvae.base.errors import LatentVAEError, ModelError
from latentvae.runtime.graphs import backend
from latentvae.runtime.optimize import optimize
from latentvae.runtime.patches import patched, restore
from latentvae.runtime.seamless import make_seamless
from latentvae.runtime.tiling.switch import enable_exact_tiling

if find_spec("openvino") is None:  # not imported here: how latentvae imports it is tested
    pytest.skip("needs openvino", allow_module_level=True)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What OpenVINO did: "compile" and "compute", in turn."""
    made: list[str] = []

    def counting(name: str, method: str) -> None:
        function = getattr(backend.Graph, method)

        def counted(*args: Any) -> Any:
            made.append(name)
            return function(*args)

        monkeypatch.setattr(backend.Graph, method, counted)

    counting("compile", "_compile")
    counting("compute", "compute")
    return made


def float_vae(*shape: Any) -> Any:
    return build(*shape).float()


@pytest.mark.parametrize(
    ("levels", "layers", "attention", "quant"), [(3, 1, True, True), (2, 2, False, True), (4, 1, True, False)]
)
def test_equals_stock_at_any_size(
    levels: int, layers: int, attention: bool, quant: bool, computed: list[str]
) -> None:
    vae = float_vae(levels, layers, attention, quant)
    data = [inputs(vae), inputs(vae, 6, 3), inputs(vae, 2, 2, batch=3)]
    before, wanted = copy.deepcopy(data), [both(vae, *each) for each in data]
    assert optimize(vae, backend="openvino") is vae
    found = [both(vae, *each) for each in data]
    for one, other, given, kept in zip(found, wanted, data, before, strict=True):
        assert_close(one, other, 2e-5)
        assert all(x.is_contiguous() and x.dtype == torch.float32 for x in one)
        assert all(torch.equal(x, y) for x, y in zip(given, kept, strict=True))
    # one graph for all sizes of each half
    assert (computed.count("compile"), computed.count("compute")) == (2, 6)
    assert_close(found[0], both(vae, *data[0]), 2e-5)  # results are not written over
    restore(vae)
    assert not patched(vae)
    assert vae.encoder not in backend._graphs
    assert vae.decoder not in backend._graphs
    assert all(torch.equal(x, y) for x, y in zip(both(vae, *data[1]), wanted[1], strict=True))
    assert len(computed) == 10


def test_the_public_functions_take_it(tiny_vae: Any, computed: list[str]) -> None:
    image = torch.rand(1, 3, 37, 50) * 2 - 1
    wanted = latentvae.reconstruct(tiny_vae, image).reconstructions
    optimize(tiny_vae, backend="openvino")
    found = latentvae.reconstruct(tiny_vae, image).reconstructions
    assert_close([found], [wanted], 2e-5)
    assert computed == ["compute", "compile"] * 2


def _load(vae: Any) -> None:
    vae.load_state_dict({name: value * 0.9 for name, value in vae.state_dict().items()})


def _assign(vae: Any) -> None:
    vae.load_state_dict({name: value * 0.9 for name, value in vae.state_dict().items()}, assign=True)


def _edit(vae: Any) -> None:
    for parameter in vae.parameters():
        parameter.data[:1] *= 0.9  # moves no version counter


def _step(vae: Any) -> None:
    step = torch.optim.SGD(vae.parameters(), 0.1)
    with torch.enable_grad():
        sum(x.square().sum() for x in both(vae, *inputs(vae))).backward()
    for parameter in vae.parameters():
        parameter.grad = parameter.grad / parameter.grad.norm()
    step.step()


def _swap_order(vae: Any) -> None:
    weight = vae.decoder.conv_in.weight
    weight.data.copy_(weight.flip(0).clone())  # the same values elsewhere


def _replace_activation(vae: Any) -> None:
    vae.decoder.conv_act = torch.nn.GELU()


def _replace_eps(vae: Any) -> None:
    vae.decoder.conv_norm_out.eps = 0.5


@pytest.mark.parametrize(
    "change", [_load, _assign, _edit, _step, _swap_order, _replace_activation, _replace_eps]
)
def test_graphs_never_go_stale(change: Any, computed: list[str]) -> None:
    vae = float_vae(1)
    stock = copy.deepcopy(vae)
    _, latents = inputs(vae)
    first = optimize(vae, backend="openvino").decode(latents).sample
    for model in (vae, stock):
        torch.manual_seed(1)
        change(model)
    found = vae.decode(latents).sample
    assert (found - first).abs().max() > 1e-4 * first.abs().max()
    assert_close([found, vae.decode(latents).sample], [stock.decode(latents).sample] * 2, 5e-5)
    assert computed.count("compile") == 2


def test_bfloat16_and_back(computed: list[str]) -> None:
    vae = float_vae()
    data = inputs(vae)
    wanted = both(vae, *data)
    optimize(vae, backend="openvino", dtype=torch.bfloat16)
    found = both(vae, *(x.bfloat16() for x in data))
    assert all(x.dtype == torch.bfloat16 for x in found)
    assert_close([x.float() for x in found], wanted, 0.2)
    vae.float()
    assert_close(both(vae, *data), both(restore(copy.deepcopy(vae)), *data), 2e-5)
    assert computed.count("compile") == 4
    vae.double()  # no dtype of OpenVINO here
    assert both(vae, *(x.double() for x in data))[0].dtype == torch.float64
    assert len(computed) == 8


def _wants_gradients(vae: Any) -> None:
    vae.decoder.conv_in.bias.requires_grad_(True)
    torch.set_grad_enabled(True)  # the fixture resets it


def _hook(vae: Any) -> None:
    vae.decoder.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda module, args, output: output * 2)


def _adapter(vae: Any) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), vae.decoder)


def _forward(vae: Any) -> None:
    attention = vae.decoder.mid_block.attentions[0]
    attention.to_v.forward = lambda x: torch.nn.functional.linear(x, attention.to_v.weight)


def _circular(vae: Any) -> None:
    vae.decoder.conv_out.padding_mode = "circular"


@pytest.mark.parametrize("attach", [_wants_gradients, _hook, _adapter, _forward, _circular, make_seamless])
@pytest.mark.parametrize("before", [True, False])
def test_torch_computes_what_a_graph_would_lack(
    attach: Any, before: bool, computed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    vae = float_vae()
    vae.requires_grad_(False)
    stock = copy.deepcopy(vae)
    _, latents = inputs(vae)
    torch.manual_seed(1)
    attach(stock)
    wanted = stock.decode(latents).sample
    if before:
        torch.manual_seed(1)
        attach(vae)
        optimize(vae, backend="openvino")
    else:
        optimize(vae, backend="openvino").decode(latents)
        torch.manual_seed(1)
        attach(vae)
    computed.clear()
    found = vae.decode(latents).sample
    assert_close([found.detach()], [wanted.detach()], 2e-5)
    assert found.requires_grad == wanted.requires_grad
    assert not computed
    assert ("computed by torch, not OpenVINO, because of decoder" in caplog.text) == (
        attach is not _wants_gradients
    )


def test_exact_tiling_tiles_by_torch_and_leaves_small_images_to_openvino(computed: list[str]) -> None:
    vae = float_vae()
    small, large = inputs(vae), inputs(vae, 12, 5)
    wanted = [both(vae, *small), both(vae, *large)]
    enable_exact_tiling(optimize(vae, backend="openvino"), tile_size=32)
    assert_close(both(vae, *small), wanted[0], 2e-5)
    assert computed == ["compute", "compile"] * 2
    assert_close(both(vae, *large), wanted[1], 2e-5)
    assert len(computed) == 4
    restore(vae, "tiling")
    assert_close(both(vae, *large), wanted[1], 2e-5)
    assert len(computed) == 6


def test_a_copy_has_graphs_of_its_own(computed: list[str]) -> None:
    gc.collect()  # VAEs of other tests; with patches they hold themselves
    others = len(backend._graphs)
    vae = optimize(float_vae(1), backend="openvino")
    _, latents = inputs(vae)
    wanted = vae.decode(latents).sample
    twin = copy.deepcopy(vae)
    for parameter in twin.parameters():
        parameter.mul_(0.5)
    assert (twin.decode(latents).sample - wanted).abs().max() > 1e-3
    assert torch.equal(vae.decode(latents).sample, wanted)
    assert computed.count("compile") == 2
    assert len(backend._graphs) == others + 2
    del twin, parameter
    gc.collect()
    assert len(backend._graphs) == others + 1


def test_threads_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, computed: list[str]) -> None:
    asked = []

    def compile_model(*args: Any) -> Any:
        asked.append(args[2])
        return core.compile_model(*args)

    core = backend._core()
    monkeypatch.setattr(
        backend, "_core", lambda: type("Core", (), {"compile_model": staticmethod(compile_model)})
    )
    vae = optimize(float_vae(1), backend="openvino")
    _, latents = inputs(vae)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        vae.decode(latents)
    assert [each["INFERENCE_NUM_THREADS"] for each in asked] == [1, 2]
    assert {each["INFERENCE_PRECISION_HINT"] for each in asked} == {"f32"}
    assert {each["PERFORMANCE_HINT"] for each in asked} == {"LATENCY"}


def test_a_forked_process_computes_by_torch(computed: list[str]) -> None:
    vae = optimize(float_vae(1), backend="openvino")
    _, latents = inputs(vae)
    wanted = vae.decode(latents).sample
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()

    def work() -> None:
        found = vae.decode(latents).sample
        answer.put((((found - wanted).abs().max() / wanted.abs().max()).item(), len(computed)))

    child = context.Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    error, calls = answer.get()
    assert error < 2e-5
    assert calls == 2  # those of this process


def test_what_stock_refuses_is_refused_in_its_words(computed: list[str]) -> None:
    vae = float_vae()
    for wrong in (torch.zeros(1, 4, 3), torch.zeros(1, 5, 3, 3)):
        with pytest.raises(Exception) as wanted:  # noqa: PT011
            vae.decode(wrong)
        with pytest.raises(type(wanted.value)):
            optimize(copy.deepcopy(vae), backend="openvino").decode(wrong)
    assert not computed


def test_half_a_vae() -> None:
    vae = float_vae(1)
    _, latents = inputs(vae)
    wanted = vae.decode(latents).sample
    del vae.encoder
    assert_close([optimize(vae, backend="openvino").decode(latents).sample], [wanted], 2e-5)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = float_vae(1)
    with pytest.raises(ModelError, match=r"torch.float16 came; OpenVINO computes in torch.float32"):
        optimize(vae, backend="openvino", dtype=torch.float16)
    with pytest.raises(ModelError, match="compile=True came"):
        optimize(vae, backend="openvino", compile=True)
    with pytest.raises(ModelError, match="'onnx' came; wanted one of torch, openvino"):
        optimize(vae, backend="onnx")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"on meta came; OpenVINO computes on the CPU"):
        optimize(float_vae(1).to("meta"), backend="openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(LatentVAEError, match=r"needs openvino, .*pip install .*openvino"):
        optimize(vae, backend="openvino")
    # a refusal changes nothing
    assert vae.dtype == torch.float32
    assert not patched(vae)


def test_nothing_is_reported_to_anybody() -> None:
    optimize(float_vae(1), backend="openvino")
    assert not any(name.startswith("openvino_telemetry") for name in sys.modules)


def test_it_says_nothing_where_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    vae = optimize(float_vae(), backend="openvino")
    with caplog.at_level(logging.INFO):
        both(vae, *inputs(vae))
    assert not caplog.text
