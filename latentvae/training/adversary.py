"""The adversarial half of training: the two discriminators, their optimizer, and the weight of g_loss."""

from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.optim import AdamW

from latentvae.base.errors import ConfigError, ModelError
from latentvae.base.files import whole_file
from latentvae.models.loading import check_keys
from latentvae.training.alignment import VisionModel
from latentvae.training.config import AdversarialConfig, Config
from latentvae.training.losses import d_loss, g_loss, lecam_loss

GROUPS = 8  # of GroupNorm; they must divide the width
WEIGHTS = "discriminator.safetensors"  # in checkpoints, and in the folder `discriminator` of a run
LECAM_DECAY = 0.99  # of the authors' code


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


class FeatureGAN(nn.Module):
    """Logits for patches, of a frozen vision model's features; positive means "real".

    What a picture shows has been learned by that model, so that the discriminator is small heads, hard to
    teach single images by heart, and looks at more than texture (Projected GANs, Sauer et al. 2021).

    Args:
        vision: gives the features; shared with the alignment of latents where that has the same model.
        width: channels of each head.
        layers: of the vision model that are looked at, each by a head of its own.

    Raises:
        ConfigError: the model has fewer.
    """

    min_size = 1  # images are brought to whole patches

    def __init__(self, vision: VisionModel, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        if layers > vision.depth:
            raise ConfigError(
                f"adversarial.layers={layers}, and the model of adversarial.features has {vision.depth}: set "
                "as many or fewer."
            )
        self.eyes = [vision]  # in a list, as it is no module: neither trained nor saved nor shared out
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(vision.width, width, 1, bias=False),
                nn.GroupNorm(GROUPS, width),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 1, 3, padding=1),
            )
            for _ in range(layers)
        )
        self.apply(_initialise)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, layers, h, w) of images (B, C, H, W) in [-1, 1], each of a patch of the model."""
        (vision,) = self.eyes
        height, width = (max(1, round(side / vision.patch)) for side in images.shape[-2:])
        levels = vision.levels(images, (height, width), len(self.heads))
        return torch.cat([head(level) for head, level in zip(self.heads, levels, strict=True)], 1)


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

    def __init__(self, config: AdversarialConfig, discriminator: PatchGAN | FeatureGAN) -> None:
        self.config = config
        self.discriminator = discriminator
        # betas of LDM: little momentum, as the opponent moves
        self.optimizer = AdamW(discriminator.parameters(), lr=config.lr, betas=(0.5, 0.9), weight_decay=0.0)
        self.model: nn.Module = discriminator
        # of LeCam: averages of real and fake logits over the steps so far, and how many those are
        self.averages = next(discriminator.parameters()).new_zeros(3)

    @classmethod
    def build(
        cls, config: Config, channels: int, device: torch.device, vision: VisionModel | None = None
    ) -> "Adversary | None":
        """A discriminator of the run's precision, fresh or from adversarial.init; None without its loss.

        Args:
            config: of the run.
            channels: of its images.
            device: of the discriminator.
            vision: what regularise.align has loaded; taken where adversarial.features names the same model.

        Raises:
            ConfigError: weights to begin with that are damaged or of another shape; as `VisionModel.load`.
        """
        own = config.adversarial
        if own.disc_weight == 0:
            return None
        discriminator: PatchGAN | FeatureGAN
        if own.features is None:
            discriminator = PatchGAN(channels, own.width, own.layers)
        else:
            if vision is None or own.features != config.regularise.align.model:
                vision = VisionModel.load(own.features, device, config.train.dtype, "adversarial.features")
            discriminator = FeatureGAN(vision, own.width, own.layers)
        if own.init is not None:
            load_weights(discriminator, find_weights(own.init))
        discriminator.to(device, config.train.dtype).to(memory_format=config.train.memory_format)
        return cls(own, discriminator)

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
        loss, more = d_loss(real, fake), {}
        total = loss
        if self.config.lecam_weight:
            average_real, average_fake, steps = self.averages.clone()
            more["lecam_loss"] = lecam_loss(real, fake, average_real, average_fake) * (steps > 0)
            total = loss + self.config.lecam_weight * more["lecam_loss"]
        accelerator.backward(total * share)
        return {
            **more,
            "d_loss": loss.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }

    def remember(self, logits: torch.Tensor) -> None:
        """Move LeCam's averages towards a step's mean logits (2,), real and fake, of all processes."""
        steps = self.averages[2]
        weight = torch.clamp(1 / (steps + 1), min=1 - LECAM_DECAY)  # a plain mean at first, not from zero
        self.averages[:2].lerp_(logits.to(self.averages), weight)
        steps += 1

    def save(self, folder: Path) -> None:
        """Write the weights, for another run's adversarial.init."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.discriminator.state_dict().items()}
        with whole_file(folder / WEIGHTS) as partial:
            save_file(tensors, partial)


def find_weights(place: str) -> Path:
    """The file of weights that adversarial.init names.

    Raises:
        ConfigError: there is none.
    """
    path = Path(place)
    places = [path, path / WEIGHTS, path / "discriminator" / WEIGHTS]
    found = next((each for each in places if each.is_file()), None)
    if found is None:
        raise ConfigError(
            f"adversarial.init={place}: no {WEIGHTS} there. Give the folder of a run that had a "
            "discriminator, the folder `discriminator` in it, or one of its checkpoints."
        )
    return found


def load_weights(discriminator: PatchGAN | FeatureGAN, path: Path) -> None:
    """Load what `Adversary.save` or a checkpoint wrote.

    Raises:
        ConfigError: another shape, or a damaged file.
    """
    try:
        tensors = load_file(path)
        check_keys(tensors, discriminator.state_dict(), path, "Set adversarial.width, .layers and .features.")
    except (SafetensorError, OSError, ModelError) as error:
        raise ConfigError(f"adversarial.init: {path} cannot be used: {error}") from error
    discriminator.load_state_dict(tensors)
