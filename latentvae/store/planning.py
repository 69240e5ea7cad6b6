"""What a run has to do: which images there are, what their store is like, which shard each belongs into, and
which shards have to be encoded.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from diffusers import AutoencoderKL

from latentvae.base.errors import StoreError
from latentvae.base.files import file_sha256, portable
from latentvae.images import captions
from latentvae.images.reading import PathLike, find_images
from latentvae.images.resizing import Preprocessing
from latentvae.models.loading import window_of
from latentvae.store import format as layout
from latentvae.store.format import DTYPES, DtypeName, Entry, Failure, Manifest, ShardRecord

BATCH_SIZE = 8
SHARD_SIZE = 1024  # images
MAX_SIZE = 8192  # pixels
NAMED = 5  # lost images and shards that a refusal names


@dataclass(frozen=True)
class Source:
    """One image file.

    Attributes:
        path: as it was found.
        root: the folder that its key is relative to.
    """

    path: Path
    root: Path

    @property
    def name(self) -> str:
        """What the store calls the file."""
        return portable(str(self.path))

    def caption(self) -> tuple[captions.Caption, list[str]]:
        """What is said about it, and notes on what cannot be read: see `captions.read_caption`."""
        return captions.read_caption(self.path, self.root)


def find_sources(
    paths: PathLike | Sequence[PathLike], store: Path, left_out: Counter[str] | None = None
) -> dict[str, Source]:
    """The images below the paths, by key, sorted; those inside the store are left out.

    A key is the POSIX path below the folder that was named, with its suffix; of a file named itself its name.

    Args:
        left_out: where to count the other files of the folders: see `find_images`.

    Raises:
        ImageError: no images, or a path that is missing.
        StoreError: two images of one key.
    """
    named = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    captions.forget()  # what an earlier run in this process read of the folders
    found: dict[str, Source] = {}
    inside = store.resolve()
    for path in find_images(named, left_out, outside=store):
        if inside in path.resolve().parents:  # its preview.png is no image of the user's
            continue
        root = next((one for one in named if one.is_dir() and path.is_relative_to(one)), path.parent)
        key = portable(path.relative_to(root).as_posix())
        if key in found and not found[key].path.samefile(path):  # naming one image twice does no harm
            raise StoreError(
                f"{found[key].path} and {path} would both have the key {key!r}: name a folder that holds "
                "both, or encode them to two stores."
            )
        found[key] = Source(path, root)
    return dict(sorted(found.items()))


def preprocessing(
    vae: AutoencoderKL, size: int | None, crop: bool, no_upscale: bool = False
) -> Preprocessing:
    """The policy that `size`, `crop` and `no_upscale` mean for a model.

    What is not enlarged is cropped to multiples of 64 px (of a model of 8 px to a latent).

    Raises:
        StoreError: a crop without a size, or with `no_upscale`; a size out of range; or a model that takes no
            images from files.
    """
    channels = vae.config["in_channels"]
    if channels not in (1, 3):
        raise StoreError(f"this model takes {channels} channels; image files have 1 or 3.")
    window = window_of(vae)
    limits = None if window is None else (window.low, window.high)
    if size is None:
        if crop:
            raise StoreError("crop came without a size: give the side of the squares to crop, --size.")
        if no_upscale:
            raise StoreError("no_upscale came without a size: without --size nothing is enlarged.")
        return Preprocessing(channels=channels, range=limits)
    if crop and no_upscale:
        raise StoreError("crop came with no_upscale: squares of one size, or images of their own, not both.")
    least = 2 ** (len(vae.config["block_out_channels"]) - 1)  # the spatial_compression_ratio
    if not least <= size <= MAX_SIZE:
        raise StoreError(f"size={size} came; wanted {least} to {MAX_SIZE} pixels.")
    policy: Literal["centre-crop", "size-no-upscale", "size"]
    policy = "centre-crop" if crop else "size-no-upscale" if no_upscale else "size"
    return Preprocessing(policy=policy, size=size, channels=channels, range=limits)


def settle(
    vae: AutoencoderKL,
    store: Path,
    old: Manifest | None,
    dtype: DtypeName,
    policy: Preprocessing,
    flips: bool,
    batch_size: int | None,
    shard_size: int | None,
    weights_sha256: str,
) -> Manifest:
    """What a store is to be like: its manifest without shards.

    Args:
        old: the manifest of the store as it is; None: a new one.
        batch_size, shard_size: None: as the store has them.

    Raises:
        StoreError: the store is made otherwise, a dtype that no store has, or sizes below 1.
    """
    batch_size = batch_size or (old.batch_size if old else BATCH_SIZE)
    shard_size = shard_size or (old.shard_size if old else SHARD_SIZE)
    names = {value: name for name, value in DTYPES.items()}  # float64 has none
    if dtype not in DTYPES or vae.dtype not in names:
        raise StoreError(
            f"dtype {dtype} and a model in {vae.dtype} came; wanted one of {', '.join(DTYPES)} each."
        )
    if min(batch_size, shard_size) < 1:
        raise StoreError(f"batch_size={batch_size}, shard_size={shard_size} came; wanted 1 or more.")
    settings = Manifest(
        weights_sha256=weights_sha256,
        config=layout.model_config(vae),
        scaling_factor=vae.config["scaling_factor"],
        shift_factor=vae.config["shift_factor"],
        preprocessing=policy,
        dtype=dtype,
        precision=names[vae.dtype],
        flips=flips,
        batch_size=batch_size,
        shard_size=shard_size,
    )
    if old is not None:
        _check_same(store, old, settings)
    return settings


def _check_same(store: Path, old: Manifest, new: Manifest) -> None:
    """Refuse to add to a store what is made otherwise.

    Raises:
        StoreError: says what differs.
    """
    names = [name for name in Manifest.model_fields if name not in ("shards", "statistics")]
    differing = [name for name in names if getattr(old, name) != getattr(new, name)]
    if "weights_sha256" in differing or {"config", "scaling_factor", "shift_factor"} & set(differing):
        raise StoreError(
            f"{store} was encoded with another VAE (weights {old.weights_sha256[:12]}, scaling_factor "
            f"{old.scaling_factor:g}; this one has {new.weights_sha256[:12]}, {new.scaling_factor:g}). Name "
            "that VAE with --model, or another folder."
        )
    versions = old.preprocessing.version, new.preprocessing.version
    if differing == ["preprocessing"] and versions[0] != versions[1]:
        raise StoreError(
            f"{store} was made by another version of latentvae, which reads some image files to other pixels "
            f"(preprocessing {versions[0]}; this is {versions[1]}). It is read and verified as ever; to add "
            "to it or repair it, encode into another folder."
        )
    if differing:
        was, came = (_listed(differing, manifest) for manifest in (old, new))
        raise StoreError(
            f"{store} was encoded with {was}; {came} came. Give the same options, or another folder."
        )


def _listed(names: Iterable[str], manifest: Manifest) -> str:
    parts = []
    for name in names:
        value = getattr(manifest, name)
        if isinstance(value, Preprocessing):
            samples = f", samples {value.range[0]:g} to {value.range[1]:g}" if value.range else ""
            kind = f"version {value.version}, {value.channels} channels{samples}"
            value = f"{value.policy} {value.size or ''} ({kind})"
        parts.append(f"{name} {value}")
    return ", ".join(parts)


@dataclass(frozen=True)
class PlannedShard:
    """A shard as it is to be.

    Attributes:
        keys: of its images whose files are there, sorted.
        vanished: keys of those whose files are gone, sorted; they stay in the shard.
        record: of the shard as it is, None where it is new or one of its lists is damaged.
        pruned: whether images are taken out.
    """

    name: str
    keys: tuple[str, ...]
    vanished: tuple[str, ...] = ()
    record: ShardRecord | None = None
    pruned: bool = False


class Loss(NamedTuple):
    """What is lost with one damaged shard: images in it that this run cannot encode again.

    Attributes:
        problem: what is wrong with it; names the file.
        keys: of images whose files are gone, sorted.
        unread: how many images it holds, where their keys are not known.
    """

    problem: str
    keys: Sequence[str]
    unread: int = 0

    def __str__(self) -> str:
        if self.unread:
            return f"{self.problem}: nothing else says which {self.unread} images it held"
        shown = ", ".join(repr(key) for key in self.keys[:NAMED]) + ", ..." * (len(self.keys) > NAMED)
        return f"{self.problem}: {len(self.keys)} of its images cannot be encoded again ({shown})"


@dataclass(frozen=True)
class Plan:
    """All shards in the order of their numbers, and the keys that were taken out."""

    shards: list[PlannedShard]
    dropped: list[str]
    damaged: list[str]  # what was wrong with lists that had to be given up
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
    present, known = set(keys), set[str]()  # known: in shards that stay
    planned, dropped, damaged = list[PlannedShard](), list[str](), dict[str, str]()
    for name, record in records.items():
        problem = layout.damage(store, record, tensors=False)
        if problem is not None:  # its images are as good as new ones, as far as they are there
            damaged[name] = problem
            continue
        lines = [*layout.read_entries(store, name), *layout.read_failures(store, name)]
        members = sorted(line.key for line in lines)
        known.update(members)
        gone = tuple(key for key in members if key not in present)
        there = tuple(key for key in members if key in present)
        if prune:
            dropped += gone
            if not there:  # its number is free for new images
                continue
        planned.append(PlannedShard(name, there, () if prune else gone, record, prune and bool(gone)))
    losses = [
        loss
        for name, problem in damaged.items()
        if (loss := _loss(store, records[name], problem, present, known)) is not None
    ]
    if prune:
        dropped += [key for loss in losses for key in loss.keys]
    taken = {layout.shard_number(shard.name) for shard in planned}
    # by number, not by rank or time: interrupted runs and any number of processes divide alike
    free = (number for number in count() if number not in taken)
    new = iter([key for key in keys if key not in known])
    while chunk := tuple(islice(new, shard_size)):
        planned.append(PlannedShard(layout.shard_name(next(free)), chunk))
    planned.sort(key=lambda shard: layout.shard_number(shard.name))
    return Plan(planned, dropped, list(damaged.values()), losses)


def _loss(store: Path, record: ShardRecord, problem: str, present: set[str], known: set[str]) -> Loss | None:
    """What giving up a shard with a damaged list would lose, if anything."""
    held = _held(store, record)
    if held is None:
        return Loss(problem, (), record.count) if record.count else None
    lost = held.difference(present, known)  # known: a killed repair may have put them elsewhere already
    return Loss(problem, tuple(sorted(lost))) if lost else None


def _held(store: Path, record: ShardRecord) -> set[str] | None:
    """The keys of the images in a shard with a damaged list; None where they are not known."""
    with suppress(OSError):  # missing or not readable
        # the index first: only the list of failures may be damaged, and older tensors do not have the keys
        if file_sha256(layout.index_path(store, record.name)) == record.index_sha256:
            return {entry.key for entry in layout.read_entries(store, record.name)}
    return layout.read_keys(store, record)


def refusal(store: Path, losses: Sequence[Loss]) -> StoreError:
    """Why nothing is repaired, and what to do."""
    named = "; ".join(map(str, losses[:NAMED]))
    more = f"; {len(losses) - NAMED} more shards" if len(losses) > NAMED else ""
    advice = []
    if not all(loss.unread for loss in losses):
        advice.append(
            "Bring the files back, name all folders that the store was made from, or give these images up "
            "with --prune."
        )
    if any(loss.unread for loss in losses):  # no file that is brought back would tell
        advice.append(
            "Put the .jsonl back from a copy of the store; or, if no image file is missing, name all folders "
            "that the store was made from and add --prune, which then encodes them again and loses none."
        )
    return StoreError(
        f"{store} is damaged, and repairing it would lose images; nothing has been changed. {named}{more}. "
        f"{' '.join(advice)} Beware: --prune takes out all images of the store whose files are not found."
    )


Line = TypeVar("Line", Entry, Failure)


class Finding(NamedTuple):
    """What is to be done about a shard: encode it, or write these lists, or (None) nothing."""

    encode: bool
    lists: tuple[list[Entry], list[Failure]] | None = None


def inspect_shard(
    store: Path,
    shard: PlannedShard,
    sources: dict[str, Source],
    retry_failed: bool,
    rehash: bool,
    damaged: bool,
) -> Finding:
    """Compare a planned shard with what is on disk.

    A file whose size and time are unchanged is not read; one whose content is unchanged is not encoded.

    Args:
        retry_failed: encode a shard again in which images failed.
        rehash: read files all the same.
        damaged: whether the shard's files do not match its hashes.
    """
    if shard.record is None or damaged:
        return Finding(True)
    entries, failures = layout.read_entries(store, shard.name), layout.read_failures(store, shard.name)
    if shard.pruned or (retry_failed and failures):
        return Finding(True)
    new_entries = [_renewed(entry, sources.get(entry.key), rehash) for entry in entries]
    new_failures = [_renewed(failure, sources.get(failure.key), rehash) for failure in failures]
    same_entries = [entry for entry in new_entries if entry is not None]
    same_failures = [failure for failure in new_failures if failure is not None]
    if len(same_entries) < len(entries) or len(same_failures) < len(failures):
        return Finding(True)
    if (same_entries, same_failures) == (entries, failures):
        return Finding(False)
    return Finding(False, (same_entries, same_failures))


def _renewed(line: Line, source: Source | None, rehash: bool) -> Line | None:
    """The line with the file's time and caption as they are now; None where the content is another."""
    if source is None:  # vanished: what is stored stays
        return line
    try:
        state = source.path.stat()
        same = (state.st_size, state.st_mtime_ns) == (line.size_bytes, line.mtime_ns)
        if line.sha256 is None:  # could not be read: None here if it can be now
            source.path.open("rb").close()
            return None
        if (rehash or not same) and (
            state.st_size != line.size_bytes or file_sha256(source.path) != line.sha256
        ):
            return None
    except OSError:  # gone since it was listed, or not readable any more: what is stored stays
        return line
    if isinstance(line, Failure):  # which has no caption
        return replace(line, source=source.name, mtime_ns=state.st_mtime_ns)
    caption, caption_notes = source.caption()
    notes = [note for note in line.notes if not note.startswith(captions.PREFIX)] + caption_notes
    return replace(line, source=source.name, mtime_ns=state.st_mtime_ns, caption=caption, notes=notes)
