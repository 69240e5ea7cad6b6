"""From an image file to what the model takes, and to its line of the index."""

import hashlib
from dataclasses import dataclass

import torch

from latentvae.errors import ImageError
from latentvae.images import load_image_with_info, pad_to_multiple
from latentvae.store.geometry import fit, read_size
from latentvae.store.manifest import Preprocessing
from latentvae.store.planning import PlannedBatch, PlannedShard, plan_batches
from latentvae.store.shard import Entry, Failure
from latentvae.store.sources import Source

MAX_BYTES = 1 << 31  # of an image file, which is read whole to be hashed


@dataclass(frozen=True)
class Loaded:
    """An image that is ready to be encoded: (C, H, W), padded; `entry` lacks only tensor and offset."""

    entry: Entry
    image: torch.Tensor
    flipped: torch.Tensor | None


@dataclass(frozen=True)
class Loader:
    """Loads images as a store's preprocessing has them.

    Attributes:
        sources: the image files by key.
        ratio: the model's spatial_compression_ratio.
        batch_size: of images up to 512 x 512 pixels.
        flips: prepare the mirror image too.
    """

    sources: dict[str, Source]
    preprocessing: Preprocessing
    ratio: int
    batch_size: int
    flips: bool

    def load(self, key: str) -> Loaded | Failure:
        """One image, or why it cannot be used."""
        source = self.sources[key]
        name, size_bytes, mtime_ns = str(source.path), 0, 0
        try:
            state = source.path.stat()
            size_bytes, mtime_ns = state.st_size, state.st_mtime_ns
            if size_bytes > MAX_BYTES:
                reason = f"{name} has {size_bytes} bytes, but at most {MAX_BYTES} are read: shrink it"
                return Failure(key, name, "", size_bytes, mtime_ns, reason)
            data = source.path.read_bytes()
        except OSError as error:
            reason = f"{name} cannot be read: {error.strerror}"
            return Failure(key, name, None, size_bytes, mtime_ns, reason)
        sha256 = hashlib.sha256(data).hexdigest()
        try:
            image, info = load_image_with_info(data, name=name, channels=self.preprocessing.channels)
        except ImageError as error:
            return Failure(key, name, sha256, size_bytes, mtime_ns, str(error))
        original = (info.width, info.height)
        geometry = fit(original, self.preprocessing, self.ratio)
        problem = geometry.problem(original)
        if problem:
            return Failure(key, name, sha256, size_bytes, mtime_ns, f"{name} cannot be used: {problem}")
        image = geometry.apply(image)
        padded, padding = pad_to_multiple(image, self.ratio)
        caption, notes = source.caption()
        entry = Entry(
            key=key,
            source=name,
            sha256=sha256,
            size_bytes=size_bytes,
            mtime_ns=mtime_ns,
            width=info.width,
            height=info.height,
            resized=geometry.resized,
            cropped=geometry.cropped,
            padding=(padding.left, padding.top, padding.right, padding.bottom),
            tensor="",
            offset=0,
            caption=caption,
            notes=[*info.notes, *geometry.notes(original), *notes],
        )
        return Loaded(entry, padded, pad_to_multiple(image.flip(-1), self.ratio)[0] if self.flips else None)

    def plan(self, shard: PlannedShard) -> list[PlannedBatch]:
        """The batches of a shard, by the sizes that headers state."""
        sizes = {}
        for key in shard.keys:
            size = read_size(self.sources[key].path)
            sizes[key] = (0, 0) if size is None else fit(size, self.preprocessing, self.ratio).size(size)
        return plan_batches(sizes, self.ratio, self.batch_size)
