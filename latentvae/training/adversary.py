"""The adversarial half of training: discriminator, its optimizer, and the weight of g_loss."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.func import functional_call
from torch.optim import AdamW

from latentvae.discriminator import PatchGAN
from latentvae.losses import d_loss, g_loss
from latentvae.training.config import AdversarialConfig, Config


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
        logits = self.model(torch.cat([images, reconstructions.detach().to(images.dtype)]))
        real, fake = logits.to(images.dtype).chunk(2)
        loss = d_loss(real, fake)
        accelerator.backward(loss * share)
        return {
            "d_loss": loss.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }
