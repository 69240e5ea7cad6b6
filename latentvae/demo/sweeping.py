"""Uploads and results, deleted after a while.

gradio's own `delete_cache` forgets files of requests without a session (those of plain HTTP clients), and
leaves every file's folder behind.
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path


class Sweeper(threading.Thread):
    """Deletes what is older than `keep_seconds` below a folder, every `sweep_seconds`, until that is gone.

    Files that are there when it is made belong to the page, and stay.
    """

    def __init__(self, folder: Path, keep_seconds: float, sweep_seconds: float) -> None:
        super().__init__(name="sweeper", daemon=True)
        self.folder, self.keep_seconds, self.sweep_seconds = folder, keep_seconds, sweep_seconds
        self.own = {Path(place, name) for place, _, names in os.walk(folder) for name in names}

    def run(self) -> None:
        """Sweep again and again."""
        while self.folder.is_dir():
            self.sweep(time.time())
            time.sleep(self.sweep_seconds)

    def sweep(self, now: float) -> None:
        """Delete what is too old at this time (seconds since 1970), and folders that are empty then."""
        for place, _, names in os.walk(self.folder, topdown=False):
            emptied = False
            for file in (Path(place, name) for name in names):
                if file not in self.own and self._is_old(file, now):
                    with suppress(OSError):  # gone already, or open on Windows: the next time
                        file.unlink()
                        emptied = True
            if Path(place) != self.folder and (emptied or self._is_old(Path(place), now)):
                with suppress(OSError):  # not empty
                    Path(place).rmdir()

    def _is_old(self, path: Path, now: float) -> bool:
        try:
            found = path.lstat()
        except OSError:
            return False
        return max(found.st_mtime, found.st_ctime) < now - self.keep_seconds
