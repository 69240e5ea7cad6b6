"""What a store is made of: `store.json`, and shards of moments with a line of JSON for each image.

    store.json                  what all shards have in common, and the list of them: `Manifest`
    latents-00000.safetensors   moments, a tensor (N, 2C, h, w) for each latent size, and one more for the
                                mirror images where they are stored (moments_flipped.32x48); in the metadata
                                the keys of the rows: {"keys": '{"moments.32x48":["a.jpg",...]}'};
                                and what `statistics` adds up, a tensor (C, ...)
    latents-00000.jsonl         its images, sorted by key: `Entry`
    latents-00000.failed.jsonl  those that could not be encoded, if there are such: `Failure`

All of it is format version 1. Shards of earlier versions hold no statistics, nor then has `store.json` any.
Those without keys (older ones, and of images too many for a header) are as good as others: the repair of a
damaged index alone looks there.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

from latentvae.base.addresses import Address, Place, place
from latentvae.base.errors import SourceError, StoreError
from latentvae.base.files import (
    check_local,
    file_sha256,
    fsync,
    link_or_copy,
    partial_path,
    staged_file,
    whole_file,
)
from latentvae.images.resizing import Preprocessing
from latentvae.images.scans import Window
from latentvae.images.tensors import Padding

MANIFEST = "store.json"
STATISTICS = "statistics"  # the name of a shard's tensor of them
VERSION = 1  # to be raised when an earlier version of this package would read a store wrongly
CANNOT_WRITE = (
    "{path} cannot be written ({reason}). Finished shards are intact: make room, or check the folder's "
    "permissions, and run the same command again."
)
MAX_KEYS = 50_000_000  # bytes; safetensors opens no file whose header is above 100 MB

DtypeName = Literal["bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class ShardRecord(BaseModel):
    """One shard: NAME.safetensors and NAME.jsonl, and NAME.failed.jsonl where images could not be encoded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^latents-\d{5,}$")
    count: int = Field(ge=0)  # images, the failed ones not included; may be 0
    sha256: str  # of the safetensors file
    index_sha256: str
    failed: int = Field(default=0, ge=0)
    failed_sha256: str | None = None


class StoredShard(NamedTuple):
    """A shard that is there, with the folder of its files."""

    folder: Path
    record: ShardRecord


