"""Whether a shard still says what the image files say, without encoding anything."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from latentvae.store.captions import PREFIX
from latentvae.store.manifest import file_sha256
from latentvae.store.planning import PlannedShard
from latentvae.store.shard import Entry, Failure, read_entries, read_failures
from latentvae.store.sources import Source

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
