"""A set of images that is looked at as a whole: pooled latents, labels, and pictures to show."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from latentvae.base.errors import LatentVAEError
from latentvae.images import resizing, saving
from latentvae.models.latents import Posterior, encode, pool_latents
from latentvae.store.dataset import StoreReader
from latentvae.toolbox.atlas.features import Features
from latentvae.toolbox.atlas.labels import folder_labels, label_of

SIDE = 32  # pixels of the image that raw pixels are compared as, squeezed to a square


@dataclass
class Gallery:
    """Images of a folder or a store, one after the other; everything in the same order.

    Args:
        weights_sha256: of the VAE.
        grid: of the pooling, see `pool_latents`.
        picture_side: pixels along the longer side of the pictures that are kept, with raw pixels; 0: neither.
    """

    weights_sha256: str
    grid: int = 0
    picture_side: int = 192
    keys: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    pictures: list[Image.Image | None] = field(default_factory=list)
    pixels: list[np.ndarray | None] = field(default_factory=list)
    labels_from: str | None = None  # what kind of source gave the labels

    def __len__(self) -> int:
        return len(self.keys)

    def add(
        self,
        key: str,
        label: str,
        latents: torch.Tensor,
        image: torch.Tensor | None = None,
        *,
        decoded: bool = False,
    ) -> None:
        """Take in one image.

        Args:
            key: its name.
            label: "" where it has none.
            latents: (1, C, h, w), unscaled.
            image: (C, H, W) in [-1, 1], or None.
            decoded: the image was made from the latents, so that its pixels are no baseline.

        Raises:
            LatentVAEError: latents that are not finite.
        """
        row = pool_latents(latents, self.grid)[0]  # before anything is kept: it may refuse them
        kept = image if self.picture_side else None
        # the picture and raw pixels alone are kept: thousands of whole images would fill the memory
        small = None if kept is None else resizing.thumbnail(kept, self.picture_side)
        self.pictures.append(None if small is None else saving.to_pil(small).convert("RGB"))
        self.pixels.append(None if kept is None or decoded else raw_pixels(kept))
        self.rows.append(row)
        self.keys.append(key)
        self.labels.append(label)

    @torch.no_grad()
    def add_image(self, vae: AutoencoderKL, key: str, label: str, image: torch.Tensor) -> None:
        """Encode one image (C, H, W) in [-1, 1] and take it in; raises as `add` does."""
        self.add(key, label, encode(vae, image[None])[0].mode(), image)

    def label(self, table: dict[str, str] | None = None) -> None:
        """Settle the labels: from a table by key, else from caption records, else from subfolders."""
        if table is not None:
            self.labels, self.labels_from = [table.get(key, "") for key in self.keys], "table"
        elif any(self.labels):
            self.labels_from = "captions"
        else:
            self.labels = folder_labels(self.keys)
            self.labels_from = "folders" if any(self.labels) else None

    @property
    def features(self) -> Features:
        """All rows.

        Raises:
            LatentVAEError: no image was added.
        """
        if not self.rows:
            raise LatentVAEError("no image could be used: name a folder of images, or a store of latents.")
        return Features(
            self.keys, self.labels, np.stack(self.rows).astype(np.float32), self.grid, self.weights_sha256
        )

    def raw(self) -> np.ndarray | None:
        """Raw pixels (N, D) of all images, or None where those of one are not there."""
        found = [row for row in self.pixels if row is not None]
        return np.stack(found) if found and len(found) == len(self) else None  # else it compares other sets


@dataclass(frozen=True)
class StoredImage:
    """An image of a latent store: its number, key, label ("" where there is none) and unscaled latents."""

    index: int
    key: str
    label: str
    latents: torch.Tensor  # (1, C, h, w), the posterior's mode


def stored_images(reader: StoreReader, numbers: range | None = None) -> Iterator[StoredImage]:
    """Images of a store in its order.

    Raises:
        StoreError: a shard that is gone or damaged.
    """
    for index in numbers or range(len(reader)):
        entry = reader.entry(index)
        latents = Posterior(reader.moments(index, entry)[None].float()).mode()  # stored in any precision
        yield StoredImage(index, entry.key, label_of(entry.caption), latents)


def raw_pixels(image: torch.Tensor) -> np.ndarray:
    """An image (C, H, W) scaled to 32 x 32 pixels, as one row, float32 in [-1, 1]."""
    row: np.ndarray = resizing.Geometry((SIDE, SIDE)).apply(image.float().cpu()).flatten().numpy()
    return row
