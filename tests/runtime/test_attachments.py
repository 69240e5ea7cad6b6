"""Whatever is attached to a VAE: what stock gives with it, or a refusal by name; never anything else."""

import copy
import functools
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks import ModelHook as DiffusersHook
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vaes import assert_close, both, build, calls

from latentvae.base.errors import LatentVAEError, ModelError
from latentvae.runtime import patches
from latentvae.runtime.optimize import optimize
from latentvae.runtime.patches import patched, restore
from latentvae.runtime.seamless import make_seamless
from latentvae.runtime.tiling import stages
from latentvae.runtime.tiling.planning import plan
from latentvae.runtime.tiling.switch import enable_exact_tiling

__all__ = ["calls"]

TILE = 16
Seen = list[torch.Tensor]  # what hooks were given: kept, not copied, so that overwriting it would show
BLOCK = "decoder.up_blocks.0"
RESNET = f"{BLOCK}.resnets.0"


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- attachments: each changes a VAE, and notes in `seen` what it is given


def sees_output(name: str, vae: Any, seen: Seen) -> None:
    vae.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))


def sees_input(name: str, vae: Any, seen: Seen) -> None:
    vae.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))


def changes_output(name: str, vae: Any, seen: Seen) -> None:
    vae.get_submodule(name).register_forward_hook(lambda module, args, output: output - output.mean())


def changes_input(name: str, vae: Any, seen: Seen) -> None:
    vae.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))


def wraps_forward(name: str, vae: Any, seen: Seen) -> None:
    module = vae.get_submodule(name)
    inner = module.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return inner(x * 1.5, *args, **kwargs)

    module.forward = forward


def replaces_forward(name: str, vae: Any, seen: Seen) -> None:
    module = vae.get_submodule(name)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tanh(type(module).forward(module, x, *args, **kwargs))

    module.forward = forward


def partial_forward(name: str, vae: Any, seen: Seen) -> None:
    module = vae.get_submodule(name)
    module.forward = functools.partial(
        lambda inner, x, *args, **kwargs: -inner(x, *args, **kwargs), module.forward
    )


def resets_forward(name: str, vae: Any, seen: Seen) -> None:
    """As code does that kept what was there before it put something else there."""
    module = vae.get_submodule(name)
    module.forward = type(module).forward.__get__(module)


class _Doubling(ModelHook):
    def post_forward(self, module: Any, output: Any) -> Any:
        return output * 2


class _DoublingOfDiffusers(DiffusersHook):
    def post_forward(self, module: Any, output: Any) -> Any:
        return output * 2


def hook_of_accelerate(name: str, vae: Any, seen: Seen) -> None:
    add_hook_to_module(vae.get_submodule(name), _Doubling())


def hook_of_diffusers(name: str, vae: Any, seen: Seen) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(vae.get_submodule(name))
    registry.register_hook(_DoublingOfDiffusers(), "doubling")


def padding_mode(mode: str, vae: Any, seen: Seen) -> None:
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = mode