class Statistics(BaseModel):
    """What scaled latents are like, a figure for each channel; of all images of a store, mirror images not.

    Attributes:
        values: latent pixels, those of padding included.
        mean, std: of posterior samples, expected over all draws.
        percentiles: by percent, such as "99.9": of one draw for each image, to about 1 % of their size.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int
    values: int
    mean: list[float]
    std: list[float]
    percentiles: dict[str, list[float]]


class Manifest(BaseModel):
    """All that the shards have in common. Latents in the store are unscaled moments (see `latents`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["latentvae-store"] = "latentvae-store"
    version: int = VERSION
    weights_sha256: str  # see `latentvae.models.fingerprint.weight_hash`
    config: dict[str, Any]  # of the AutoencoderKL
    scaling_factor: float
    shift_factor: float | None
    preprocessing: Preprocessing
    dtype: DtypeName  # of the stored moments
    precision: DtypeName  # of the model's arithmetic
    flips: bool  # whether each image's mirror image was encoded too
    batch_size: int  # recorded, because what shares a batch moves the last bits of bf16 moments
    shard_size: int
    statistics: Statistics | None = None  # None: no images, or shards of an earlier version
    shards: list[ShardRecord] = Field(default_factory=list)

    @property
    def window(self) -> Window | None:
        """The intensity range that was encoded, of scans."""
        limits = self.preprocessing.range
        return Window(*limits) if limits else None

    @property
    def count(self) -> int:
        """How many images are in the store."""
        return sum(shard.count for shard in self.shards)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the stored moments."""
        return DTYPES[self.dtype]


def read_manifest(store: str | Place) -> Manifest:
    """Read a store's manifest, from a folder or an address.

    Raises:
        StoreError: there is none, it is damaged, or of a later version of this format.
        SourceError: the address cannot be reached.
    """
    folder = place(store)
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, SourceError) as error:
        why = ""
        if isinstance(folder, Address):
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            why = folder.why_missing()
        else:
            check_local(folder, StoreError)
        raise StoreError(
            f"{store} is no complete store: it has no {MANIFEST}{why}. Name a folder that `latentvae encode` "
            "wrote, or run that again to its end."
        ) from error
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}). Restore it, or delete the folder and encode again."
        ) from error
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise StoreError(
            f"{path} is of format version {version}, this package reads up to {VERSION}: update it."
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        member = ".".join(map(str, first["loc"]))
        raise StoreError(
            f"{path} is no manifest of a store: {member}: {first['msg']}. Restore it, or delete the folder "
            "and encode again."
        ) from error


def write_manifest(store: str | Path, manifest: Manifest) -> None:
    """Put the manifest in place, whole or not at all."""
    with whole_file(Path(store) / MANIFEST, StoreError, CANNOT_WRITE, durable=True) as path:
        path.write_bytes(to_bytes(manifest))


def to_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is in its file."""
    # without a null, so that what earlier versions wrote stays as it is
    left_out = {"statistics"} if manifest.statistics is None else None
    return manifest.model_dump_json(indent=1, exclude=left_out).encode() + b"\n"


def model_config(vae: AutoencoderKL) -> dict[str, Any]:
    """The config as JSON values, without what names this machine."""
    own = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    return json.loads(json.dumps(own)) | {"_class_name": "AutoencoderKL"}


@dataclass(frozen=True)
class _Line:
    """One image in a shard's lists."""

    key: str  # POSIX path below the source folder, with its suffix
    source: str  # path of the file, as it was named

    def line(self) -> bytes:
        """It as JSON, ASCII, with its end: file names need not be valid Unicode."""
        return json.dumps(asdict(self), separators=(",", ":")).encode("ascii") + b"\n"


@dataclass(frozen=True)
class Entry(_Line):
    """One image of a store.

    Its moments are row `offset` of the tensor `tensor` in the shard's safetensors file (and of
    `flipped_name(tensor)` where mirror images are stored).
    """

    sha256: str  # of the image file
    size_bytes: int
    mtime_ns: int
    width: int  # pixels of the image file, upright
    height: int
    resized: tuple[int, int] | None  # width, height after scaling; None: not scaled
    cropped: tuple[int, int, int, int] | None  # left, top, width, height taken after scaling; None: all
    padding: tuple[int, int, int, int]  # left, top, right, bottom pixels that the encoder's padding added
    tensor: str  # for instance "moments.32x48": latent height x width
    offset: int  # row
    caption: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def encoded_width(self) -> int:
        """Pixels of what was encoded: after scaling and cropping, before padding."""
        return self.cropped[2] if self.cropped else self.resized[0] if self.resized else self.width

    @property
    def encoded_height(self) -> int:
        """Pixels of what was encoded: after scaling and cropping, before padding."""
        return self.cropped[3] if self.cropped else self.resized[1] if self.resized else self.height

    @property
    def image_padding(self) -> Padding:
        """What `latents.decode` takes to give an image of encoded_height x encoded_width."""
        return Padding(*self.padding, height=self.encoded_height, width=self.encoded_width)


_NAMES = {each.name for each in fields(Entry)}
_TUPLES = ("resized", "cropped", "padding")


def parse_entry(line: bytes) -> Entry:
    """Read one index line.

    Raises:
        StoreError: it is none.
    """
    try:
        values = json.loads(line)
        if not isinstance(values, dict) or values.keys() != _NAMES:  # a flipped bit may leave good JSON
            raise ValueError(f"keys {sorted(_NAMES)} were wanted")
        for name in _TUPLES:
            values[name] = None if values[name] is None else tuple(values[name])
        return Entry(**values)
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{line[:80]!r} is no line of a store's index ({error}). Run `latentvae verify` to find the "
            "damaged shard, and `latentvae encode` to repair it."
        ) from error


