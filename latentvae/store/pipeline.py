"""From image files to moments: the images of shards are put into batches, read by threads, and encoded."""

import hashlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL

from latentvae.base import threads
from latentvae.base.errors import ImageError, NoMemoryError, SourceError, ran_out_of_memory
from latentvae.images.reading import read_size
from latentvae.images.resizing import Preprocessing, Size, plan_geometry
from latentvae.images.scans import Window, load
from latentvae.images.tensors import pad_to_multiple
from latentvae.store import format as layout
from latentvae.store.format import Entry, Failure, Row
from latentvae.store.planning import ShardWork, Source

NO_MEMORY = "{name} could not be loaded: the machine's memory was full. Run again with more room."
MAX_BYTES = 1 << 31  # of an image file, which is read whole to be hashed
BATCH_PIXELS = 512 * 512  # a batch size is meant for images of so many; of larger ones fewer make a batch
NOT_FINITE = "{} gives moments that are NaN or infinite: encode in a precision of wider range (fp32, bf16)"
LARGE = 1024 * 1024  # pixels above which an image is a batch of its own, and may be tiled


class PlannedBatch(NamedTuple):
    """Images of one padded size."""

    keys: list[str]
    pixels: int  # of all of them


def plan_batches(sizes: dict[str, Size], ratio: int, batch_size: int) -> list[PlannedBatch]:
    """Batches of images that are of one size when padded; large images in smaller batches.

    Args:
        sizes: width and height by key, of what is to be encoded.
        ratio: sizes are padded to multiples of.
        batch_size: of images up to 512 x 512 pixels.

    Returns:
        The batches, those of large images first, so that memory runs out early if it does.
    """
    groups: dict[Size, list[str]] = {}
    for key in sorted(sizes):
        width, height = sizes[key]
        groups.setdefault((-(-width // ratio), -(-height // ratio)), []).append(key)
    batches = []
    for width, height in sorted(groups, key=lambda size: (-size[0] * size[1], size)):
        pixels = width * height * ratio**2
        keys, most = groups[width, height], batch_limit(pixels, batch_size)
        parts = [keys[start : start + most] for start in range(0, len(keys), most)]
        batches += [PlannedBatch(part, pixels * len(part)) for part in parts]
    return batches


def batch_limit(pixels: int, batch_size: int) -> int:
    """How many images of so many pixels make a batch."""
    if pixels > LARGE:
        return 1
    return max(1, min(batch_size, batch_size * BATCH_PIXELS // max(pixels, 1)))


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
        name, size_bytes, mtime_ns = source.name, 0, 0
        sha256 = ""  # of a file that is too large to be read
        try:
            size, mtime_ns = source.images.state(source.index)
            size_bytes = size or 0
            if size_bytes > MAX_BYTES:
                raise ImageError(
                    f"{name} has {size_bytes} bytes, but at most {MAX_BYTES} are read: shrink it"
                )
            data = source.images.read(source.index)  # once: what is hashed is what is encoded
            size_bytes, sha256 = len(data), hashlib.sha256(data).hexdigest()
            limits = self.preprocessing.range
            window = Window(*limits) if limits else None
            image, info = load(data, self.preprocessing.channels, window, name)
            original = (info.width, info.height)
            geometry = plan_geometry(original, self.preprocessing, self.ratio)
            if problem := geometry.problem(original):
                raise ImageError(f"{name} cannot be used: {problem}")
            image = geometry.apply(image)  # (C, H, W)
            padded, padding = pad_to_multiple(image, self.ratio)
            # flipped before it is padded, so that its padding too is on the right and at the bottom
            flipped = pad_to_multiple(image.flip(-1), self.ratio)[0] if self.flips else None
        except (ImageError, SourceError, OSError, MemoryError, RuntimeError) as error:
            if ran_out_of_memory(error):
                reason = str(error) if isinstance(error, ImageError) else NO_MEMORY.format(name=name)
            elif isinstance(error, OSError):
                # a row that holds a path is another thing than the file of that path
                other = f" ({error.filename})" if str(error.filename or name) not in name else ""
                reason = f"{name} cannot be read: {error.strerror or error}{other}"
            elif isinstance(error, SourceError):
                reason = str(error)
            elif isinstance(error, ImageError):
                return Failure(key, name, sha256, size_bytes, mtime_ns, str(error))
            else:
                raise
            return Failure(key, name, None, size_bytes, mtime_ns, reason)  # None: the next run tries again
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
        return Loaded(entry, padded, flipped)

    def plan(self, shard: ShardWork) -> list[PlannedBatch]:
        """The batches of what is to be encoded of a shard, by the sizes that headers state."""
        sizes = {}
        for key in shard.keys:
            size = self._size(self.sources[key])  # None: loading it will say what is wrong
            sizes[key] = (
                (0, 0) if size is None else plan_geometry(size, self.preprocessing, self.ratio).size(size)
            )
        return plan_batches(sizes, self.ratio, self.batch_size)

    @staticmethod
    def _size(source: Source) -> Size | None:
        try:
            with source.images.open(source.index) as file:
                return read_size(file)
        except (ImageError, SourceError, OSError):
            return None


class Batch(NamedTuple):
    """Images of one shard and one padded size, and those that could not be loaded."""

    shard: ShardWork
    images: list[Loaded]
    failures: list[Failure]
    last: bool  # of its shard

    @property
    def is_large(self) -> bool:
        """Whether it is one image above 1024 x 1024 pixels."""
        return bool(self.images) and self.images[0].image[0].numel() > LARGE


class _Ahead(NamedTuple):
    shard: ShardWork
    loading: list[Future[Loaded | Failure]]
    pixels: int  # of all, as planned
    last: bool


def feed(loader: Loader, shards: Iterable[ShardWork], workers: int) -> Iterator[Batch]:
    """The images of all shards in batches, shard after shard; the last of each shard says so.

    Args:
        workers: threads that load. About twice as many images, or two batches, are in memory at once.
    """
    pool = threads.pool(workers, "latentvae-load")
    ahead = deque[_Ahead]()
    most = 2 * max(loader.batch_size, workers)
    try:
        for one in _begun(loader, shards, pool):
            ahead.append(one)
            # more images or pixels are waiting than the model needs
            while len(ahead) > 1 and (
                sum(len(each.loading) for each in ahead) > most
                or sum(each.pixels for each in ahead) > most * BATCH_PIXELS
            ):
                yield from _loaded(ahead.popleft(), loader)
        while ahead:
            yield from _loaded(ahead.popleft(), loader)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begun(loader: Loader, shards: Iterable[ShardWork], pool: ThreadPoolExecutor) -> Iterator[_Ahead]:
    """Batches whose images are being loaded, from when they are asked for."""
    plans = ((shard, pool.submit(loader.plan, shard)) for shard in shards)
    current = next(plans, None)
    while current is not None:
        following = next(plans, None)  # its headers are read while the images of the one before it are
        shard, planning = current
        batches = planning.result() or [PlannedBatch([], 0)]  # of vanished images only: it still has an end
        for number, batch in enumerate(batches, 1):
            loading = [pool.submit(loader.load, key) for key in batch.keys]
            yield _Ahead(shard, loading, batch.pixels, number == len(batches))
        current = following


def _loaded(one: _Ahead, loader: Loader) -> Iterator[Batch]:
    """What was planned as one batch; several where headers were wrong."""
    results = [future.result() for future in one.loading]
    for number, result in enumerate(results):
        if isinstance(result, Failure) and result.sha256 is None:
            # alone: a large image beside it may have had the memory
            results[number] = loader.load(result.key)
    failures = [result for result in results if isinstance(result, Failure)]
    groups: dict[tuple[int, ...], list[Loaded]] = {}
    for result in results:
        if isinstance(result, Loaded):
            groups.setdefault(tuple(result.image.shape), []).append(result)
    parts: list[list[Loaded]] = []
    for shape, images in groups.items():
        most = batch_limit(shape[1] * shape[2], loader.batch_size)
        parts += [images[start : start + most] for start in range(0, len(images), most)]
    for number, images in enumerate(parts or [[]], 1):  # where all failed, a batch of none carries them on
        end = number == max(len(parts), 1)
        yield Batch(one.shard, images, failures if end else [], one.last and end)


class Computer:
    """Runs a VAE's encoder in threads of its own; use it in a `with` block.

    Args:
        vae: the model; its forward must be safe to call from several threads, as the stock ones are.
        dtype: of the moments that come out.
        count: batches at once, on a CPU; elsewhere it is one.
        batch_size: of images up to 512 x 512 pixels. Batches are filled up, so that an image's moments do not
            depend on the others: kernels are chosen by the size of a batch, and differ in the last bits.
    """

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, count: int, batch_size: int) -> None:
        self.vae, self.dtype, self.batch_size = vae, dtype, batch_size
        # side by side, on a core each: what they compute does not depend on how many there are
        self.count = count if vae.device.type == "cpu" else 1
        self._pool = threads.pool(self.count, "latentvae-encode")
        self._room = threading.Semaphore(self.count + 1)  # one batch waits, so that no thread does
        self.encoded = 0  # images
        self._lock, self._start, self._busy = threading.Lock(), time.perf_counter(), 0.0  # seconds

    def __enter__(self) -> "Computer":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def waiting(self) -> float:
        """The share of the time in which the model had nothing to do, as far as it is done with batches."""
        return max(0.0, 1 - self._busy / (self.count * (time.perf_counter() - self._start)))

    def submit(self, images: list[Loaded]) -> Future[list[Row]]:
        """Encode a batch as soon as the model can; waits where enough batches wait already."""
        self._room.acquire()
        future = self._pool.submit(self._encode, images)
        future.add_done_callback(lambda _: self._room.release())
        return future

    def alone(self, images: list[Loaded], within: AbstractContextManager[object]) -> Future[list[Row]]:
        """Encode a batch while nothing else runs, inside of a context; what comes back is done."""
        for _ in range(self.count + 1):  # all places taken: no batch runs or waits
            self._room.acquire()
        try:
            with within:
                future = self._pool.submit(self._encode, images)
                wait([future])
                return future
        finally:
            self._room.release(self.count + 1)

    @torch.inference_mode()
    def _encode(self, images: list[Loaded]) -> list[Row]:
        began = time.perf_counter()
        try:
            plain = self._moments([one.image for one in images])
            flipped = [one.flipped for one in images if one.flipped is not None]
            mirrored = self._moments(flipped) if flipped else [None] * len(images)
            return [Row(one.entry, *both) for one, *both in zip(images, plain, mirrored, strict=True)]
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            shape = " x ".join(map(str, images[0].image.shape[1:]))
            raise NoMemoryError(
                f"{len(images)} images of {shape} pixels (H x W) did not fit into memory at once, first "
                f"{images[0].entry.source}. Run again with more room, a smaller --batch-size, or on a CPU "
                "fewer --threads."
            ) from error
        finally:
            with self._lock:  # += of several threads loses counts
                self._busy += time.perf_counter() - began
                self.encoded += len(images)

    def _moments(self, images: list[torch.Tensor]) -> torch.Tensor:
        missing = batch_limit(images[0][0].numel(), self.batch_size) - len(images)
        filled = [*images, *[torch.zeros_like(images[0])] * missing]
        batch = torch.stack(filled).to(self.vae.device, self.vae.dtype)  # (B, C, H, W)
        moments = self.vae.encode(batch).latent_dist.parameters  # (B, 2C, h, w): means, then log-variances
        return moments[: len(images)].to(self.dtype).cpu()


@dataclass
class Pending:
    """A shard whose moments are still being computed."""

    name: str
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    computing: list[tuple[list[Entry], Future[list[Row]]]] = field(default_factory=list)

    def collect(self) -> None:
        """Wait for the moments; images whose moments are not finite have failed."""
        for entries, future in self.computing:
            try:
                rows = future.result()
            except NoMemoryError as error:  # the others go on; a later run tries these again
                self.failures += [failure_of(entry, error) for entry in entries]
                continue
            for row in rows:
                if row.is_finite:
                    self.rows.append(row)
                else:
                    self.failures.append(
                        failure_of(row.entry, ImageError(NOT_FINITE.format(row.entry.source)))
                    )


def begun(work: ShardWork) -> Pending:
    """A shard with what is kept of others."""
    rows = [
        row
        for holder, entries in work.entries
        if entries
        for row in layout.read_rows(holder.folder, holder.record.name, entries)
    ]
    return Pending(work.name, rows, work.failures)


def failure_of(entry: Entry, error: ImageError) -> Failure:
    """An image that could not be encoded; without a hash, so that later runs try it, where memory was why."""
    sha256 = None if isinstance(error, NoMemoryError) else entry.sha256
    return Failure(entry.key, entry.source, sha256, entry.size_bytes, entry.mtime_ns, str(error))
