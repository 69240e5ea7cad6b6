"""Defects painted for the benchmarks: local, repeatable, and of every kind."""

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import textured
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from defects import KINDS, LARGEST, damage


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_changes_one_place_and_comes_back_with_its_seed(kind: str) -> None:
    photo, other = (Image.fromarray(textured(192, 192, seed)) for seed in (0, 1))
    before = np.asarray(photo).astype(int)
    after = np.asarray(damage(photo, other, kind, 3)).astype(int)
    changed = np.abs(after - before).max(-1) > 0
    assert 20 < changed.sum() < (LARGEST + 12) ** 2
    if kind != "scratch":
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert max(np.ptp(rows), np.ptp(columns)) <= LARGEST + 12  # with its faded edge
    assert (np.asarray(damage(photo, other, kind, 3)) == after).all()
    assert (np.asarray(damage(photo, other, kind, 4)) != after).any()
