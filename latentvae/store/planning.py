"""Which image is in which shard and batch, and what a store is made with."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

from diffusers import AutoencoderKL

from latentvae.base.errors import StoreError
from latentvae.images import captions
from latentvae.images.captions import Caption
from latentvae.images.reading import PathLike, find_images
from latentvae.images.resizing import Preprocessing, Size
from latentvae.store.format import (
    DTYPES,
    MANIFEST,
    DtypeName,
    Manifest,
    ShardRecord,
    damage,
    model_config,
    read_entries,
    read_failures,
    shard_name,
    shard_number,
)
from latentvae.store.journal import DONE, FOLDER
from latentvae.store.locking import LOCK, OTHERS
from latentvae.store.salvage import Loss, Remains, find_losses, read_remains

BATCH_SIZE = 8
SHARD_SIZE = 1024
MAX_SIZE = 8192  # pixels


def preprocessing(vae: AutoencoderKL, size: int | None, crop: bool) -> Preprocessing:
    """The policy that `size` and `crop` mean for a model.

    Raises:
        StoreError: a crop without a size, a size out of range, or a model that takes no images from files.
    """
    channels = vae.config["in_channels"]
    if channels not in (1, 3):
        raise StoreError(f"this model takes {channels} channels; image files have 1 or 3.")
    if size is None:
        if crop:
            raise StoreError("crop came without a size: give the side of the squares to crop, --size.")
        return Preprocessing(channels=channels)
    least = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if not least <= size <= MAX_SIZE:
        raise StoreError(f"size={size} came; wanted {least} to {MAX_SIZE} pixels.")
    return Preprocessing(policy="centre-crop" if crop else "size", size=size, channels=channels)


def new_settings(
    vae: AutoencoderKL,
    dtype: DtypeName,
    policy: Preprocessing,
    flips: bool,
    batch_size: int,
    shard_size: int,
    weights_sha256: str,
) -> Manifest:
    """The manifest of a new store, without shards.

    Raises:
        StoreError: a dtype that no store has, or sizes below 1.
    """
    names = {value: name for name, value in DTYPES.items()}
    if dtype not in DTYPES or vae.dtype not in names:
        raise StoreError(
            f"dtype {dtype} and a model in {vae.dtype} came; wanted one of {', '.join(DTYPES)} each."
        )
    if min(batch_size, shard_size) < 1:
        raise StoreError(f"batch_size={batch_size}, shard_size={shard_size} came; wanted 1 or more.")
    return Manifest(
        weights_sha256=weights_sha256,
        config=model_config(vae),
        scaling_factor=vae.config["scaling_factor"],
        shift_factor=vae.config["shift_factor"],
        preprocessing=policy,
        dtype=dtype,
        precision=names[vae.dtype],
        flips=flips,
        batch_size=batch_size,
        shard_size=shard_size,
    )


def check_same(store: Path, old: Manifest, new: Manifest) -> None:
    """Refuse to add to a store what is made otherwise.

    Raises:
        StoreError: says what differs.
    """
    names = [name for name in Manifest.model_fields if name != "shards"]
    differing = [name for name in names if getattr(old, name) != getattr(new, name)]
    if "weights_sha256" in differing or {"config", "scaling_factor", "shift_factor"} & set(differing):
        raise StoreError(
            f"{store} was encoded with another VAE (weights {old.weights_sha256[:12]}, scaling_factor "
            f"{old.scaling_factor:g}; this one has {new.weights_sha256[:12]}, {new.scaling_factor:g}). Name "
            "that VAE with --model, or another folder."
        )
    if differing:
        was, came = (_listed(differing, manifest) for manifest in (old, new))
        raise StoreError(
            f"{store} was encoded with {was}; {came} came. Give the same options, or another folder."
        )


def check_folder(store: Path) -> None:
    """Create a store's folder where it is missing.

    Raises:
        StoreError: something else is there, or it cannot be made.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in store.iterdir()}
    except OSError as error:
        raise StoreError(f"{store} cannot be made ({error.strerror}): choose another folder.") from error
    if found - {LOCK, OTHERS, DONE} and not found & {MANIFEST, FOLDER}:
        raise StoreError(
            f"{store} is a folder of other files ({sorted(found)[0]} and so on), no store. The last argument "
            "names the store: give a new or an empty folder."
        )


def _listed(names: Iterable[str], manifest: Manifest) -> str:
    parts = []
    for name in names:
        value = getattr(manifest, name)
        if isinstance(value, Preprocessing):
            value = f"{value.policy} {value.size or ''} (version {value.version}, {value.channels} channels)"
        parts.append(f"{name} {value}")
    return ", ".join(parts)


