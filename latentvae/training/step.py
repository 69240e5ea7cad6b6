"""One optimizer step: forward passes, one backward each, and the updates of both networks."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.grad import conv2d_weight
from torch.nn.utils import clip_grad_norm_, get_total_norm

from latentvae.models.latents import Posterior
from latentvae.training.adversary import Adversary
from latentvae.training.data.batches import CropBatch
from latentvae.training.distillation import original_share
from latentvae.training.draws import Inputs, draw_inputs
from latentvae.training.losses import Terms, adaptive_weight
from latentvae.training.module import TrainingOutputs
from latentvae.training.optim import set_learning_rate
from latentvae.training.setup import Run


def optimizer_step(run: Run, batches: list[CropBatch]) -> Terms:
    """One update from `accumulation` batches; returns the mean of each term, and grad_norm.

    A step whose loss or gradient is not finite changes nothing but the counters.
    """
    run.model.train()
    state, adversary = run.state, run.state.adversary
    if adversary is not None and adversary.ramp(state.step) == 0:
        adversary = None  # before disc_start it gets neither a pass nor an update

    # 1. Every random choice of the step, on the device.
    inputs = [draw_inputs(run, batch) for batch in batches]

    # 2. Forward and backward passes; in the last of them processes average their gradients.
    terms = plain_pass(run, inputs) if adversary is None else adversarial_pass(run, inputs, adversary)

    # 3. Undo the scale that fp16 needs, clip, and ask all processes whether anything is NaN or inf.
    optimizers = [state.optimizer, *([adversary.optimizer] if adversary is not None else [])]
    scheduled = [state.optimizer, *([state.alignment.optimizer] if state.alignment is not None else [])]
    optimizers += scheduled[1:]
    if state.scaler is not None:
        terms["loss_scale"] = state.scaler.scale(terms["total"].new_ones(()))
        run.accelerator.unscale_gradients(optimizers)
    terms["grad_norm"] = clip_grad_norm_(state.vae.parameters(), run.config.optim.max_grad_norm)
    finite = torch.isfinite(terms["grad_norm"]) & torch.isfinite(terms["total"])
    if adversary is not None:
        terms["d_grad_norm"] = clip_grad_norm_(
            adversary.discriminator.parameters(), run.config.optim.max_grad_norm
        )
        finite = finite & torch.isfinite(terms["d_grad_norm"])
    if state.alignment is not None:  # its projection's gradient may overflow alone: sums over all places
        gradients = [each.grad for each in state.alignment.projection.parameters() if each.grad is not None]
        finite = finite & torch.isfinite(get_total_norm(gradients))
    # all processes agree, and count every unusable image, by one reduction and one wait for the device
    skipped = terms["total"].new_tensor(sum(len(batch.skipped) for batch in batches))
    logits = [terms[name] for name in ("logits_real", "logits_fake") if name in terms]
    found = run.accelerator.reduce(torch.stack([finite.to(skipped), skipped, *logits]), "sum")
    agreed, skipped_by_all = found[:2].tolist()
    state.skipped_images += int(skipped_by_all)
    all_finite = agreed == run.accelerator.num_processes
    state.count_step(all_finite)
    if state.scaler is not None:
        state.scaler.update()  # by the gradients, which are the same in all processes

    # 4. Update both networks and the average, or nothing at all.
    if all_finite:
        # the step has been counted: its own number, from 0, is one less
        for optimizer in scheduled:
            set_learning_rate(optimizer, run.config.optim, state.step - 1, run.config.train.max_steps)
        for optimizer in optimizers:
            optimizer.step()
        if adversary is not None:
            adversary.remember(found[2:] / run.accelerator.num_processes)
        state.ema.update(state.vae, state.step)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return terms


def plain_pass(run: Run, inputs: list[Inputs]) -> Terms:
    """Forward and backward of every batch without a discriminator."""
    sums: Terms = {}
    for number, each in enumerate(inputs):
        with synchronised_last(run, number, len(inputs)):
            outputs = run.model(*each.arguments)  # through the wrapper, or processes would drift apart
            with run.accelerator.autocast():
                nll, terms = run.loss.reconstruction(target_of(run, each, outputs), outputs.reconstructions)
                rest, more = latent_terms(run, outputs, each.target[0].numel(), each.images)
            run.accelerator.backward((nll + rest) / len(inputs))
        add(sums, {**terms, **more, "total": nll + rest}, 1 / len(inputs))
    return sums


def synchronised_last(
    run: Run, number: int, count: int, model: torch.nn.Module | None = None
) -> AbstractContextManager[Any]:
    """Keep gradients local in all but the last of `count` passes."""
    return nullcontext() if number == count - 1 else run.accelerator.no_sync(model or run.model)


def latent_terms(
    run: Run, outputs: TrainingOutputs, elements: int, images: torch.Tensor
) -> tuple[torch.Tensor, Terms]:
    """The weighted sum of the terms on the latents (KL, or agreement with a teacher), and each of them.

    That with a vision model's features counts in full here: its weight is applied to its gradient, where that
    meets the decoder's.
    """
    if outputs.moments is None:  # only a decoder learns
        return next(run.state.vae.parameters()).new_zeros(()), {}
    posterior = Posterior(outputs.moments)
    if outputs.teacher_moments is not None:
        teacher, factor = Posterior(outputs.teacher_moments), run.state.vae.config["scaling_factor"]
        return run.loss.distillation(posterior, teacher, factor, run.config.distil.l1_weight)
    average = partial(run.accelerator.reduce, reduction="mean")
    kl, terms = run.loss.kl(posterior, elements, run.state.step, average)
    if run.state.alignment is None or outputs.aligned is None or outputs.projected is None:
        return kl, terms
    align, more = run.state.alignment.loss(outputs.aligned, outputs.projected, images)
    return kl + align, {**terms, **more}


def target_of(run: Run, each: Inputs, outputs: TrainingOutputs) -> torch.Tensor:
    """What reconstructions (B, C, H, W) are compared with: the original, or first the teacher's picture."""
    if outputs.teacher_pictures is None:
        return each.target
    share = original_share(run.config.distil, run.state.step)
    return torch.lerp(outputs.teacher_pictures.to(each.target), each.target, share)


