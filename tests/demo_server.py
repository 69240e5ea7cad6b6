"""A demo on a tiny model, in this process, for tests: server, client, and files as uploads."""

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import latentvae
from latentvae.models.exporting import export


def free_port() -> int:
    """One that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tiny_export(folder: Path) -> Path:
    """An untrained tiny model, exported."""
    torch.manual_seed(0)
    return export(latentvae.build("tiny"), folder / "tiny-model")


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
    from latentvae.demo import loaded_models, server
    from latentvae.demo.guard import Limits

    patch.setattr(loaded_models, "bundled", list)
    # as measured it is not the same on every run
    patch.setattr(loaded_models, "_is_faster", lambda *_: False)
    patch.setenv("LATENTVAE_LPIPS", str(model))  # a folder without its weights
    patch.setattr(torch.hub, "get_dir", lambda: str(model / "no-hub"))
    with server.workplace() as files:
        page = server.start([model, *peers], host, free_port(), limits=Limits(**options), mcp=mcp)
        page.files = files
        try:
            yield page
        finally:
            page.close()
            for thread in threading.enumerate():  # or it would write where the folder was
                if thread.name == server.WARM_UP:
                    thread.join()


def stored(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names]
