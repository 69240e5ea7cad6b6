"""A folder made of another, file by file: what is to be done, what has been, and what is in the way."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latentvae.base.errors import LatentVAEError
from latentvae.base.files import make_folder
from latentvae.cli.options import counted
from latentvae.cli.places import with_ending

NAMED = 3  # files in the way that a refusal names


@dataclass(frozen=True)
class Job:
    """One file to be made of another; `name` is the path below the folder that was named."""

    source: Path
    target: Path
    name: str

    @property
    def is_younger(self) -> bool:
        """Whether what was made is not older than what it was made of."""
        return self.target.stat().st_mtime_ns >= self.source.stat().st_mtime_ns


def plan(
    files: list[Path], source: Path, output: Path, ending: str, error: type[LatentVAEError], suffix: str = ""
) -> list[Job]:
    """OUT/KEY with an ending for each file of a folder, where it may replace a suffix.

    Raises:
        LatentVAEError: as `error`: OUT is a file, or two files would become one.
    """
    if output.is_file():
        raise error(f"{output} is a file; of the folder {source}, a folder was wanted to write to.")
    planned: dict[Path, Job] = {}
    for file in files:
        name = file.relative_to(source)
        stem = name.name[: len(name.name) - len(suffix)]
        target = output / name.parent / with_ending(stem, ending, name.as_posix())
        if target in planned:
            raise error(f"{planned[target].source} and {file} would both become {target}: rename one.")
        planned[target] = Job(file, target, name.as_posix())
    return list(planned.values())


def remaining(
    jobs: list[Job], is_done: Callable[[Job], bool], overwrite: bool, error: type[LatentVAEError]
) -> list[Job]:
    """The jobs that are not done; their folders are made.

    Raises:
        LatentVAEError: as `error`: other files are in the way, and are not to be replaced.
    """
    todo = [job for job in jobs if not (job.target.is_file() and is_done(job))]
    in_the_way = [str(job.target) for job in todo if job.target.exists()]
    if in_the_way and not overwrite:
        more = ", ..." if len(in_the_way) > NAMED else ""
        raise error(
            f"{counted(len(in_the_way), 'file')} already there, not made of the same image in the same way: "
            f"{', '.join(in_the_way[:NAMED])}{more}. Choose another folder, or pass --overwrite."
        )
    for folder in sorted({job.target.parent for job in todo}):
        make_folder(folder, error)
    return todo
