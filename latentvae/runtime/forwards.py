"""Forwards that `optimize` puts in the place of diffusers' own: the same results, to rounding, sooner.

Convolutions, norms and activations take arguments that only these forwards pass to each other, so that work
can be done in another module's place. They do so only where nobody would see it: whatever is attached to one
of these modules, or changed in it, `plain` finds at the call, and then it gets and gives what stock does.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from latentvae.runtime.kernels import blocks, choices, compiled, groupnorm, winograd
from latentvae.runtime.patches import patches_of, underlying
from latentvae.runtime.plain import is_3x3, is_changed, is_nearest, is_plain, is_simple, takes_ours

# --- upsampling


def upsample(
    self: Upsample2D, x: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Upsample2D that leaves the upsampling to its convolution."""
    # an output_size need not be twice the input's: only doubling is folded
    asked = output_size is not None or args or kwargs
    if asked or is_changed(self) or not is_nearest(self) or not _folds(conv_of(self), x):
        return underlying(self, "optimize")(x, output_size, *args, **kwargs)
    conv = conv_of(self)
    return _handed_on(self, conv(x, upsample=True))  # (B, C, h, w) -> (B, K, 2h, 2w)


def conv_of(upsampler: Upsample2D) -> Any:
    """The convolution after the upsampling."""
    return upsampler.conv if upsampler.name == "conv" else upsampler.Conv2d_0