@dataclass(frozen=True)
class Source:
    """One image file.

    Attributes:
        path: as it was found.
        root: the folder that its key is relative to.
    """

    path: Path
    root: Path

    def caption(self) -> tuple[Caption, list[str]]:
        """What is said about it, and notes on what cannot be read: see `captions.read_caption`."""
        return captions.read_caption(self.path, self.root)


def find_sources(paths: PathLike | Sequence[PathLike], store: Path) -> dict[str, Source]:
    """The images below the paths, by key, sorted; those inside the store are left out.

    A key is the POSIX path below the folder that was named, with its suffix; of a file named itself its name.

    Raises:
        ImageError: no images, or a path that is missing.
        StoreError: two images of one key.
    """
    named = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    captions.forget()
    found: dict[str, Source] = {}
    inside = store.resolve()
    for path in find_images(named):
        if inside in path.resolve().parents:
            continue
        root = next((one for one in named if one.is_dir() and path.is_relative_to(one)), path.parent)
        key = path.relative_to(root).as_posix()
        if key in found and not found[key].path.samefile(path):
            raise StoreError(
                f"{found[key].path} and {path} would both have the key {key!r}: name a folder that holds "
                "both, or encode them to two stores."
            )
        found[key] = Source(path, root)
    return dict(sorted(found.items()))


BATCH_PIXELS = 512 * 512  # a batch size is meant for images of so many; of larger ones fewer make a batch
LARGE = 1024 * 1024  # pixels above which an image is a batch of its own, and may be tiled


@dataclass(frozen=True)
class PlannedShard:
    """A shard as it is to be.

    Attributes:
        keys: of its images whose files are there, sorted.
        vanished: keys of those whose files are gone, sorted; they stay in the shard.
        record: of the shard as it is, None where it is new or its index is damaged.
        pruned: whether images are taken out.
    """

    name: str
    keys: tuple[str, ...]
    vanished: tuple[str, ...] = ()
    record: ShardRecord | None = None
    pruned: bool = False


@dataclass(frozen=True)
class Plan:
    """All shards in the order of their numbers, and the keys that were taken out."""

    shards: list[PlannedShard]
    dropped: list[str]
    damaged: list[str]  # what was wrong with indexes that had to be given up
    losses: list[Loss]  # images in those that are not among the images that are there


def plan_shards(
    store: Path, records: dict[str, ShardRecord], keys: Sequence[str], shard_size: int, prune: bool
) -> Plan:
    """Keep the shards that are there, and put new images, sorted, into new ones of `shard_size`.

    What a killed run has finished stays, and what remains is divided as it would have been: all shards of new
    images but the last are full, and the sorted images go to the free numbers in their order.

    Args:
        keys: of all images that are there, sorted.
        prune: take images out whose files are gone.
    """
    present, known = set(keys), set[str]()
    shards, dropped, damaged = list[PlannedShard](), list[str](), list[Remains]()
    for name, record in records.items():
        problem = damage(store, record, tensors=False)
        if problem is not None:
            damaged.append(read_remains(store, record, problem))
            continue
        members = sorted(
            [entry.key for entry in read_entries(store, name)]
            + [failure.key for failure in read_failures(store, name)]
        )
        known.update(members)
        gone = tuple(key for key in members if key not in present)
        there = tuple(key for key in members if key in present)
        if prune:
            dropped += gone
            if not there:
                continue
        shards.append(PlannedShard(name, there, () if prune else gone, record, prune and bool(gone)))
    losses = find_losses(damaged, present, known)
    if prune:
        dropped += [key for loss in losses for key in loss.keys]
    taken = {shard_number(shard.name) for shard in shards}
    free = (number for number in count() if number not in taken)
    new = _chunks((key for key in keys if key not in known), shard_size)
    shards += [PlannedShard(shard_name(number), chunk) for chunk, number in zip(new, free, strict=False)]
    shards.sort(key=lambda shard: shard_number(shard.name))
    return Plan(shards, dropped, [remains.problem for remains in damaged], losses)


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
        for keys in _chunks(groups[width, height], batch_limit(pixels, batch_size)):
            batches.append(PlannedBatch(list(keys), pixels * len(keys)))
    return batches


def batch_limit(pixels: int, batch_size: int) -> int:
    """How many images of so many pixels make a batch."""
    if pixels > LARGE:
        return 1
    return max(1, min(batch_size, batch_size * BATCH_PIXELS // max(pixels, 1)))


def _chunks(keys: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    rest = iter(keys)
    while chunk := tuple(islice(rest, size)):
        yield chunk
