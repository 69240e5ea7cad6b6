"""Processes that a launcher has numbered."""

import pytest

from latentvae.base.errors import LatentVAEError
from latentvae.runtime.processes import Processes


def test_one_process_shares_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = Processes()
    assert alone.is_main
    assert alone.share({"a": 1}) == [{"a": 1}]
    alone.share_same("images", ["a"])
    alone.fail(ValueError("no"))


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
