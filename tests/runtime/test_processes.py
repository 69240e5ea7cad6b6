"""Processes that a launcher has numbered."""

import os
import socket
import subprocess
import sys

import pytest
from training_runs import THREADS_LEFT

from latentvae.base.errors import LatentVAEError
from latentvae.runtime.processes import Processes


def test_one_process_shares_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with Processes() as alone:
        assert alone.is_main
        assert alone.share({"a": 1}) == [{"a": 1}]
        alone.share_same("images", ["a"])


def test_environments_that_name_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LatentVAEError, match=r"0 of 2 did not meet the others .*torchrun"):
        Processes()
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(LatentVAEError, match="RANK=2"):
        Processes()
    monkeypatch.setenv("RANK", "none")
    with pytest.raises(LatentVAEError, match="RANK='none'"):
        Processes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_ends_one_ends_the_other_with_its_reason_and_nothing_is_aborted() -> None:
    code = (
        THREADS_LEFT
        + """
from latentvae.base.errors import LatentVAEError
from latentvae.runtime.processes import Processes
try:
    with Processes() as processes:
        import torch.distributed.nn.functional  # as diffusers does; it would keep the group as a default
        if processes.rank == 1:
            raise LatentVAEError("no room")
        processes.share(1)
except LatentVAEError as error:
    raise SystemExit(f"{processes.rank}: {error}")
"""
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **common, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=250)[1].strip() for process in both]
    assert said == ["0: process 1 stopped: no room", "1: no room"]
    assert [process.returncode for process in both] == [1, 1]
