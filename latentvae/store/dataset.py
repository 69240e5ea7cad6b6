"""Latents of a store: a torch dataset for whoever trains a diffusion model, and any image by its number."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from latentvae.base import cache as caches
from latentvae.base.addresses import Address, Place, place, read_part
from latentvae.base.errors import LatentVAEError, StoreError
from latentvae.images.resizing import Geometry
from latentvae.images.scans import load
from latentvae.images.sources import read_origin
from latentvae.models.latents import Posterior, Scaling, decode
from latentvae.store import format as layout
from latentvae.store.format import Entry, Manifest, ShardRecord

SHARDS_KEPT = 1024  # mapped files hold no descriptor, so the limit is the memory of their indexes
LINES_KEPT = 2_000_000  # of all indexes kept: 8 bytes each, and the keys in the headers, about 60
FETCHED_KEPT = 64  # mapped shards that a cache of bounded size cannot drop

_TENSOR = re.compile(rb'"tensor":"(moments\.\d+x\d+)"')

Mode = Literal["sample", "mode", "moments"]
Item = dict[str, Any]
Answer = TypeVar("Answer")
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
        store: the folder that `latentvae encode` wrote, or its address, such as s3://bucket/latents.
        mode: "sample": a new draw of the posterior in every epoch; "mode": its mean; "moments": both halves.
        flip: probability of the mirror image, 0 to 1. Needs a store with flipped latents
            (`latentvae encode --flips`): mirrored latents are not the latents of the mirror image.
        seed: not negative; of all draws.
        generator: draws the seed, instead of `seed`.
        scaled: False gives unscaled latents.
        caption_keys: where an image's caption record may have the text, a string or a list of strings; the
            first one that is there counts.
        label_key: where it may have the label, an integer.
        cache: of a store at an address: where shards are kept that were fetched, whole, when one of their
            images was first read; shared by all that name it. None: $LATENTVAE_CACHE, or below ~/.cache.
        cache_bytes: what is kept there; beyond it shards go that were used longest ago. Reading at random
            from a store that is larger fetches a shard for nearly every image: see `LatentStream`.

    Raises:
        StoreError: no store, a damaged or empty one, one of a later version; flips that were not stored; an
            option that is out of range.
        SourceError: an address that cannot be read.
    """

    def __init__(
        self,
        store: str | Place,
        *,
        mode: Mode = "sample",
        flip: float = 0.0,
        seed: int = 0,
        generator: torch.Generator | None = None,
        scaled: bool = True,
        caption_keys: Sequence[str] = CAPTION_KEYS,
        label_key: str = LABEL_KEY,
        cache: str | Path | None = None,
        cache_bytes: int = caches.BYTES,
    ) -> None:
        self.reader = StoreReader(store, cache, cache_bytes)
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
        # NumPy's, which is seeded by several numbers; torch's takes one
        random = np.random.default_rng((self.seed, self.epoch, index))
        flipped = random.random() < self.flip
        pick = random.random()  # drawn with or without captions, so that they change no latents
        # (2C, h, w); a copy, because the stored ones are a view of the file
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
            latents = Scaling.of(self.manifest).scale(latents)
        return {"latents": latents[0]}


def _check(mode: str, flip: float, seed: int, reader: "StoreReader") -> None:
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
    whole = entry.resized[0] if entry.resized else entry.width  # what was right of the crop is left of it
    return top, whole - left - width if flipped else left


def original_image(entry: Entry, manifest: Manifest, largest: int | None = None) -> torch.Tensor | None:
    """The image (C, H, W) as it was encoded, from its file; None where that is gone or above `largest` px."""
    if largest is not None and entry.encoded_width * entry.encoded_height > largest:
        return None
    try:
        data = read_origin(entry.source)
        image, _ = load(data, manifest.preprocessing.channels, manifest.window)
    except (LatentVAEError, OSError):  # gone, or no image any more
        return None
    return Geometry(entry.resized, entry.cropped).apply(image)


