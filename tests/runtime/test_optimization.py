import copy
import logging
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from vaes import assert_close, both, build, calls, inputs

from latentvae.base.errors import ModelError
from latentvae.runtime import forwards
from latentvae.runtime.optimize import optimize
from latentvae.runtime.patches import patched

__all__ = ["calls"]

SWITCHES = ("upsample", "norm", "residual", "winograd", "channels_last")
STRUCTURES = [(levels, layers, True, True) for levels in range(1, 6) for layers in (1, 2)]
STRUCTURES += [(4, 3, False, True), (2, 1, False, False), (3, 2, True, False)]


@pytest.mark.parametrize(("levels", "layers", "attention", "quant"), STRUCTURES)
@torch.no_grad()
def test_equals_stock(levels: int, layers: int, attention: bool, quant: bool, calls: list[str]) -> None:
    vae = build(levels, layers, attention, quant)
    data = inputs(vae, batch=layers)
    before, wanted = [x.clone() for x in data], both(vae, *data)
    assert optimize(vae) is vae
    found = both(vae, *data)
    assert_close(found, wanted)
    assert all(x.is_contiguous() for x in found)
    assert all(torch.equal(x, y) for x, y in zip(data, before, strict=True))
    resnets = sum(isinstance(m, ResnetBlock2D) for m in vae.modules())
    upsamplers = sum(isinstance(m, Upsample2D) for m in vae.modules())
    assert calls.count("convolve+") == 2 * resnets  # each with its norm in it
    assert calls.count("convolve") == upsamplers == levels - 1
    assert calls.count("affine") == 2 * resnets + 2  # and one at the end of each half
    # resnet, its convolutions, norms and SiLU; upsampler and convolution; three at the ends of each half
    assert len(patched(vae, "optimize")) == 6 * resnets + 2 * upsamplers + 6


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("on", [True, False])
@torch.no_grad()
def test_each_switch(switch: str, on: bool, calls: list[str]) -> None:
    vae = build()
    data = inputs(vae)
    wanted = both(vae, *data)
    optimize(vae, **{name: (name == switch) == on for name in SWITCHES})
    assert_close(both(vae, *data), wanted)
    names = patched(vae, "optimize")
    part = {
        "upsample": "upsamplers.0",
        "norm": "norm1",
        "residual": "resnets.0",
        "winograd": "conv1",
        "channels_last": "conv_in",
    }[switch]
    assert any(name.endswith(part) for name in names) == on
    assert vae.encoder.conv_in.weight.is_contiguous() != ((switch == "channels_last") == on)
    if on:
        assert set(calls) <= {"affine"}  # winograd wants channels_last too
    elif switch != "channels_last":
        assert ("convolve" in calls) == (switch not in ("upsample", "winograd"))
        assert ("convolve+" in calls) == (switch == "upsample")


@pytest.mark.parametrize(("inside", "outside"), [(3, 5), (4, 4), (5, 2)])
def test_folded_kernel_equals_upsampling_and_convolution(inside: int, outside: int) -> None:
    x = torch.randn(2, inside, 5, 6, dtype=torch.float64)
    weight = torch.randn(outside, inside, 3, 3, dtype=torch.float64)
    found = torch.nn.functional.conv_transpose2d(x, forwards.folded(weight), stride=2, padding=1)
    upsampled = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    assert_close([found], [torch.nn.functional.conv2d(upsampled, weight, padding=1)], 1e-13)


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


def _convert(vae: Any) -> None:
    vae.to(torch.float32).to(torch.float64)


@pytest.mark.parametrize("change", [_load, _assign, _edit, _step, _convert])
@torch.no_grad()
def test_weights_never_go_stale(change: Any, calls: list[str]) -> None:
    vae = build()
    stock = copy.deepcopy(vae)
    data = inputs(vae)
    first = both(optimize(vae), *data)
    for model in (vae, stock):
        torch.manual_seed(1)
        change(model)
    assert (both(vae, *data)[1] - first[1]).abs().max() > 1e-9 * first[1].abs().max()
    assert_close(both(vae, *data), both(stock, *data), 1e-8)
    assert "convolve" in calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trained", ["", "decoder.up_blocks", "conv_shortcut", "norm1.bias", "none"])
