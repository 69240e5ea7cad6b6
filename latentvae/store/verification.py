"""Whether a store is what its manifest says, byte for byte."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from latentvae.base.errors import StoreError
from latentvae.images.reading import PathLike
from latentvae.store.format import (
    Entry,
    Manifest,
    ShardRecord,
    damage,
    flipped_name,
    index_path,
    latent_size,
    read_entries,
    read_failures,
    read_manifest,
    tensors_path,
)
from latentvae.store.journal import FOLDER

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # as safetensors calls them


def verify(store: PathLike, *, progress: bool = False) -> list[str]:
    """Check every shard of a store against its hashes, its index and the manifest; what is wrong, or [].

    Each problem names the file. `latentvae encode` with the store's images mends all of them.

    Raises:
        StoreError: the folder is no store.
    """
    folder = Path(store)
    manifest = read_manifest(folder)
    problems = [f"{FOLDER}: a run was not finished"] if (folder / FOLDER).exists() else []
    seen: dict[str, str] = {}
    for record in tqdm(manifest.shards, "verifying", unit="shard", disable=not progress, delay=2):
        problem = damage(folder, record)
        problems += [problem] if problem else _check_content(folder, manifest, record, seen)
    names = {record.name for record in manifest.shards}
    strangers = {path.name for path in folder.glob("latents-*") if path.name.split(".")[0] not in names}
    return [*problems, *(f"{name} is in no list of shards" for name in sorted(strangers))]


def _check_content(
    folder: Path, manifest: Manifest, record: ShardRecord, seen: dict[str, str]
) -> Iterator[str]:
    """Whether index and tensors fit together; what a hash cannot tell if they were written wrongly."""
    index, tensors = index_path(folder, record.name).name, tensors_path(folder, record.name)
    try:
        entries, failures = read_entries(folder, record.name), read_failures(folder, record.name)
        with safe_open(tensors, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            dtypes = {file.get_slice(name).get_dtype() for name in shapes}
    except (StoreError, SafetensorError, OSError) as error:
        yield f"{record.name}: {error}"
        return
    if (len(entries), len(failures)) != (record.count, record.failed):
        yield f"{index} lists {len(entries)} images, {len(failures)} failed, not as the manifest says"
    keys = [entry.key for entry in entries]
    if keys != sorted(set(keys)):
        yield f"{index} is not sorted by key, or names one twice"
    for key in keys:
        if key in seen:
            yield f"{index} holds {key!r}, which {seen[key]} holds too"
        seen[key] = index
    if dtypes - {DTYPES[manifest.dtype]}:
        yield f"{tensors.name} holds {', '.join(sorted(dtypes))}; {DTYPES[manifest.dtype]} wanted"
    wanted = _shapes(entries, 2 * manifest.config["latent_channels"], manifest.flips)
    if shapes != wanted or any(not _fits(entry, shapes) for entry in entries):
        yield f"{tensors.name} does not hold what {index} says"


def _shapes(entries: list[Entry], channels: int, flips: bool) -> dict[str, list[int]]:
    """The tensors that the lines call for."""
    shapes: dict[str, list[int]] = {}
    for entry in entries:
        for name in (entry.tensor, flipped_name(entry.tensor))[: 1 + flips]:
            shapes.setdefault(name, [0, channels, *latent_size(entry.tensor)])[0] += 1
    return shapes


def _fits(entry: Entry, shapes: dict[str, list[int]]) -> bool:
    return entry.tensor in shapes and 0 <= entry.offset < shapes[entry.tensor][0]
