"""The adversarial half of training: PatchGAN, its optimizer, and the weight of g_loss."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.func import functional_call
from torch.optim import AdamW

from latentvae.training.config import AdversarialConfig, Config
from latentvae.training.losses import d_loss, g_loss

GROUPS = 8  # of GroupNorm; they must divide the width


class PatchGAN(nn.Module):
    """Logits for overlapping patches; positive means "real". 70x70 pixels per patch with three layers.

    Isola et al. 2017 (pix2pix), with the widths of LDM's `NLayerDiscriminator`. GroupNorm instead of
    BatchNorm: no statistics are shared between images, so ranks need none of each other's, and real and fake
    images can go through together.

    Args:
        in_channels: of the images.
        width: channels of the first layer; doubled with each of the others up to eight times.
        layers: strided layers; each doubles the stride.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.layers = layers
        widths = [width * min(2**level, 8) for level in range(layers + 1)]
        # (B, C, H, W) -> (B, width, H/2, W/2) -> ... -> (B, 1, h, w); kernels of 4, as LDM's
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
                nn.GroupNorm(GROUPS, widths[level]),
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
        return smallest_input(self.layers)


def smallest_input(layers: int) -> int:
    """The side of images, in pixels, of which a discriminator of so many layers makes one patch."""
    # every strided layer halves; the last two, of kernel 4 and padding 1, take one pixel each
    return 3 * 2**layers


def _initialise(module: nn.Module) -> None:
    """DCGAN's: weights drawn with a standard deviation of 0.02 (Radford et al. 2015)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Adversary:
    """The discriminator and its optimizer, built with the run and touched only from `disc_start` on.

    Args:
        config: of the discriminator.
        discriminator: on its device.
    """

    def __init__(self, config: AdversarialConfig, discriminator: PatchGAN) -> None:
        self.config = config
        self.discriminator = discriminator
        # betas of LDM: little momentum, as the opponent moves
        self.optimizer = AdamW(discriminator.parameters(), lr=config.lr, betas=(0.5, 0.9), weight_decay=0.0)
        self.model: nn.Module = discriminator

    @classmethod
    def build(cls, config: Config, channels: int, device: torch.device) -> "Adversary | None":
        """A fresh discriminator of the run's precision, or None where the run has no adversarial loss."""
        if config.adversarial.disc_weight == 0:
            return None
        discriminator = PatchGAN(channels, config.adversarial.width, config.adversarial.layers)
        discriminator.to(device, config.train.dtype).to(memory_format=config.train.memory_format)
        return cls(config.adversarial, discriminator)

    def prepare(self, accelerator: Accelerator) -> None:
        """Wrap the discriminator for its own step, in which processes share gradients."""
        self.model = accelerator.prepare_model(self.discriminator)

    def ramp(self, step: int) -> float:
        """Share of disc_weight at an optimizer step: 0 before disc_start, then linear to 1 over disc_ramp."""
        return min(1.0, max(0, step - self.config.disc_start + 1) / (self.config.disc_ramp + 1))

    def generator_loss(self, reconstructions: torch.Tensor) -> torch.Tensor:
        """g_loss through frozen weights: its backward leaves nothing in the discriminator."""
        weights = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        return g_loss(
            functional_call(self.discriminator, weights, (reconstructions,)).to(reconstructions.dtype)
        )

    def backward(
        self, accelerator: Accelerator, images: torch.Tensor, reconstructions: torch.Tensor, share: float
    ) -> dict[str, torch.Tensor]:
        """Backward of `share` times d_loss on images and detached reconstructions; returns the terms."""
        # (2B, 1, h, w): real and fake in one pass, as no norm mixes images
        logits = self.model(torch.cat([images, reconstructions.detach().to(images.dtype)]))
        real, fake = logits.to(images.dtype).chunk(2)
        loss = d_loss(real, fake)
        accelerator.backward(loss * share)
        return {
            "d_loss": loss.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }
