"""Whether a store is what its manifest says, byte for byte; and a contact sheet, to look at it."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from latentvae.base.addresses import WEB, Place, forget, place
from latentvae.base.errors import LatentVAEError, StoreError
from latentvae.images.drawing import grid
from latentvae.images.sources import Spec, read_origin
from latentvae.models.latents import Posterior
from latentvae.store import format as layout
from latentvae.store.dataset import StoreReader, decoded_images, original_image
from latentvae.store.format import STATISTICS, Entry, Manifest, ShardRecord
from latentvae.store.journal import FOLDER

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # as safetensors calls them
PREVIEW = "preview.png"
LARGEST = 1024 * 1024  # pixels of an image that is shown


def verify(store: Spec, *, progress: bool = False) -> list[str]:
    """Check every shard of a store against its hashes, its index and the manifest; what is wrong, or [].

    Each problem names the file. `latentvae encode` with the store's images mends all of them. Of a store at
    an address each shard is fetched in its turn.

    Raises:
        StoreError: no store is there.
        SourceError: an address that cannot be read.
    """
    forget()
    folder = place(store)
    manifest = layout.read_manifest(folder)
    problems = [f"{FOLDER}: a run was not finished"] if (folder / FOLDER).exists() else []
    seen: dict[str, str] = {}  # index file by key, of all shards: an image is in one
    for record in tqdm(manifest.shards, "verifying", unit="shard", disable=not progress, delay=2):
        with here(folder, record) as local:
            problem = layout.damage(local, record)
            problems += [problem] if problem else _check_content(local, manifest, record, seen)
    names = {record.name for record in manifest.shards}
    # shards of a killed run that no manifest names yet, or what somebody left here
    listed = folder.iterdir() if isinstance(folder, Path) or folder.scheme not in WEB else ()
    found = {path.name for path in listed if path.name.startswith("latents-")}
    strangers = {name for name in found if name.split(".")[0] not in names}
    return [*problems, *(f"{name} is in no list of shards" for name in sorted(strangers))]


@contextmanager
def here(store: Place, record: ShardRecord, *, tensors: bool = True) -> Iterator[Path]:
    """A folder of this machine with a shard's files, as far as they are to be had."""
    if isinstance(store, Path):
        yield store
        return
    with tempfile.TemporaryDirectory() as folder:
        for path, sha256 in layout.shard_files(folder, record)[0 if tensors else 1 :]:
            file = store / path.name
            if sha256 is not None and file.exists():
                file.ask(partial(_get, str(path)))
        yield Path(folder)


def _get(here: str, files: Any, at: str) -> None:
    files.get_file(at, here)


def verify_sources(store: Spec, *, progress: bool = False) -> list[str]:
    """Images of a store whose files are gone or are not those that were encoded: each is read and hashed.

    Raises:
        StoreError: no store is there, or an index is damaged.
    """
    folder, problems = place(store), list[str]()
    manifest = layout.read_manifest(folder)
    with tqdm(total=manifest.count, desc="reading", unit="image", disable=not progress, delay=2) as bar:
        for record in manifest.shards:
            with here(folder, record, tensors=False) as local:
                entries = layout.read_entries(local, record.name)
            for entry in entries:
                try:
                    if hashlib.sha256(read_origin(entry.source)).hexdigest() != entry.sha256:
                        problems.append(f"{entry.key}: {entry.source} is not the file that was encoded")
                except (LatentVAEError, OSError) as error:
                    reason = getattr(error, "strerror", None) or error
                    problems.append(f"{entry.key}: {entry.source} cannot be read ({reason})")
                bar.update()
    return problems


def _check_content(
    folder: Path, manifest: Manifest, record: ShardRecord, seen: dict[str, str]
) -> Iterator[str]:
    """Whether index and tensors fit together; what a hash cannot tell if they were written wrongly."""
    index, tensors = layout.index_path(folder, record.name).name, layout.tensors_path(folder, record.name)
    try:
        entries, failures = (
            layout.read_entries(folder, record.name),
            layout.read_failures(folder, record.name),
        )
        with safe_open(tensors, framework="pt") as file:
            names = [name for name in file.keys() if name != STATISTICS]  # noqa: SIM118
            shapes = {name: file.get_slice(name).get_shape() for name in names}
            dtypes = {file.get_slice(name).get_dtype() for name in shapes}
            named = (file.metadata() or {}).get("keys")  # None in shards of earlier versions
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
    elif named is not None and named != layout.keys_metadata(entries).get("keys"):
        yield f"{tensors.name} names other images than {index}"


def _shapes(entries: list[Entry], channels: int, flips: bool) -> dict[str, list[int]]:
    """The tensors that the lines call for."""
    shapes: dict[str, list[int]] = {}
    for entry in entries:
        for name in (entry.tensor, layout.flipped_name(entry.tensor))[: 1 + flips]:
            shapes.setdefault(name, [0, channels, *layout.latent_size(entry.tensor)])[0] += 1
    return shapes


def _fits(entry: Entry, shapes: dict[str, list[int]]) -> bool:
    return entry.tensor in shapes and 0 <= entry.offset < shapes[entry.tensor][0]


def contact_sheet(store: Spec, vae: AutoencoderKL, count: int = 8) -> Image.Image:
    """Draw up to `count` images of a store, evenly spaced, each beside its decoded latents.

    Images whose files are gone, and those above 1024 x 1024 pixels, are left out.

    Args:
        store: the folder, or its address.
        vae: the model that it was encoded with.

    Raises:
        StoreError: no image can be shown, or the store cannot be read.
    """
    reader, rows = StoreReader(store), list[list[torch.Tensor]]()
    for number in range(0, len(reader), -(-len(reader) // count)):
        entry = reader.entry(number)
        original = original_image(entry, reader.manifest, LARGEST)
        if original is not None:
            latents = Posterior(reader.moments(number, entry)[None]).mode()  # (1, C, h, w)
            (decoded,) = decoded_images(vae, [entry], latents)
            rows.append([original, decoded.clamp(-1, 1)])
    if not rows:
        raise StoreError(f"no image of {store} can be shown: their files are gone, or all are large.")
    return grid(rows, ["Image", "Decoded from the store"])
