import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import AutoencoderKL
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from vaes import assert_close, both, build, calls, inputs

from latentvae.base.errors import ModelError
from latentvae.runtime.optimize import optimize
from latentvae.runtime.patches import patch, patched, restore, underlying

__all__ = ["calls"]


@torch.no_grad()
def test_restore_gives_stock_back(calls: list[str]) -> None:
    vae = build()
    data = inputs(vae)
    wanted = both(vae, *data)
    state = {name: (value.clone(), value.stride()) for name, value in vae.state_dict().items()}
    attributes = [set(module.__dict__) for module in vae.modules()]
    optimize(optimize(vae), upsample=False)
    assert restore(restore(vae)) is vae
    calls.clear()
    assert all(torch.equal(x, y) for x, y in zip(both(vae, *data), wanted, strict=True))
    assert not calls
    assert not patched(vae)
    assert [set(module.__dict__) for module in vae.modules()] == attributes
    for name, value in vae.state_dict().items():
        assert torch.equal(value, state[name][0])
        assert value.stride() == state[name][1]


@torch.no_grad()
def test_deep_copy_computes_with_its_own_weights(calls: list[str]) -> None:
    vae = optimize(build())
    data = inputs(vae)
    wanted = both(vae, *data)
    twin = copy.deepcopy(vae)
    assert patched(twin) == patched(vae)
    for parameter in twin.parameters():
        parameter.zero_()
    assert both(twin, *data)[1].abs().max() == 0
    assert all(torch.equal(x, y) for x, y in zip(both(vae, *data), wanted, strict=True))
    restore(twin)
    assert patched(vae)


@pytest.mark.parametrize("safe", [True, False])
def test_saves_as_stock(safe: bool, tmp_path: Path) -> None:
    vae = build()
    config, state = dict(vae.config), {name: value.clone() for name, value in vae.state_dict().items()}
    optimize(vae)
    assert dict(vae.config) == config
    assert list(vae.state_dict()) == list(state)
    vae.save_pretrained(tmp_path, safe_serialization=safe)
    loaded = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert type(vae) is type(loaded) is AutoencoderKL
    assert not patched(loaded)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def _double(self: Any, x: torch.Tensor) -> torch.Tensor:
    return 2 * underlying(self, "optimize")(x)


def _increment(self: Any, x: torch.Tensor) -> torch.Tensor:
    return 1 + underlying(self, "tiling")(x)


@pytest.mark.parametrize("order", [("optimize", "tiling"), ("tiling", "optimize")])
@pytest.mark.parametrize("first", ["optimize", "tiling"])
def test_features_stack_in_any_order(order: tuple[str, str], first: str) -> None:
    vae = build(1)
    conv, x = vae.post_quant_conv, torch.randn(1, 4, 2, 2, dtype=torch.float64)
    stock = conv(x)
    for feature in order:
        patch(conv, {"optimize": _double, "tiling": _increment}[feature], feature)
    assert torch.equal(conv(x), 1 + 2 * stock)
    assert patched(vae, "optimize") == patched(vae, "tiling") == ["post_quant_conv"]
    restore(vae, first)
    assert torch.equal(conv(x), 1 + stock if first == "optimize" else 2 * stock)
    restore(vae)
    assert torch.equal(conv(x), stock)
    assert "forward" not in conv.__dict__


def test_somebody_elses_patch_is_given_back() -> None:
    vae = build(1)
    conv, x = vae.post_quant_conv, torch.randn(1, 4, 2, 2, dtype=torch.float64)
    stock = conv(x)
    conv.forward = lambda x: 3 * torch.nn.Conv2d.forward(conv, x)
    patch(conv, _double, "optimize")
    assert torch.equal(conv(x), 2 * (3 * stock))
    restore(vae)
    assert torch.equal(conv(x), 3 * stock)


class _Counting(ModelHook):
    """A hook of accelerate that counts calls."""

    count = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return args, kwargs


class _CountingOfDiffusers(DiffusersHook):
    count = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return args, kwargs


def _accelerate(conv: Any) -> tuple[Any, Any]:
    hook = _Counting()
    add_hook_to_module(conv, hook)
    return hook, lambda: remove_hook_from_module(conv)


def _diffusers(conv: Any) -> tuple[Any, Any]:
    hook = _CountingOfDiffusers()
    registry = HookRegistry.check_if_exists_or_initialize(conv)
    registry.register_hook(hook, "counting")
    return hook, lambda: registry.remove_hook("counting")


@pytest.mark.parametrize("add", [_accelerate, _diffusers])
@pytest.mark.parametrize(
    "order",
    [
        "add patch restore remove",
        "add patch remove restore",
        "patch add restore remove",
        "patch add remove restore",
        "patch add restore patch remove restore",
    ],
)
@torch.no_grad()
def test_hooks_come_and_go(add: Any, order: str) -> None:
    vae = build(1)
    conv, x = vae.post_quant_conv, torch.randn(1, 4, 2, 2, dtype=torch.float64)
    stock, hooked, hook, remove = conv(x), False, None, None
    for step in order.split():
        if step == "add":
            (hook, remove), hooked = add(conv), True
        elif step == "remove":
            remove()
            hooked = False
        elif step == "patch":
            patch(conv, _double, "optimize")
        else:
            restore(vae)
        before = hook.count if hook else 0
        assert torch.equal(conv(x), 2 * stock if patched(vae) else stock), step
        assert (hook.count - before if hook else 0) == hooked, step
        if add is _diffusers and hooked:
            continue  # copies of modules with such hooks compute with the original's weights, stock or not
        twin = copy.deepcopy(conv)
        twin.weight.zero_()
        assert torch.equal(
            twin(x), (2 if patched(vae) else 1) * twin.bias[None, :, None, None].expand(x.shape)
        )


@pytest.mark.parametrize("offload_first", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
@torch.no_grad()
def test_offloading(offload_first: bool, sequential: bool, calls: list[str]) -> None:
    vae = build()
    data = inputs(vae)
    wanted = both(vae, *data)
    offload: Any = cpu_offload if sequential else cpu_offload_with_hook
    if not offload_first:
        optimize(vae)
    offload(vae, torch.device("cpu"))
    if offload_first:
        optimize(vae)
    assert (vae.decoder.conv_in.weight.device.type == "meta") == sequential
    assert_close(both(vae, *data), wanted)
    assert "convolve+" in calls
    assert "convolve" in calls
    restore(vae)
    calls.clear()
    assert_close(both(vae, *data), wanted)
    remove_hook_from_module(vae, recurse=True)
    assert_close(both(vae, *data), wanted)
    assert not calls
    assert not patched(vae)


@torch.no_grad()
def test_pickles_as_stock() -> None:
    vae = build(2)
    data = inputs(vae)
    wanted = both(vae, *data)
    loaded = pickle.loads(pickle.dumps(optimize(vae)))
    assert_close(both(loaded, *data), wanted)


def test_restore_refuses_what_is_no_autoencoder() -> None:
    with pytest.raises(ModelError, match="Linear came"):
        restore(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
