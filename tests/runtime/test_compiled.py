import logging
import runpy
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn
from vaes import assert_close, both, inputs

import latentvae
from latentvae.runtime import forwards
from latentvae.runtime.kernels import blocks, compiled, groupnorm

SHAPES = [(1, 1, 1), (2, 9, 13), (1, 33, 70), (1, 8, 100)]  # B, H, W


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    if compiled.library() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As in a process that has not asked for the library, with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.library.cache_clear()
    yield tmp_path / "latentvae" / "kernels"
    monkeypatch.undo()
    compiled.library.cache_clear()


def random_map(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def conv_of(inside: int, outside: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Conv2d:
    conv = nn.Conv2d(inside, outside, 3, padding=1, bias=bias).to(dtype).requires_grad_(False)
    return conv.to(memory_format=torch.channels_last) if bias else conv  # weights may lie either way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize(("inside", "outside"), [(16, 48), (112, 16)])
@torch.no_grad()
def test_equals_convolution(dtype: torch.dtype, upsample: bool, inside: int, outside: int) -> None:
    for batch, height, width in SHAPES:
        x, bias = random_map(batch, inside, height, width, dtype=dtype), height != 9
        conv = conv_of(inside, outside, dtype, bias=bias)
        exact = x.double()
        if upsample:
            exact = F.interpolate(exact, scale_factor=2, mode="nearest")
        exact = F.conv2d(exact, conv.weight.double(), conv.bias.double() if bias else None, padding=1)
        plus = random_map(*exact.shape, dtype=dtype)
        found = compiled.convolve(x, conv, upsample, None, plus)
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        exact = exact + plus.double()
        # of bfloat16 only the result is rounded, once: by half of 2^-7 of its size at most
        allowed = 3e-6 * exact.abs().max() + (2**-8 * exact.abs() if dtype == torch.bfloat16 else 0)
        assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("groups", [1, 8])
@torch.no_grad()
def test_a_norm_is_measured_as_the_map_is_written(groups: int) -> None:
    norm = nn.GroupNorm(groups, 32)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    first, second, x = conv_of(16, 32), conv_of(32, 16), random_map(2, 16, 21, 30)
    first.bias += 10  # away from zero, where sums of squares lose digits
    for upsample in (False, True):
        y = compiled.convolve(
            x, first, upsample, None if upsample else (torch.ones(2, 16), torch.zeros(2, 16))
        )
        exact = F.group_norm(y.double(), groups, norm.weight.double(), norm.bias.double(), norm.eps)
        kept, measured = compiled.affine(norm, y), compiled.affine(norm, y.clone())
        assert_close(kept, measured, 1e-6)
        assert_close([groupnorm.apply(y, blocks.Affine(*kept), silu=False).double()], [exact], 3e-6)
        activated = F.silu(exact)
        assert_close([groupnorm.apply(y, blocks.Affine(*kept), silu=True).double()], [activated], 3e-6)
        exact = F.conv2d(activated, second.weight.double(), second.bias.double(), padding=1)
        assert_close([compiled.convolve(y, second, False, kept).double()], [exact], 3e-6)


@pytest.mark.parametrize("where", ["resnets.0", "resnets.0.conv1", "upsamplers.0", ""])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_hook_changes_is_measured_anew(where: str, mode: type) -> None:
    vae = latentvae.build("tiny").eval().requires_grad_(False)
    x, block = random_map(1, 32, 20, 20), vae.decoder.up_blocks[0]

    def change(module: nn.Module, args: object, output: torch.Tensor) -> None:
        output.mul_(torch.linspace(1, 2, output.shape[3]))

    block.get_submodule(where).register_forward_hook(change)
    following = vae.decoder.up_blocks[1]
    with mode():
        wanted = following(block(x))
        latentvae.optimize(vae)
        assert_close([following(block(x))], [wanted], 3e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_hook_changes_on_its_way_into_a_norm_is_measured_anew(mode: type) -> None:
    vae = latentvae.build("tiny").eval().requires_grad_(False)
    x, resnet = random_map(1, 32, 20, 20), vae.decoder.up_blocks[0].resnets[0]

    def change(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        args[0].mul_(torch.linspace(1, 2, args[0].shape[3]))

    resnet.norm2.register_forward_pre_hook(change)
    with mode():
        wanted = resnet(x, None)
        latentvae.optimize(vae)
        assert_close([resnet(x, None)], [wanted], 3e-6)


@torch.no_grad()
def test_silu_is_right_from_end_to_end() -> None:
    x = torch.linspace(-200, 200, 16 * 4000).view(1, 16, 40, 100).to(memory_format=torch.channels_last)
    found = compiled.apply(x, torch.ones(1, 16), torch.zeros(1, 16), silu=True)
    wanted = F.silu(x.double())
    assert ((found - wanted).abs() <= 1.5e-7 * x.abs() + 1e-30).all()
    x[0, 0, 0, 0] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        found = compiled.apply(x.to(dtype), torch.ones(1, 16), torch.zeros(1, 16), silu=True)
        assert found[0, 0, 0, 0].isnan()
        assert found.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_whole_vae(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    convolve = compiled.convolve
    monkeypatch.setattr(compiled, "convolve", lambda *args: ran.append("convolve") or convolve(*args))
    monkeypatch.setattr(compiled, "MIN_PIXELS", dict.fromkeys(compiled.DTYPES, 1))
    vae = latentvae.build("tiny", norm_num_groups=4).double().eval().requires_grad_(False)
    data = inputs(vae, 5, 7)
    exact = both(vae, *data)
    stock = both(vae.to(dtype), *(each.to(dtype) for each in data))
    with torch.inference_mode() if dtype == torch.float32 else torch.no_grad():
        found = both(latentvae.optimize(vae), *(each.to(dtype) for each in data))
    resnets = sum(type(module).__name__ == "ResnetBlock2D" for module in vae.modules())
    assert len(ran) == 2 * resnets + 3
    if dtype == torch.float32:
        assert_close([each.double() for each in found], exact, 3e-6)
    else:  # no further from the truth than stock: it rounds less often
        for ours, its, truth in zip(found, stock, exact, strict=True):
            assert (ours - truth).square().mean() < 1.1 * (its - truth).square().mean()


@torch.no_grad()
def test_neither_threads_nor_a_batch_change_bits() -> None:
    x, conv, norm = random_map(3, 32, 40, 30), conv_of(32, 32), nn.GroupNorm(4, 32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = compiled.convolve(x, conv, False, compiled.affine(norm, x), x)
        results.append(compiled.convolve(y, conv, True, None))
    alone = compiled.convolve(x[1:2], conv, False, compiled.affine(norm, x[1:2]), x[1:2])
    assert all(torch.equal(results[0], each) for each in results[1:])
    assert torch.equal(results[0][1:2], compiled.convolve(alone, conv, True, None))


def test_concurrent_calls_do_not_disturb_each_other() -> None:
    torch.set_num_threads(2)
    x, convs = random_map(1, 16, 40, 40), [conv_of(16, 16) for _ in range(4)]
    wanted = [compiled.convolve(x, conv) for conv in convs]
    same: list[bool] = []

    def run(number: int) -> None:
        torch.set_num_threads(2)
        same.extend(torch.equal(compiled.convolve(x, convs[number]), wanted[number]) for _ in range(10))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 40


@torch.no_grad()
def test_a_call_does_not_wait_for_threads_that_another_one_has() -> None:
    torch.set_num_threads(2)
    x, conv, done = random_map(1, 16, 40, 40), conv_of(16, 16), threading.Event()
    busy = [blocks.all_threads().submit(done.wait, 20) for _ in range(2)]
    try:
        compiled.convolve(x, conv)
        assert not any(each.done() for each in busy)
    finally:
        done.set()


@pytest.mark.parametrize("what", ["weight", "x", "plus"])
def test_nothing_that_wants_a_gradient_loses_it(what: str) -> None:
    x, plus, conv = random_map(1, 16, 20, 20), random_map(1, 16, 20, 20), conv_of(16, 16)
    {"x": x, "plus": plus, "weight": conv.weight}[what].requires_grad_(True)
    assert forwards.conv(conv, x, plus=plus).requires_grad


@pytest.mark.parametrize("compiler", ["", "no-such-compiler", "false"])
@torch.no_grad()
def test_without_a_compiler_torch_computes(
    compiler: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    x, conv = random_map(1, 16, 40, 40), conv_of(16, 16)
    with caplog.at_level(logging.INFO, "latentvae"):
        assert_close([forwards.conv(conv, x)], [conv(x)], 1e-6)
    assert len(caplog.records) == 1
    assert "cannot be written" not in caplog.text  # which it could be
    assert not list(fresh.glob("*.so"))


def test_nobody_waits_for_ever_for_who_compiles(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = []

    def taken(path: Path, *args: float, **options: bool) -> FileLock:
        others.append(FileLock(path))
        others[0].acquire()
        return FileLock(path, *args, **options)

    monkeypatch.setattr(compiled, "FileLock", taken)
    monkeypatch.setattr(compiled, "PATIENCE", 0.1)
    assert compiled.library() is None
    others[0].release()


@torch.no_grad()
def test_without_a_home_torch_computes(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    x, conv = random_map(1, 16, 40, 40), conv_of(16, 16)
    with caplog.at_level(logging.INFO, "latentvae"):
        assert_close([forwards.conv(conv, x)], [conv(x)], 1e-6)
    assert "set XDG_CACHE_HOME" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_torchs_defaults_change_nothing(dtype: torch.dtype) -> None:
    x, conv, norm = random_map(1, 16, 40, 40), conv_of(16, 16), nn.GroupNorm(4, 16)
    wanted = compiled.convolve(x, conv, False, compiled.affine(norm, x))
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            scale, shift = compiled.affine(norm, x)
            assert torch.equal(compiled.convolve(x, conv, False, (scale, shift)), wanted)
            anew = runpy.run_path(compiled.__file__)
    finally:
        torch.set_default_dtype(torch.float32)
    # or kernels would write beyond them
    assert {(each.dtype, each.device.type) for each in (scale, shift, anew["_like"])} == {
        (torch.float32, "cpu")
    }


def test_weights_that_are_elsewhere_are_not_read() -> None:
    x, conv = random_map(1, 16, 40, 40), conv_of(16, 16)
    assert compiled.suits_conv(conv, x, x)
    assert not compiled.suits_conv(conv, x, x.to("meta"))
    assert not compiled.suits_conv(conv.to("meta"), x, None)