@dataclass(frozen=True)
class Failure(_Line):
    """An image that belongs to a shard and could not be encoded."""

    sha256: str | None  # None: its bytes could not even be read, so that the next run tries again
    size_bytes: int
    mtime_ns: int
    reason: str


def shard_name(number: int) -> str:
    """For instance "latents-00000"."""
    return f"latents-{number:05d}"


def shard_number(name: str) -> int:
    """The inverse of `shard_name`."""
    return int(name.rpartition("-")[2])


def tensors_path(store: str | Path, name: str) -> Path:
    """The safetensors file of a shard."""
    return Path(store) / f"{name}.safetensors"


def index_path(store: str | Path, name: str) -> Path:
    """The index of a shard."""
    return Path(store) / f"{name}.jsonl"


def failed_path(store: str | Path, name: str) -> Path:
    """The list of a shard's images that could not be encoded; there only if there are such."""
    return Path(store) / f"{name}.failed.jsonl"


def tensor_name(height: int, width: int) -> str:
    """What the moments of latents of height x width are called in a shard."""
    return f"moments.{height}x{width}"


def flipped_name(tensor: str) -> str:
    """What the moments of the mirror images are called."""
    return tensor.replace("moments.", "moments_flipped.", 1)


def latent_size(tensor: str) -> tuple[int, int]:
    """Height and width of the latents in a tensor, from its name."""
    height, _, width = tensor.rpartition(".")[2].partition("x")
    return int(height), int(width)


def line_starts(index: Path) -> np.ndarray:
    """Where each line starts, and at last the file's size: int64 (count + 1,). No line is parsed."""
    ends, base = [np.zeros(1, np.int64)], 0
    with index.open("rb") as file:
        while chunk := file.read(1 << 24):  # parsing a million lines takes 7.6 s and 1.2 GB
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + base + 1)
            base += len(chunk)
    return np.concatenate(ends)


def read_entries(store: str | Path, name: str, text: str = "") -> list[Entry]:
    """The entries of one shard in whose lines a text stands, sorted by key."""
    with index_path(store, name).open("rb") as file:  # parsing a million lines takes 7.6 s
        return [parse_entry(line) for line in file if text.encode() in line]


def read_failures(store: str | Path, name: str) -> list[Failure]:
    """The images of one shard that could not be encoded, sorted by key."""
    path = failed_path(store, name)
    if not path.exists():
        return []
    try:
        return [Failure(**json.loads(line)) for line in path.read_bytes().splitlines()]
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}): run `latentvae encode` to repair it.") from error


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


def read_rows(folder: Path, name: str, entries: Iterable[Entry]) -> list[Row]:
    """Images of a shard by their lines."""
    rows = []
    with safe_open(tensors_path(folder, name), framework="pt") as tensors:
        stored = set(tensors.keys())
        for entry in entries:
            twin = flipped_name(entry.tensor)
            mirrored = tensors.get_slice(twin)[entry.offset] if twin in stored else None
            rows.append(Row(entry, tensors.get_slice(entry.tensor)[entry.offset], mirrored))
    return rows


