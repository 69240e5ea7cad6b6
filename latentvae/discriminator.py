"""PatchGAN: a discriminator that judges overlapping patches, not whole images."""

import torch
from torch import nn

from latentvae.errors import ConfigError


class PatchGAN(nn.Module):
    """Logits for overlapping patches; positive means "real". 70x70 pixels per patch with three layers.

    Isola et al. 2017 (pix2pix), with the widths of LDM's `NLayerDiscriminator`. GroupNorm instead of
    BatchNorm: no statistics are shared between images, so ranks need none of each other's, and real and fake
    images can go through together.

    Args:
        in_channels: of the images.
        width: channels of the first layer; doubled with each of the others up to eight times.
        layers: strided layers; each doubles the stride.
        groups: of the norms.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3, groups: int = 8) -> None:
        super().__init__()
        if width % groups:
            raise ConfigError(f"a discriminator of width {width} cannot be divided into {groups} groups.")
        widths = [width * min(2**level, 8) for level in range(layers + 1)]
        stages: list[nn.Module] = [
            nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for level in range(1, layers + 1):
            stages += [
                # the bias would be undone by the norm
                nn.Conv2d(
                    widths[level - 1], widths[level], 4, 2 if level < layers else 1, padding=1, bias=False
                ),
                nn.GroupNorm(groups, widths[level]),
                nn.LeakyReLU(0.2),
            ]
        stages.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.stages = nn.Sequential(*stages)
        self.apply(_initialise)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Patch logits (B, 1, h, w) of images (B, C, H, W) in [-1, 1]."""
        return self.stages(images)

    @property
    def min_size(self) -> int:
        """The smallest side that leaves one patch."""
        layers = sum(isinstance(stage, nn.GroupNorm) for stage in self.stages)
        return 2**layers * 3


def _initialise(module: nn.Module) -> None:
    """DCGAN's: weights drawn with a standard deviation of 0.02 (Radford et al. 2015)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
