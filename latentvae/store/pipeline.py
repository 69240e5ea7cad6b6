"""From image files to a shard: read by threads, encoded in batches, compared with what is there."""

import hashlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open

from latentvae.base import threads
from latentvae.base.errors import ImageError, StoreError
from latentvae.base.files import file_sha256
from latentvae.images.captions import PREFIX
from latentvae.images.reading import load_image_with_info
from latentvae.images.resizing import Preprocessing, fit, read_size
from latentvae.images.tensors import pad_to_multiple
from latentvae.store.format import (
    Entry,
    Failure,
    flipped_name,
    read_entries,
    read_failures,
    tensor_name,
    tensors_path,
)
from latentvae.store.planning import (
    BATCH_PIXELS,
    PlannedBatch,
    PlannedShard,
    Source,
    batch_limit,
    plan_batches,
)

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


class Batch(NamedTuple):
    """Images of one shard and one padded size, and those that could not be loaded."""

    shard: PlannedShard
    images: list[Loaded]
    failures: list[Failure]
    last: bool  # of its shard

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.images[0].image[0].numel() if self.images else 0


class _Ahead(NamedTuple):
    shard: PlannedShard
    planned: PlannedBatch
    loading: list[Future[Loaded | Failure]]
    last: bool


def feed(loader: Loader, shards: Iterable[PlannedShard], workers: int) -> Iterator[Batch]:
    """The images of all shards in batches, shard after shard; the last of each shard says so.

    Args:
        workers: threads that load. About twice as many images, or two batches, are in memory at once.
    """
    pool = threads.pool(workers, "latentvae-load")
    ahead: deque[_Ahead] = deque()
    most = 2 * max(loader.batch_size, workers)
    try:
        for shard, planned, last in _planned(loader, shards, pool):
            loading = [pool.submit(loader.load, key) for key in planned.keys]
            ahead.append(_Ahead(shard, planned, loading, last))
            while _is_enough(ahead, most):
                yield from _loaded(ahead.popleft(), loader.batch_size)
        while ahead:
            yield from _loaded(ahead.popleft(), loader.batch_size)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _is_enough(ahead: deque[_Ahead], most: int) -> bool:
    """Whether more images or pixels are waiting than the model needs."""
    images = sum(len(one.loading) for one in ahead)
    pixels = sum(one.planned.pixels for one in ahead)
    return len(ahead) > 1 and (images > most or pixels > most * BATCH_PIXELS)


def _planned(
    loader: Loader, shards: Iterable[PlannedShard], pool: ThreadPoolExecutor
) -> Iterator[tuple[PlannedShard, PlannedBatch, bool]]:
    """(shard, batch, whether it is the last), each shard planned while the one before it is loaded."""
    waiting: deque[tuple[PlannedShard, Future[list[PlannedBatch]]]] = deque()
    for shard in shards:
        waiting.append((shard, pool.submit(loader.plan, shard)))
        if len(waiting) > 1:
            yield from _each(*waiting.popleft())
    while waiting:
        yield from _each(*waiting.popleft())


def _each(
    shard: PlannedShard, planning: Future[list[PlannedBatch]]
) -> Iterator[tuple[PlannedShard, PlannedBatch, bool]]:
    batches = planning.result() or [PlannedBatch([], 0)]  # a shard of vanished images only still has an end
    for number, batch in enumerate(batches, 1):
        yield shard, batch, number == len(batches)


def _loaded(one: _Ahead, batch_size: int) -> Iterator[Batch]:
    """What was planned as one batch; several where headers were wrong."""
    results = [future.result() for future in one.loading]
    failures = [result for result in results if isinstance(result, Failure)]
    groups: dict[tuple[int, ...], list[Loaded]] = {}
    for result in results:
        if isinstance(result, Loaded):
            groups.setdefault(tuple(result.image.shape), []).append(result)
    parts: list[list[Loaded]] = []
    for shape, images in groups.items():
        most = batch_limit(shape[1] * shape[2], batch_size)
        parts += [images[start : start + most] for start in range(0, len(images), most)]
    for number, images in enumerate(parts or [[]], 1):
        end = number == max(len(parts), 1)
        yield Batch(one.shard, images, failures if end else [], one.last and end)


