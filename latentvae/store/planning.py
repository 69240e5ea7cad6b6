"""What a run has to do: which images there are, which shard each belongs into, and what has to be encoded."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

from latentvae.base.addresses import Address, Place
from latentvae.base.errors import ImageError, SourceError, StoreError
from latentvae.base.files import file_sha256, partial_path
from latentvae.images import captions
from latentvae.images.listing import ARCHIVES, Listing, files_below
from latentvae.images.sources import FolderSource, ImageFiles, ListSource, Spec, open_sources
from latentvae.images.tars import TarSource
from latentvae.store import format as layout
from latentvae.store.format import Entry, Failure, StoredShard

NAMED = 5  # lost images and shards that a refusal names

Line = Entry | Failure


@dataclass(frozen=True, slots=True)  # there are millions
class Source:
    """One image file: a number of those that lie together."""

    images: ImageFiles
    index: int

    @property
    def name(self) -> str:
        """What the store calls the file."""
        return self.images.origin(self.index)

    def caption(self) -> tuple[captions.Caption, list[str]]:
        """What is said about it, and notes on what cannot be read: see `captions.read_caption`."""
        return self.images.caption(self.index)


def find_sources(
    paths: Spec | Sequence[Spec],
    store: Place,
    left_out: Counter[str] | None = None,
    column: str | None = None,
) -> dict[str, Source]:
    """The images that the paths name, by key, sorted; those inside the store are left out.

    A key is the POSIX path below the folder that was named, with its suffix; of a file named itself its name.
    Of a member SHARD/MEMBER, of a row FILE/NUMBER, shards and files without their suffix.

    Args:
        left_out: where to count the other files of folders and shards, by suffix.
        column: with the images, see `open_source`.

    Raises:
        ImageError: no images, or a path that is missing or damaged.
        StoreError: two images of one key.
    """
    counted = Counter[str]() if left_out is None else left_out
    captions.forget()  # what an earlier run in this process read of the folders

    def scan(folder: Path) -> Listing:
        own = store if isinstance(store, Path) else None  # else it lies in no folder here
        files = files_below(folder, counted, own, ARCHIVES)
        archives = [file for file in files if file.suffix.lower() in ARCHIVES]
        if len(archives) == len(files):
            return Listing([], archives)
        # tars beside images are left where they are, as other files are: they may be copies of the same
        counted.update(file.suffix.lower() for file in archives)
        packed = set(archives)
        return Listing([file for file in files if file not in packed], [])

    opened = open_sources([paths] if isinstance(paths, str | Path | Address) else [*paths], column, scan)
    for images in opened:
        counted.update(images.left_out if isinstance(images, TarSource) else ())
    found: dict[str, Source] = {}
    seen = set[str]()
    for source in _outside(opened, store.resolve()):
        if len(opened) > 1 and source.name in seen:  # a folder and what is in it may both be named
            continue
        key = source.images.key(source.index)
        if (other := found.get(key)) is not None:
            _check_same_image(key, other, source)
            continue
        found[key] = source
        if len(opened) > 1:
            seen.add(source.name)
    order = sorted(found)
    return found if order == list(found) else {key: found[key] for key in order}


def _outside(opened: Iterable[ImageFiles], store: Place) -> Iterator[Source]:
    """All images, but for those in the store: its preview.png is no image of the user's."""
    outside = lru_cache(maxsize=1)(lambda place: store not in place.parents)  # of a shard many lie in one
    for images in opened:
        for index in range(len(images)):
            if outside(images.place(index)[0]):
                yield Source(images, index)


def _check_same_image(key: str, one: Source, other: Source) -> None:
    if one.images.place(one.index) != other.images.place(other.index):  # naming one twice does no harm
        raise StoreError(
            f"{one.images.name(one.index)} and {other.images.name(other.index)} would both have the key "
            f"{key!r}: name a folder that holds both, or encode them to two stores."
        )


def unclaimed(sources: Iterable[Source]) -> list[str]:
    """Caption files beside the images of folders that belong to none of them, sorted."""
    paths, roots = list[Place](), list[Place]()
    for images, index in ((each.images, each.index) for each in sources):
        if isinstance(images, FolderSource) and not isinstance(images, ListSource):
            paths.append(images.paths[index])
            roots.append(images.root or paths[-1].parent)
    return captions.unclaimed(paths, roots)


