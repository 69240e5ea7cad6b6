"""What training pays for its images besides decoding: listing folders, and finding the next one.

    python benchmarks/feeding.py --files 10000000

The listing is of a made-up folder, a thousand names in each of its subfolders, whose entries say what they
are as a file system does; so it is the time of this package alone, and of making these entries. Seconds are
of this process's CPU, so that other processes do not count. Beside it a real folder of empty files is listed,
by `Path` objects as well.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from latentvae.images.kinds import SUFFIXES
from latentvae.images.listing import ARCHIVES, FileTable, list_files, scan
from latentvae.training.data import crops

IN_A_FOLDER = 1000


class Entry:
    """What `os.scandir` gives, of a file or a folder that is not there."""

    def __init__(self, name: str, folder: bool) -> None:
        self.name, self.folder = name, folder

    def is_dir(self) -> bool:
        return self.folder

    def is_file(self) -> bool:
        return not self.folder

    def is_symlink(self) -> bool:
        return False


@contextmanager
def made_up(folder: str, files: int) -> Iterator[Iterator[Entry]]:
    """The entries of the folder with all subfolders, or of one of these."""
    if folder == "/made-up":
        yield (Entry(f"n{number:08d}", True) for number in range(files // IN_A_FOLDER))
    else:
        yield (Entry(f"{Path(folder).name}_{number:05d}.JPEG", False) for number in range(IN_A_FOLDER))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and the CPU seconds that it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def made_up_listing(files: int) -> FileTable:
    """List a made-up folder, and print what that took."""
    before = psutil.Process().memory_info().rss
    scandir, os.scandir = os.scandir, lambda folder: made_up(folder, files)  # type: ignore[assignment]
    try:
        found, seconds = timed(lambda: scan(Path("/made-up")).images)
    finally:
        os.scandir = scandir  # type: ignore[assignment]
    grown = psutil.Process().memory_info().rss - before
    arrays = found.names.nbytes + found.ends.nbytes + found.folder_of.nbytes
    print(
        f"{len(found):,} made-up files: {seconds:.1f} s, {seconds / len(found) * 1e6:.2f} us and "
        f"{arrays / len(found):.0f} bytes a file; table {arrays / 1e6:.0f} MB, process + {grown / 1e6:.0f} MB"
    )
    return found


def real_listing(files: int) -> None:
    """List empty files on disk as `Path` objects and as a table."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for number in range(files):
            folder = root / f"n{number // IN_A_FOLDER:04d}"
            folder.mkdir(exist_ok=True)
            (folder / f"{number:08d}.JPEG").touch()
        paths, slow = timed(lambda: list_files(root, (*SUFFIXES, *ARCHIVES)))
        table, fast = timed(lambda: scan(root).images)
        assert [*table] == paths
    print(
        f"{files:,} files on disk: {slow / files * 1e6:.2f} us each as paths, "
        f"{fast / files * 1e6:.2f} as a table"
    )


def order(count: int) -> None:
    """Print what finding the next image of an epoch takes."""
    visited = crops.EpochOrder(0, 0, count)
    _, seconds = timed(lambda: [visited[place] for place in range(20_000)])
    print(
        f"the next of {count:,} images: {seconds / 20_000 * 1e6:.1f} us, nothing stored "
        "(8 bytes an image where the whole order is drawn)"
    )


def main() -> None:
    """Print one line for each measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=1_000_000, help="of the made-up folder")
    parser.add_argument("--on-disk", type=int, default=20_000, help="of the real one")
    arguments = parser.parse_args()
    made_up_listing(arguments.files)
    real_listing(arguments.on_disk)
    order(arguments.files)


if __name__ == "__main__":
    main()
