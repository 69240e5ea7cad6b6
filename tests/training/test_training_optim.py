"""Muon with AdamW: the same steps as torch's own optimizers, the right parameters in each, the schedule."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import nn

from latentvae.models.presets import build
from latentvae.training import optim
from latentvae.training.config import OptimConfig
from latentvae.training.optim import (
    MUON_RMS,
    NEWTON_SCHULZ,
    NEWTON_SCHULZ_STEPS,
    MuonAdamW,
    build_optimizer,
    learning_rate,
    orthogonalize,
    set_learning_rate,
)

BETAS = (0.9, 0.99)
EDGES = {
    *("encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_in.weight"),
    *("decoder.conv_out.weight", "quant_conv.weight", "post_quant_conv.weight"),
}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(drawn(*shape, seed=i)) for i, shape in enumerate(shapes)]


def give_gradients(those: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    for i, parameter in enumerate(those):
        parameter.grad = drawn(*parameter.shape, seed=1000 * step + i + 500).to(parameter.dtype) * scale


# --- orthogonalisation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 144), (144, 16), (32, 48), (3, 8, 72), (2, 3, 72, 8), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonalize_brings_singular_values_near_one(shape, dtype):
    result = orthogonalize(drawn(*shape, dtype=dtype) * 37)
    assert result.shape == shape
    assert result.dtype == dtype
    values = torch.linalg.svdvals(result.double())
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_orthogonalize_keeps_the_singular_vectors(shape):
    matrix = drawn(*shape, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ orthogonalize(matrix) @ vt.mT
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-12
    assert inside.diagonal().min() > 0.6


def iterated(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration as Jordan et al. write it, on the wide matrix itself."""
    a, b, c = NEWTON_SCHULZ
    x = matrix / matrix.norm()
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("spread", [0, 2, 4])
def test_orthogonalize_is_the_iteration_on_the_wide_matrix(spread):
    rows = torch.logspace(0, -spread, 16, dtype=torch.float64)[:, None]
    matrix = rows * drawn(16, 60, dtype=torch.float64)
    wanted = iterated(matrix)
    assert (orthogonalize(matrix) - wanted).norm() < 1e-10 * wanted.norm()
    assert (orthogonalize(matrix.float()) - wanted).norm() < 1e-3 * wanted.norm()
    assert (orthogonalize(matrix.bfloat16()) - wanted).norm() < 0.05 * wanted.norm()


def test_a_stack_is_orthogonalised_matrix_by_matrix():
    stack = drawn(4, 8, 30, dtype=torch.float64) * torch.tensor([1.0, 10, 100, 0.01]).view(4, 1, 1)
    alone = torch.stack([orthogonalize(matrix) for matrix in stack])
    assert torch.allclose(orthogonalize(stack), alone, rtol=0, atol=1e-12)


def test_orthogonalize_forgets_the_scale_and_leaves_zero_zero():
    matrix = drawn(8, 30, dtype=torch.float64)
    assert torch.allclose(orthogonalize(matrix * 1e6), orthogonalize(matrix), rtol=0, atol=1e-12)
    assert torch.equal(orthogonalize(torch.zeros(8, 30)), torch.zeros(8, 30))