def test_gradients_equal_stock(training: bool, trained: str, calls: list[str]) -> None:
    vae = build().train(training)
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(trained in name)
    stock = copy.deepcopy(vae)
    found = []
    for model in (optimize(vae), stock):
        data = [x.requires_grad_(trained in ("", "none")) for x in _same_inputs(vae)]
        sum(x.square().sum() for x in both(model, *data)).backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append({**grads, **{str(number): x.grad for number, x in enumerate(data)}})
    assert {name for name, grad in found[0].items() if grad is not None} == {
        name for name, grad in found[1].items() if grad is not None
    }
    for name, wanted in found[1].items():
        if wanted is not None:
            scale = max(wanted.abs().max().item(), 1e-6 if "to_k.bias" in name else 0)  # truly zero
            assert (found[0][name] - wanted).abs().max() <= 1e-9 * scale, name


def _same_inputs(vae: Any) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return inputs(vae)


@torch.no_grad()
def test_dropout_is_kept() -> None:
    vae = optimize(build()).train()
    resnet = vae.decoder.mid_block.resnets[0]
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    assert torch.equal(resnet(x, None), resnet(x, None))
    resnet.dropout.p = 0.5
    assert not torch.equal(resnet(x, None), resnet(x, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtype(dtype: torch.dtype) -> None:
    vae = build()
    images, latents = inputs(vae)
    wanted = both(vae, images, latents)
    optimize(vae, dtype=dtype)
    assert vae.dtype == dtype
    found = both(vae, images.to(dtype), latents.to(dtype))
    assert all(x.dtype == dtype for x in found)
    assert_close([x.double() for x in found], wanted, {torch.float32: 1e-5}.get(dtype, 0.2))


@torch.no_grad()
def test_autocast_gives_what_stock_gives(calls: list[str]) -> None:
    vae = build().float()
    data = inputs(vae)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = both(vae, *data)
        found = both(optimize(vae), *data)
    assert [x.dtype for x in found] == [x.dtype for x in wanted]
    assert_close([x.float() for x in found], [x.float() for x in wanted], 0.2)
    assert not calls


def test_odd_blocks_stay_stock_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    vae = build()
    stock = vae.decoder.up_blocks[0].upsamplers[0]
    stock.conv = torch.nn.Conv2d(8, 8, 5, padding=2, dtype=torch.float64)
    data = inputs(vae)
    wanted = both(vae, *data)
    with caplog.at_level(logging.WARNING):
        optimize(vae)
    assert "decoder.up_blocks.0.upsamplers.0" in caplog.text
    assert_close(both(vae, *data), wanted)


@torch.no_grad()
def test_what_others_do_to_modules_is_respected(calls: list[str]) -> None:
    vae = build()
    upsampler = vae.decoder.up_blocks[0].upsamplers[0]
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    wanted, larger = upsampler(x), upsampler(x, (9, 11))
    optimize(vae)
    assert_close(
        [upsampler(x), upsampler(x, (9, 11)), upsampler(x, output_size=(9, 11))], [wanted, larger, larger]
    )
    assert calls == ["convolve"] * 3
    upsampler.conv.register_forward_hook(lambda module, args, output: output + 1)
    assert_close([upsampler(x)], [wanted + 1])
    upsampler.conv = torch.nn.Sequential(upsampler.conv)  # as adapters do
    assert_close([upsampler(x)], [wanted + 1])


def test_refuses_what_is_no_autoencoder() -> None:
    with pytest.raises(ModelError, match=r"AutoencoderTiny came; wanted a diffusers.AutoencoderKL"):
        optimize(AutoencoderTiny())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"Pass its \.module"):
        optimize(torch.nn.DataParallel(build()))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="int8"):
        optimize(build(), dtype=torch.int8)


@pytest.mark.slow
@torch.no_grad()
def test_compiles_once_for_all_sizes() -> None:
    from torch._dynamo.utils import counters

    vae = build(2).float()
    sizes = [(6, 8), (7, 9), (16, 12), (9, 30), (21, 5)]
    data = [inputs(vae, *size) for size in sizes]
    wanted = [both(vae, *pair) for pair in data]
    torch._dynamo.reset()
    counters.clear()
    optimize(vae, compile=True)
    graphs = []
    for pair, result in zip(data, wanted, strict=True):
        assert_close(both(vae, *pair), result, 1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1]
    assert patched(copy.deepcopy(vae)) == patched(vae)


def test_without_a_compiler_it_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import cpp_builder

    def none() -> str:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    vae = optimize(build(1), compile=True)
    assert "no compiler found" in caplog.text
    assert "decoder" not in patched(vae)
