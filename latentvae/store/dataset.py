"""Latents of a store as a torch dataset, for whoever trains a diffusion model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from latentvae.errors import StoreError
from latentvae.latents import Posterior
from latentvae.store.manifest import Manifest
from latentvae.store.reading import StoreReader
from latentvae.store.shard import Entry

Mode = Literal["sample", "mode", "moments"]
Item = dict[str, Any]
CAPTION_KEYS = ("caption", "text")  # NAME.txt beside an image, and what `datasets` calls it
LABEL_KEY, NO_LABEL = "label", -1


class LatentDataset(Dataset[Item]):
    """The latents of a store by number, ready for a DataLoader; opening reads `store.json` alone.

    An item is a dict that DataLoaders collate:

    - `latents`: float32 (C, h, w), `(latents - shift_factor) * scaling_factor` with the recorded factors.
      With mode "moments" `moments` instead: float32 (2C, h, w), means then log-variances, unscaled.
    - `key`: the image's path below its folder. `index`: its number.
    - `caption`: text, "" where there is none; of several, one at random. `label`: int, -1 where none.
    - `flipped`: whether the latents are the mirror image's.
    - `original_size`, `crop_top_left`, `size`: int64 (2,), what SDXL is conditioned on: the file's height and
      width, where the crop began after scaling, and the height and width of what was encoded.

    What is random is drawn from (seed, epoch, index), never from a process's own state: workers, ranks and
    order change nothing. Call `set_epoch` at the start of each epoch, or every epoch draws the same.

    Items of one store can have several sizes, which cannot be stacked: see `BucketBatchSampler`.

    Args:
        store: the folder that `latentvae encode` wrote.
        mode: "sample": a new draw of the posterior in every epoch; "mode": its mean; "moments": both halves.
        flip: probability of the mirror image, 0 to 1. Needs a store with flipped latents
            (`latentvae encode --flips`): mirrored latents are not the latents of the mirror image.
        seed: not negative; of all draws.
        generator: draws the seed, instead of `seed`.
        scaled: False gives unscaled latents.
        caption_keys: where an image's caption record may have the text, a string or a list of strings; the
            first one that is there counts.
        label_key: where it may have the label, an integer.

    Raises:
        StoreError: no store, a damaged or empty one, one of a later version; flips that were not stored; an
            option that is out of range.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        mode: Mode = "sample",
        flip: float = 0.0,
        seed: int = 0,
        generator: torch.Generator | None = None,
        scaled: bool = True,
        caption_keys: Sequence[str] = CAPTION_KEYS,
        label_key: str = LABEL_KEY,
    ) -> None:
        self.reader = StoreReader(store)
        _check(mode, flip, seed, self.reader)
        self.mode, self.flip, self.scaled = mode, flip, scaled
        self.caption_keys, self.label_key = tuple(caption_keys), label_key
        drawn = generator is not None
        self.seed = int(torch.randint(2**62, (), generator=generator)) if drawn else seed
        # shared, because workers that live on from epoch to epoch have copies of this object
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def manifest(self) -> Manifest:
        """What all images of the store have in common: VAE, factors, preprocessing."""
        return self.reader.manifest

    @property
    def epoch(self) -> int:
        """What `set_epoch` was called with last."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other samples, flips and captions from now on; reaches running DataLoader workers too."""
        self._epoch.fill_(epoch)

    def entry(self, index: int) -> Entry:
        """All that the store's index says of an image: source, hash, sizes, padding, caption record."""
        return self.reader.entry(index)

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]
        entry = self.reader.entry(index)
        random = np.random.default_rng((self.seed, self.epoch, index))
        flipped = random.random() < self.flip
        pick = random.random()
        moments = self.reader.moments(index, entry, flipped).to(torch.float32, copy=True)
        return {
            **self._tensor(moments, random),
            "key": entry.key,
            "index": index,
            "caption": caption(entry, self.caption_keys, pick),
            "label": label(entry, self.label_key),
            "flipped": flipped,
            "original_size": torch.tensor((entry.height, entry.width)),
            "crop_top_left": torch.tensor(_crop_top_left(entry, flipped)),
            "size": torch.tensor((entry.encoded_height, entry.encoded_width)),
        }

    def _tensor(self, moments: torch.Tensor, random: np.random.Generator) -> dict[str, torch.Tensor]:
        if self.mode == "moments":
            return {"moments": moments}
        posterior = Posterior(moments[None])
        latents = posterior.mode()
        if self.mode == "sample":
            latents = posterior.at(torch.from_numpy(random.standard_normal(latents.shape, np.float32)))
        if self.scaled:
            latents = (latents - (self.manifest.shift_factor or 0.0)) * self.manifest.scaling_factor
        return {"latents": latents[0]}


def _check(mode: str, flip: float, seed: int, reader: StoreReader) -> None:
    if mode not in ("sample", "mode", "moments"):
        raise StoreError(f"mode={mode!r} came; wanted 'sample', 'mode' or 'moments'.")
    if not 0 <= flip <= 1:
        raise StoreError(f"flip={flip} came; wanted a probability, 0 to 1.")
    if seed < 0:
        raise StoreError(f"seed={seed} came; wanted one that is not negative.")
    if flip and not reader.manifest.flips:
        raise StoreError(
            f"flip={flip} came, but {reader.store} holds no flipped latents, and mirrored latents are not "
            "those of the mirror image. Encode the images again with --flips, or pass flip=0."
        )


def caption(entry: Entry, keys: Sequence[str] = CAPTION_KEYS, pick: float = 0.0) -> str:
    """An image's caption, "" where it has none; of several the one at `pick`, 0 to below 1."""
    found = (entry.caption or {}).get(next((key for key in keys if key in (entry.caption or {})), ""))
    texts = [text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)]
    return texts[int(pick * len(texts))] if texts else ""


def label(entry: Entry, key: str = LABEL_KEY) -> int:
    """An image's label, -1 where it has none."""
    found = (entry.caption or {}).get(key)
    return int(found) if isinstance(found, int) else NO_LABEL


def _crop_top_left(entry: Entry, flipped: bool) -> tuple[int, int]:
    """Where the crop begins in the scaled image, or in its mirror image."""
    if entry.cropped is None:
        return 0, 0
    left, top, width, _ = entry.cropped
    whole = entry.resized[0] if entry.resized else entry.width
    return top, whole - left - width if flipped else left
