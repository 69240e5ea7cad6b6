"""LDM's naming rules and formulas, written down once more: random weights, and LDM's results."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


class LDM:
    """Random weights under LDM's names, and LDM's own computation with them."""

    def __init__(
        self,
        widths: tuple[int, ...],
        layers: int = 1,
        attention: bool = True,
        quant: bool = True,
        z: int = 4,
        inside: Collection[int] = (),  # levels with attention after each block, as in kl-f16 and kl-f32
        groups: int = 32,
    ) -> None:
        self.widths, self.layers, self.groups = widths, layers, groups
        self.weights: Tensors = {}
        top, last = len(widths) - 1, widths[-1]
        self.conv("encoder.conv_in", 3, widths[0])
        self.conv("decoder.conv_in", z, last)
        width = widths[0]
        for level, out in enumerate(widths):
            for number in range(layers):
                self.block(f"encoder.down.{level}.block.{number}", out if number else width, out)
                if level in inside:
                    self.attend(f"encoder.down.{level}.attn.{number}", out)
            if level < top:
                self.conv(f"encoder.down.{level}.downsample.conv", out, out)
            width = out
        for level in reversed(range(len(widths))):
            for number in range(layers + 1):
                self.block(
                    f"decoder.up.{level}.block.{number}", widths[level] if number else width, widths[level]
                )
                if level in inside:
                    self.attend(f"decoder.up.{level}.attn.{number}", widths[level])
            if level > 0:
                self.conv(f"decoder.up.{level}.upsample.conv", widths[level], widths[level])
            width = widths[level]
        for part, channels, out in (("encoder", last, 2 * z), ("decoder", widths[0], 3)):
            for name in ("block_1", "block_2"):
                self.block(f"{part}.mid.{name}", last, last)
            if attention:
                self.attend(f"{part}.mid.attn_1", last)
            self.norm(f"{part}.norm_out", channels)
            self.conv(f"{part}.conv_out", channels, out)
        if quant:
            self.conv("quant_conv", 2 * z, 2 * z, 1)
            self.conv("post_quant_conv", z, z, 1)

    def conv(self, name: str, channels: int, out: int, size: int = 3) -> None:
        self.weights[f"{name}.weight"] = torch.randn(out, channels, size, size) / (channels * size**2) ** 0.5
        self.weights[f"{name}.bias"] = torch.randn(out) * 0.1

    def norm(self, name: str, channels: int) -> None:
        self.weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels)
        self.weights[f"{name}.bias"] = 0.1 * torch.randn(channels)

    def attend(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", channels, channels, 1)

    def block(self, name: str, channels: int, out: int) -> None:
        self.norm(f"{name}.norm1", channels)
        self.conv(f"{name}.conv1", channels, out)
        self.norm(f"{name}.norm2", out)
        self.conv(f"{name}.conv2", out, out)
        if channels != out:
            self.conv(f"{name}.nin_shortcut", channels, out, 1)

    def run_conv(self, name: str, x: torch.Tensor, **options: Any) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        options.setdefault("padding", weight.shape[-1] // 2)
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], **options)

    def run_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(
            x, self.groups, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6
        )

    def run_block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        h = self.run_conv(f"{name}.conv1", F.silu(self.run_norm(f"{name}.norm1", x)))
        h = self.run_conv(f"{name}.conv2", F.silu(self.run_norm(f"{name}.norm2", h)))
        return h + (
            self.run_conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.bias" in self.weights else x
        )

    def run_attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Unchanged where there is none of that name."""
        if f"{name}.q.weight" not in self.weights:
            return x
        h = self.run_norm(f"{name}.norm", x)
        q, k, v = (self.run_conv(f"{name}.{n}", h).flatten(2) for n in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, dim=2)
        return x + self.run_conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def run_middle(self, part: str, x: torch.Tensor) -> torch.Tensor:
        x = self.run_attention(f"{part}.mid.attn_1", self.run_block(f"{part}.mid.block_1", x))
        return self.run_block(f"{part}.mid.block_2", x)

    def run_out(self, part: str, x: torch.Tensor) -> torch.Tensor:
        return self.run_conv(f"{part}.conv_out", F.silu(self.run_norm(f"{part}.norm_out", x)))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        x = self.run_conv("encoder.conv_in", x)
        for level in range(len(self.widths)):
            for number in range(self.layers):
                x = self.run_block(f"encoder.down.{level}.block.{number}", x)
                x = self.run_attention(f"encoder.down.{level}.attn.{number}", x)
            if level < len(self.widths) - 1:
                x = F.pad(x, (0, 1, 0, 1))
                x = self.run_conv(f"encoder.down.{level}.downsample.conv", x, stride=2, padding=0)
        x = self.run_out("encoder", self.run_middle("encoder", x))
        return self.run_conv("quant_conv", x) if "quant_conv.weight" in self.weights else x

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        x = self.run_conv("post_quant_conv", x) if "post_quant_conv.weight" in self.weights else x
        x = self.run_middle("decoder", self.run_conv("decoder.conv_in", x))
        for level in reversed(range(len(self.widths))):
            for number in range(self.layers + 1):
                x = self.run_block(f"decoder.up.{level}.block.{number}", x)
                x = self.run_attention(f"decoder.up.{level}.attn.{number}", x)
            if level > 0:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.run_conv(f"decoder.up.{level}.upsample.conv", x)
        return self.run_out("decoder", x)
