"""A student begins as its teacher: an AutoencoderTiny's convolutions, placed in the resnets of a stock VAE.

An AutoencoderTiny is convolutions and ReLU, block after block x <- relu(x + c3 relu(c2 relu(c1 x))). Stock
resnets have no ReLU, normalise every map, and leave no room between two convolutions for a third, yet two of
them compute such a block:

- **Anchors.** Two channels hold +A and -A, far above all else, so that they alone decide a GroupNorm's
  deviation; one more holds minus the sum of the others, so that the mean is 0. A norm of one group is then
  an affine map, whose weights undo it.
- **SiLU** far from 0 is ReLU, so maps are scaled up inside; scaled far down it is half of its input.
- **The stream** of a level holds x and, beside it, u = c2 relu(c1 x). The first resnet writes u and takes the
  old one out; the second adds c3 relu(u) + relu(-t), where t = x + c3 relu(u): together relu(t).

What has no room in a level of fewer channels than 2 x 64 + 3 is left out: the channels of u that matter
least, and the rest is fitted to what all of them gave. Outermost levels (of whole pixels) are not the
teacher's: its 64 channels there would cost more than all else. They begin at random and have to be learned.

Stock's strided convolutions read pixels 2i to 2i + 2, the teacher's 2i - 1 to 2i + 1, so maps are moved by
one pixel on the way; the encoder's levels have a resnet fewer than the decoder's, and two lose a block each.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from latentvae.base.errors import ConfigError
from latentvae.training.distillation import Teacher
from latentvae.training.grafts import (
    ANCHOR,
    FIT_ROWS,
    LINEAR,
    RMS,
    SPARE,
    Conv,
    Half,
    anchor,
    blank,
    drop_anchors,
    let_pass,
    scale_of,
    trace,
)

# what is not the teacher's, and begins at random
NEW = (
    "encoder.conv_in.",
    "encoder.down_blocks.0.",
    "encoder.down_blocks.1.resnets.0.",
    "decoder.up_blocks.3.",
    "decoder.conv_norm_out.",
    "decoder.conv_out.",
)
KNOTS = (0.0, 1.0, 2.0, 3.2, 4.5, 6.0)  # of the pieces of the teacher's soft clamp, 3 tanh(z / 3)
FEW_KNOTS = (0.0, 1.3, 2.8)  # with 16 channels there is room for fewer


def is_transplanted(name: str) -> bool:
    """Whether a parameter is one that `transplant` sets."""
    return not name.startswith(NEW)


def stays_fixed(name: str) -> bool:
    """Whether a parameter only makes stock layers behave as the teacher's: training would undo that.

    Norms whose deviation is the anchors', and the 1x1 convolutions that lead a stream into the next level.
    """
    return is_transplanted(name) and ("norm" in name or "conv_shortcut" in name)


def transplant(vae: AutoencoderKL, teacher: Teacher, images: torch.Tensor) -> float:
    """Give a fresh model the inner levels of a teacher.

    Args:
        vae: changed in place; norms of one group, five resnets a level, no attention.
        teacher: an AutoencoderTiny of the same latent channels and ratio.
        images: (B, 3, H, W) in [-1, 1] on which scales are measured; sides multiples of the ratio.

    Returns:
        R2 of the scaled latents of these images, if what is to be learned gave the teacher's own map.

    Raises:
        ConfigError: a teacher of another class, or a shape that its layers do not fit.
    """
    tiny = teacher.model
    if not isinstance(tiny, AutoencoderTiny):
        raise ConfigError(
            "distil.transplant takes an AutoencoderTiny apart, and model.teacher is a "
            f"{type(tiny).__name__}. Name an AutoencoderTiny, or set distil.transplant=false."
        )
    _check_shape(vae, tiny)
    with torch.no_grad():
        images = images.to(vae.device, vae.dtype)
        _Decoder(vae, teacher, tiny.encode(images).latents).place()
        return _Encoder(vae, teacher, images).place()


def _check_shape(vae: AutoencoderKL, teacher: AutoencoderTiny) -> None:
    config, width = vae.config, teacher.encoder.layers[0].out_channels
    widths, latents = config["block_out_channels"], config["latent_channels"]
    needs = {
        "norm_num_groups is 1": config["norm_num_groups"] == 1,
        "layers_per_block is 5 or more": config["layers_per_block"] >= 5,
        "mid_block_add_attention is false": not config["mid_block_add_attention"],
        "act_fn is silu": config["act_fn"] == "silu",
        "there are four levels": len(widths) == len(teacher.config["num_encoder_blocks"]) == 4,
        f"all but the first of block_out_channels are at least {width + SPARE + 1}": min(widths[1:])
        > width + SPARE,
        f"the last of block_out_channels is at least {width + SPARE + latents}": widths[-1]
        >= width + SPARE + latents,
    }
    if missing := [need for need, met in needs.items() if not met]:
        raise ConfigError(
            f"distil.transplant places a teacher's layers of {width} channels in a student's, and fits only "
            f"where {', '.join(missing)}. Take model.preset=f8c4-deep or f8c16-deep, or set "
            "distil.transplant=false."
        )


class _Decoder(Half):
    """mid_block and up_blocks[0] to [2]; up_blocks[3], of whole pixels, is left to be learned."""

    def __init__(self, vae: AutoencoderKL, teacher: Teacher, scaled_latents: torch.Tensor) -> None:
        super().__init__(vae, teacher)
        self.z = scaled_latents
        self.layers = teacher.model.decoder.layers
        self.blocks, self.between, _ = trace(self.layers, 3 * torch.tanh(scaled_latents / 3))
        up = vae.decoder.up_blocks
        self.levels = [
            [*vae.decoder.mid_block.resnets, *up[0].resnets],
            *(list(up[i].resnets) for i in (1, 2)),
        ]

    def place(self) -> None:
        """See `transplant`."""
        decoder = self.vae.decoder
        scales = [scale_of(*(block.x for block in blocks)) for blocks in self.blocks[:3]]
        self._place_clamp(self.levels[0][0], self.layers[0], scales[0])
        self._place_relu(self.levels[0][1])
        self.place_blocks(self.levels[0][2:], self.blocks[0], scales[0], signed=False)
        ups = [decoder.up_blocks[i].upsamplers[0].conv for i in range(3)]
        for i in (1, 2):
            self.place_between(ups[i - 1], self.between[i], scales[i - 1], scales[i])
            self.place_blocks(self.levels[i], self.blocks[i], scales[i], signed=True)
        self.place_between(ups[2], self.between[3], scales[2], 2.0)  # ordinary sizes for what is learned
        ups[2].bias[-2:] = 0
        latents = self.scaling.unscale(self.z)

        def run() -> None:
            self.vae.decode(latents)

        self.norms.calibrate(run)
        for i, resnets in enumerate(self.levels):
            # where widths change, it is the first resnet that writes
            writers = [decoder.conv_in] if i == 0 else [ups[i - 1]]
            self.balance(resnets, [] if resnets[0].conv_shortcut is not None else writers, [ups[i]], run)
            drop_anchors(resnets[-1])

    def _latents_in_stream(self) -> range:
        return range(self.width, self.width + self.z.shape[1])

    def _place_clamp(self, resnet: Any, first: Conv, scale: float) -> None:
        """The teacher's first convolution of 3 tanh(z / 3), as a sum of bends at KNOTS on either side."""
        vae, (shift, factor) = self.vae, self.scaling
        conv_in, stream = vae.decoder.conv_in, self._latents_in_stream()
        blank(conv_in, resnet.conv1, resnet.conv2)
        if vae.post_quant_conv is not None:
            blank(vae.post_quant_conv)
            let_pass(vae.post_quant_conv, range(len(stream)), range(len(stream)))
        let_pass(conv_in, stream, range(len(stream)), float(factor) * RMS)
        conv_in.bias[list(stream)] = -float(shift) * float(factor) * RMS
        anchor(conv_in)
        room = (resnet.conv1.out_channels - SPARE) // (2 * len(stream))
        knots = torch.tensor(KNOTS if room >= len(KNOTS) else FEW_KNOTS)
        bends = [(sign, float(knot)) for sign in (1, -1) for knot in knots]
        gains = _fit_clamp(self.z, bends)
        for channel, source in enumerate(stream):
            for i, ((sign, knot), gain) in enumerate(zip(bends, gains, strict=True)):
                unit = channel * len(bends) + i
                let_pass(resnet.conv1, [unit], [source], sign * 2 / LINEAR)
                resnet.conv1.bias[unit] = -knot * RMS
                resnet.conv2.weight[: self.width, unit] = first.weight[:, channel] * (gain * scale / RMS)
        resnet.conv2.bias[: self.width] = first.bias * scale
        anchor(resnet.conv1)
        self.norms.plan(resnet.norm1, (stream, LINEAR))
        self.norms.plan(resnet.norm2, (range(len(stream) * len(bends)), 1))

    def _place_relu(self, resnet: Any) -> None:
        """x <- relu(x) as x + relu(-x), and the latents out of the stream."""
        stream = self._latents_in_stream()
        blank(resnet.conv1, resnet.conv2)
        for conv in (resnet.conv1, resnet.conv2):
            let_pass(conv, self.x, self.x)
        let_pass(resnet.conv1, stream, stream, 2 / LINEAR)
        let_pass(resnet.conv2, stream, stream, -2 / LINEAR)
        anchor(resnet.conv1)
        self.norms.plan(resnet.norm1, (self.x, -1), (stream, LINEAR))
        self.norms.plan(resnet.norm2, (self.x, 1), (stream, LINEAR))


