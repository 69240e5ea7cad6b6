"""What validations say: lines, the summary at the end, early stopping, and how many images are held out."""

import json
from pathlib import Path

import pytest

from latentvae.training.progress import Point, line, read_points, split_line, stalled, summary

RISING = [Point(step, 20 + step / 100, 0.5 - step / 1000) for step in (100, 200, 300, 400)]
FLAT = [*RISING[:2], *(Point(step, 22.01, 0.301) for step in (300, 400))]


def test_a_validation_is_a_line_with_what_changed() -> None:
    assert line(RISING[:1]) == "step 100: PSNR 21.00 dB, LPIPS 0.400 on held-out images"
    assert line(RISING[:2]).endswith("PSNR 22.00 dB (+1.00), LPIPS 0.300 (-0.100) on held-out images")
    without = [point._replace(lpips=None) for point in RISING]
    assert line(without) == "step 400: PSNR 24.00 dB (+1.00) on held-out images"


def test_the_summary_says_whether_more_steps_would_help() -> None:
    assert summary(RISING) == (
        "Validation: 24.00 dB, LPIPS 0.100. Since step 300: PSNR +1.00 dB, LPIPS -0.100; still improving: "
        "more steps (train.max_steps, with --resume latest) would help."
    )
    assert "more steps (this stage's `steps`) would help" in summary(RISING, in_stage=True)
    assert "no longer improving" in summary(FLAT)
    assert "Too few validations" in summary(RISING[:1])
    worse = [*RISING, Point(500, 23, 0.2)]
    assert "23.00 dB, LPIPS 0.200 (best: 24.00 dB at step 400)" in summary(worse)
    assert summary([]) == "No validation gave a finite figure."


def test_a_run_is_stalled_when_nothing_better_came_for_so_long() -> None:
    assert not stalled(RISING, 2)
    assert stalled(FLAT, 2)
    assert not stalled(FLAT, 3)
    assert not stalled(FLAT[:2], 2)  # nothing before to compare with
    assert stalled([point._replace(lpips=None) for point in FLAT], 2)


def test_points_are_read_from_the_record(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "total": 3.0},
        {"step": 2, "val_psnr": 20.5, "val_lpips": None},
        {"step": 3, "val_psnr": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_points(tmp_path / "metrics.jsonl") == [Point(2, 20.5, None)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            (44, 4, False, 24),
            "44 images to train on, 4 held out for validation; data.val_images=24, at most a tenth",
        ),
        (
            (12, 2, False, 8),
            "12 images to train on, 2 held out for validation; data.val_images=8, of fewer than twenty "
            "at most two",
        ),
        ((976, 24, False, 24), "976 images to train on, 24 held out for validation (data.val_images)"),
        ((48, 9, True, 24), "48 images to train on, 9 of data.val to validate on"),
    ],
)
def test_what_is_held_out_is_said(arguments: tuple[int, int, bool, int], said: str) -> None:
    assert split_line(*arguments) == said