def conv_forward_recipe(name: str, vae: Any, seen: Seen) -> None:
    """What people use for textures that tile along x alone."""

    def forward(self: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        left, right, top, bottom = self._reversed_padding_repeated_twice
        x = nn.functional.pad(x, (left, right, 0, 0), mode="circular")
        x = nn.functional.pad(x, (0, 0, top, bottom))
        return nn.functional.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    for module in vae.get_submodule(name).modules():
        if isinstance(module, nn.Conv2d):
            module._conv_forward = forward.__get__(module)


def weight_norm(name: str, vae: Any, seen: Seen) -> None:
    conv = vae.get_submodule(name)
    torch.nn.utils.parametrizations.weight_norm(conv)
    conv.parametrizations.weight.original0.mul_(1.5)


def derived_weights(name: str, vae: Any, seen: Seen) -> None:
    """As pruning does it: the weight is no parameter, but made by a hook."""
    vae.get_submodule(name).weight.mul_(3)
    torch.manual_seed(7)
    torch.nn.utils.spectral_norm(vae.get_submodule(name))
    vae.eval()


def lora(targets: str, vae: Any, seen: Seen) -> None:
    torch.manual_seed(5)
    inject_adapter_in_model(LoraConfig(target_modules=targets.split(), init_lora_weights=False), vae)
    vae.double().eval()


def another_class(name: str, vae: Any, seen: Seen) -> None:
    vae.get_submodule(name).__class__ = {nn.SiLU: nn.ReLU, nn.Conv2d: _Scaled}[type(vae.get_submodule(name))]


class _Scaled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.7


def another_module(name: str, vae: Any, seen: Seen) -> None:
    torch.manual_seed(6)
    old = vae.get_submodule(name)
    if isinstance(old, nn.Conv2d):
        new: nn.Module = nn.Conv2d(old.in_channels, old.out_channels, 5, padding=2, groups=2).double()
    else:
        new = nn.Softsign() if isinstance(old, nn.SiLU) else nn.InstanceNorm2d(old.num_channels).double()
    vae.set_submodule(name, new)


def attributes(name: str, vae: Any, seen: Seen) -> None:
    conv = vae.get_submodule(name)
    conv.dilation, conv.padding = (2, 2), (2, 2)


ATTACHMENTS: dict[str, Callable[[Any, Seen], None]] = {
    f"{function.__name__} {name}": functools.partial(function, name)
    for function, names in {
        sees_output: [
            f"{RESNET}.norm1",
            f"{RESNET}.conv2",
            f"{RESNET}.dropout",
            "decoder.conv_norm_out",
            BLOCK,
        ],
        sees_input: [
            f"{RESNET}.conv1",
            f"{RESNET}.conv2",
            f"{BLOCK}.upsamplers.0.conv",
            f"{RESNET}.nonlinearity",
        ],
        changes_output: [
            BLOCK,
            RESNET,
            f"{RESNET}.norm2",
            f"{RESNET}.conv1",
            "decoder.mid_block.attentions.0",
        ],
        changes_input: [f"{RESNET}.conv1", f"{BLOCK}.upsamplers.0", "encoder.down_blocks.0.downsamplers.0"],
        wraps_forward: [f"{RESNET}.conv1", RESNET, "decoder.conv_act", "decoder", "encoder.conv_in"],
        replaces_forward: [
            f"{RESNET}.conv2",
            f"{RESNET}.norm1",
            RESNET,
            BLOCK,
            f"{BLOCK}.upsamplers.0",
            "decoder",
        ],
        partial_forward: [f"{RESNET}.conv1", f"{RESNET}.nonlinearity"],
        resets_forward: [f"{RESNET}.conv1", f"{RESNET}.nonlinearity", f"{BLOCK}.upsamplers.0.conv"],
        hook_of_accelerate: [f"{RESNET}.conv1", f"{RESNET}.norm2", BLOCK],
        hook_of_diffusers: [f"{RESNET}.conv2", RESNET],
        padding_mode: ["circular", "reflect", "replicate"],
        conv_forward_recipe: ["", RESNET],
        weight_norm: [f"{RESNET}.conv1"],
        derived_weights: [f"{RESNET}.conv2"],
        lora: ["conv1 conv2", "to_q", "conv_shortcut conv_in"],
        another_class: [f"{RESNET}.conv1", f"{RESNET}.nonlinearity"],
        another_module: [f"{RESNET}.conv1", f"{RESNET}.norm2", f"{RESNET}.nonlinearity"],
        attributes: [f"{RESNET}.conv1"],
    }.items()
    for name in names
}


# of these, tiling loses nothing
TILED = (
    "padding_mode",
    "lora to_q",
    "changes_output decoder.mid",
    "resets_forward",
    f"another_class {RESNET}.nonlinearity",
)


# --- the comparison


def switch_on(features: str, vae: Any) -> None:
    if "optimize" in features:
        optimize(vae)
    if "tiling" in features:
        enable_exact_tiling(vae, TILE, memory=0 if "tight" in features else 4e9)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Images, (1, 3, 20, 26), and latents of that size, both larger than a tile."""
    torch.manual_seed(1)
    return torch.rand(1, 3, 20, 26, dtype=torch.float64) * 2 - 1, torch.randn(
        1, 4, 10, 13, dtype=torch.float64
    )


def compare(attach: Callable[[Any, Seen], None], features: str, attach_first: bool) -> bool:
    """Assert that it gives what stock gives; False where it refused."""
    stock, ours = build(2), build(2)
    wanted_seen: Seen = []
    seen: Seen = []
    attach(stock, wanted_seen)
    wanted = both(stock, *data())
    try:
        if attach_first:
            attach(ours, seen)
        switch_on(features, ours)
        if not attach_first:
            attach(ours, seen)
        found = both(ours, *data())
    except LatentVAEError as error:
        refusal = str(error)
    else:
        assert_close(found, wanted)
        assert_close(seen, wanted_seen)
        return True
    assert "encoder" in refusal or "decoder" in refusal  # by its name
    return False


@pytest.mark.parametrize("features", ["optimize", "tiling", "optimize tiling", "tight tiling"])
@pytest.mark.parametrize("attachment", ATTACHMENTS)
def test_equals_stock_or_is_refused(attachment: str, features: str, calls: list[str]) -> None:
    done = [compare(ATTACHMENTS[attachment], features, attach_first) for attach_first in (True, False)]
    if features == "optimize":
        assert all(done)
    elif "tight" not in features:
        assert done[1]  # there is memory to compute it whole
    elif not attachment.startswith(TILED):
        # who gives the decoder another forward afterwards has it called; all else is refused
        assert done == [False, attachment.endswith("_forward decoder")]


KINDS = (
    *(sees_output, sees_input, changes_output, changes_input),
    *(wraps_forward, replaces_forward, partial_forward, resets_forward),
)


@pytest.mark.parametrize("seed", range(24))
def test_anything_anywhere(seed: int, calls: list[str]) -> None:
    draws = random.Random(seed)
    names = [
        name for name, module in build(2).named_modules() if name and not isinstance(module, nn.ModuleList)
    ]
    convs = [name for name in names if "conv" in name and "conv_" not in name]
    chosen: list[Callable[[Any, Seen], None]] = []
    for _ in range(draws.randint(1, 4)):
        kind = draws.choice([*KINDS, hook_of_accelerate, hook_of_diffusers, _pads_one, _pads_one])
        chosen.append(functools.partial(kind, draws.choice(convs if kind is _pads_one else names)))
    if draws.random() < 0.3:
        chosen.insert(draws.randint(0, len(chosen)), functools.partial(lora, draws.choice(convs)))
    features = draws.choice(["optimize", "tiling", "optimize tiling", "tight tiling"])
    first = draws.randint(0, len(chosen))

    def attach(part: slice) -> Callable[[Any, Seen], None]:
        return lambda vae, seen: [one(vae, seen) for one in chosen[part]] and None

    stock, ours, wanted_seen, seen = build(2), build(2), [], []
    attach(slice(None))(stock, wanted_seen)
    wanted = both(stock, *data())
    try:
        attach(slice(first))(ours, seen)
        switch_on(features, ours)
        attach(slice(first, None))(ours, seen)
        found = both(ours, *data())
    except LatentVAEError:
        assert "tiling" in features
        return
    assert_close(found, wanted)
    assert_close(seen, wanted_seen)


def _pads_one(name: str, vae: Any, seen: Seen) -> None:
    modes = ("circular", "replicate", "reflect")
    vae.get_submodule(name).padding_mode = modes[sum(map(ord, name)) % 3]


# --- offloading


def blocks_on_disk(vae: Any, folder: Path) -> None:
    blocks = ["encoder", "decoder", "quant_conv", "post_quant_conv"]
    options = {"offload_type": "block_level", "num_blocks_per_group": 1, "block_modules": blocks}
    apply_group_offloading(vae, torch.device("cpu"), offload_to_disk_path=str(folder), **options)


def leaves_on_disk(vae: Any, folder: Path) -> None:
    options = {"offload_type": "leaf_level", "offload_to_disk_path": str(folder)}
    apply_group_offloading(vae, torch.device("cpu"), **options)


def sequential(vae: Any, folder: Path) -> None:
    cpu_offload(vae, execution_device=torch.device("cpu"))


def whole_blocks(vae: Any, folder: Path) -> None:
    """Hooks on blocks that bring the weights of all they contain, as a device map's."""
    for block in (*vae.decoder.up_blocks, *vae.encoder.down_blocks, vae.decoder.mid_block):
        options = {"offload": True, "place_submodules": True, "weights_map": None}
        add_hook_to_module(block, AlignDevicesHook(torch.device("cpu"), **options))


@pytest.mark.parametrize("features", ["optimize", "tight tiling", "optimize tiling"])
@pytest.mark.parametrize("offload", [blocks_on_disk, leaves_on_disk, sequential, whole_blocks])
def test_offloaded_weights_are_reached(
    offload: Any, features: str, calls: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = both(build(2), *data())
    for number, offload_first in enumerate((True, False)):
        vae = build(2)
        if offload_first:
            offload(vae, tmp_path / str(number))
        switch_on(features, vae)
        if not offload_first and "disk" in offload.__name__ and "optimize" in features:
            with pytest.raises(
                ValueError, match="non contiguous"
            ):  # diffusers writes no channels_last weights
                offload(vae, tmp_path / str(number))
            continue
        if not offload_first:
            offload(vae, tmp_path / str(number))
        for _ in range(2):  # the weights go away again in between
            assert_close(both(vae, *data()), wanted)
    assert not caplog.records  # nothing ran as stock, nothing whole


@pytest.mark.parametrize("offload", [blocks_on_disk, leaves_on_disk])
def test_without_channels_last_groups_go_to_disk_afterwards(
    offload: Any, calls: list[str], tmp_path: Path
) -> None:
    """What docs/attachments.md names for it."""
    wanted, vae = both(build(2), *data()), optimize(build(2), channels_last=False)
    offload(vae, tmp_path / "disk")
    for _ in range(2):
        assert_close(both(vae, *data()), wanted)


# --- copies


@pytest.mark.parametrize("features", ["optimize", "tight tiling", "optimize tiling"])
def test_copies(features: str, calls: list[str], tmp_path: Path) -> None:
    wanted, vae = both(build(2), *data()), build(2)
    switch_on(features, vae)
    twin = copy.deepcopy(vae)
    assert patched(twin) == patched(vae)
    vae.share_memory()
    assert_close(both(vae, *data()), wanted)
    torch.save(vae, tmp_path / "vae.pt")
    for loaded in (pickle.loads(pickle.dumps(vae)), torch.load(tmp_path / "vae.pt", weights_only=False)):
        assert not patched(loaded)
        calls.clear()
        assert_close(both(loaded, *data()), wanted)
        assert not calls
        switch_on(features, loaded)
        assert patched(loaded) == patched(vae)
        assert_close(both(loaded, *data()), wanted)
    for parameter in vae.parameters():
        parameter.zero_()
    assert_close(both(twin, *data()), wanted)


def test_a_pickle_names_nothing_of_ours_and_says_that_it_is_stock(caplog: pytest.LogCaptureFixture) -> None:
    patches._say_once.cache_clear()
    vae = enable_exact_tiling(optimize(build(2)), TILE)
    assert b"latentvae.runtime" not in pickle.dumps(vae)  # so it loads where this package is not installed
    assert [record.message for record in caplog.records] == [
        "a pickled copy computes as stock: call optimize or enable_exact_tiling there again."
    ]
    vae = build(2)
    replaces_forward("decoder.conv_in", vae, [])
    optimize(vae)
    with pytest.raises(pickle.PicklingError, match=r"decoder\.conv_in had a forward of its own"):
        pickle.dumps(vae)


# --- transforms


def _both_ways(function: Callable[[Any], torch.Tensor], caplog: pytest.LogCaptureFixture) -> None:
    wanted = function(build(2, attention=False).requires_grad_(False))
    for features in ("optimize", "optimize tiling"):
        vae = build(2, attention=False).requires_grad_(False)
        switch_on(features, vae)
        patches._say_once.cache_clear()
        assert_close([function(vae)], [wanted])
        assert ("not tiled" in caplog.text) == ("tiling" in features)


def test_transforms_get_what_stock_gives(calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    latents = data()[1]

    def forward_ad(vae: Any) -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level(), torch.enable_grad():
            dual = torch.autograd.forward_ad.make_dual(latents, torch.ones_like(latents))
            return torch.autograd.forward_ad.unpack_dual(vae.decode(dual).sample).tangent

    functions: list[Callable[[Any], torch.Tensor]] = [
        forward_ad,
        lambda vae: torch.func.jvp(lambda z: vae.decode(z).sample, (latents,), (torch.ones_like(latents),))[
            1
        ],
        lambda vae: torch.func.vmap(lambda z: vae.decode(z[None]).sample[0])(latents.repeat(2, 1, 1, 1)),
        lambda vae: torch.func.grad(lambda z: vae.decode(z).sample.square().sum())(latents),
    ]
    for function in functions:
        caplog.clear()
        _both_ways(function, caplog)
    assert not calls


def test_modes_see_every_operation(calls: list[str]) -> None:
    counts = []
    for vae in (build(2), optimize(build(2))):
        with FlopCounterMode(display=False) as counter:
            vae.decode(data()[1])
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_compiles_in_one_graph() -> None:
    for features in ("optimize", "seamless optimize"):
        vae = build(2, attention=False)
        if "seamless" in features:
            make_seamless(vae, y=False)
        wanted = vae.decode(data()[1]).sample
        optimize(vae)
        torch._dynamo.reset()
        compiled = torch.compile(lambda z, vae=vae: vae.decode(z).sample, fullgraph=True, backend="eager")
        assert_close([compiled(data()[1])], [wanted])


@pytest.mark.slow
def test_compiling_a_tiled_vae_leaves_tiling_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = build(2, attention=False)
    wanted = vae.decode(data()[1]).sample
    enable_exact_tiling(optimize(vae), TILE)
    torch._dynamo.reset()
    compiled = torch.compile(vae.decoder, backend="eager")
    seen = []
    monkeypatch.setattr(stages.TiledRun, "attend", lambda *_: None)
    monkeypatch.setattr(stages.TiledRun, "_finish", lambda *_: seen.append(torch.compiler.is_compiling()))
    for _ in range(2):
        assert_close([compiled(vae.post_quant_conv(data()[1]))], [wanted])
    assert seen
    assert not any(seen)
    torch._dynamo.reset()  # or what was compiled above would serve
    with pytest.raises(Exception, match=r"exact tiling is not compiled: latentvae\.restore"):
        torch.compile(vae.decoder, backend="eager", fullgraph=True)(vae.post_quant_conv(data()[1]))


# --- the rest


def test_running_as_stock_is_said_once_and_by_name(
    calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    vae = optimize(build(2))
    sees_output(f"{RESNET}.norm1", vae, [])
    for _ in range(2):
        both(vae, *data())
    assert [record.message for record in caplog.records] == [f"runs as stock: {RESNET}.norm1 has hooks."]
    caplog.clear()
    enable_exact_tiling(vae, TILE)
    for _ in range(2):
        both(vae, *data())
    found = f"not tiled, but computed whole, because of {RESNET}.norm1, which has hooks."
    assert [record.message for record in caplog.records] == [found]


def test_forwards_put_around_ours_survive_restore_and_another_optimize(calls: list[str]) -> None:
    vae, stock = optimize(build(2)), build(2)
    for model in (vae, stock):
        wraps_forward(f"{RESNET}.conv1", model, [])
    wanted = both(stock, *data())
    for step in (restore, optimize, optimize, restore):
        step(vae)
        assert_close(both(vae, *data()), wanted)


@pytest.mark.parametrize("gone", ["encoder", "decoder"])
def test_one_half_is_enough(gone: str, calls: list[str]) -> None:
    vae = build(2)
    images, latents = data()
    run = (
        (lambda: vae.decode(latents).sample)
        if gone == "encoder"
        else lambda: vae.encode(images).latent_dist.mean
    )
    wanted = run()
    delattr(vae, gone)
    enable_exact_tiling(optimize(vae), TILE)
    assert_close([run()], [wanted])
    assert calls
    with pytest.raises(ModelError, match=f"no {gone}"):
        plan(vae, 64, 64)
    assert_close([make_seamless(restore(vae)) and restore(vae) and run()], [wanted])
