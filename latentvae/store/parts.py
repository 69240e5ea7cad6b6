"""Parts of a run: which of several processes this one is, and which shards are its own.

Parts never talk to each other. A shard belongs to the part of its number, modulo their count; which image
belongs into which shard is decided by the sorted keys, so that the bytes do not depend on the count.
"""

import os
import re
from typing import NamedTuple

from latentvae.base.errors import StoreError
from latentvae.base.threads import environment_number
from latentvae.store.format import shard_number

WANTED = "wanted RANK/WORLD, counted from 0: of four parts 0/4, 1/4, 2/4 and 3/4"


class Part(NamedTuple):
    """One of several, counted from 0 as torchrun counts ranks."""

    rank: int
    world: int

    def __str__(self) -> str:
        return f"{self.rank}/{self.world}"

    def owns(self, shard: str) -> bool:
        """Whether a shard, by its name, is this part's to write."""
        return shard_number(shard) % self.world == self.rank


WHOLE = Part(0, 1)


def parse(text: str) -> Part:
    """Read "2/8".

    Raises:
        StoreError: it is none, or out of range.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None:
        raise StoreError(f"part {text!r} came; {WANTED}.")
    return _checked(Part(int(match[1]), int(match[2])), f"part {text} came")


def of_environment() -> Part:
    """The part that torchrun, accelerate or a Slurm array has given this process; without these the whole.

    Raises:
        StoreError: numbers that are none, or out of range.
    """
    if "WORLD_SIZE" in os.environ:
        part = Part(environment_number("RANK", 0), environment_number("WORLD_SIZE", 1))
        return _checked(part, f"RANK={part.rank} and WORLD_SIZE={part.world} are in the environment")
    if "SLURM_ARRAY_TASK_COUNT" in os.environ:
        own, least = (
            environment_number("SLURM_ARRAY_TASK_ID", 0),
            environment_number("SLURM_ARRAY_TASK_MIN", 0),
        )
        part = Part(
            (own - least) // max(1, environment_number("SLURM_ARRAY_TASK_STEP", 1)),
            environment_number("SLURM_ARRAY_TASK_COUNT", 1),
        )
        return _checked(part, f"SLURM_ARRAY_TASK_ID={own} is in the environment")
    return WHOLE


def _checked(part: Part, came: str) -> Part:
    if not 0 <= part.rank < part.world:
        raise StoreError(f"{came}, which is out of range; {WANTED}.")
    return part