# --- steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_adamw_part_is_torchs_adamw_bitwise(weight_decay):
    shapes = [(5,), (4, 7), (3, 2, 3, 3)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    mine = MuonAdamW([{"params": ours, "weight_decay": weight_decay}], lr=3e-3, betas=BETAS)
    torchs = torch.optim.AdamW(theirs, lr=3e-3, betas=BETAS, weight_decay=weight_decay)
    for step in range(5):
        for optimizer, those in ((mine, ours), (torchs, theirs)):
            optimizer.param_groups[0]["lr"] = 3e-3 / (step + 1)
            give_gradients(those, step)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), f"step {step}"


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_the_muon_part_is_torchs_muon_to_its_bfloat16(shape, weight_decay):
    lr = 0.02
    (ours,), (theirs,) = parameters(shape), parameters(shape)
    mine = MuonAdamW([{"params": [ours], "weight_decay": weight_decay, "muon": True}], lr=lr, betas=BETAS)
    torchs = torch.optim.Muon(
        [theirs],
        lr=lr,
        weight_decay=weight_decay,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    start = ours.detach().clone()
    for step in range(4):
        for optimizer, parameter in ((mine, ours), (torchs, theirs)):
            give_gradients([parameter], step)
            optimizer.step()
    moved = (ours.detach() - start).norm()
    assert moved > 2 * lr * MUON_RMS * math.sqrt(ours.numel())  # four steps that do not cancel
    assert (ours - theirs).norm() < 0.05 * moved  # torch's is rounded to bfloat16, which is good for 3 %


def test_muon_sees_a_kernel_as_a_matrix_of_its_output_channels():
    (kernel,), (matrix,) = parameters((8, 5, 3, 3)), parameters((8, 45))
    with torch.no_grad():
        matrix.copy_(kernel.flatten(1))
    kernel.data = kernel.data.to(memory_format=torch.channels_last)
    optimizers = [MuonAdamW([{"params": [p], "muon": True}], 0.01, BETAS) for p in (kernel, matrix)]
    for step in range(3):
        matrix.grad = drawn(8, 45, seed=step)
        kernel.grad = matrix.grad.view(8, 5, 3, 3).to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_kernels_of_one_shape_each_get_their_own_update():
    shapes = [(8, 4, 3, 3), (6, 4, 3, 3), (8, 4, 3, 3), (8, 4, 3, 3)]
    together, alone = parameters(*shapes), parameters(*shapes)
    joint = MuonAdamW([{"params": together, "muon": True, "weight_decay": 0.1}], 0.01, BETAS)
    single = [MuonAdamW([{"params": [p], "muon": True, "weight_decay": 0.1}], 0.01, BETAS) for p in alone]
    for step in range(3):
        give_gradients(together, step)
        give_gradients(alone, step)
        joint.step()
        for optimizer in single:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-4)  # a step moves each weight by about 2e-3


