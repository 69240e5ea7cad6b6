"""The parts that `transplant` places: a teacher's blocks in pairs of resnets, norms that undo themselves.

What they compute, and why, stands at the top of latentvae/training/transplant.py.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.functional import unfold

from latentvae.training.distillation import Teacher

Conv = Any  # nn.Conv2d with a bias, which torch's type does not promise

RMS = 30.0  # of maps inside: SiLU differs from ReLU by at most 0.28, about 0
ANCHOR = 170 * RMS  # 120 such channels add a thousandth to the deviation; a twelfth of fp16's range
LINEAR = 0.03 / RMS  # the scale at which SiLU is linear to 1.5 %
FIT_ROWS = 20_000  # pixels that a refitted convolution is fitted on
SPARE = 3  # channels of every map that hold the balance and the anchors


class Norms:
    """What each GroupNorm with its SiLU is to do to each channel: a slope, 0 where the channel is not read.

    1 is ReLU, -1 the ReLU of the negative, LINEAR the identity (times LINEAR / 2).
    """

    def __init__(self) -> None:
        self.slopes: dict[nn.GroupNorm, torch.Tensor] = {}

    def plan(self, norm: nn.GroupNorm, *parts: tuple[Iterable[int], float]) -> None:
        """Give channels their slopes; the others get none."""
        slopes = torch.zeros_like(norm.weight)
        for channels, slope in parts:
            slopes[list(channels)] = slope
        self.slopes[norm] = slopes

    def calibrate(self, run: Callable[[], Any]) -> None:
        """Let every planned norm undo what it does to the maps of a run, in the order of the run."""

        def set_affine(norm: nn.GroupNorm, inputs: tuple[torch.Tensor]) -> None:
            norm.weight.copy_(self.slopes[norm] * inputs[0].std(unbiased=False))
            norm.bias.copy_(self.slopes[norm] * inputs[0].mean())

        with _hooks((norm, set_affine) for norm in self.slopes):
            run()

    def flip(self, norm: nn.GroupNorm, signs: torch.Tensor) -> torch.Tensor:
        """Account for channels that now come negated; the signs with which the norm hands them on."""
        slopes, used = self.slopes[norm], len(signs)
        linear = (slopes[:used] != 0) & (slopes[:used].abs() < 1)
        slopes[:used] = torch.where(linear, slopes[:used], slopes[:used] * signs)
        return torch.where(linear, signs, torch.ones_like(signs))


@contextmanager
def _hooks(pairs: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Block:
    """A block of the teacher, and the sizes of its maps on the images at hand."""

    convs: tuple[Conv, Conv, Conv]
    x: torch.Tensor
    u: torch.Tensor
    p_scale: float  # what brings c1 x to RMS
    u_scale: float

    @classmethod
    def of(cls, block: Any, x: torch.Tensor) -> "Block":
        first, second, third = (block.conv[i] for i in (0, 2, 4))
        p = first(x)
        u = second(p.relu())
        return cls((first, second, third), x, u, scale_of(p), scale_of(u))

    def third_on(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The `count` channels of u that matter most; weight and bias of c3 on them, by least squares."""
        third, relu = self.convs[2], self.u.relu()
        if count >= relu.shape[1]:
            return torch.arange(relu.shape[1]), third.weight, third.bias
        strength = relu.square().mean((0, 2, 3)) * third.weight.square().sum((0, 2, 3))
        keep = strength.argsort(descending=True)[:count].sort().values
        patches = unfold(relu[:, keep], 3, padding=1).transpose(1, 2).flatten(0, 1)
        wanted = third(relu).movedim(1, -1).flatten(0, 2)
        rows = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:FIT_ROWS]
        patches, wanted = patches[rows].double(), wanted[rows].double()
        patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
        gram = patches.T @ patches
        gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        solution = torch.linalg.solve(gram, patches.T @ wanted).to(third.weight)
        return keep, solution[:-1].T.reshape(-1, count, 3, 3), solution[-1]


def scale_of(*maps: torch.Tensor) -> float:
    """What brings maps to RMS."""
    return RMS / float(torch.stack([each.square().mean() for each in maps]).mean().sqrt())


def blank(*convs: Conv) -> None:
    """Let convolutions give nothing."""
    for conv in convs:
        conv.weight.zero_()
        conv.bias.zero_()


