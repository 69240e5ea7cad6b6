"""The latents that a prior learns: those of a store, all of one size, scaled and normalised per channel."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from latentvae.base.errors import LatentVAEError, StoreError
from latentvae.models.fingerprint import weight_hash
from latentvae.models.latents import Posterior, Scaling, encode
from latentvae.store.buckets import BucketBatchSampler
from latentvae.store.dataset import NO_LABEL, LatentDataset

LEAST = 2  # images: one has no spread
MEMORY = 2e9  # bytes kept of a store; of larger ones an even selection
KEPT = 3 * 4  # bytes of a latent: its mean, and its log-variance as it was stored and within its bounds


class Origin(Protocol):
    """What is known of the VAE whose latents they are: a store's manifest says it, among other things."""

    @property
    def weights_sha256(self) -> str:
        """As `weight_hash`."""

    @property
    def scaling_factor(self) -> float:
        """Of its config."""

    @property
    def shift_factor(self) -> float | None:
        """Likewise."""


class Model(NamedTuple):
    """The `Origin` of latents that no store has held."""

    weights_sha256: str
    scaling_factor: float
    shift_factor: float | None


class LatentSet:
    """The posteriors of a store's images, read once and kept in float32.

    Attributes:
        manifest: of the store, or what else says whose latents these are.
        shape: (C, h, w) of the latents.
        labels: (N,) int64, each image's label; -1 where it has none.
        mean, std: (C,) of scaled posterior samples over all images, for `batch`.
        total: images of the store; more than `len` where they would not fit into memory.

    Args:
        store: the folder that `latentvae encode` wrote.
        progress: show a bar.

    Raises:
        StoreError: no store, an empty or damaged one, one image, or images of several sizes.
    """

    def __init__(self, store: str | Path, *, progress: bool = False) -> None:
        dataset = LatentDataset(store, mode="moments")
        self.total = len(dataset)
        if self.total < LEAST:
            raise StoreError(f"{store} holds {self.total} image; a prior learns from {LEAST} or more.")
        channels = dataset.manifest.config["latent_channels"]
        self.shape = (channels, *_one_size(store, dataset))
        self.manifest: Origin = dataset.manifest
        chosen = _selection(self.total, KEPT * int(np.prod(self.shape)))
        scaling = Scaling.of(self.manifest)
        moments = torch.empty(len(chosen), 2 * channels, *self.shape[1:])  # filled in place
        self.labels = torch.empty(len(chosen), dtype=torch.int64)
        for place, number in enumerate(tqdm(chosen, unit="image", desc="reading", disable=not progress)):
            item = dataset[number]
            moments[place] = scaling.scale_moments(item["moments"].float())
            self.labels[place] = item["label"]
        self._posterior = Posterior(moments)
        self.mean, self.std = _statistics(self._posterior)

    @classmethod
    def of(cls, vae: AutoencoderKL, batches: Iterable[torch.Tensor]) -> "LatentSet":
        """The posteriors of images (B, C, H, W) in [-1, 1], all of one size, that no store holds.

        Raises:
            LatentVAEError: fewer than two images.
        """
        with torch.no_grad():
            posteriors = [encode(vae, batch)[0] for batch in batches]
            parts = [torch.cat([each.mean, each.logvar], dim=1).float().cpu() for each in posteriors]
        if sum(map(len, parts)) < LEAST:
            raise LatentVAEError(f"{sum(map(len, parts))} image came; a prior learns from {LEAST} or more.")
        found = cls.__new__(cls)
        factors = vae.config["scaling_factor"], vae.config["shift_factor"]
        found.manifest = Model(weight_hash(vae), *factors)
        found._posterior = Posterior(Scaling.of(found.manifest).scale_moments(torch.cat(parts)))
        found.total, channels, height, width = found._posterior.mean.shape
        found.shape = (channels, height, width)
        found.labels = torch.full((found.total,), NO_LABEL)
        found.mean, found.std = _statistics(found._posterior)
        return found

    def __len__(self) -> int:
        return len(self.labels)

    def modes(self) -> torch.Tensor:
        """The posteriors' means, normalised, (N, C, h, w)."""
        return (self._posterior.mean - self.mean[:, None, None]) / self.std[:, None, None]

    def draw(self, numbers: Sequence[int] | np.ndarray, noise: torch.Tensor) -> torch.Tensor:
        """Samples of the posteriors of the images with these numbers, normalised, (B, C, h, w) float32.

        Args:
            numbers: of images, 0 to `len` - 1.
            noise: (B, C, h, w), standard normal.
        """
        places = torch.as_tensor(np.asarray(numbers))
        std = torch.exp(0.5 * self._posterior.logvar[places])  # of these alone
        latents = self._posterior.mean[places] + std * noise
        return (latents - self.mean[:, None, None]) / self.std[:, None, None]

    def classes(self) -> list[int]:
        """The labels that occur, sorted.

        Raises:
            StoreError: an image without one.
        """
        without = int((self.labels == NO_LABEL).sum())
        if without:
            raise StoreError(
                f"{without} of {len(self)} images have no label, but a prior by class needs one for each: "
                'write NAME.json with {"label": 3} beside each image and encode again, or leave classes out.'
            )
        return sorted(set(self.labels.tolist()))


def _one_size(store: str | Path, dataset: LatentDataset) -> tuple[int, int]:
    sizes = BucketBatchSampler(dataset, 1).sizes
    if len(sizes) > 1:
        shown = ", ".join(f"{count} of {h}x{w}" for (h, w), count in list(sizes.items())[:3])
        raise StoreError(
            f"{store} holds latents of {len(sizes)} sizes ({shown}{', ...' if len(sizes) > 3 else ''}); a "
            "prior learns one. Encode the images to another store with --size 256 --crop."
        )
    return next(iter(sizes))


def _selection(total: int, bytes_each: int) -> list[int]:
    """All numbers, or as many as memory holds, evenly spaced."""
    kept = min(total, max(LEAST, int(MEMORY // bytes_each)))
    return [total * i // kept for i in range(kept)]


def _statistics(posterior: Posterior) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of samples per channel, (C,) float32 each, by the law of total variance."""
    channels = range(posterior.mean.shape[1])  # one by one: a copy in float64 of all would be twice the set
    means, deviations = [], []
    for channel in channels:
        centres = posterior.mean[:, channel].double()
        within = torch.exp(posterior.logvar[:, channel].double()).mean()
        means.append(centres.mean())
        deviations.append((within + centres.var(correction=0)).sqrt())
    # a channel that never varies: draws divide by its deviation
    return torch.stack(means).float(), torch.stack(deviations).clamp_min(1e-6).float()