class Threads:
    """As much of torch.distributed as Muon wants, among threads of this process."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier, self.mine = world, threading.Barrier(world, timeout=30), threading.local()
        self.given: list[torch.Tensor] = [torch.empty(0)] * world

    is_available = is_initialized = staticmethod(lambda: True)

    def get_rank(self) -> int:
        return self.mine.rank

    def get_world_size(self) -> int:
        return self.world

    def all_gather(self, rows: list[torch.Tensor], given: torch.Tensor) -> None:
        self.given[self.get_rank()] = given
        self.barrier.wait()
        for row, each in zip(rows, self.given, strict=True):
            row.copy_(each)
        self.barrier.wait()


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_share_the_orthogonalising_and_all_get_the_same_updates(monkeypatch, world):
    matrices = [drawn(*shape, seed=seed) for seed, shape in enumerate([(8, 36), (8, 36), (6, 9), (16, 8)])]
    wanted = [optim.orthogonalize(matrix) for matrix in matrices]
    counted = []
    whole = optim.orthogonalize
    monkeypatch.setattr(optim, "orthogonalize", lambda stack: counted.append(len(stack)) or whole(stack))
    threads = Threads(world)
    monkeypatch.setattr(optim, "dist", threads)

    def one(rank: int) -> list[torch.Tensor]:
        threads.mine.rank = rank
        return optim.orthogonalize_together(matrices)

    with ThreadPoolExecutor(world) as pool:
        for updates in pool.map(one, range(world)):
            for update, each in zip(updates, wanted, strict=True):
                assert torch.allclose(update, each, rtol=0, atol=1e-6)
    assert sum(counted) == len(matrices)  # each of them once, by one


def test_shares_are_of_nearly_the_same_cost_and_hold_each_matrix_once():
    shapes = [(512, 4608)] * 9 + [(256, 2304)] * 7 + [(128, 1152)] * 5
    shares = optim.share_out(shapes, 4)
    assert sorted(index for share in shares for index in share) == list(range(len(shapes)))
    assert [sum(shapes[index][0] == 512 for index in share) for share in shares] == [3, 2, 2, 2]
    assert all(len(share) > 3 for share in shares[1:])


def test_a_muon_step_is_the_size_of_adamws_whatever_the_shape():
    for shape in [(16, 16, 3, 3), (64, 8, 3, 3), (8, 64, 1, 1)]:
        (kernel,) = parameters(shape)
        before = kernel.detach().clone()
        give_gradients([kernel], 1, scale=1e-4)
        MuonAdamW([{"params": [kernel], "muon": True}], 0.1, BETAS).step()
        rms = (kernel.detach() - before).square().mean().sqrt()
        assert 0.6 * 0.1 * MUON_RMS < rms < 1.3 * 0.1 * MUON_RMS


def test_a_parameter_without_a_gradient_is_left_alone():
    those = parameters((8, 4, 3, 3), (8, 4, 3, 3), (5,), (5,))
    before = [p.detach().clone() for p in those]
    optimizer = MuonAdamW(
        [
            {"params": those[:2], "muon": True, "weight_decay": 0.5},
            {"params": those[2:], "weight_decay": 0.5},
        ],
        lr=0.1,
        betas=BETAS,
    )
    give_gradients(those, 0)
    those[0].grad = those[2].grad = None
    optimizer.step()
    assert [torch.equal(p, old) for p, old in zip(those, before, strict=True)] == [True, False, True, False]
    assert those[0] not in optimizer.state
    assert those[2] not in optimizer.state


# --- which parameters go where -----------------------------------------------------------------------------


def placed(vae: nn.Module, config: OptimConfig) -> dict[str, list[dict]]:
    """The groups that each parameter is in, by name."""
    groups = build_optimizer(vae, config).param_groups
    return {
        name: [group for group in groups for other in group["params"] if other is parameter]
        for name, parameter in vae.named_parameters()
    }


@pytest.mark.parametrize("attention", [False, True])
def test_every_parameter_is_in_exactly_one_group_of_its_kind(attention):
    vae = build("tiny", mid_block_add_attention=attention)
    config = OptimConfig(weight_decay=0.25, lr=0.5, betas=(0.8, 0.9))
    groups = placed(vae, config)
    assert all(len(those) == 1 for those in groups.values())
    for name, parameter in vae.named_parameters():
        (group,) = groups[name]
        hidden = parameter.ndim == 4 and name not in EDGES
        assert group["muon"] is hidden, name
        assert group["weight_decay"] == (0.25 if parameter.ndim > 1 else 0), name
        assert (group["lr"], group["betas"]) == (0.5, (0.8, 0.9))
    assert {n for n, p in vae.named_parameters() if p.ndim == 4 and not groups[n][0]["muon"]} == EDGES
    linear = [name for name, parameter in vae.named_parameters() if parameter.ndim == 2]
    assert bool(linear) is attention  # the query, key and value matrices, in AdamW


def test_adamw_alone_takes_every_parameter_once():
    groups = placed(build("tiny"), OptimConfig(name="adamw", weight_decay=0.25))
    assert all(len(those) == 1 and those[0]["muon"] is False for those in groups.values())
    assert {those[0]["weight_decay"] for those in groups.values()} == {0.25, 0}


def test_frozen_parameters_are_in_no_group():
    vae = build("tiny")
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    for name, those in placed(vae, OptimConfig()).items():
        assert len(those) == (0 if name.startswith(("encoder.", "quant_conv.")) else 1), name
    vae.requires_grad_(False)
    vae.decoder.conv_out.bias.requires_grad_(True)  # a group that would be empty is left out
    assert len(build_optimizer(vae, OptimConfig()).param_groups) == 1


# --- schedule ----------------------------------------------------------------------------------------------


def rates(max_steps: int, **settings: object) -> list[float]:
    return [learning_rate(OptimConfig(**settings), step, max_steps) for step in range(max_steps + 1)]


def test_the_rate_warms_up_linearly_from_above_zero():
    rate = rates(100, warmup_steps=4, schedule="constant")
    assert rate[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rate[5:] == [1.0] * 96
    assert rates(10, warmup_steps=0, schedule="constant") == [1.0] * 11


def test_the_cosine_falls_from_the_warm_up_to_the_final_rate():
    rate = rates(110, warmup_steps=10, final_lr=0.2)
    assert rate[10] == 1
    assert rate[60] == pytest.approx(0.6)  # half way between 1 and 0.2
    assert rate[35] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rate[110] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rate[10:]))
    assert learning_rate(OptimConfig(warmup_steps=10, final_lr=0.2), 500, 110) == pytest.approx(0.2)


def test_decay_steps_keep_the_rate_constant_before_them():
    rate = rates(110, warmup_steps=10, decay_steps=40, final_lr=0)
    assert rate[10:71] == [1.0] * 61
    assert rate[71] < 1
    assert rate[90] == pytest.approx(0.5)
    assert rate[110] == pytest.approx(0, abs=1e-12)


def test_a_run_that_is_all_warm_up_is_defined():
    rate = rates(10, warmup_steps=10)
    assert all(0 < value <= 1 for value in rate)
    assert rate[9] == pytest.approx(10 / 11)


def test_every_group_gets_the_rate_of_its_step():
    config = OptimConfig(lr=2.0, warmup_steps=3, schedule="constant")
    optimizer = build_optimizer(build("tiny"), config)
    assert len(optimizer.param_groups) == 3
    set_learning_rate(optimizer, config, 1, 100)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0] * 3
