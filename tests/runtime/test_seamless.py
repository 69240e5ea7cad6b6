"""Textures that tile: what one side of a map sees beyond its border is the other."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from vaes import assert_close, both, build

from latentvae.base.errors import ModelError
from latentvae.runtime.optimize import optimize
from latentvae.runtime.patches import patched, restore
from latentvae.runtime.seamless import make_seamless
from latentvae.runtime.tiling.switch import enable_exact_tiling

AXES = [(True, False), (False, True), (True, True)]


def data(levels: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and latents of that size."""
    factor = 2 ** (levels - 1)
    images = torch.rand(1, 3, height, width, dtype=torch.float64) * 2 - 1
    return images, torch.randn(1, 4, height // factor, width // factor, dtype=torch.float64)


@pytest.mark.parametrize("axes", AXES)
@torch.no_grad()
def test_a_rolled_texture_is_the_same_texture(axes: tuple[bool, bool]) -> None:
    x, y = axes
    vae = make_seamless(build(3), x=x, y=y)
    latents = data(3, 24, 32)[1]
    rolled = vae.decode(latents.roll((3, 2), (2, 3))).sample
    same = vae.decode(latents).sample.roll((12, 8), (2, 3))
    if x and y:
        assert_close([rolled], [same])
    assert_close(
        [vae.decode(latents.roll(2, 3)).sample], [vae.decode(latents).sample.roll(8, 3)], 1e-9 if x else 9
    )
    assert ((rolled - same).abs().max() > 1e-3) == (not (x and y))


@torch.no_grad()
def test_both_axes_are_padding_mode_circular_and_restore_undoes_them() -> None:
    vae, circular, arguments = build(3), build(3), data(3, 24, 32)
    stock = both(vae, *arguments)
    for module in circular.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    assert_close(both(make_seamless(vae), *arguments), both(circular, *arguments))
    assert_close(both(make_seamless(vae, x=False, y=False), *arguments), stock)
    make_seamless(make_seamless(vae), y=False)
    assert patched(vae, "seamless")
    assert_close(both(restore(vae), *arguments), stock)
    assert not patched(vae)


@pytest.mark.parametrize("axes", [*AXES, None], ids=["x", "y", "both", "padding_mode"])
@pytest.mark.parametrize("memory", [0.0, math.inf])
@pytest.mark.parametrize("size", [(2, 1, 40, 18), (3, 2, 44, 36), (3, 1, 4, 52)], ids=str)
@torch.no_grad()
def test_tiles_wrap_as_the_whole_does(size: Any, memory: float, axes: Any) -> None:
    levels, layers, *sides = size
    vae, arguments = build(levels, layers), data(levels, *sides)
    if axes is None:
        for module in vae.modules():
            if isinstance(module, nn.Conv2d):
                module.padding_mode = "circular"
    else:
        make_seamless(vae, x=axes[0], y=axes[1])
    wanted = both(vae, *arguments)
    enable_exact_tiling(vae, 16, memory=memory)
    assert_close(both(vae, *arguments), wanted)
    assert_close(both(optimize(vae), *arguments), wanted)


@torch.no_grad()
def test_some_convolutions_wrap_and_some_do_not() -> None:
    for seed in range(4):
        vae, arguments = build(3, 1), data(3, 36, 44)
        torch.manual_seed(seed)
        modes = ("zeros", "circular", "replicate")
        for module in vae.modules():
            if isinstance(module, nn.Conv2d):
                module.padding_mode = modes[int(torch.randint(3, ()))]
        wanted = both(vae, *arguments)
        for memory in (0.0, math.inf):
            assert_close(both(enable_exact_tiling(vae, 16, memory=memory), *arguments), wanted)


def test_what_pads_in_its_own_way_is_refused_by_name() -> None:
    vae = build(2)
    vae.decoder.conv_in.padding_mode = "reflect"
    with pytest.raises(ModelError, match=r"decoder\.conv_in pads by reflect"):
        make_seamless(vae)
    assert not patched(vae)
    vae = make_seamless(build(2))
    vae.decoder.conv_out._conv_forward = lambda *_: None
    with pytest.raises(ModelError, match=r"decoder\.conv_out has a forward of its own"):
        vae.decode(data(2, 8, 8)[1])