class _Encoder(Half):
    """down_blocks[1] to [3] and mid_block, but for the first resnet: it and down_blocks[0] are to be learned.

    Their place is taken, while scales are measured, by the teacher's own map, moved by one pixel.
    """

    def __init__(self, vae: AutoencoderKL, teacher: Teacher, images: torch.Tensor) -> None:
        super().__init__(vae, teacher)
        self.images = images
        self.layers = teacher.model.encoder.layers
        self.blocks, self.between, maps = trace(self.layers, images.add(1).div(2))
        self.first_map = maps[1]
        down = vae.encoder.down_blocks
        self.levels = [
            list(down[1].resnets)[1:],
            list(down[2].resnets),
            [*down[3].resnets, *vae.encoder.mid_block.resnets],
        ]

    def place(self) -> float:
        """See `transplant`."""
        encoder = self.vae.encoder
        blocks = self.blocks[1:]
        scales = [scale_of(*(block.x for block in level)) for level in blocks]
        learned = encoder.down_blocks[1].resnets[0]
        for conv in (learned.conv2, learned.conv_shortcut):  # u is the business of those after it
            conv.weight[self.width :] = 0
            conv.bias[self.width :] = 0
        anchor(learned.conv_shortcut)
        downs = [encoder.down_blocks[i].downsamplers[0].conv for i in (1, 2)]
        self.place_blocks(self.levels[0], blocks[0][: len(self.levels[0]) // 2], scales[0], signed=True)
        self.place_between(downs[0], self.between[2], scales[0], scales[1])
        self.place_blocks(self.levels[1], blocks[1][: (len(self.levels[1]) - 1) // 2], scales[1], signed=True)
        self._place_move(self.levels[1][-1])
        self.place_between(downs[1], self.between[3], scales[1], scales[2])
        self.place_blocks(self.levels[2], blocks[2], scales[2], signed=True)
        self._place_last(scales[2])
        return self._balance_levels(learned, downs, scales[0])

    def _place_move(self, resnet: Any) -> None:
        """Move x by one pixel down and to the right."""
        blank(resnet.conv1, resnet.conv2)
        let_pass(resnet.conv1, self.x, self.x)
        let_pass(resnet.conv2, self.x, self.x, -1.0)
        resnet.conv2.weight[self.x, self.x, 0, 0] = 1.0
        anchor(resnet.conv1)
        self.norms.plan(resnet.norm1, (self.x, 1))
        self.norms.plan(resnet.norm2, (self.x, 1))

    def _place_last(self, scale: float) -> None:
        """The teacher's last convolution, to unscaled latents."""
        encoder, quant = self.vae.encoder, self.vae.quant_conv
        last, latents = self.layers[-1], self.vae.config["latent_channels"]
        shift, factor = (float(x) for x in self.scaling)
        blank(encoder.conv_out)
        encoder.conv_out.weight[:latents, : self.width] = last.weight / (scale * factor)
        encoder.conv_out.bias[:latents] = last.bias / factor + shift
        if quant is not None:
            blank(quant)
            let_pass(quant, range(latents), range(latents))
        (quant or encoder.conv_out).bias[latents:] = self.teacher.logvar
        self.norms.plan(encoder.conv_norm_out, (self.x, 1))

    def _balance_levels(self, learned: Any, downs: list[Conv], scale: float) -> float:
        width = learned.conv2.out_channels
        images, _, height, across = self.first_map.shape
        stand_in = self.first_map.new_zeros(images, width, height, across)
        stand_in[:, : self.width, 1:, 1:] = self.first_map[:, :, :-1, :-1] * scale
        stand_in[:, -2], stand_in[:, -1] = ANCHOR, -ANCHOR
        used = width - SPARE

        def run() -> None:
            self.vae.encode(self.images)

        handle = learned.register_forward_hook(lambda *_: stand_in.clone())
        try:
            self.norms.calibrate(run)
            signs = self.balance(self.levels[0], [learned.conv2, learned.conv_shortcut], [downs[0]], run)
            stand_in[:, :used] *= signs[None, :, None, None]
            stand_in[:, used] = -stand_in[:, :used].sum(1)
            self.norms.calibrate(run)
            for i in (1, 2):
                resnets = self.levels[i]
                writers = [] if resnets[0].conv_shortcut is not None else [downs[i - 1]]
                signs = self.balance(resnets, writers, downs[i:], run)
            self.norms.flip(self.vae.encoder.conv_norm_out, signs)
            self.norms.calibrate(run)
            latents = self.vae.encode(self.images).latent_dist.mean
        finally:
            handle.remove()
        for resnets in self.levels[:2]:
            drop_anchors(resnets[-1])
        wanted = self.scaling.unscale(self.layers(self.images.add(1).div(2)))
        spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
        return 1 - float((latents - wanted).square().sum() / spread)


def _fit_clamp(z: torch.Tensor, bends: list[tuple[int, float]]) -> list[float]:
    """Gains of relu(sign z - knot) whose sum comes closest to 3 tanh(z / 3), on latents and a ramp."""
    some = torch.randperm(z.numel(), generator=torch.Generator().manual_seed(0))[:FIT_ROWS]
    values = torch.cat([z.flatten().cpu()[some], torch.linspace(-7, 7, 2000)]).double()
    pieces = torch.stack([(sign * values - knot).relu() for sign, knot in bends], 1)
    return torch.linalg.lstsq(pieces, 3 * torch.tanh(values / 3)[:, None]).solution[:, 0].tolist()
