"""The picture of a run's curves."""

import json
from pathlib import Path

import pytest

from latentvae.training.record import PANELS, draw_curves


@pytest.mark.parametrize("steps", [3, 40])
def test_curves_of_short_and_long_runs_are_named(
    steps: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    names = next(names for _, names in PANELS if len(names) > 1)
    records = [{"step": step, **dict.fromkeys(names, 1.0 + step)} for step in range(steps)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert draw_curves(metrics, tmp_path / "curves.png") is not None
    assert not [str(each.message) for each in recwarn.list]  # "No artists with labels found"


def test_what_is_told_to_be_watched_is_drawn() -> None:
    shown = {name for _, names in PANELS for name in names}
    aligned, distilled = {"align_cosine", "align_distance"}, {"distil_loss", "latent_r2", "val_r2"}
    assert aligned | distilled | {"logits_real", "logits_fake", "g_loss", "d_loss"} <= shown
