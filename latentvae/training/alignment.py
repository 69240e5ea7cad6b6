"""Latents that resemble a vision foundation model's features (VA-VAE: Yao, Yang, Wang 2025).

Latents of many channels rebuild well and are hard to diffuse. Tied to the features of a frozen model such as
DINOv2, they keep what is in a picture apart, and diffusion learns them faster. A linear projection is learned
along and thrown away; what is exported is the VAE alone.
"""

import inspect
import logging
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from torch.nn.functional import cosine_similarity, interpolate, normalize
from torch.optim import AdamW

from latentvae.base.errors import ConfigError
from latentvae.base.optional import need
from latentvae.training.config import AlignConfig, Config

logger = logging.getLogger(__name__)

# of ImageNet, which most vision models are trained with; used where a folder does not state its own
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Balance(torch.autograd.Function):
    """Two copies of latents, whose gradients pull equally hard: the second's is scaled to the first's norm.

    That is the adaptive weight of VA-VAE (equation 9), taken at the latents, the last that both losses share,
    and over all processes; so it costs no second backward pass.
    """

    @staticmethod
    def forward(ctx: Any, latents: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents to decode, and latents to align."""
        ctx.weight = weight
        return latents.clone(), latents.clone()

    @staticmethod
    def backward(ctx: Any, decoded: torch.Tensor, aligned: torch.Tensor) -> Any:
        """Their gradients, added up in proportion."""
        # squares add up over processes, so that N of them scale as one does
        squares = reduce(torch.stack([decoded.square().sum(), aligned.square().sum()]), "sum")
        first, second = squares.sqrt()
        # the authors' bound; nothing is added below: norms grow with the number of processes, ratios do not
        scale = (first / second.clamp_min(1e-30)).clamp(0, 1e8)
        return decoded + ctx.weight * scale * aligned, None


class VisionModel:
    """A frozen vision transformer of the package transformers, as a map of features.

    Args:
        network: gives `last_hidden_state` (B, tokens, D) of pixels (B, 3, S, S).
        patch: pixels of a token's side.
        mean, std: of its inputs, for images in [0, 1].
    """

    def __init__(
        self, network: nn.Module, patch: int, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
    ) -> None:
        self.network = network.requires_grad_(False).eval()
        self.patch, self.mean, self.std = patch, mean, std
        flag = "interpolate_pos_encoding"  # the others take any size, or one size only
        self.more = {flag: True} if flag in inspect.signature(network.forward).parameters else {}

    @classmethod
    def load(
        cls, name: str, device: torch.device, dtype: torch.dtype, setting: str = "regularise.align.model"
    ) -> "VisionModel":
        """A folder, or a model of the hub; `setting` is what named it.

        Raises:
            ConfigError: not there, no vision transformer, or transformers is not installed.
        """
        transformers = need("transformers", ConfigError, what=setting)
        try:
            network = transformers.AutoModel.from_pretrained(name, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{setting}={name} cannot be loaded ({error}). Give a folder of a vision model "
                "of transformers, with safetensors, or an id of the hub where there is a connection."
            ) from error
        network = getattr(network, "vision_model", network)  # of models of text and images
        patch = getattr(network.config, "patch_size", None)
        if not isinstance(patch, int):
            raise ConfigError(f"{setting}={name} has no patches; wanted a vision transformer.")
        return cls(network.to(device, dtype), patch, *_normalisation(transformers, name))

    @property
    def width(self) -> int:
        """Of its features."""
        return int(self.network.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def depth(self) -> int:
        """Its layers."""
        return int(self.network.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Features (B, D, h, w) of images (B, 3 or 1, H, W) in [-1, 1], seen at h x w patches, `size`."""
        (last,) = self.levels(images, size, 1)
        return last

    def levels(self, images: torch.Tensor, size: tuple[int, int], count: int) -> list[torch.Tensor]:
        """Features of `count` layers, evenly spaced to the last; gradients go back to the images."""
        pixels = (images.expand(-1, 3, -1, -1) + 1) / 2
        seen = (size[0] * self.patch, size[1] * self.patch)
        pixels = interpolate(pixels, seen, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        given = self.network((pixels - mean) / std, output_hidden_states=count > 1, **self.more)
        # what enters the first layer stands first; the last layer's, with its norm, is last_hidden_state
        chosen = [given.hidden_states[self.depth * number // count] for number in range(1, count)]
        chosen.append(given.last_hidden_state)
        # (B, tokens, D): those of the image come last, after a class token and registers
        return [tokens[:, -size[0] * size[1] :].mT.unflatten(-1, size) for tokens in chosen]


class Alignment:
    """The frozen model, the projection that is learned along, and its optimizer.

    Args:
        config: weight and margins.
        vision: gives the features.
        projection: of latents (B, c, h, w) to their width.
        lr: of the projection, at the start.
    """

    def __init__(self, config: AlignConfig, vision: VisionModel, projection: nn.Conv2d, lr: float) -> None:
        self.config, self.vision, self.projection = config, vision, projection
        self.optimizer = AdamW(projection.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)

    @classmethod
    def build(cls, config: Config, channels: int, device: torch.device) -> "Alignment | None":
        """With a fresh projection; None for a run without.

        Raises:
            ConfigError: as `VisionModel.load`.
        """
        align = config.regularise.align
        if not align.weight:
            return None
        vision = VisionModel.load(align.model, device, config.train.dtype)
        projection = nn.Conv2d(channels, vision.width, 1).to(device, config.train.dtype)
        logger.info("latents are aligned to %s, %d features", align.model, vision.width)
        return cls(align, vision, projection, config.optim.lr)

    def loss(
        self, latents: torch.Tensor, projected: torch.Tensor, images: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of both terms, and each: latents (B, c, h, w), as projected, of images (B, C, H, W)."""
        features = self.vision(images, (latents.shape[-2], latents.shape[-1])).to(projected.dtype)
        terms = {
            "align_cosine": marginal_cosine(projected, features, self.config.cosine_margin),
            "align_distance": marginal_distance(latents, features, self.config.distance_margin),
        }
        return terms["align_cosine"] + terms["align_distance"], terms


def marginal_cosine(projected: torch.Tensor, features: torch.Tensor, margin: float) -> torch.Tensor:
    """How far the cosine at a place is below 1 - margin, averaged (equation 5): maps (B, D, h, w) both."""
    return torch.relu(1 - margin - cosine_similarity(projected, features, dim=1)).mean()


def marginal_distance(latents: torch.Tensor, features: torch.Tensor, margin: float) -> torch.Tensor:
    """By how much more than the margin the cosines of each two places of an image differ (equation 6).

    Args:
        latents: (B, c, h, w). features: (B, D, h, w).
        margin: a difference that costs nothing.
    """
    # (B, hw, hw) each: how alike any two places are
    one, other = (each.mT @ each for each in (normalize(x.flatten(2), dim=1) for x in (latents, features)))
    return torch.relu((one - other).abs() - margin).mean()


def _normalisation(transformers: Any, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What a model says of its inputs, or else ImageNet's."""
    try:
        stated, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):  # there is none
        stated = {}
    return tuple(stated.get("image_mean") or MEAN), tuple(stated.get("image_std") or STD)
