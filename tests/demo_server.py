"""A demo on a tiny model, in this process, for tests: fixtures for all of them, which conftest.py loads."""

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import latentvae


def free_port() -> int:
    """One that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tiny_export(folder: Path) -> Path:
    """An untrained tiny model, exported."""
    torch.manual_seed(0)
    return latentvae.export(latentvae.build("tiny"), folder / "tiny-model")


def tiny_peer(folder: Path) -> Path:
    """An untrained AutoencoderTiny."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    sizes: dict[str, Any] = {f"{side}_block_out_channels": (8, 8, 8, 8) for side in ("encoder", "decoder")}
    blocks = {f"num_{side}_blocks": (1, 1, 1, 1) for side in ("encoder", "decoder")}
    AutoencoderTiny(**sizes, **blocks).save_pretrained(folder / "tiny-peer")
    return folder / "tiny-peer"


@contextmanager
def running(
    model: Path,
    patch: pytest.MonkeyPatch,
    host: str = "127.0.0.1",
    peers: Sequence[Path] = (),
    mcp: bool = False,
    **options: Any,
) -> Iterator[Any]:
    """A page that is served, with the tiny model (and peers) alone, and without LPIPS."""
    from latentvae.demo import loaded_models, one_model, server
    from latentvae.demo.guard import Limits

    patch.setattr(loaded_models, "bundled", list)
    # as measured it is not the same on every run
    patch.setattr(one_model, "_is_faster", lambda *_: False)
    patch.setenv("LATENTVAE_LPIPS", str(model))  # a folder without its weights
    patch.setattr(torch.hub, "get_dir", lambda: str(model / "no-hub"))
    with server.workplace() as files:
        page = server.start([model, *peers], host, free_port(), limits=Limits(**options), mcp=mcp)
        page.files = files
        try:
            yield page
        finally:
            close(page)


def close(page: Any) -> None:
    """Close a page, and wait for what it computes ahead: it would write where the folder was."""
    from latentvae.demo import server

    page.close()
    for thread in threading.enumerate():
        if thread.name == server.WARM_UP:
            thread.join()


def stored(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder."""
    return tiny_export(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def page(model: Path) -> Iterator[Any]:
    """The demo; a module that needs another one has its own."""
    with pytest.MonkeyPatch.context() as patch, running(model, patch) as served:
        yield served


@pytest.fixture(scope="module")
def client(page: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """gradio's own, of the page."""
    from gradio_client import Client

    return Client(page.local_url, download_files=str(tmp_path_factory.mktemp("downloads")), verbose=False)


@pytest.fixture
def web(page: Any) -> Iterator[Any]:
    """Requests to the page, past any proxy."""
    import httpx

    with httpx.Client(base_url=page.local_url, timeout=30, trust_env=False) as session:
        yield session


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A small picture, whose name has a space."""
    from conftest import textured

    Image.fromarray(textured(61, 45, 1)).save(tmp_path / "my photo.png")
    return tmp_path / "my photo.png"
