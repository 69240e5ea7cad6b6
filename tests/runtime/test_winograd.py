import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vaes import assert_close, calls

from latentvae.runtime import forwards
from latentvae.runtime.kernels import blocks, groupnorm, winograd

__all__ = ["calls"]

SHAPES = [(1, 3, 5, 1, 1), (2, 4, 3, 3, 5), (1, 4, 4, 16, 65), (2, 6, 5, 33, 70)]  # B, C, K, H, W


def random_map(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("batch", "inside", "outside", "height", "width"), SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_equals_convolution(
    batch: int, inside: int, outside: int, height: int, width: int, threads: int, upsample: bool, bias: bool
) -> None:
    torch.set_num_threads(threads)
    x = random_map(batch, inside, height, width)
    conv = nn.Conv2d(inside, outside, 3, padding=1, bias=bias, dtype=torch.float64)
    scheme = winograd.UPSAMPLING if upsample else winograd.CONVOLUTION
    stock = F.interpolate(x, scale_factor=2, mode="nearest") if upsample else x
    plus = random_map(batch, outside, *stock.shape[2:])
    found = winograd.convolve(x, conv, scheme, None, plus)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close([found], [conv(stock) + plus], 1e-13)
    assert torch.get_num_threads() == threads


@torch.no_grad()
def test_norm_and_activation_come_first() -> None:
    x, conv, norm = random_map(2, 4, 9, 40), nn.Conv2d(4, 3, 3, padding=1), nn.GroupNorm(2, 4)
    nn.init.normal_(norm.bias)
    conv, norm = conv.double(), norm.double()
    found = winograd.convolve(x, conv, winograd.CONVOLUTION, groupnorm.affine(norm, x))
    assert_close([found], [conv(F.silu(norm(x)))], 1e-13)  # zeros around what is activated, not around x


@torch.no_grad()
def test_a_crop_of_a_map_is_read_as_it_lies() -> None:
    x = random_map(1, 4, 20, 30)[:, :, 2:13, 5:19]
    conv, norm = nn.Conv2d(4, 4, 3, padding=1).double(), nn.GroupNorm(2, 4).double()
    assert_close([winograd.convolve(x, conv)], [conv(x)], 1e-13)
    assert_close([groupnorm.apply(x, groupnorm.affine(norm, x), silu=False)], [norm(x)], 1e-13)


@torch.no_grad()
def test_rounding_is_that_of_a_direct_convolution() -> None:
    x, conv = random_map(1, 128, 32, 32, dtype=torch.float32), nn.Conv2d(128, 128, 3, padding=1)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    for found in (winograd.convolve(x, conv), conv(x)):
        assert_close([found.double()], [exact], 3e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@torch.no_grad()
def test_large_maps_are_measured_to_the_last_digit(offset: float) -> None:
    x = random_map(1, 8, 400, 500, dtype=torch.float32) + offset
    norm = nn.GroupNorm(2, 8)
    exact = F.group_norm(x.double(), 2, norm.weight.double(), norm.bias.double(), norm.eps)
    found = groupnorm.apply(x, groupnorm.affine(norm, x), silu=False)
    assert_close([found.double()], [exact], 1e-6 * (1 + offset / 30))  # torch's own: 1e-4
    found = groupnorm.apply(x, groupnorm.affine(norm, x), silu=True)
    assert_close([found.double()], [F.silu(exact)], 1e-6 * (1 + offset / 30))


@pytest.mark.parametrize("what", ["weight", "bias", "x", "plus"])
def test_nothing_that_wants_a_gradient_loses_it(what: str, calls: list[str]) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1).double().requires_grad_(False)
    x, plus = random_map(1, 4, 6, 6), random_map(1, 4, 6, 6)
    {"x": x, "plus": plus, "weight": conv.weight, "bias": conv.bias}[what].requires_grad_(True)
    blocks_ran = forwards.conv(conv, x, plus=plus)
    assert blocks_ran.requires_grad
    assert not calls
    with torch.no_grad():
        assert_close([forwards.conv(conv, x, plus=plus)], [blocks_ran], 1e-13)
    assert calls == ["convolve"]


@pytest.mark.parametrize("mode", ["inference", "no_grad"])
def test_buffers_serve_in_every_mode(mode: str) -> None:
    conv, x = nn.Conv2d(4, 4, 3, padding=1).double(), random_map(1, 4, 20, 20)
    torch.set_num_threads(2)
    for context in (torch.inference_mode, torch.no_grad)[:: 1 if mode == "inference" else -1]:
        with context():
            assert_close([winograd.convolve(x, conv)], [conv(x)], 1e-13)


def test_concurrent_calls_do_not_disturb_each_other() -> None:
    torch.set_num_threads(2)
    convs = [nn.Conv2d(8, 8, 3, padding=1).double().requires_grad_(False) for _ in range(4)]
    x = random_map(1, 8, 40, 40)
    wanted = [conv(x) for conv in convs]
    found: dict[int, list[torch.Tensor]] = {number: [] for number in range(4)}

    def run(number: int) -> None:
        for _ in range(10):
            found[number].append(winograd.convolve(x, convs[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in found.items():
        assert_close(results, [wanted[number]] * 10, 1e-13)


def test_errors_of_a_block_arrive() -> None:
    torch.set_num_threads(2)
    done: list[int] = []

    def worker() -> Any:
        def work(job: int) -> None:
            if job == 3:
                raise ValueError("job 3")
            done.append(job)

        return work

    with pytest.raises(ValueError, match="job 3"):
        blocks.share_out(range(100), worker)
    blocks.share_out([7], worker)
    assert done[-1] == 7
