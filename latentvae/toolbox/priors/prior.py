"""What a prior over latents is: draws by seed and number, and a folder that belongs to one VAE."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import LatentVAEError
from latentvae.base.files import check_folder, whole_folder
from latentvae.models.fingerprint import weight_hash
from latentvae.models.latents import Scaling, seeded_noise
from latentvae.models.loading import spatial_compression_ratio
from latentvae.toolbox.priors.latent_set import LatentSet

FORMAT = 1  # of prior.json
SIDECAR = "prior.json"  # of every kind: by it a folder is known as a prior
WRITTEN = {SIDECAR, "mixture.safetensors", "model_index.json", "unet", "scheduler"}  # by any kind


@dataclass(frozen=True)
class PriorCard:
    """What `prior.json` says: whose latents these are, and how they were scaled and learned.

    Attributes:
        kind: gaussian, mixture or diffusion; standard where nothing was learned.
        weights_sha256: of the VAE.
        latent_shape: (C, h, w).
        mean, std: per channel; x = ((latents - shift_factor) * scaling_factor - mean) / std is what is drawn.
        images: how many were learned from.
        labels, label_counts: the classes of a prior by class and their images; None where it has none.
        fit: how it was learned, for people.
    """

    kind: str
    weights_sha256: str
    latent_shape: tuple[int, int, int]
    scaling_factor: float
    shift_factor: float
    mean: list[float]
    std: list[float]
    images: int
    labels: list[int] | None = None
    label_counts: list[int] | None = None
    fit: dict[str, Any] = field(default_factory=dict)


class Prior(ABC):
    """A distribution over latents of one size. Draw number n of a seed does not depend on the other draws."""

    def __init__(self, card: PriorCard) -> None:
        self.card = card

    @abstractmethod
    def draw(self, numbers: Sequence[int], seed: int, labels: Sequence[int] | None = None) -> torch.Tensor:
        """Normalised latents (B, C, h, w), float32 on the CPU, of the draws with these numbers.

        Args:
            numbers: from 0 on.
            seed: other seeds, other draws.
            labels: of each draw, for a prior by class.
        """

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write what was learned into a folder, the card left out."""

    def to(self, device: torch.device) -> "Prior":
        """Compute there from now on; only a network does."""
        return self

    def latents(self, numbers: Sequence[int], seed: int, labels: Sequence[int] | None = None) -> torch.Tensor:
        """Unscaled latents (B, C, h, w) of these draws, as a decoder takes them."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.card.mean, self.card.std))
        scaled = self.draw(numbers, seed, labels) * std + mean  # (B, C, h, w), as a diffusion model sees them
        return Scaling.of(self.card).unscale(scaled)

    def labels_of(self, numbers: Sequence[int], seed: int) -> list[int] | None:
        """The labels of these draws where none are asked for; None of a prior without classes."""
        return None

    def noise(self, numbers: Sequence[int], seed: int) -> torch.Tensor:
        """Standard normal noise of these draws, (B, C, h, w)."""
        # draw by draw: one generator for all would tie draw n to how many are drawn at once
        return torch.stack([seeded_noise(self.card.latent_shape, seed, "prior", n) for n in numbers])

    def check(self, vae: AutoencoderKL) -> None:
        """Refuse another VAE: its decoder does not speak these latents.

        Raises:
            LatentVAEError: the weights' hash is not the card's.
        """
        found = weight_hash(vae)
        if found != self.card.weights_sha256:
            raise LatentVAEError(
                f"this prior was learned from latents of the VAE {self.card.weights_sha256[:12]}, but the "
                f"model is {found[:12]}: name the model that encoded the store (--model), or fit a prior to "
                "a store of this one."
            )

    def save(self, folder: str | Path) -> Path:
        """Write a folder, whole or not at all; an earlier prior there is replaced.

        Raises:
            LatentVAEError: the folder holds something else, or cannot be written.
        """
        final = Path(folder).resolve()
        check_target(final)  # again: minutes of training ago it may have been empty
        with whole_folder(
            final, message="{path} cannot be written ({reason}): choose another folder."
        ) as partial:
            self.write(partial)
            text = json.dumps({"format": FORMAT, **asdict(self.card)}, indent=1)
            (partial / SIDECAR).write_text(text + "\n", encoding="utf-8")
        return final


class StandardNormal(Prior):
    """The standard normal distribution of scaled latents: what the KL term pulls towards, and not further.

    Args:
        vae: whose latents.
        height: of an image in pixels, rounded down to whole latents.
        width: likewise.
    """

    def __init__(self, vae: AutoencoderKL, height: int, width: int) -> None:
        channels, ratio = vae.config["latent_channels"], spatial_compression_ratio(vae)
        if min(height, width) < ratio:
            raise LatentVAEError(
                f"a size of {width}x{height} px came; a latent of this model is {ratio} px wide."
            )
        shape = (channels, height // ratio, width // ratio)
        factors = vae.config["scaling_factor"], vae.config["shift_factor"] or 0.0  # None: no shift
        super().__init__(
            PriorCard("standard", weight_hash(vae), shape, *factors, [0.0] * channels, [1.0] * channels, 0)
        )

    def draw(self, numbers: Sequence[int], seed: int, labels: Sequence[int] | None = None) -> torch.Tensor:
        return self.noise(numbers, seed)

    def write(self, folder: Path) -> None:
        raise LatentVAEError("a standard normal prior has learned nothing that could be saved.")


def card_of(latents: LatentSet, kind: str, fit: dict[str, Any], by_class: bool = False) -> PriorCard:
    """The card of a prior that has learned these latents."""
    labels = latents.classes() if by_class else None
    counts = [int((latents.labels == label).sum()) for label in labels] if labels is not None else None
    manifest = latents.manifest
    return PriorCard(
        kind,
        manifest.weights_sha256,
        latents.shape,
        manifest.scaling_factor,
        manifest.shift_factor or 0.0,
        latents.mean.tolist(),
        latents.std.tolist(),
        len(latents),
        labels,
        counts,
        {"store_images": latents.total, **fit},  # more than `images` where memory did not hold all
    )


def check_target(folder: Path) -> None:
    """Refuse to write a prior over anything else.

    Raises:
        LatentVAEError: a file, or a folder that holds no prior, or other things beside one.
    """
    check_folder(folder, "prior", SIDECAR, WRITTEN, instead="Choose another folder, or move that away")