def _folds(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether a convolution takes our argument, and transposed ones are known to work: not beyond 32 bits."""
    if not takes_ours(conv) or not is_3x3(conv):
        return False
    size = 4 * x.numel() // conv.in_channels * conv.out_channels
    return x.device.type == "cpu" or (x.device.type == "cuda" and size < 2**31)


def folding_conv(self: nn.Conv2d, x: torch.Tensor, upsample: bool = False) -> torch.Tensor:
    """A 3x3 convolution, after nearest x2 upsampling if so asked: 16 products for four outputs, not 36."""
    if not upsample:
        return underlying(self, "optimize")(x)
    return F.conv_transpose2d(x, folded(self.weight), self.bias, stride=2, padding=1)


def folded(weight: torch.Tensor) -> torch.Tensor:
    """A 3x3 kernel (K, C, 3, 3) after x2 nearest, as that of a transposed convolution: (C, K, 4, 4).

    Its stride is 2, its padding 1. Along each axis (w0, w1, w2) becomes (w2, w1 + w2, w0 + w1, w0), summed in
    float32 at least and rounded once. Differentiable.
    """
    w = weight.to(torch.promote_types(weight.dtype, torch.float32)).transpose(0, 1)
    # (C, K, 3, 3) to (C, K, 4, 3) to (C, K, 4, 4)
    w = torch.stack((w[:, :, 2], w[:, :, 1] + w[:, :, 2], w[:, :, 0] + w[:, :, 1], w[:, :, 0]), dim=2)
    w = torch.stack((w[..., 2], w[..., 1] + w[..., 2], w[..., 0] + w[..., 1], w[..., 0]), dim=3)
    return w.to(weight.dtype)


# --- resnets


def resnet(
    self: ResnetBlock2D, x: torch.Tensor, temb: torch.Tensor | None = None, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """ResnetBlock2D without the steps that do nothing: no dropout, no division by 1, sums in place."""
    # AutoencoderKL passes none of these: whoever does wants the steps that are left out here
    asked = temb is not None or args or kwargs
    if asked or is_changed(self) or not is_simple(self) or not _runs_unseen(self):
        return underlying(self, "optimize")(x, temb, *args, **kwargs)
    hidden = _normed_conv(self.norm1, self.nonlinearity, self.conv1, x)
    if self.conv_shortcut is not None:
        # contiguous as in diffusers, where DDP would warn of the strides of gradients
        x = self.conv_shortcut(x.contiguous() if self.training else x)
    hidden = _normed_conv(self.norm2, self.nonlinearity, self.conv2, hidden, plus=x)
    # dividing by 1, as stock does, is a pass over the map that changes nothing
    return _handed_on(self, hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor)


def _handed_on(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a module gives or gets; its statistics are forgotten where a hook might change it unseen."""
    # compiled graphs measure nothing to forget, and cannot ask
    if not torch.compiler.is_compiling() and (x.is_inference() or not is_plain(module)):
        compiled.forget_statistics(x)
    return x


def _runs_unseen(self: ResnetBlock2D) -> bool:
    """Whether nobody would see that dropout, which does nothing, is not called, and the shortcut early."""
    dropout, shortcut = self.dropout, self.conv_shortcut
    idle = type(dropout) is nn.Dropout and not (dropout.training and dropout.p) and is_plain(dropout)
    return idle and (shortcut is None or is_plain(shortcut))


def _normed_conv(
    norm: nn.Module, activation: nn.Module, conv: nn.Module, x: torch.Tensor, plus: torch.Tensor | None = None
) -> torch.Tensor:
    """Norm, activation, convolution and sum: in one go over x where the patches of all three allow it."""
    overwrites = takes_ours(norm, activation)  # else somebody may have kept what the norm gave
    if overwrites and takes_ours(conv) and is_3x3(conv):
        hidden = norm(x, deferred=True)
        if isinstance(hidden, blocks.Affine):  # the convolution applies it block by block, in the cache
            return conv(x, before=hidden, plus=plus)
    else:
        hidden = norm(_handed_on(norm, x))
    hidden = conv(activation(hidden, overwrite=True) if overwrites else activation(hidden))
    return _sum(hidden, plus) if plus is None or is_plain(conv) else plus + hidden


def _sum(hidden: torch.Tensor, plus: torch.Tensor | None) -> torch.Tensor:
    """hidden + plus, written over hidden unless gradients or another dtype are wanted."""
    if plus is None:
        return hidden
    # in place would break a graph, and would round a wider sum to the dtype of hidden
    if hidden.requires_grad or plus.requires_grad or hidden.dtype != plus.dtype:
        return plus + hidden
    return hidden.add_(plus)


def group_norm(self: nn.GroupNorm, x: torch.Tensor, deferred: bool = False) -> torch.Tensor | blocks.Affine:
    """GroupNorm that measures large maps well; if `deferred`, it may say what to do to x, and not do it."""
    if is_changed(self) or not groupnorm.suits_norm(self, x):
        return underlying(self, "optimize")(x)
    affine = groupnorm.affine(self, x)
    return affine if deferred else groupnorm.apply(x, affine, silu=False)


def silu(self: nn.SiLU, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """SiLU that overwrites its input if asked to: the output of a norm, which nobody else reads."""
    if not overwrite:
        return underlying(self, "optimize")(x)
    return F.silu(x, inplace=not x.requires_grad)


def conv(
    self: nn.Conv2d,
    x: torch.Tensor,
    upsample: bool = False,
    before: blocks.Affine | None = None,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """A 3x3 convolution of x normalised and activated as `before` says, or upsampled, with `plus` added."""
    if is_changed(self) or not is_3x3(self):  # then nobody passes arguments of ours
        return underlying(self, "optimize")(x)
    scheme = winograd.UPSAMPLING if upsample else winograd.CONVOLUTION

    def directly() -> torch.Tensor:
        given = x if before is None else groupnorm.apply(x, before, silu=True)
        return _sum(folding_conv(self, given, upsample), plus)

    def in_blocks() -> torch.Tensor:
        if is_compiled:
            return compiled.convolve(x, self, upsample, before, plus)
        return winograd.convolve(x, self, scheme, before, plus)

    # blocks write into plain buffers, where autograd cannot follow
    recorded = plus is not None and plus.requires_grad and torch.is_grad_enabled()
    is_compiled = not recorded and compiled.suits_conv(self, x, plus)
    if recorded or not (is_compiled or blocks.suits_blocks(self, x)):
        return directly()
    faster = compiled if is_compiled else winograd
    return choices.run(
        f"{'upsample + conv' if upsample else 'conv'} {self.in_channels} to {self.out_channels}",
        winograd.pixels(x, scheme),
        in_blocks,
        directly,
        rule=faster.is_likely_faster(self, x, scheme),
    )


def takes_norms(module: nn.Conv2d) -> bool:
    """Whether a convolution takes what comes `before` it: `conv` is its forward, and nobody would see it."""
    ours = patches_of(module)
    if ours is None or not any(function is conv for _, function in ours.functions):
        return False
    return takes_ours(module) and is_3x3(module)


# --- memory format


def conv_in(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A convolution of x in channels_last."""
    return underlying(self, "optimize")(x.contiguous(memory_format=torch.channels_last))


def conv_out(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A convolution with a contiguous result."""
    return underlying(self, "optimize")(x).contiguous()