def anchor(conv: Conv) -> None:
    """Let a convolution write the anchors."""
    conv.bias[-2], conv.bias[-1] = ANCHOR, -ANCHOR


def let_pass(conv: Conv, outs: Iterable[int], ins: Iterable[int], gain: float = 1.0) -> None:
    """Let channels through: `gain` in the middle of the kernel."""
    middle = conv.kernel_size[0] // 2
    for out, into in zip(outs, ins, strict=True):
        conv.weight[out, into, middle, middle] = gain


class Half:
    """What encoder and decoder share: blocks into pairs of resnets, and signs that balance every map."""

    def __init__(self, vae: AutoencoderKL, teacher: Teacher) -> None:
        self.vae, self.teacher, self.scaling = vae, teacher, teacher.scaling
        self.norms = Norms()
        self.width = teacher.model.encoder.layers[0].out_channels
        self.x = range(self.width)

    def place_blocks(self, resnets: list[Any], blocks: list[Block], scale: float, signed: bool) -> None:
        """Blocks of a level into pairs of its resnets; the rest adds nothing until it learns to.

        Args:
            signed: the first block's input may be negative, as a convolution's output is.
        """
        room = min(resnets[0].conv2.out_channels - self.width - SPARE, self.width)
        for i, block in enumerate(blocks):
            keep, weight, bias = block.third_on(room)
            first, second = resnets[2 * i : 2 * i + 2]
            self._place_first(first, block, scale, keep, old_u=i > 0, signed=signed and i == 0)
            weight, bias = weight * (scale / block.u_scale), bias * scale
            self._place_second(second, weight, bias, signed and i == 0)
        for resnet in resnets[2 * len(blocks) :]:
            blank(resnet.conv2)
            anchor(resnet.conv1)
            self.norms.plan(resnet.norm1, (self.x, 1))
            self.norms.plan(resnet.norm2, (range(resnet.conv1.out_channels - SPARE), 1))

    def _place_first(
        self, resnet: Any, block: Block, scale: float, keep: torch.Tensor, old_u: bool, signed: bool
    ) -> None:
        """Write u = c2 relu(c1 x) in place of the old one. Inside: c1 x, and the old u on its way."""
        first, second, _ = block.convs
        u = range(self.width, self.width + len(keep))
        blank(resnet.conv1, resnet.conv2)
        gain = 2 / LINEAR if signed else 1.0
        resnet.conv1.weight[self.x, : self.width] = first.weight * (block.p_scale / scale * gain)
        resnet.conv1.bias[self.x] = first.bias * block.p_scale
        resnet.conv2.weight[u, : self.width] = second.weight[keep] * (block.u_scale / block.p_scale)
        resnet.conv2.bias[u] = second.bias[keep] * block.u_scale
        if old_u:
            let_pass(resnet.conv1, u, u, 2 / LINEAR)
            let_pass(resnet.conv2, u, u, -2 / LINEAR)
        anchor(resnet.conv1)
        old = u if old_u else ()
        self.norms.plan(resnet.norm1, (self.x, LINEAR if signed else 1), (old, LINEAR))
        self.norms.plan(resnet.norm2, (self.x, 1), (old, LINEAR))
        if resnet.conv_shortcut is not None:
            blank(resnet.conv_shortcut)
            let_pass(resnet.conv_shortcut, self.x, self.x)
            anchor(resnet.conv_shortcut)

    def _place_second(self, resnet: Any, weight: torch.Tensor, bias: torch.Tensor, signed: bool) -> None:
        """x <- relu(t), t = x + c3 relu(u). Inside: t, and relu(u) on its way."""
        u = range(self.width, self.width + weight.shape[1])
        blank(resnet.conv1, resnet.conv2)
        let_pass(resnet.conv1, self.x, self.x, 2 / LINEAR if signed else 1.0)
        let_pass(resnet.conv1, u, u)
        let_pass(resnet.conv2, self.x, self.x)
        for conv in (resnet.conv1, resnet.conv2):
            conv.weight[: self.width, u] = weight
            conv.bias[: self.width] = bias
        anchor(resnet.conv1)
        self.norms.plan(resnet.norm1, (self.x, LINEAR if signed else 1), (u, 1))
        self.norms.plan(resnet.norm2, (self.x, -1), (u, 1))

    def place_between(self, conv: Conv, source: Conv, scale_in: float, scale_out: float) -> None:
        """A convolution from one level's x to the next one's; anchors begin anew."""
        blank(conv)
        conv.weight[: self.width, : self.width] = source.weight * (scale_out / scale_in)
        if source.bias is not None:
            conv.bias[: self.width] = source.bias * scale_out
        anchor(conv)
        keep_balance(conv)

    def balance(
        self, resnets: list[Any], writers: list[Any], readers: list[Any], run: Callable[[], Any]
    ) -> torch.Tensor:
        """Choose signs of a level's channels, and keep the balance, so that no norm's mean moves with images.

        Args:
            writers: convolutions outside that write into the stream.
            readers: those outside that read it as it is.

        Returns:
            The signs of the stream's channels.
        """
        stream, inside = self._means(resnets, run)
        signs = opposed_signs(torch.cat(stream))
        for i, resnet in enumerate(resnets):
            hidden = opposed_signs(inside[i])
            if resnet.conv_shortcut is None:  # else it reads the level before
                flip_columns(resnet.conv1, self.norms.flip(resnet.norm1, signs))
            flip_rows(resnet.conv1, hidden)
            flip_columns(resnet.conv2, self.norms.flip(resnet.norm2, hidden))
            flip_rows(resnet.conv2, signs)
            if resnet.conv_shortcut is not None:
                flip_rows(resnet.conv_shortcut, signs)
        for conv in writers:
            flip_rows(conv, signs)
        for conv in readers:
            flip_columns(conv, signs)
        self.norms.calibrate(run)
        return signs

    def _means(
        self, resnets: list[Any], run: Callable[[], Any]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Means over the pixels (images, channels) of what the norms of a level are given."""
        used = resnets[0].conv2.out_channels - SPARE
        stream: list[torch.Tensor] = []
        inside: list[torch.Tensor] = []

        def into(means: list[torch.Tensor]) -> Callable[..., None]:
            return lambda _, inputs: means.append(inputs[0].mean((2, 3))[:, :used])

        own = [resnet for resnet in resnets if resnet.conv_shortcut is None]
        pairs = [(resnet.norm1, into(stream)) for resnet in own]
        with _hooks([*pairs, *((resnet.norm2, into(inside)) for resnet in resnets)]):
            run()
        return stream, inside


def opposed_signs(means: torch.Tensor) -> torch.Tensor:
    """Signs (channels) with which the sum over channels stays small in every image; means of images."""
    total, signs = torch.zeros_like(means[:, 0]), torch.ones_like(means[0])
    for channel in means.abs().mean(0).argsort(descending=True):
        signs[channel] = -1 if (total * means[:, channel]).sum() > 0 else 1
        total += signs[channel] * means[:, channel]
    return signs


def flip_rows(conv: Conv, signs: torch.Tensor) -> None:
    """Negate channels that a convolution writes."""
    conv.weight[: len(signs)] *= signs[:, None, None, None]
    conv.bias[: len(signs)] *= signs
    keep_balance(conv)


def flip_columns(conv: Conv, signs: torch.Tensor) -> None:
    """Account for negated channels that a convolution reads."""
    conv.weight[:, : len(signs)] *= signs[None, :, None, None]


def keep_balance(conv: Conv) -> None:
    """Let the first spare channel hold minus the sum of those before it."""
    used = conv.out_channels - SPARE
    conv.weight[used] = -conv.weight[:used].sum(0)
    conv.bias[used] = -conv.bias[:used].sum()


def drop_anchors(resnet: Any) -> None:
    """What reads a stream as it is would see nothing but anchors move when it is trained."""
    resnet.conv2.bias[-2:] -= torch.tensor([ANCHOR, -ANCHOR]).to(resnet.conv2.bias)


def trace(layers: nn.Sequential, x: torch.Tensor) -> tuple[list[list[Block]], list[Conv], list[torch.Tensor]]:
    """Of a teacher's half: its blocks by level, the convolution before each level, and the levels' inputs."""
    levels: list[list[Block]] = []
    between: list[Conv] = []
    inputs: list[torch.Tensor] = []
    for layer in layers:
        if hasattr(layer, "conv"):
            if len(levels) < len(between):
                levels.append([])
                inputs.append(x)
            levels[-1].append(Block.of(layer, x))
        elif isinstance(layer, nn.Conv2d):
            between.append(layer)
        x = layer(x)
    return levels, between, inputs