@dataclass(frozen=True)
class PlannedShard:
    """A shard as it is to be.

    Attributes:
        keys: of its images, sorted.
        vanished: those of them whose files are gone; they stay in the store.
        holders: the shards that there are which hold one of these, under any name.
        whole: the one of them that holds all, no other, under this name; None: there is none.
    """

    name: str
    keys: tuple[str, ...]
    vanished: tuple[str, ...] = ()
    holders: tuple[StoredShard, ...] = ()
    whole: StoredShard | None = None


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
    """All shards in the order of their numbers, and the keys that are taken out."""

    shards: list[PlannedShard]
    dropped: list[str]
    damaged: list[str]  # what was wrong with lists that had to be given up
    losses: list[Loss]  # images in those that are not among the images that are there

    @property
    def keys(self) -> Iterator[str]:
        """Of all images that are to be in the store, sorted."""
        return (key for shard in self.shards for key in shard.keys)


def plan_shards(found: Sequence[StoredShard], keys: Sequence[str], shard_size: int, prune: bool) -> Plan:
    """Divide all images, sorted, into shards of `shard_size`, whatever shards they are in now.

    So a store that has been brought up to date is what one made anew would be, and killed runs and any number
    of parts divide alike.

    Args:
        found: the shards that there are; what is in several is taken from the first of them.
        keys: of all images that are there, sorted.
        prune: take images out whose files are gone.
    """
    present, damaged = set(keys), list[tuple[StoredShard, str]]()
    holders = dict[str, tuple[int, ...]]()  # by key, which of `found`
    whole = dict[tuple[str, tuple[str, ...]], StoredShard]()
    for number, shard in enumerate(found):
        lines = read_lists(shard)
        if lines is None:  # its images are as good as new ones, as far as they are there
            name = shard.record.name
            damaged.append((shard, layout.damage(*shard, tensors=False) or f"{name} has just changed"))
            continue
        members = tuple(sorted(line.key for line in lines))
        whole.setdefault((shard.record.name, members), shard)
        alone = (number,)  # one for all of them
        for key in members:
            holders[key] = (*holders[key], number) if key in holders else alone
    losses = [loss for each in damaged if (loss := _loss(*each, present, holders)) is not None]
    dropped = sorted(holders.keys() - present) if prune else []
    if prune:
        dropped += [key for loss in losses for key in loss.keys]
    wanted = iter(keys if prune else sorted(present.union(holders)))
    planned, numbers = list[PlannedShard](), count()
    while chunk := tuple(islice(wanted, shard_size)):
        name = layout.shard_name(next(numbers))
        gone = tuple(key for key in chunk if key not in present)
        those = sorted({number for key in chunk for number in holders.get(key, ())})
        planned.append(
            PlannedShard(name, chunk, gone, tuple(found[each] for each in those), whole.get((name, chunk)))
        )
    return Plan(planned, dropped, [problem for _, problem in damaged], losses)


def read_lists(shard: StoredShard) -> list[Line] | None:
    """The lines of a shard's lists as its record has them, also while another part puts them in place.

    None where they are not to be had.
    """
    folder, record = shard
    index = _promised(layout.index_path(folder, record.name), record.index_sha256)
    failed = b""
    if index is not None and record.failed_sha256 is not None:
        found = _promised(layout.failed_path(folder, record.name), record.failed_sha256)
        index, failed = (None, b"") if found is None else (index, found)
    if index is None:
        return None
    failures = [Failure(**json.loads(line)) for line in failed.splitlines()]
    return [*map(layout.parse_entry, index.splitlines()), *failures]


def _promised(path: Path, sha256: str) -> bytes | None:
    for place in (path, partial_path(path), path):  # it may get its name just now
        with suppress(OSError):
            data = place.read_bytes()
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
    return None


def _loss(shard: StoredShard, problem: str, *elsewhere: Collection[str]) -> Loss | None:
    """What giving up a shard with a damaged list would lose, if anything."""
    held = _held(shard)
    if held is None:
        return Loss(problem, (), shard.record.count) if shard.record.count else None
    lost = held.difference(*elsewhere)  # the files that are there; what other shards hold
    return Loss(problem, tuple(sorted(lost))) if lost else None