def add(sums: Terms, terms: Terms, share: float) -> None:
    """Add a share of each term to its sum."""
    for name, value in terms.items():
        sums[name] = sums.get(name, 0) + value.detach() * share


def adversarial_pass(run: Run, inputs: list[Inputs], adversary: Adversary) -> Terms:
    """Forward and backward of every batch for the VAE and for the discriminator.

    The adaptive weight needs the gradients of all batches and processes before any of them is used. So the
    losses are taken back to the reconstructions only, which are small enough to keep, and weighted there.
    With accumulation the VAE's forward is repeated, as the graphs of all batches would fill the memory.
    """
    share, keep = 1 / len(inputs), len(inputs) == 1
    sums: Terms = {}
    judgements = []
    # 2a. Losses back to the reconstructions and to the last layer's weight, of all batches.
    for number, each in enumerate(inputs):
        with torch.set_grad_enabled(keep), synchronised_last(run, number, len(inputs)):
            judgement, at_last_layer = judge(run, each, adversary)
        judgements.append(judgement)
        add(sums, {**judgement.terms, **at_last_layer}, share)
    # 2b. One weight for all: averages over batches and processes first, then norms, then their ratio.
    at_last = torch.stack([sums.pop("nll_at_last"), sums.pop("g_at_last")])
    weight = adaptive_weight(*run.accelerator.reduce(at_last, "mean"))
    weight = weight * run.config.adversarial.disc_weight * adversary.ramp(run.state.step)

    # 2c. On from the reconstructions into the VAE; then the discriminator's own pass.
    for number, (each, judgement) in enumerate(zip(inputs, judgements, strict=True)):
        with synchronised_last(run, number, len(inputs)):
            outputs = judgement.outputs if keep else run.model(*each.arguments)
            rest, more = latent_terms(run, outputs, each.target[0].numel(), each.images)
            at_reconstructions = (judgement.nll_gradient + weight * judgement.g_gradient) * share
            at_reconstructions, rest_share = (
                scaled(run, each) for each in (at_reconstructions, rest * share)
            )
            roots = [(outputs.reconstructions, at_reconstructions), (rest_share, None)]
            roots = roots[: 1 + rest.requires_grad]  # a frozen encoder's KL has no gradient
            torch.autograd.backward(*zip(*roots, strict=True))  # once: processes synchronise in it
        with synchronised_last(run, number, len(inputs), adversary.model), run.accelerator.autocast():
            target = target_of(run, each, outputs)
            fakes: Any = outputs.reconstructions  # there are some: settings refuse an encoder alone here
            seen = each.augmentation(target), each.augmentation(fakes.detach())
            more |= adversary.backward(run.accelerator, *seen, share)
        add(
            sums, {**more, "total": judgement.terms["nll"] + rest + weight * judgement.terms["g_loss"]}, share
        )
    sums.pop("nll")
    return {**sums, "adaptive_weight": weight}


@dataclass
class Judgement:
    """What the losses say of one forward pass's reconstructions, before the backward through the VAE."""

    outputs: TrainingOutputs
    nll_gradient: torch.Tensor  # at the reconstructions, (B, C, H, W)
    g_gradient: torch.Tensor  # likewise
    terms: Terms


def judge(run: Run, each: Inputs, adversary: Adversary) -> tuple[Judgement, Terms]:
    """Forward one batch and take its losses back to the reconstructions and to the decoder's last layer."""
    seen: list[torch.Tensor] = []
    last = run.state.vae.decoder.conv_out
    hook = last.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    try:
        outputs = run.model(*each.arguments)
    finally:
        hook.remove()
    with torch.enable_grad(), run.accelerator.autocast():
        reconstructions = outputs.reconstructions.detach().requires_grad_()
        nll, terms = run.loss.reconstruction(target_of(run, each, outputs), reconstructions)
        nll_gradient = gradient_of(run, nll, reconstructions)
        g_loss = adversary.generator_loss(each.augmentation(reconstructions))
        g_gradient = gradient_of(run, g_loss, reconstructions)
    # (C, c_last, kh, kw): the kernel's gradient from what enters and leaves it, without a second backward
    entering = seen[0].to(nll_gradient.dtype)  # (B, c_last, H, W)
    at_last = {
        f"{name}_at_last": conv2d_weight(entering, last.weight.shape, gradient, padding=last.padding)
        for name, gradient in (("nll", nll_gradient), ("g", g_gradient))
    }
    return Judgement(outputs, nll_gradient, g_gradient, {**terms, "nll": nll, "g_loss": g_loss}), at_last


def gradient_of(run: Run, loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The gradient of a loss at a tensor, in its own units whatever the scale of its backward."""
    (gradient,) = torch.autograd.grad(scaled(run, loss), at)
    return gradient if run.state.scaler is None else gradient / scaled(run, gradient.new_ones(()))


def scaled(run: Run, values: torch.Tensor) -> torch.Tensor:
    """Values to begin a backward with: in fp16 large enough that what they lead to does not vanish."""
    return values if run.state.scaler is None else run.state.scaler.scale(values)