class Moments(NamedTuple):
    """Of a batch: (B, 2C, h, w) in the store's dtype on the CPU, and those of the mirror images."""

    plain: torch.Tensor
    flipped: torch.Tensor | None


class Computer:
    """Runs a VAE's encoder in threads of its own; use it in a `with` block.

    Args:
        vae: the model; its forward must be safe to call from several threads, as the stock ones are.
        dtype: of the moments that come out.
        count: batches at once, on a CPU; elsewhere it is one.
    """

    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, count: int) -> None:
        self.vae, self.dtype = vae, dtype
        self.count = count if vae.device.type == "cpu" else 1
        self._pool = threads.pool(self.count, "latentvae-encode")
        self._room = threading.Semaphore(self.count + 1)
        self.encoded = 0  # images
        self._lock, self._start = threading.Lock(), time.perf_counter()
        self._busy, self._since = 0.0, dict[int, float]()  # seconds done with; when each thread began

    def __enter__(self) -> "Computer":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def waiting(self) -> float:
        """The share of the time in which the model had nothing to do."""
        with self._lock:
            now = time.perf_counter()
            busy = self._busy + sum(now - since for since in self._since.values())
        return max(0.0, 1 - busy / (self.count * (now - self._start)))

    def submit(self, images: list[Loaded]) -> Future[Moments]:
        """Encode a batch as soon as the model can; waits where enough batches wait already."""
        self._room.acquire()
        future = self._pool.submit(self._encode, images)
        future.add_done_callback(lambda _: self._room.release())
        return future

    def alone(self, images: list[Loaded], within: AbstractContextManager[object]) -> Future[Moments]:
        """Encode a batch while nothing else runs, inside of a context; what comes back is done."""
        for _ in range(self.count + 1):
            self._room.acquire()
        try:
            with within:
                future = self._pool.submit(self._encode, images)
                wait([future])
                return future
        finally:
            self._room.release(self.count + 1)

    @torch.inference_mode()
    def _encode(self, images: list[Loaded]) -> Moments:
        thread = threading.get_ident()
        with self._lock:
            self._since[thread] = time.perf_counter()
        try:
            plain = self._moments([one.image for one in images])
            mirrored = [one.flipped for one in images if one.flipped is not None]
            return Moments(plain, self._moments(mirrored) if mirrored else None)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            shape = " x ".join(map(str, images[0].image.shape[1:]))
            raise StoreError(
                f"{len(images)} images of {shape} pixels (H x W) do not fit into memory at once, first "
                f"{images[0].entry.source}. Give a smaller --batch-size, and on a CPU fewer --threads."
            ) from error
        finally:
            with self._lock:
                self._busy += time.perf_counter() - self._since.pop(thread)
                self.encoded += len(images)

    def _moments(self, images: list[torch.Tensor]) -> torch.Tensor:
        batch = torch.stack(images).to(self.vae.device, self.vae.dtype)
        moments = self.vae.encode(batch).latent_dist.parameters
        return moments.to(self.dtype).cpu()


@dataclass(frozen=True)
class Row:
    """One image: its line, and its moments (2C, h, w) as they are stored."""

    entry: Entry
    moments: torch.Tensor
    flipped: torch.Tensor | None

    @property
    def is_finite(self) -> bool:
        """Whether the precision was enough."""
        both = [self.moments] if self.flipped is None else [self.moments, self.flipped]
        return all(bool(torch.isfinite(moments).all()) for moments in both)