def assemble(rows: Iterable[Row]) -> tuple[dict[str, torch.Tensor], list[Entry]]:
    """One tensor (N, 2C, h, w) for each size, its rows sorted by key; and the lines, which say where."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.entry.key):
        groups.setdefault(tensor_name(*row.moments.shape[-2:]), []).append(row)
    tensors: dict[str, torch.Tensor] = {}
    entries: list[Entry] = []
    for name, group in groups.items():
        tensors[name] = torch.stack([row.moments for row in group])
        if mirrored := [row.flipped for row in group if row.flipped is not None]:
            tensors[flipped_name(name)] = torch.stack(mirrored)
        entries += [replace(row.entry, tensor=name, offset=at) for at, row in enumerate(group)]
    return tensors, entries


def keys_metadata(entries: Iterable[Entry]) -> dict[str, str]:
    """The metadata of a shard's tensors: the keys of their rows.

    All in one text: safetensors writes several in another order each time, and a store's bytes are to be the
    same. Left out where a shard has so many images that the file could not be opened.
    """
    rows: dict[str, list[str]] = {}
    for entry in sorted(entries, key=lambda entry: (entry.tensor, entry.offset)):
        rows.setdefault(entry.tensor, []).append(entry.key)
    text = json.dumps(rows, separators=(",", ":"))
    return {"keys": text} if len(text) <= MAX_KEYS else {}


def read_keys(store: str | Path, record: ShardRecord) -> set[str] | None:
    """The keys of a shard's images from its tensors' metadata.

    None where they are not known: the tensors are damaged too, or were written before keys stood there.
    """
    path = tensors_path(store, record.name)
    try:
        if file_sha256(path) != record.sha256:
            return None
        with safe_open(path, framework="pt") as tensors:
            rows = json.loads((tensors.metadata() or {}).get("keys", "null"))
    except OSError:
        return None
    return None if rows is None else {key for keys in rows.values() for key in keys}


def stage_shard(
    folder: Path,
    name: str,
    tensors: dict[str, torch.Tensor] | StoredShard,
    entries: Sequence[Entry],
    failures: Sequence[Failure],
) -> ShardRecord:
    """Write a shard's files, durably, under temporary names.

    Args:
        tensors: or the shard whose tensors these are; of another folder they become this one's too.

    Raises:
        StoreError: they cannot be written.
    """
    path = tensors_path(folder, name)
    if isinstance(tensors, StoredShard):
        sha256 = tensors.record.sha256
        if tensors.folder != folder:
            with staged_file(path, StoreError, CANNOT_WRITE) as partial:
                link_or_copy(tensors_path(tensors.folder, name), partial)
    else:
        with staged_file(path, StoreError, CANNOT_WRITE) as partial:
            save_file(tensors, partial, keys_metadata(entries))
        sha256 = file_sha256(partial_path(path))
    record = ShardRecord(
        name=name,
        count=len(entries),
        sha256=sha256,
        index_sha256=_stage_lines(index_path(folder, name), entries),
        failed=len(failures),
        failed_sha256=_stage_lines(failed_path(folder, name), failures) if failures else None,
    )
    fsync(folder)
    return record


def place_shard(folder: Path, record: ShardRecord) -> None:
    """Give the staged files of a shard their names, as far as that has not been done; the index last."""
    for path, sha256 in shard_files(folder, record):
        partial = partial_path(path)
        if sha256 is None:
            path.unlink(missing_ok=True)
        elif partial.exists() and file_sha256(partial) == sha256:  # else of a run killed before its record
            partial.replace(path)
    fsync(folder)


def shard_files(store: str | Path, record: ShardRecord) -> list[tuple[Path, str | None]]:
    """A shard's files and their hashes, the index last; None: there is to be no such file."""
    name = record.name
    return [
        (tensors_path(store, name), record.sha256),
        (failed_path(store, name), record.failed_sha256),
        (index_path(store, name), record.index_sha256),
    ]


def damage(store: str | Path, record: ShardRecord, *, tensors: bool = True) -> str | None:
    """What is wrong with a shard's files by their hashes, or None. Without `tensors`, of its lists only."""
    for path, sha256 in shard_files(store, record)[0 if tensors else 1 :]:
        if sha256 is not None and not path.is_file():
            return f"{path.name} is missing"
        try:
            if sha256 is not None and file_sha256(path) != sha256:
                return f"{path.name} does not match its sha256"
        except OSError as error:
            return f"{path.name} cannot be read ({error.strerror or error})"
    return None


def remove_shard(store: Path, name: str) -> None:
    """Delete a shard's files, its index first: a shard without one is never taken for whole."""
    for path in (index_path(store, name), failed_path(store, name), tensors_path(store, name)):
        path.unlink(missing_ok=True)


def _stage_lines(path: Path, lines: Sequence[Entry | Failure]) -> str:
    """Write a list, sorted by key, under its temporary name; its sha256."""
    content = b"".join(line.line() for line in sorted(lines, key=lambda line: line.key))
    with staged_file(path, StoreError, CANNOT_WRITE) as partial:
        partial.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
