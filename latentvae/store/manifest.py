"""`store.json`: what all shards of a store have in common, and their hashes."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from latentvae.errors import StoreError

MANIFEST = "store.json"
VERSION = 1
PREPROCESSING_VERSION = 1  # to be raised when the same image file would give other pixels

DtypeName = Literal["bf16", "fp16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Preprocessing(_Record):
    """What is done to an image between its file and the encoder's padding.

    `as-is`: nothing. `size`: scaled and cropped at the middle to the nearest of a few aspect ratios of about
    size x size pixels. `centre-crop`: the shorter side scaled to `size`, and the square in the middle.
    """

    version: int = PREPROCESSING_VERSION
    policy: Literal["as-is", "size", "centre-crop"] = "as-is"
    size: int | None = None  # pixels; None with as-is
    channels: int = 3  # 3: RGB, 1: luminance


class ShardRecord(_Record):
    """One shard: NAME.safetensors and NAME.jsonl, and NAME.failed.jsonl where images could not be encoded."""

    name: str = Field(pattern=r"^latents-\d{5,}$")
    count: int = Field(ge=0)  # images, the failed ones not included; may be 0
    sha256: str  # of the safetensors file
    index_sha256: str
    failed: int = Field(default=0, ge=0)
    failed_sha256: str | None = None


class Manifest(_Record):
    """All that the shards have in common. Latents in the store are unscaled moments (see `latents`)."""

    format: Literal["latentvae-store"] = "latentvae-store"
    version: int = VERSION
    weights_sha256: str  # see `latentvae.fingerprint.weight_hash`
    config: dict[str, Any]  # of the AutoencoderKL
    scaling_factor: float
    shift_factor: float | None
    preprocessing: Preprocessing
    dtype: DtypeName  # of the stored moments
    precision: DtypeName  # of the model's arithmetic
    flips: bool  # whether each image's mirror image was encoded too
    batch_size: int
    shard_size: int
    shards: list[ShardRecord] = Field(default_factory=list)

    @property
    def count(self) -> int:
        """How many images are in the store."""
        return sum(shard.count for shard in self.shards)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the stored moments."""
        return DTYPES[self.dtype]


def read_manifest(store: str | Path) -> Manifest:
    """Read a store's manifest.

    Raises:
        StoreError: there is none, it is damaged, or of a later version of this format.
    """
    path = Path(store) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreError(
            f"{store} is no complete store: it has no {MANIFEST}. Name a folder that `latentvae encode` "
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
        place = ".".join(map(str, first["loc"]))
        raise StoreError(
            f"{path} is no manifest of a store: {place}: {first['msg']}. Restore it, or delete the folder "
            "and encode again."
        ) from error


def write_manifest(store: str | Path, manifest: Manifest) -> None:
    """Put the manifest in place, whole or not at all."""
    write_atomically(Path(store) / MANIFEST, lambda path: path.write_bytes(to_bytes(manifest)))


def to_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is in its file."""
    return manifest.model_dump_json(indent=1).encode() + b"\n"


def model_config(vae: AutoencoderKL) -> dict[str, Any]:
    """The config as JSON values, without what names this machine."""
    own = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    return json.loads(json.dumps(own)) | {"_class_name": "AutoencoderKL"}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, make it durable, and give it its name.

    Raises:
        StoreError: it cannot be written; what was at `path` stays.
    """
    stage(path, write)
    partial_path(path).replace(path)
    fsync(path.parent)


def stage(path: Path, write: Callable[[Path], object]) -> None:
    """The first half of `write_atomically`: a durable file that only needs to be renamed.

    Raises:
        StoreError: it cannot be written.
    """
    partial = partial_path(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)  # safetensors lets nobody else read what it writes
        fsync(partial)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        with suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or error
        raise StoreError(
            f"{path} cannot be written ({reason}). Finished shards are intact: make room, or check the "
            "folder's permissions, and run the same command again."
        ) from error


def partial_path(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.name}.partial")


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows has no handle to a folder
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
