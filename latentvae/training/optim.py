"""Muon for convolution kernels with AdamW for the rest, as one optimizer; schedule and moving average."""

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from torch import nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from latentvae.training.config import DistilConfig, OptimConfig
from latentvae.training.transplant import is_transplanted

# Quintic Newton-Schulz coefficients of Jordan et al. 2024 (Muon): steepest at zero.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MUON_MOMENTUM = 0.95
# Orthogonalised updates have RMS 1/sqrt(max(rows, columns)); AdamW's have about this (Liu et al. 2025).
MUON_RMS = 0.2
ADAM_EPS = 1e-8


def build_optimizer(vae: nn.Module, config: OptimConfig, distil: DistilConfig | None = None) -> Optimizer:
    """The configured optimizer over the trainable parameters of `vae`.

    Where a teacher's layers were transplanted, those learn at a rate of their own, and later.

    Kernels decay, biases and norms do not. Muon leaves the first and last convolutions and the 1x1 ones
    around the latents to AdamW: their rows or columns are pixels and latents, whose scales mean something.
    """
    named = [(name, p) for name, p in vae.named_parameters() if p.requires_grad]
    groups = []
    if distil is not None and distil.transplant:
        moved = [(name, p) for name, p in named if is_transplanted(name)]
        named = [(name, p) for name, p in named if not is_transplanted(name)]
        rate = {"share": distil.transplanted_lr, "from_step": distil.hold_steps}
        groups = [{**group, **rate} for group in _groups(moved, config)]
    groups = _groups(named, config) + groups
    return MuonAdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)


def _groups(named: list[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Parameters by how they are updated; the order is that of the slots in checkpoints."""
    edges = ("encoder.conv_in.", "encoder.conv_out.", "decoder.conv_in.", "decoder.conv_out.", "quant_conv.")
    hidden = [p for name, p in named if p.ndim == 4 and not any(edge in name for edge in edges)]
    taken = {id(p) for p in hidden}
    kernels = [p for _, p in named if p.ndim >= 2 and id(p) not in taken]
    vectors = [p for _, p in named if p.ndim < 2]
    return [
        {"params": hidden, "weight_decay": config.weight_decay, "muon": config.name == "muon"},
        {"params": kernels, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def set_learning_rate(optimizer: Optimizer, config: OptimConfig, step: int, max_steps: int) -> None:
    """Give every group the rate of an optimizer step. It follows from the step, so it is not saved."""
    for group in optimizer.param_groups:
        share = group.get("share", 1.0) if step >= group.get("from_step", 0) else 0.0
        group["lr"] = config.lr * learning_rate(config, step, max_steps) * share


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """Share of `lr` at an optimizer step: linear warm-up, constant, cosine decay to `final_lr`."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return warmup
    start = config.warmup_steps if config.decay_steps is None else max_steps - config.decay_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, max_steps - start)))
    return warmup * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


class MuonAdamW(Optimizer):
    """Orthogonalised momentum steps for groups with `muon=True`, kernels seen as matrices; AdamW for others.

    torch.optim.Muon takes 2-D parameters only; a kernel (out, in, kh, kw) is one as (out, in*kh*kw).
    Both share one learning rate, as Muon's updates are scaled to the size of AdamW's.

    Args:
        groups: parameter groups; each may set `muon`, `lr`, `weight_decay`, `betas`.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "weight_decay": 0.0, "muon": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters: list[Any] = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(group, parameters)
            elif parameters:
                self._adamw(group, parameters)

    def _muon(self, group: dict[str, Any], parameters: list[Any]) -> None:
        matrices = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - MUON_MOMENTUM)
            # (out, in, kh, kw) seen as (out, in*kh*kw)
            matrices.append(parameter.grad.lerp(state["momentum"], MUON_MOMENTUM).flatten(1))
        for parameter, update in zip(parameters, orthogonalize_together(matrices), strict=True):
            step = group["lr"] * MUON_RMS * math.sqrt(max(update.shape))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.view(parameter.shape), alpha=-step)

    def _adamw(self, group: dict[str, Any], parameters: list[Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=ADAM_EPS,
            maximize=False,
        )


def orthogonalize_together(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """`orthogonalize` of matrices (rows, columns) that all processes hold alike: each does its share of them.

    The iteration is the dearest part of an update, and the same everywhere; what the shares give is gathered
    instead. Matrices of one shape go through it as one stack.
    """
    several = bool(matrices) and dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    shares = share_out([matrix.shape for matrix in matrices], world)
    updates = matrices.copy()
    by_shape = defaultdict(list)
    for index in shares[rank]:
        by_shape[matrices[index].shape].append(index)
    for members in by_shape.values():
        stack = orthogonalize(torch.stack([matrices[index] for index in members]))
        for index, update in zip(members, stack, strict=True):
            updates[index] = update
    if world == 1:
        return updates
    own = [updates[index].flatten() for index in shares[rank]]
    longest = max(sum(matrices[index].numel() for index in share) for share in shares)
    given = torch.cat([*own, matrices[0].new_zeros(longest - sum(map(len, own)))])  # all of one length
    rows = [torch.empty_like(given) for _ in range(world)]
    dist.all_gather(rows, given)
    for share, row in zip(shares, rows, strict=True):
        end = 0
        for index in share:
            start, end = end, end + matrices[index].numel()
            updates[index] = row[start:end].view(matrices[index].shape)
    return updates


def share_out(shapes: Sequence[tuple[int, ...]], world: int) -> list[list[int]]:
    """Which matrices each of `world` processes orthogonalises: the dearest first, to who has least to do."""
    costs = {
        # two products with the wide matrix, and four of squares in each step
        index: min(shape) ** 2 * (2 * max(shape) + 4 * NEWTON_SCHULZ_STEPS * min(shape))
        for index, shape in enumerate(shapes)
    }
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for index in sorted(costs, key=lambda each: (-costs[each], each)):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += costs[index]
    return [sorted(share) for share in shares]


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly replace the singular values of (..., rows, columns) by one, by Newton-Schulz iteration.

    Each step multiplies by a polynomial of the Gram matrix from the left. Such polynomials commute, so they
    are collected in the small square, and the wide matrix is multiplied once: a third of the work of
    iterating it, which pays for float32 where others round to bfloat16. float64 input stays float64.
    """
    a, b, c = NEWTON_SCHULZ
    # (n, rows, columns), turned so that the Gram matrix is the smaller of the two
    x = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    # the iteration converges for singular values up to 1, and the norm is at least the largest
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    gram = x @ x.mT
    identity = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
    product = identity
    for _ in range(NEWTON_SCHULZ_STEPS):
        polynomial = a * identity + b * gram + c * gram @ gram
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    x = product @ x
    return (x.mT if tall else x).to(matrices.dtype)


class EMA:
    """Exponential moving average of a model's weights in float32, with the decay warmed up.

    Args:
        model: averaged; the average is `ema.model`, a copy in eval mode without gradients.
        decay: the final decay. At step n it is at most (1 + n) / (10 + n), so that short runs do not report
            their first weights.
    """

    def __init__(self, model: AutoencoderKL, decay: float) -> None:
        self.decay = decay
        self.model: AutoencoderKL = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: AutoencoderKL, step: int) -> None:
        """Move the average towards `model`, once per optimizer step; `step` counts from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, weights = [*self.model.parameters()], [*model.parameters()]
        # lerp_ keeps weights that do not change exactly; mul_ and add_ round them
        torch._foreach_lerp_(averages, weights, weight)  # all in a few kernels
