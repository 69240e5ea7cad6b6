"""Files at addresses, without a network: in memory, and some not to be had the first times."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from latentvae.base import addresses


class Shaky(MemoryFileSystem):
    """Files in memory, of which some are not to be had the first times."""

    protocol = "shaky"
    store: dict[str, Any] = {}  # noqa: RUF012  # fsspec's own way
    pseudo_dirs = [""]  # noqa: RUF012
    breaks: dict[str, int] = {}  # noqa: RUF012  # by the end of a name: how often it is refused
    asked: list[str] = []  # noqa: RUF012

    @classmethod
    def refuse(cls, path: str) -> None:
        cls.asked.append(path)
        for end, left in cls.breaks.items():
            if path.endswith(end) and left:
                cls.breaks[end] -= 1
                raise ConnectionResetError("connection reset by peer")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        self.refuse(path)
        return bytes(super().cat_file(path, start, end, **kwargs))

    def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self.refuse(path)
        return super()._open(path, *args, **kwargs)


@pytest.fixture(autouse=True)
def shaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Shaky]]:
    """A file system of its own for each test, whose pauses cost no time."""
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    monkeypatch.setattr(addresses, "PAUSE", 0.0)
    addresses.forget()
    yield Shaky
    Shaky.store.clear()
    Shaky.pseudo_dirs[:] = [""]
    Shaky.breaks.clear()
    Shaky.asked.clear()


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A server of S3 on this machine without a bucket; called, it gives credentials, and makes "bucket"."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    # what another server of this process kept is this one's too
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    s3fs.S3FileSystem.clear_instance_cache()

    def open_bucket() -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")

    yield open_bucket
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def put(files: dict[str, bytes], at: str) -> str:
    """Write files to an address."""
    for name, data in files.items():
        with fsspec.open(f"{at}/{name}", "wb") as file:
            file.write(data)
    return at


def upload(folder: Path, at: str) -> str:
    """Put all files of a folder to an address."""
    return put({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}, at)