def _held(shard: StoredShard) -> set[str] | None:
    """The keys of the images in a shard with a damaged list; None where they are not known."""
    folder, record = shard
    with suppress(OSError):  # missing or not readable
        # the index first: only the list of failures may be damaged, and older tensors do not have the keys
        if file_sha256(layout.index_path(folder, record.name)) == record.index_sha256:
            return {entry.key for entry in layout.read_entries(folder, record.name)}
    return layout.read_keys(folder, record)


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


@dataclass(frozen=True)
class ShardWork:
    """A shard that has to be written.

    Attributes:
        keys: of images to be encoded, sorted.
        kept: lines of the others as they are now, by the shard that has their moments.
        tensors: the shard whose tensors stay, since the lists alone are others; None: there is none.
    """

    name: str
    keys: tuple[str, ...]
    kept: tuple[tuple[StoredShard, tuple[Line, ...]], ...] = ()
    tensors: StoredShard | None = None

    @property
    def entries(self) -> Iterator[tuple[StoredShard, list[Entry]]]:
        """Of the kept lines those of images that have moments, by the shard that has them."""
        for holder, lines in self.kept:
            yield holder, [line for line in lines if isinstance(line, Entry)]

    @property
    def failures(self) -> list[Failure]:
        """The other kept lines."""
        return [line for _, lines in self.kept for line in lines if isinstance(line, Failure)]


def inspect_shard(
    shard: PlannedShard,
    sources: dict[str, Source],
    damaged: Container[StoredShard],
    retry_failed: bool,
    rehash: bool,
) -> ShardWork | StoredShard:
    """Compare a planned shard with what is on disk: what is to be done, or the shard that is as it should be.

    A file whose size and time are unchanged is not read; one whose content is unchanged is not encoded.

    Args:
        damaged: shards whose moments are not those that were written; of their lines failures alone count.
        retry_failed: encode images again that failed.
        rehash: read files all the same.
    """
    left, kept = set(shard.keys), list[tuple[StoredShard, tuple[Line, ...]]]()
    for holder in sorted(shard.holders, key=lambda each: each != shard.whole):  # that one first
        lines = tuple(line for line in read_lists(holder) or () if line.key in left)
        if holder in damaged:
            lines = tuple(line for line in lines if isinstance(line, Failure))
        renewed = list[Line]()
        for line in lines:
            source = sources.get(line.key)
            if source is not None and retry_failed and isinstance(line, Failure):
                continue
            if (now := _renewed(line, source, rehash)) is not None:
                renewed.append(now)
        left.difference_update(line.key for line in renewed)
        if renewed:
            kept.append((holder, tuple(renewed)))
        if holder == shard.whole and holder not in damaged and not left:
            return holder if tuple(renewed) == lines else ShardWork(shard.name, (), tuple(kept), holder)
    return ShardWork(shard.name, tuple(sorted(left)), tuple(kept))


def _sha256(source: Source) -> str:
    with source.images.open(source.index) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto


def _renewed(line: Line, source: Source | None, rehash: bool) -> Line | None:
    """The line with the file's time and caption as they are now; None where the content is another."""
    if source is None:  # vanished: what is stored stays
        return line
    images, index = source.images, source.index
    try:
        size, mtime_ns = images.state(index)
        same = mtime_ns == line.mtime_ns and size in (line.size_bytes, None)
        if line.sha256 is None:  # could not be read: None here if it can be now
            images.open(index).close()
            return None
        resized = size not in (line.size_bytes, None)
        if (rehash or not same) and (resized or _sha256(source) != line.sha256):
            return None
    except (OSError, ImageError, SourceError):  # gone since it was listed: what is stored stays
        return line
    if isinstance(line, Failure):  # which has no caption
        return replace(line, source=source.name, mtime_ns=mtime_ns)
    caption, caption_notes = source.caption()
    notes = [note for note in line.notes if not note.startswith(captions.PREFIX)] + caption_notes
    return replace(line, source=source.name, mtime_ns=mtime_ns, caption=caption, notes=notes)