@torch.no_grad()
def decoded_images(
    vae: AutoencoderKL, entries: Sequence[Entry], latents: torch.Tensor | Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The images (C, H, W) that unscaled latents (B, C, h, w) give, without padding, on the CPU."""
    decoded = decode(vae, torch.stack(list(latents))).cpu()  # (B, C, H, W)
    return [entry.image_padding.crop(image) for entry, image in zip(entries, decoded, strict=True)]


class StoreReader:
    """Reads images of a store by number, in the order of its shards and their indexes.

    Opening reads `store.json` alone. A shard's tensors are mapped when one of its images is first read, and
    its index is scanned for line ends, not parsed; both are kept for the shards that were used last. No file
    stays open, so readers may be pickled and forked.

    Args:
        store: the folder, or its address.
        cache, cache_bytes: of an address, as `LatentDataset` has them.

    Raises:
        StoreError: no store, a damaged one, one of a later version, or one without images.
        SourceError: an address that cannot be read.
    """

    def __init__(
        self, store: str | Place, cache: str | Path | None = None, cache_bytes: int = caches.BYTES
    ) -> None:
        # absolute: files are opened again and again, wherever the process then is
        self.store = named if isinstance(named := place(store), Address) else named.absolute()
        self.cache = caches.Cache(Path(cache) if cache else caches.default_folder(), cache_bytes)
        self.manifest = layout.read_manifest(store)
        if not self.manifest.count:
            raise StoreError(
                f"the store {store} holds no image: run `latentvae encode` with images that can be read."
            )
        if not isinstance(self.manifest.config.get("latent_channels"), int):
            raise StoreError(
                f"store.json of {store} does not say how many latent_channels its VAE has: encode again."
            )
        # a number for each shard: nothing here grows with the images
        self._ends = list(accumulate(shard.count for shard in self.manifest.shards))
        self._firsts = {
            shard.name: end - shard.count for shard, end in zip(self.manifest.shards, self._ends, strict=True)
        }
        self._remember()

    def _remember(self) -> None:
        """Start with no shard kept; what is mapped cannot be pickled for a worker."""
        longest = max(shard.count for shard in self.manifest.shards)
        most = FETCHED_KEPT if isinstance(self.store, Address) else SHARDS_KEPT
        kept = max(1, min(most, LINES_KEPT // longest))
        self._line_starts = lru_cache(kept)(self._scan)
        self._tensors = lru_cache(kept)(self._map)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_line_starts", "_tensors")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[ShardRecord, int]:
        """The shard of an image and its line there; IndexError where there is no such image."""
        position = range(len(self))[index]  # negative ones count from the end, as in a list
        number = bisect_right(self._ends, position)
        shard = self.manifest.shards[number]
        return shard, position - self._firsts[shard.name]

    def first(self, shard: ShardRecord) -> int:
        """The number of a shard's first image."""
        return self._firsts[shard.name]

    def entry(self, index: int) -> Entry:
        """The index line of an image.

        Raises:
            StoreError: its shard is gone, damaged, or was replaced since this reader opened the store.
        """
        shard, line = self.locate(index)
        with self._using(shard):
            start, end = (int(each) for each in self._line_starts(shard)[line : line + 2])
            text = self._index(shard, lambda path: read_part(path, start, end - start))
        # offsets of an index that was replaced meanwhile cut lines in two
        if not text.startswith(b"{") or text.find(b"\n") != len(text) - 1:
            raise self._unusable(shard, "its index has changed since the store was opened")
        try:
            return layout.parse_entry(text)
        except StoreError as error:
            raise self._unusable(shard, f"line {line + 1} of its index is damaged") from error

    def moments(self, index: int, entry: Entry, flipped: bool = False) -> torch.Tensor:
        """The moments of an image, (2C, h, w), as stored; a view of the mapped file: not to be written to.

        Args:
            index: the image's number.
            entry: its `entry(index)`.
            flipped: those of its mirror image, which must have been stored.

        Raises:
            StoreError: as `entry`; or the tensors lack this row.
        """
        shard, _ = self.locate(index)
        name = layout.flipped_name(entry.tensor) if flipped else entry.tensor
        with self._using(shard):
            # a slice, because it may be empty: what the index says is checked against what is there
            row = self._tensors(shard).get_slice(name)[entry.offset : entry.offset + 1]
        channels = 2 * self.manifest.config["latent_channels"]
        if entry.offset < 0 or row.shape != (1, channels, *layout.latent_size(entry.tensor)):
            raise self._unusable(shard, f"{name} has no row {entry.offset} of the wanted shape")
        return row[0]

    def tensor_names(self, shard: ShardRecord) -> list[str]:
        """The tensor of each image of a shard, in order; the index is read only where there are several."""
        if not shard.count:
            return []
        stored: list[str] = self._tensors(shard).keys()
        names = [name for name in stored if name.startswith("moments.")]
        if len(names) == 1:  # the rule, with --size and --crop
            return names * shard.count
        with self._using(shard):
            found = self._index(shard, _tensors_of)
        if len(found) != shard.count:
            raise self._unusable(shard, f"its index has {len(found)} lines instead of {shard.count}")
        return found

    def _scan(self, shard: ShardRecord) -> np.ndarray:
        starts = self._index(shard, layout.line_starts)
        if len(starts) != shard.count + 1:
            raise self._unusable(shard, f"its index has {len(starts) - 1} lines instead of {shard.count}")
        return starts

    def _map(self, shard: ShardRecord) -> Any:
        with self._using(shard):
            return self._file(
                f"{shard.name}.safetensors", shard.sha256, lambda path: safe_open(path, framework="pt")
            )

    def fetch(self, shard: ShardRecord) -> None:
        """Bring a shard of an address here, before it is needed."""
        if isinstance(self.store, Address):
            self.cache.fetch(self.store / f"{shard.name}.safetensors", shard.sha256)
            self.cache.fetch(self.store / f"{shard.name}.jsonl", shard.index_sha256)

    def _index(self, shard: ShardRecord, use: Callable[[Path], Answer]) -> Answer:
        return self._file(f"{shard.name}.jsonl", shard.index_sha256, use)

    def _file(self, name: str, sha256: str, use: Callable[[Path], Answer]) -> Answer:
        """Do something with a file of the store, on this machine."""
        if isinstance(self.store, Address):
            return self.cache.use(self.store / name, sha256, use)
        return use(self.store / name)

    @contextmanager
    def _using(self, shard: ShardRecord) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, TypeError) as error:  # TypeError: an offset that is no number
            raise self._unusable(shard, getattr(error, "strerror", None) or str(error)) from error

    def _unusable(self, shard: ShardRecord, reason: str) -> StoreError:
        return StoreError(
            f"the shard {shard.name} of {self.store} cannot be used: {reason}. Run `latentvae verify` to see "
            "what is damaged, and `latentvae encode` with the images to repair it; then open the store again."
        )


def _tensors_of(index: Path) -> list[str]:
    with index.open("rb") as file:
        return [_tensor_of(line) for line in file]


def _tensor_of(line: bytes) -> str:
    """The tensor that an index line names: found without parsing, ten times as fast."""
    match = _TENSOR.search(line)  # the first: captions come later in the line
    return match[1].decode() if match else layout.parse_entry(line).tensor
