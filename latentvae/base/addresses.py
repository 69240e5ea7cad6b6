"""Files at addresses, such as s3://bucket/a.tar, through fsspec: like a Path, and asked for again.

What fails is asked for `TRIES` times in all, unless asking again cannot help; then it is a SourceError that
names the address as it was typed.
"""

import hashlib
import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar

from latentvae.base.errors import LatentVAEError, SourceError
from latentvae.base.optional import install_command, need

TRIES = 4
PAUSE = 0.5  # seconds before the second try; doubled before each after it
SCHEME = re.compile(r"([A-Za-z][\w+.-]+):(//.*)", re.DOTALL)  # one letter is a drive of Windows
WEB = ("http", "https")  # without folders, and with queries behind the name
BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs")
HEADER = 1 << 16  # bytes that are fetched at once where a header is read
# that the extra does not bring
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs", "az": "adlfs"}
_AZURE = "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
CREDENTIALS = {
    "abfs": _AZURE,
    "az": _AZURE,
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=1 for a public bucket",
    "gs": "run `gcloud auth application-default login`",
    "hf": "run `hf auth login`, or set HF_TOKEN",
}
MISSING = "{what} is read with the package `{package}`, which is missing: {install}"

Answer = TypeVar("Answer")


class Stat(NamedTuple):
    """As `os.stat` names them; of a place that knows no time a number that changes with the content."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, order=True)
class Address:
    """A file or folder at an address; what it has of a Path does the same, and raises SourceError."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def scheme(self) -> str:
        """For instance "s3"."""
        return self.url.partition(":")[0].lower()

    @property
    def bare(self) -> str:
        """Without a query, and without a slash at the end."""
        whole = re.split(r"[?#]", self.url)[0] if self.scheme in WEB else self.url
        return whole.rstrip("/")

    @property
    def name(self) -> str:
        """What is behind the last slash."""
        return self.bare.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> "Address":
        """The folder."""
        return Address(self.bare.rpartition("/")[0])

    @property
    def parents(self) -> "list[Address]":
        """All folders above, down to the bucket or the host."""
        above = self.parent
        return [] if above.url.endswith(("/", ":")) or "://" not in above.url else [above, *above.parents]

    def __truediv__(self, name: str) -> "Address":
        return Address(f"{self.bare}/{name}")

    def with_name(self, name: str) -> "Address":
        """Another one in the same folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> "Address":
        """The same with another suffix."""
        return self.parent / f"{self.stem}{suffix}"

    def is_relative_to(self, other: "Path | Address") -> bool:
        """Whether it is the other, or below it."""
        return isinstance(other, Address) and f"{self.bare}/".startswith(f"{other.bare}/")

    def relative_to(self, other: "Address") -> PurePosixPath:
        """The path below the other."""
        return PurePosixPath(self.bare[len(other.bare) + 1 :])

    def as_posix(self) -> str:
        """The address."""
        return self.url

    def resolve(self) -> "Address":
        """Itself: there are no links."""
        return self

    def exists(self) -> bool:
        """Whether a file or a folder is there."""
        return _info(self) is not None

    def is_file(self) -> bool:
        """Whether a file is there."""
        return (_info(self) or {}).get("type") == "file"

    def is_dir(self) -> bool:
        """Whether a folder is there."""
        return self.scheme not in WEB and (_info(self) or {}).get("type") == "directory"

    def stat(self) -> Stat:
        """Its size, and when it was changed."""
        found = _info(self)
        if found is None:
            raise SourceError(f"{self} does not exist{self.why_missing()}. Check the address.")
        return Stat(found["size"] or 0, _changed(found))

    def read_bytes(self) -> bytes:
        """All of it."""
        return self.ask(lambda files, path: bytes(files.cat_file(path)))

    def read_part(self, start: int, size: int) -> bytes:
        """Some bytes, fewer where it ends before."""
        if not size:
            return b""

        def part(files: Any, path: str) -> bytes:
            data = bytes(files.cat_file(path, start=start, end=start + size))
            if len(data) > size:
                raise self._without_ranges()
            return data

        return self.ask(part)

    def open(
        self, mode: str = "rb", encoding: str | None = None, newline: str | None = None, block: int = HEADER
    ) -> IO[Any]:
        """Open it to be read; as bytes it is fetched piece by piece, as text at once."""
        if mode == "rb":
            return self.ask(lambda files, path: self.opened(files, path, block))
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding=encoding, newline=newline)

    def opened(self, files: Any, path: str, block: int) -> IO[bytes]:
        """The file in a file system that `ask` gives, fetched in blocks of so many bytes."""
        file: IO[bytes] = files.open(path, "rb", block_size=block, cache_type="readahead")
        try:
            file.seek(1)
            file.seek(0)
        except ValueError as error:  # fsspec's stream of what cannot be had in parts
            raise self._without_ranges() from error
        return file

    def write_bytes(self, data: bytes) -> None:
        """Make it a file of this content; on an object store whole or not at all."""
        self._change(lambda files, path: files.pipe_file(path, data))

    def put(self, file: Path) -> None:
        """Copy a file of this machine there; on an object store whole or not at all."""
        self._change(lambda files, path: files.put_file(str(file), path))

    def copy_to(self, other: "Address") -> None:
        """Have its file system copy it to another address of that."""
        other._change(lambda files, path: files.cp_file(files._strip_protocol(self.url), path))

    def unlink(self) -> None:
        """Delete the file, if it is there."""

        def remove(files: Any, path: str) -> None:
            with suppress(FileNotFoundError):
                files.rm_file(path)

        self.ask(remove, "deleted")

    def rmdir(self) -> None:
        """Delete the folder, which is empty; in a bucket it is none without files."""
        if self.scheme not in BUCKETS:
            self.ask(lambda files, path: files.rmdir(path) if files.exists(path) else None, "deleted")

    def sizes(self) -> dict[str, int]:
        """Bytes of what is in the folder now, by name, of folders 0; nothing where it does not exist."""

        def look(files: Any, path: str) -> dict[str, int]:
            files.invalidate_cache()
            try:
                found = files.ls(path, detail=True)
            except FileNotFoundError:
                return {}
            return {each["name"].rstrip("/").rpartition("/")[2]: each["size"] or 0 for each in found}

        return self.ask(look)

    def _change(self, change: Callable[[Any, str], Any]) -> None:
        if self.scheme in WEB:
            raise SourceError(
                f"{self} cannot be written: {self.scheme}:// is read alone. Name another place."
            )

        def do(files: Any, path: str) -> None:
            if self.scheme not in BUCKETS:  # which have no folders; s3fs would even make a bucket
                files.makedirs(files._parent(path), exist_ok=True)
            change(files, path)

        self.ask(do, "written")

    def _without_ranges(self) -> SourceError:
        return SourceError(
            f"{self} can only be had whole, and parts of it are wanted: its server knows no ranges. Copy it "
            "here, and name that."
        )

    def iterdir(self) -> "Iterator[Address]":
        """What is in the folder."""
        return iter(
            self.ask(lambda files, path: [self._named(files, each) for each in files.ls(path, detail=False)])
        )

    def below(self) -> "list[Address]":
        """All files below the folder, sorted; hidden ones are left out."""
        found = self.ask(lambda files, path: [self._named(files, each) for each in files.find(path)])
        return sorted(each for each in found if not re.search(r"/\.", each.url[len(self.bare) :]))

    def matching(self) -> "list[Address]":
        """What it matches as a pattern with *, sorted."""
        return self.ask(lambda files, path: sorted(self._named(files, each) for each in files.glob(path)))

    def why_missing(self) -> str:
        """ " (there is no bucket ...)" where that is why nothing is here."""
        if self.scheme not in BUCKETS:
            return ""
        bucket = self.bare.partition("://")[2].partition("/")[0]
        return "" if Address(f"{self.scheme}://{bucket}").exists() else f" (there is no bucket {bucket!r})"

    def ask(self, question: Callable[[Any, str], Answer], done: str = "read") -> Answer:
        """Ask a file system, again where that may help; what it raises is named.

        Args:
            question: takes fsspec's file system and the path in it. done: what it does, as a participle.

        Raises:
            SourceError: no answer; or a LatentVAEError of the question's.
        """
        fsspec = need("fsspec", SourceError, MISSING, self)
        problem: Exception | None = None
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                # anew: file systems do not survive a fork, and fsspec keeps them for each process
                return question(*fsspec.core.url_to_fs(self.url))
            except LatentVAEError:
                raise
            except Exception as error:  # each kind of file system has errors of its own
                if reason := self._hopeless(error):
                    raise SourceError(f"{self} cannot be {done}: {reason}.") from error
                problem = error
        said = str(problem) or type(problem).__name__
        raise SourceError(
            f"{self} cannot be {done} ({said}); it was tried {TRIES} times. Check the connection, and run "
            "the same command again."
        ) from problem

    def _named(self, files: Any, path: str) -> "Address":
        """What a file system calls a file, as it would have been typed."""
        return Address(f"{self.scheme}://{str(files.unstrip_protocol(path)).partition('://')[2]}")

    def _hopeless(self, error: Exception) -> str | None:
        """Why asking again would not help; None where it may."""
        if isinstance(error, ImportError):
            package, is_ours = PACKAGES.get(self.scheme), self.scheme in (*WEB, "s3", "s3a")
            how = (
                f"pip install {package}"
                if package
                else install_command("remote")
                if is_ours
                else "install it"
            )
            return f"a package is missing ({error}): {how}"
        if isinstance(error, FileNotFoundError) or type(error).__name__ == "ResourceNotFoundError":  # azure's
            return f"it does not exist{self.why_missing()}: check the address"
        known = CREDENTIALS.get(self.scheme.replace("gcs", "gs"), "check who may do that")
        if "Credentials" in type(error).__name__ or "with credentials!" in str(error):  # adlfs's ValueError
            return f"there are no credentials ({error}): {known}"
        if isinstance(error, PermissionError) or "failed to authenticate" in str(error):  # azure's
            return f"these credentials do not allow it ({error}): {known}"
        if isinstance(error, ValueError) and "rotocol" in str(error):  # fsspec's "Protocol not known: ..."
            return f"{self.scheme}:// is no kind of address that is known ({error})"
        return None


Place = Path | Address


def place(spec: "str | Place") -> Place:
    """A path of this machine, or an address; "s3:" may be a folder here."""
    found = SCHEME.fullmatch(spec) if isinstance(spec, str) else None
    if found and not Path(f"{found[1]}:").exists():
        return Address(str(spec))
    return Path(spec) if isinstance(spec, str) else spec


def is_below(file: Place, folder: Place) -> bool:
    """Whether a file lies in a folder, or is it; one of them may be an address, and the other not."""
    if isinstance(file, Path):
        return isinstance(folder, Path) and file.is_relative_to(folder)
    return file.is_relative_to(folder)


def below(file: Place, folder: Place) -> str:
    """The POSIX path of a file below a folder in which it lies."""
    if isinstance(folder, Path):
        return Path(str(file)).relative_to(folder).as_posix()
    return Address(str(file)).relative_to(folder).as_posix()


def read_part(file: Place, start: int, size: int) -> bytes:
    """Some bytes of a file, fewer where it ends before; raises OSError or SourceError."""
    if isinstance(file, Address):
        return file.read_part(start, size)
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(size)


def forget() -> None:
    """Look at addresses anew: to be called when a run begins."""
    _info.cache_clear()


@lru_cache(maxsize=100_000)
def _info(address: Address) -> dict[str, Any] | None:
    """What is known of a file or folder without reading it; None where there is none."""

    def look(files: Any, path: str) -> dict[str, Any] | None:
        files.invalidate_cache()  # listings that it keeps are of an earlier time
        try:
            return dict(files.info(path))
        except FileNotFoundError:
            return None

    return address.ask(look)


def _changed(info: dict[str, Any]) -> int:
    for name in ("LastModified", "mtime", "updated", "last_modified", "created"):
        found = info.get(name)
        if found is not None and hasattr(found, "timestamp"):
            return int(found.timestamp() * 1e9)
        if isinstance(found, int | float):
            return int(found * 1e9)
    tag = str(
        next(
            (
                info[name]
                for name in ("updated", "ETag", "etag", "Last-Modified", "blob_id")
                if info.get(name)
            ),
            "",
        )
    )
    return int.from_bytes(hashlib.sha256(tag.encode()).digest()[:7]) if tag else 0
