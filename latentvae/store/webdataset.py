"""A store as WebDataset shards: tar files that are read from end to end, from a disk or over a network."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from latentvae.base.errors import StoreError
from latentvae.base.files import explained, whole_file
from latentvae.store.dataset import NO_LABEL, StoreReader, caption, label
from latentvae.store.format import CANNOT_WRITE, Entry, Manifest

DATASET = "dataset.json"
LONGEST_NAME = 200  # bytes; file systems, where people unpack tars, take 255 with the suffix
_TAR = re.compile(r"latents-\d{6,}\.tar")


def export_webdataset(
    store: str | Path,
    folder: str | Path,
    *,
    images_per_shard: int = 1000,
    progress: Callable[[int], object] | None = None,
) -> list[Path]:
    """Write a store as `latents-000000.tar`, ...; the same store gives the same bytes.

    Each image is a sample NAME of up to five members:

    - `NAME.moments.npy`: (2C, h, w), means then log-variances, unscaled; with flips also
      `NAME.moments_flipped.npy`. bf16 becomes float32, twice the bytes: NumPy has no bf16, float16 would
      round moments below 6e-5, and readers of WebDataset know npy but not safetensors. fp16 stays.
    - `NAME.json`: key, image hash, sizes, padding, caption record, and the factors that scale latents.
    - `NAME.txt`: the caption, if there is one. `NAME.cls`: the label, if there is one.

    NAME is the key, percent-encoded (`urllib.parse.unquote` decodes it) with its dots and slashes too:
    WebDataset ends a sample's name at the first dot. Long ones end in a hash instead; the json has the key.
    `dataset.json` beside the tars says what all samples have in common, the VAE's hash and config included.

    Args:
        store: the folder that `latentvae encode` wrote.
        folder: is made; must not hold such tars.
        images_per_shard: images of one tar, 1 or more.
        progress: called with the number of images that were just written.

    Returns:
        The tar files.

    Raises:
        StoreError: what `StoreReader` raises; a folder that holds such tars or cannot be written.
    """
    if images_per_shard < 1:
        raise StoreError(f"images_per_shard={images_per_shard} came; wanted 1 or more.")
    reader, folder = StoreReader(store), Path(folder)
    _make(folder)
    numbers, tars = iter(range(len(reader))), list[Path]()
    while part := list(islice(numbers, images_per_shard)):
        tars.append(folder / f"latents-{len(tars):06d}.tar")
        with whole_file(tars[-1], StoreError, CANNOT_WRITE, durable=True) as partial:
            _write_tar(reader, part, partial)
        if progress is not None:
            progress(len(part))
    common = json.dumps(reader.manifest.model_dump(mode="json", exclude={"shards"}), indent=1) + "\n"
    with whole_file(folder / DATASET, StoreError, CANNOT_WRITE, durable=True) as partial:
        partial.write_text(common, encoding="utf-8")
    return tars


def sample_name(key: str) -> str:
    """The WebDataset name of a key: ASCII without dots and slashes, another for every key."""
    # file names need not be valid Unicode, and `quote` takes dots for harmless
    name = quote(key, safe=" ", errors="surrogateescape").replace(".", "%2E")
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{name[: LONGEST_NAME - len(digest) - 1]}~{digest}"


def _make(folder: Path) -> None:
    with explained(folder, StoreError, "{path} cannot be written to ({reason}): choose another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted(path.name for path in folder.iterdir() if _TAR.fullmatch(path.name))
    if there:  # readers take all tars of a folder for one dataset
        raise StoreError(
            f"{folder} holds {there[0]} already, and tars of two exports must not mix: delete them, or "
            "choose another folder."
        )


def _write_tar(reader: StoreReader, numbers: list[int], path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in numbers:
            entry = reader.entry(number)
            name = sample_name(entry.key)
            for suffix, content in _members(reader, number, entry).items():
                header = tarfile.TarInfo(f"{name}.{suffix}")  # its defaults: no time, no owner
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


def _members(reader: StoreReader, number: int, entry: Entry) -> dict[str, bytes]:
    members = {"moments.npy": _npy(reader.moments(number, entry))}
    if reader.manifest.flips:
        members["moments_flipped.npy"] = _npy(reader.moments(number, entry, flipped=True))
    members["json"] = json.dumps(_description(entry, reader.manifest)).encode("ascii")
    if text := caption(entry):
        members["txt"] = text.encode("utf-8", errors="surrogatepass")
    if (number_of_class := label(entry)) != NO_LABEL:
        members["cls"] = str(number_of_class).encode("ascii")
    return members


def _npy(moments: torch.Tensor) -> bytes:
    values = moments.float() if moments.dtype == torch.bfloat16 else moments  # NumPy has no bf16
    file = io.BytesIO()
    np.save(file, values.numpy(), allow_pickle=False)
    return file.getvalue()


def _description(entry: Entry, manifest: Manifest) -> dict[str, Any]:
    """What a sample says of itself, without what only the store or its machine needs."""
    own = ("source", "size_bytes", "mtime_ns", "tensor", "offset", "notes")  # true of this machine or shard
    kept = {key: value for key, value in asdict(entry).items() if key not in own}
    return {**kept, "scaling_factor": manifest.scaling_factor, "shift_factor": manifest.shift_factor}
