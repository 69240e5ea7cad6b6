"""Training losses of the VAE: each term named and unweighted, and their weighted total.

Reductions are LDM's (Rombach et al. 2022, `LPIPSWithDiscriminator`): rec_loss and kl_loss are summed over
C, H, W and averaged over the batch; the perceptual distance counts once for every element of the image. That
is what `kl_weight = 1e-6` refers to. The total is then divided by C * H * W, which moves no minimum and no
ratio between terms, and makes the norm of the gradient independent of the crop's size.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from latentvae.base.errors import MissingWeightsError
from latentvae.measure.lpips import LPIPS, load_lpips
from latentvae.models.latents import Posterior
from latentvae.training.config import LossConfig

Terms = dict[str, torch.Tensor]  # scalars by name, without their weights
PixelLossName = Literal["l1", "l2", "charbonnier"]

# Charbonnier's rounding of the L1 corner: a twentieth of one 8-bit step (2/255).
CHARBONNIER_EPS = 4e-4


def pixel_loss(
    images: torch.Tensor, reconstructions: torch.Tensor, kind: PixelLossName = "l1"
) -> torch.Tensor:
    """Reconstruction error per element, (B, C, H, W): |d|, d^2, or sqrt(d^2 + eps^2) - eps.

    Args:
        images: (B, C, H, W) in [-1, 1].
        reconstructions: the same shape.
        kind: "l1", "l2" or "charbonnier" (Charbonnier et al. 1994; L1 with a smooth minimum).
    """
    if images.shape != reconstructions.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and reconstructions {tuple(reconstructions.shape)} differ."
        )
    difference = reconstructions - images
    match kind:
        case "l1":
            return difference.abs()
        case "l2":
            return difference.square()
        case "charbonnier":
            return (difference.square() + CHARBONNIER_EPS**2).sqrt() - CHARBONNIER_EPS
    raise ValueError(f"unknown pixel loss {kind!r}; wanted l1, l2 or charbonnier.")


class VAELoss(nn.Module):
    """The weighted terms of the VAE's loss, each sum divided by C*H*W, with every term by name beside it.

    What is trained is `reconstruction` + (`kl` or `distillation`) + the adversary's weighted g_loss.

    Args:
        config: the weights.
        lpips: the frozen LPIPS network, or None for no perceptual term.
    """

    def __init__(self, config: LossConfig, lpips: LPIPS | None = None) -> None:
        super().__init__()
        self.config = config
        self.lpips = lpips

    @classmethod
    def build(cls, config: LossConfig) -> "VAELoss":
        """The loss with its LPIPS network.

        Raises:
            MissingWeightsError: the perceptual term is asked for and its weights are not there.
        """
        if config.perceptual_weight == 0:
            return cls(config, None)
        try:
            return cls(config, load_lpips(config.perceptual_net, config.perceptual_weights))
        except MissingWeightsError as error:
            ways = (
                "(the option is loss.perceptual_weights); --set loss.perceptual_weight=0 trains without LPIPS"
            )
            raise MissingWeightsError(f"{str(error).removesuffix('.')} {ways}.") from error

    @property
    def min_size(self) -> int:
        """The smallest side of images that every term can judge."""
        return 1 if self.lpips is None else self.lpips.min_size

    def reconstruction(
        self, images: torch.Tensor, reconstructions: torch.Tensor | None
    ) -> tuple[torch.Tensor, Terms]:
        """The terms that compare images (B, C, H, W): the weighted sum, rec_loss and perceptual_loss.

        Zeros where there are no reconstructions, as only an encoder learns.
        """
        if reconstructions is None:
            none = images.new_zeros(())
            return none, {"rec_loss": none, "perceptual_loss": none}
        # per element (B, C, H, W), summed over an image (B,), averaged over the batch
        rec_loss = pixel_loss(images, reconstructions, self.config.pixel).flatten(1).sum(1).mean()
        perceptual_loss = self.perceptual(images, reconstructions)
        nll = rec_loss / images[0].numel() + self.config.perceptual_weight * perceptual_loss
        return nll, {"rec_loss": rec_loss, "perceptual_loss": perceptual_loss}

    def perceptual(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        """Mean LPIPS of the batch, a scalar; the images' side is computed without autograd bookkeeping."""
        if self.lpips is None:
            return reconstructions.new_zeros(())
        with torch.no_grad():  # the target is given; the reconstructions' side must keep its graph
            target = self.lpips.features(images)
        return self.lpips.distance_from_features(target, self.lpips.features(reconstructions)).mean()

    def kl(
        self,
        posterior: Posterior,
        elements: int,
        step: int,
        average: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> tuple[torch.Tensor, Terms]:
        """The KL term: weighted, warmed up, less free bits; kl_loss in nats, kl_per_channel (c,).

        Args:
            posterior: (B, c, h, w) of the images.
            elements: C*H*W of an image.
            step: optimizer steps done.
            average: means over processes, so that all of them spare the same channels.
        """
        kl_map = posterior.kl_map()  # (B, c, h, w)
        per_channel = average(kl_map.detach().mean((0, 2, 3)))  # (c,), nats per latent pixel
        free = self.config.free_bits
        spent = kl_map * (per_channel > free)[:, None, None] if free else kl_map
        warmup = min(1.0, (step + 1) / (self.config.kl_warmup_steps + 1))
        weighted = warmup * self.config.kl_weight * spent.flatten(1).sum(1).mean() / elements
        # reported in full, also where free bits spare it
        return weighted, {"kl_loss": kl_map.flatten(1).sum(1).mean(), "kl_per_channel": per_channel}

    def distillation(
        self, student: Posterior, teacher: Posterior, scaling_factor: float, l1_weight: float = 0.0
    ) -> tuple[torch.Tensor, Terms]:
        """Agreement with a teacher, in the KL's place: weighted; distil_loss, latent_cosine and latent_r2."""
        distil_loss = distillation_loss(student, teacher, scaling_factor)
        l1 = ((student.mean - teacher.mean) * scaling_factor).abs().mean()
        terms = {"distil_loss": distil_loss, "latent_cosine": latent_cosine(student, teacher)}
        terms["latent_r2"] = latent_r2(student, teacher)
        return self.config.distil_weight * (distil_loss + l1_weight * l1), terms


def g_loss(logits_fake: torch.Tensor) -> torch.Tensor:
    """The generator's adversarial loss, a scalar: minus the mean logit of reconstructions (Lim & Ye 2017)."""
    return -logits_fake.mean()


def d_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's hinge loss, a scalar: real logits up to 1, fake ones down to -1 (Lim & Ye 2017)."""
    return 0.5 * (torch.relu(1 - logits_real).mean() + torch.relu(1 + logits_fake).mean())


def lecam_loss(
    logits_real: torch.Tensor,
    logits_fake: torch.Tensor,
    average_real: torch.Tensor,
    average_fake: torch.Tensor,
) -> torch.Tensor:
    """How far logits are beyond the other side's average, squared: a scalar (Tseng et al. 2021, LeCam).

    As in the authors' code: only real logits above the average of fake ones cost, and fake ones below.
    """
    real, fake = torch.relu(logits_real - average_fake), torch.relu(average_real - logits_fake)
    return real.square().mean() + fake.square().mean()


# Of squared differences of log-variances in a distillation: where deviations are far below the spread of the
# latents the Wasserstein distance no longer sees them, and the KL of the student would be left to chance.
LOGVAR_WEIGHT = 1e-3


def distillation_loss(student: Posterior, teacher: Posterior, scaling_factor: float) -> torch.Tensor:
    """How far a student's posteriors are from its teacher's, a scalar: mean squared 2-Wasserstein distance.

    Of Gaussians it is (difference of means)^2 + (difference of deviations)^2, here per element and in scaled
    units, so that 1 is the spread of the latents. LOGVAR_WEIGHT ties what is left of the log-variances.
    """
    means = ((student.mean - teacher.mean) * scaling_factor).square().mean()
    deviations = ((student.std - teacher.std) * scaling_factor).square().mean()
    return means + deviations + LOGVAR_WEIGHT * (student.logvar - teacher.logvar).square().mean()


def latent_cosine(student: Posterior, teacher: Posterior) -> torch.Tensor:
    """Cosine between two models' mean latents of one image, averaged over the batch: 1 where they agree."""
    return torch.cosine_similarity(student.mean.flatten(1), teacher.mean.flatten(1)).mean()


def latent_r2(student: Posterior, teacher: Posterior) -> torch.Tensor:
    """1 minus the squared difference of mean latents over the variance of the teacher's, per channel."""
    spread = (teacher.mean - teacher.mean.mean((0, 2, 3), keepdim=True)).square().mean()
    return 1 - (student.mean - teacher.mean).square().mean() / spread.clamp_min(1e-12)


def adaptive_weight(nll_gradient: torch.Tensor, g_gradient: torch.Tensor) -> torch.Tensor:
    """How much g_loss must be scaled to pull at the decoder's last layer as hard as the other losses.

    Esser et al. 2021 (VQGAN), equation 7. A ratio of norms: average both gradients over ranks and
    accumulation first, as the mean of ratios is another number.

    Args:
        nll_gradient: of pixel and perceptual loss at `decoder.conv_out.weight`.
        g_gradient: of g_loss, at the same weight.

    Returns:
        A scalar in [0, 1e4].
    """
    return (nll_gradient.norm() / (g_gradient.norm() + 1e-4)).clamp(0, 1e4)