@dataclass
class Assembly:
    """Rows and failures of one shard."""

    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def keep(self, store: Path, shard: PlannedShard) -> None:
        """Take over the images whose files are gone from the shard as it is."""
        gone = set(shard.vanished)
        self.failures += [failure for failure in read_failures(store, shard.name) if failure.key in gone]
        with safe_open(tensors_path(store, shard.name), framework="pt") as tensors:
            for entry in read_entries(store, shard.name):
                if entry.key in gone:
                    moments = tensors.get_slice(entry.tensor)[entry.offset : entry.offset + 1][0]
                    name = flipped_name(entry.tensor)
                    flipped = (
                        tensors.get_slice(name)[entry.offset : entry.offset + 1][0]
                        if name in tensors.keys()  # noqa: SIM118  safe_open is no dict
                        else None
                    )
                    self.rows.append(Row(entry, moments, flipped))

    def tensors(self) -> tuple[dict[str, torch.Tensor], list[Entry]]:
        """One tensor (N, 2C, h, w) for each size, its rows sorted by key; and the lines, which say where."""
        groups: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.entry.key):
            groups.setdefault(tensor_name(*row.moments.shape[-2:]), []).append(row)
        tensors: dict[str, torch.Tensor] = {}
        entries: list[Entry] = []
        for name, rows in groups.items():
            tensors[name] = torch.stack([row.moments for row in rows])
            if rows[0].flipped is not None:
                tensors[flipped_name(name)] = _stack([row.flipped for row in rows])
            entries += [replace(row.entry, tensor=name, offset=at) for at, row in enumerate(rows)]
        return tensors, entries


def _stack(rows: Sequence[torch.Tensor | None]) -> torch.Tensor:
    return torch.stack([row for row in rows if row is not None])


Line = TypeVar("Line", Entry, Failure)


class Finding(NamedTuple):
    """What is to be done about a shard: encode it, or write these lists, or (None) nothing."""

    encode: bool
    lists: tuple[list[Entry], list[Failure]] | None = None


def examine(
    store: Path, shard: PlannedShard, sources: dict[str, Source], retry_failed: bool, damaged: bool
) -> Finding:
    """Compare a planned shard with what is on disk.

    A file whose size and time are unchanged is not read; one whose content is unchanged is not encoded.

    Args:
        retry_failed: encode a shard again in which images failed.
        damaged: whether the shard's files do not match its hashes.
    """
    if shard.record is None or damaged:
        return Finding(True)
    entries, failures = read_entries(store, shard.name), read_failures(store, shard.name)
    if shard.pruned or (retry_failed and failures):
        return Finding(True)
    new_entries = [_renewed(entry, sources.get(entry.key)) for entry in entries]
    new_failures = [_renewed(failure, sources.get(failure.key)) for failure in failures]
    same_entries = [entry for entry in new_entries if entry is not None]
    same_failures = [failure for failure in new_failures if failure is not None]
    if len(same_entries) < len(entries) or len(same_failures) < len(failures):
        return Finding(True)
    if (same_entries, same_failures) == (entries, failures):
        return Finding(False)
    return Finding(False, (same_entries, same_failures))


def _renewed(line: Line, source: Source | None) -> Line | None:
    """The line with the file's time and caption as they are now; None where the content is another."""
    if source is None:
        return line
    try:
        state = source.path.stat()
        same = (state.st_size, state.st_mtime_ns) == (line.size_bytes, line.mtime_ns)
        if line.sha256 is None:  # could not be read: None here if it can be now
            source.path.open("rb").close()
            return None
        if not same and (state.st_size != line.size_bytes or file_sha256(source.path) != line.sha256):
            return None
    except OSError:  # gone since it was listed, or not readable any more: what is stored stays
        return line
    if isinstance(line, Failure):
        return replace(line, source=str(source.path), mtime_ns=state.st_mtime_ns)
    caption, caption_notes = source.caption()
    notes = [note for note in line.notes if not note.startswith(PREFIX)] + caption_notes
    return replace(line, source=str(source.path), mtime_ns=state.st_mtime_ns, caption=caption, notes=notes)
