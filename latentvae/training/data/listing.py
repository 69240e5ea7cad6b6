"""Large folders, listed once on each machine, whose processes share what was found; orders of many images."""

import json
import shutil
import tempfile
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from latentvae.base.errors import ConfigError
from latentvae.images.listing import FileTable, Listing, scan


def scan_together(root: Path) -> Listing:
    """`scan`, by one process of each machine; the others map what it found.

    Raises:
        OSError: as `scan`, in all processes.
        ConfigError: machines see different files.
    """
    state = PartialState()
    if state.num_processes == 1:
        return scan(root)
    said: tuple[str | None, str, OSError | None] = (None, "", None)
    place: Path | None = None
    if state.is_local_main_process:
        try:
            found = scan(root)
            images = found.images
            assert isinstance(images, FileTable)  # as `scan` makes them
            place = Path(tempfile.mkdtemp(prefix="latentvae-listing-"))
            images.save(place)
            (place / "archives.json").write_text(json.dumps([*map(str, found.archives)]), encoding="utf-8")
            said = (str(place), images.digest, None)
        except OSError as error:
            said = (None, "", error)
    all_said = gather_object([said])
    if problem := next((error for _, _, error in all_said if error is not None), None):
        raise problem
    others = {digest for _, digest, _ in all_said if digest}
    if len(others) == 1:
        first, _, _ = all_said[state.process_index - state.local_process_index]
        archives = json.loads((Path(first) / "archives.json").read_text(encoding="utf-8"))
        found = Listing(FileTable.load(Path(first)), [*map(Path, archives)])
    gather_object([None])  # all have opened it
    if place is not None:
        shutil.rmtree(place, ignore_errors=True)  # what is mapped stays
    if len(others) > 1:
        raise ConfigError(
            f"machines see different files in {root}: processes would train on other images than they are "
            "counted as. Make the folders alike, or put them on storage that all machines share."
        )
    return found


ROUNDS = 6
LISTED = (
    2**16
)  # images up to which the order of an epoch is drawn as a whole; beyond, 8 bytes an image add up


def shuffled(place: int, count: int, keys: tuple[int, ...]) -> int:
    """Where a pseudorandom permutation of range(count) takes `place`; computed, so that none need be stored.

    A Feistel network permutes the numbers of an even number of bits, at most four times as many; those that
    it takes outside are taken on until they are inside (Black & Rogaway 2002, cycle walking).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            mixed = (right + key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & mask)
        place = left << half | right
        if place < count:
            return place
