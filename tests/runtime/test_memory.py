"""How many batches a CPU works on at once."""

from typing import Any

import pytest
import torch

from latentvae.runtime import memory


def test_batches_at_once_are_one_per_core_as_far_as_memory_goes(
    tiny_vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = memory.ordinary_peak(tiny_vae, 64, 64) / memory.SHARE
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for free, wanted in ((0.5 * each, 1), (2.5 * each, 2), (9 * each, 3)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert memory.batches_at_once(tiny_vae, 64, 64) == wanted
