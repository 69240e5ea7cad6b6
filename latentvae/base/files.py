"""Files and folders on disk: written whole or not at all, never over what is somebody else's, hashed.

    with whole_file(path) as partial: ...     fill `partial`; it gets the name when the block ends well
    with staged_file(path) as partial: ...    the same up to the rename: the store's journal does that later
    with whole_folder(path) as partial: ...   the same for a folder; an earlier one goes only after that
    put_in_place(partial, final)              the last step of it alone, for what several processes fill
    with explained(path, error, message): ... what the disk refuses becomes an error that says what to do
    check_file(path, ...), check_folder(path, ...)    refuse to overwrite, before work is spent
    check_local(path)                         refuse s3://bucket/x, which Path makes a name here of
    make_folder(path, ...)                    there and writable, or an error
    portable(name), local(name)               names as text that is the same in any locale, and back
    file_sha256(path), fsync(path), link_or_copy(source, target)

`error` is the class to raise, `message` what it says: a template with {path} and {reason}, not an f-string,
because paths may hold braces.

What is written is a new file that takes the name: a link to a file is replaced, not followed, and a read-only
file is replaced too. A link to a folder is followed.
"""

import errno
import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from latentvae.base.errors import LatentVAEError

# safetensors reports a full disk as an error of its own, which is no OSError
REFUSALS = (OSError, SafetensorError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # nothing else can be written there either
CANNOT_WRITE = "{path} cannot be written ({reason}): name a place in a folder of yours."
CANNOT_MAKE = "{path} cannot be written to ({reason}). Choose another folder."

ADDRESS = re.compile(r"([A-Za-z][\w+.-]+:)/+(.*)", re.DOTALL)  # one letter is a drive of Windows

Kind = type[LatentVAEError]


@contextmanager
def whole_file(
    path: Path, error: Kind = LatentVAEError, message: str = CANNOT_WRITE, *, durable: bool = False
) -> Iterator[Path]:
    """A temporary file beside `path` to fill: it replaces `path` when the block ends, or goes if it fails.

    Args:
        durable: wait until it is on the disk, so that a power cut leaves the old or the new one too. Costs
            milliseconds a file: for what others are judged by and what took hours, not for pictures.

    Raises:
        LatentVAEError: as `error`: it cannot be written; what was at `path` stays.
    """
    # A durable file is written by one process under a lock, and a second run is to write over what a killed
    # one left. Others may be written by two at once, under names so long that nothing can be added to them.
    partial = partial_path(path) if durable else path.with_name(f".{uuid.uuid4().hex}.partial")
    with explained(path, error, message), _filled(partial, path, durable):
        yield partial


@contextmanager
def staged_file(path: Path, error: Kind = LatentVAEError, message: str = CANNOT_WRITE) -> Iterator[Path]:
    """The first half of a durable `whole_file`: what the block fills stays at `partial_path(path)`.

    Raises:
        LatentVAEError: as `error`: it cannot be written, and is gone.
    """
    with explained(path, error, message), _filled(partial_path(path), None, durable=True):
        yield partial_path(path)


@contextmanager
def whole_folder(
    path: str | Path, error: Kind = LatentVAEError, message: str = CANNOT_WRITE
) -> Iterator[Path]:
    """An empty temporary folder beside `path` to fill: it replaces `path` when the block ends, or goes.

    Raises:
        LatentVAEError: as `error`: it cannot be written; what was at `path` stays.
    """
    final = Path(path).resolve()  # "." and links have no name to put another folder in place of
    with explained(Path(path), error, message), partial_folder(final) as partial:
        yield partial
        put_in_place(partial, final)


@contextmanager
def partial_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside `final`, deleted at the end with all that was not moved out of it."""
    partial = partial_path(final)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, final: Path, *, durable: bool = False) -> None:
    """Rename a folder to `final`; what was there is deleted only after that, or comes back."""
    old = final.parent / f".{final.name}.old"
    if old.exists() and not final.exists():  # killed between the two renames: the only whole one there is
        old.rename(final)
    let_others_read(partial)
    if durable:  # content first, then names: a rename must never be on the disk before what it names
        for path in [*partial.rglob("*"), partial]:
            fsync(path)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():  # no system renames a folder over one that is not empty
        final.rename(old)
    try:
        partial.rename(final)
    except BaseException:
        if old.exists():
            old.rename(final)
        raise
    if durable:
        fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def explained(path: Path, error: Kind = LatentVAEError, message: str = CANNOT_WRITE) -> Iterator[None]:
    """Turn what a disk refuses within the block into `error`, with the reason as people know it."""
    check_local(path, error)
    try:
        yield
    except REFUSALS as refusal:
        reason = getattr(refusal, "strerror", None) or refusal  # without "[Errno 28]" and temporary names
        failure = error(message.format(path=path, reason=reason))
        failure.ends_run = getattr(refusal, "errno", None) in FULL or os.strerror(errno.ENOSPC) in str(
            refusal
        )
        raise failure from refusal


def check_local(path: str | Path, error: Kind = LatentVAEError) -> None:
    """Refuse an address: as a Path s3://bucket/x is the folder "s3:" here, which would even be made.

    Raises:
        LatentVAEError: as `error`: says to copy or mount it.
    """
    found = ADDRESS.match(str(path))
    if found and not Path(found[1]).exists():
        raise error(
            f"{found[1]}//{found[2]} is an address; wanted a path of this machine: copy it here, or mount "
            "it, and name that."
        )


def check_file(
    path: Path,
    what: str = "",
    earlier: Callable[[Path], bool] | None = None,
    *,
    overwrite: bool = False,
    error: Kind = LatentVAEError,
) -> None:
    """Refuse to write a file over another one.

    Args:
        what: a noun, such as "calibration", of which an earlier one may be replaced;
        earlier: tells whether what is there is one.
        overwrite: replace whatever file it is.

    Raises:
        LatentVAEError: as `error`: a folder, or a file that is not to be replaced.
    """
    if path.is_dir():
        raise error(f"{path} is a folder; wanted the name of a file to write.")
    if overwrite or not path.exists():
        return
    if earlier is None:
        raise error(f"{path} is already there. Choose another, or pass --overwrite.")
    if not earlier(path):
        raise error(f"{path} is there and is no {what}: name another file, or delete it first.")


def check_folder(
    folder: Path,
    what: str,
    mark: str = "",
    only: Collection[str] = (),
    *,
    overwrite: bool = True,
    instead: str = "Choose another folder",
    error: Kind = LatentVAEError,
) -> None:
    """Refuse to write a folder over anything but an earlier one of its kind.

    Args:
        what: a noun, such as "export".
        mark: name of a file that every earlier one holds.
        only: names of all that an earlier one may hold: the rest would be lost.
        overwrite: replace an earlier one.
        instead: what to do otherwise, such as "Choose another --output".

    Raises:
        LatentVAEError: as `error`: a file, other things, or an earlier one that is not to be replaced.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise error(f"{folder} is a file; wanted a folder to write the {what} to.")
    names = {each.name for each in folder.iterdir()}
    if names and mark and mark not in names:
        raise error(f"{folder} is not empty and no earlier {what}. {instead}.")
    if only and (others := names - set(only)):
        beside = (
            f"{min(others)!r} beside an earlier {what}" if mark else f"other things, such as {min(others)}"
        )
        raise error(f"{folder} holds {beside}, and all in it would be replaced. {instead}.")
    if names and not overwrite:
        raise error(f"{folder} holds an earlier {what}. {instead}, or pass --overwrite.")


def is_too_long(path: Path) -> bool:
    """Whether the system refuses to look at a path, which can be made all the same, step by step."""
    try:
        path.lstat()
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def may_be_file(path: Path) -> bool:
    """Whether it is a file, or too long to be looked at: reading it then says so, and names it."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return True


def collect_too_long(found: list[Path]) -> Callable[[OSError], None]:
    """What `os.walk` does about a folder that cannot be read: raise, but put paths that are too long here."""

    def handle(error: OSError) -> None:
        if error.errno != errno.ENAMETOOLONG:
            raise error
        found.append(Path(error.filename))

    return handle


def portable(name: str) -> str:
    """A file's name as text that is the same in any locale: its bytes as UTF-8, others escaped."""
    return name if os.name == "nt" else os.fsencode(name).decode("utf-8", "surrogateescape")


def local(name: str) -> str:
    """A name that `portable` made, as this locale has it: what files are opened by."""
    return name if os.name == "nt" else os.fsdecode(name.encode("utf-8", "surrogateescape"))


def make_folder(folder: Path, error: Kind = LatentVAEError, message: str = CANNOT_MAKE) -> Path:
    """Create a folder where it is missing, and try whether it can be written to.

    Raises:
        LatentVAEError: as `error`: it cannot.
    """
    with explained(folder, error, message):
        folder.mkdir(parents=True, exist_ok=True)
        # tried, because permission bits tell nothing of read-only disks, or of root
        probe = folder / f".latentvae-write-test-{uuid.uuid4().hex}"  # its own: threads may be at it at once
        probe.touch()
        probe.unlink()
    return folder


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again, ours in `latentvae`; it need not be there.

    Raises:
        LatentVAEError: this user has no home, as in a container that runs under any number.
    """
    kept = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    names = ("XDG_CACHE_HOME", "LOCALAPPDATA") if sys.platform == "win32" else ("XDG_CACHE_HOME",)
    named = next(filter(None, map(os.environ.get, names)), None)
    try:
        return (Path(named) if named else Path.home() / kept) / "latentvae"
    except RuntimeError as error:
        raise LatentVAEError(f"{error}: set XDG_CACHE_HOME to a folder of yours.") from error


def partial_path(path: Path) -> Path:
    """What a durable file, or a folder, is called until it is whole."""
    return path.with_name(f".{path.name}.partial")


def let_others_read(folder: Path) -> None:
    """Give a folder's tensors the permissions of any new file: safetensors 0.8 lets only the owner read."""
    probe = folder / ".permissions"  # asking for the umask would set it, for all threads
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        _set_mode(path, mode)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows has no handle to a folder
        return
    # Windows flushes only what is open for writing
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that nobody will write to a second name, or a copy where the disk has no such links."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _filled(partial: Path, final: Path | None, durable: bool) -> Iterator[None]:
    """A new file, then whole, then renamed to `final` if there is one; gone after any failure, Ctrl-C too."""
    try:
        partial.unlink(missing_ok=True)  # what a kill left would lend its permissions
        partial.touch()
        mode = partial.stat().st_mode
        yield
        _set_mode(partial, mode)  # safetensors lets nobody else read what it writes
        if durable:
            fsync(partial)
        if final is not None:
            partial.replace(final)
            if durable:
                fsync(final.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _set_mode(path: Path, mode: int) -> None:
    """Change permissions, where they differ: some mounts refuse to, even to what is so already."""
    if path.stat().st_mode != mode:
        path.chmod(mode)
