"""What the repair of a damaged shard would lose: images in it that this run cannot encode again."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from latentvae.base.errors import StoreError
from latentvae.store.format import ShardRecord, index_path

NAMED = 5  # lost images and shards that a refusal names

_MEMBER = re.compile(rb'\{"key":("(?:[^"\\]|\\.)*"),"source":("(?:[^"\\]|\\.)*")')
_QUOTE = re.compile(rb'(?<!\\)"')


class Loss(NamedTuple):
    """What is lost with one shard.

    Attributes:
        problem: what is wrong with it; names the file.
        keys: of images whose files are gone, sorted.
        unread: images that the index no longer names.
    """

    problem: str
    keys: Sequence[str]
    unread: int = 0

    def __str__(self) -> str:
        shown = ", ".join(repr(key) for key in self.keys[:NAMED]) + ", ..." * (len(self.keys) > NAMED)
        parts = [f"{len(self.keys)} of its images cannot be encoded again ({shown})"] if self.keys else []
        if self.unread:
            parts.append(f"{self.unread} lines of its index cannot be read")
        return f"{self.problem}: {' and '.join(parts)}"


@dataclass
class Remains:
    """What a damaged index still says.

    Attributes:
        count: images that were in it.
        keys: of those that it names beyond doubt.
        doubtful: for each other line the keys that it may mean.
    """

    problem: str
    count: int
    keys: set[str] = field(default_factory=set)
    doubtful: list[set[str]] = field(default_factory=list)


def read_remains(store: Path, record: ShardRecord, problem: str) -> Remains:
    """Take from a damaged index what it still names; a key is certain where the file's path ends in it."""
    remains, roots, rest = Remains(problem, record.count), set[str](), list[bytes]()
    try:
        lines = index_path(store, record.name).read_bytes().splitlines()
    except OSError:  # missing or unreadable, as `problem` says
        lines = []
    for line in lines:
        texts = [[_text(quoted) for quoted in match.groups()] for match in _MEMBER.finditer(line)]
        certain = [(key, source) for key, source in texts if _ends_in(source, key)]
        remains.keys.update(key for key, _ in certain)
        roots.update(source[: -len(key)] for key, source in certain)
        if not certain:
            rest.append(line)
    for line in rest:
        before = line.partition(b'"caption"')[0]
        pieces = {_text(b'"' + piece + b'"') for piece in _QUOTE.split(before)} - {""}
        below = {piece.removeprefix(root) for piece in pieces for root in roots}
        remains.doubtful.append(pieces | below)
    return remains


def find_losses(damaged: Sequence[Remains], present: Collection[str], known: Collection[str]) -> list[Loss]:
    """What is in damaged indexes and not among the images that this run can encode.

    Args:
        present: keys of all images that are there.
        known: keys in intact shards.
    """
    free = set(present) - set(known) if damaged else set[str]()
    free.difference_update(*(remains.keys for remains in damaged))
    losses = []
    for remains in damaged:
        unread = remains.count - len(remains.keys)
        for options in remains.doubtful:
            meant = sorted(free & options)
            if meant:
                free.discard(meant[0])
                unread -= 1
        gone = sorted(remains.keys.difference(present, known))
        if gone or unread > 0:
            losses.append(Loss(remains.problem, tuple(gone), max(unread, 0)))
    return losses


def refusal(store: Path, losses: Sequence[Loss]) -> StoreError:
    """Why nothing is repaired, and what to do."""
    named = "; ".join(map(str, losses[:NAMED]))
    more = f"; {len(losses) - NAMED} more shards" if len(losses) > NAMED else ""
    return StoreError(
        f"{store} is damaged, and repairing it would lose images; nothing has been changed. {named}{more}. "
        "Bring the files back, name all folders that the store was made from, or give these images up with "
        "--prune."
    )


def _text(quoted: bytes) -> str:
    """A JSON string, or "" where it is damaged."""
    try:
        return str(json.loads(quoted))
    except ValueError:
        return ""


def _ends_in(source: str, key: str) -> bool:
    path = source.replace("\\", "/")
    end = key.replace("\\", "/")
    return bool(key) and (path == end or path.endswith("/" + end))
