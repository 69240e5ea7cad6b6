"""What validations say to people: a line each, at the end a summary, and when to stop early.

All of it is read from metrics.jsonl, so a run that was resumed speaks of its earlier parts too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from latentvae.training.record import read_records

# by how much a figure must change to count; less is the noise of which crops came last
NOTICED = {"psnr": 0.05, "lpips": 0.002}


class Point(NamedTuple):
    """The means of one validation."""

    step: int
    psnr: float  # dB, higher is better
    lpips: float | None  # lower is better; None where it was not measured

    def value(self, figure: str) -> float:
        """A figure, so that higher is better."""
        return self.psnr if figure == "psnr" else -(self.lpips or 0.0)


def read_points(metrics: Path) -> list[Point]:
    """The validations of a metrics.jsonl, in their order, less those whose PSNR was infinite."""
    found = [record for record in read_records(metrics) if record.get("val_psnr") is not None]
    return [Point(record["step"], record["val_psnr"], record.get("val_lpips")) for record in found]


def line(points: Sequence[Point]) -> str:
    """The last validation in a line, and what changed since the one before."""
    last, before = points[-1], points[-2] if len(points) > 1 else None
    figures = [f"PSNR {last.psnr:.2f} dB" + (f" ({last.psnr - before.psnr:+.2f})" if before else "")]
    if last.lpips is not None:
        known = before is not None and before.lpips is not None
        change = f" ({last.lpips - (before.lpips or 0.0):+.3f})" if before is not None and known else ""
        figures.append(f"LPIPS {last.lpips:.3f}{change}")
    return f"step {last.step}: {', '.join(figures)} on held-out images"


def summary(points: Sequence[Point], in_stage: bool = False) -> str:
    """The end's figures in a sentence or two, and whether they were still improving; how to go on then."""
    if not points:
        return "No validation gave a finite figure."
    last = points[-1]
    judged = [name for name in NOTICED if name == "psnr" or last.lpips is not None]
    shown = f"{last.psnr:.2f} dB" + ("" if last.lpips is None else f", LPIPS {last.lpips:.3f}")
    best = max(points, key=lambda point: point.psnr)
    if best.psnr - last.psnr > NOTICED["psnr"]:
        shown += f" (best: {best.psnr:.2f} dB at step {best.step})"
    earlier = [point for point in points if point.step <= 0.75 * last.step]
    if not earlier:
        return f"Validation: {shown}. Too few validations to say whether it still improves."
    before = earlier[-1]
    gained = [name for name in judged if last.value(name) - before.value(name) > NOTICED[name]]
    changes = [f"PSNR {last.psnr - before.psnr:+.2f} dB"]
    if last.lpips is not None and before.lpips is not None:
        changes.append(f"LPIPS {last.lpips - before.lpips:+.3f}")
    way = "this stage's `steps`" if in_stage else "train.max_steps, with --resume latest"
    verdict = (
        f"still improving: more steps ({way}) would help"
        if gained
        else "no longer improving: more steps would bring little"
    )
    return f"Validation: {shown}. Since step {before.step}: {', '.join(changes)}; {verdict}."


def stalled(points: Sequence[Point], patience: int) -> bool:
    """Whether none of the last `patience` validations beats those before: by LPIPS, or else by PSNR."""
    before, recent = points[:-patience], points[-patience:]
    if not before or len(recent) < patience:
        return False
    figure = "psnr" if any(point.lpips is None for point in points) else "lpips"
    best = max(point.value(figure) for point in before)
    return max(point.value(figure) for point in recent) - best <= NOTICED[figure]


def split_line(train: int, held_out: int, own_folder: bool, wanted: int) -> str:
    """How many images are trained on and how many are kept for validation."""
    if own_folder:
        return f"{train} images to train on, {held_out} of data.val to validate on"
    # `hold_out` never takes less than two where it can
    most = "at most a tenth" if 10 * held_out <= train + held_out else "of fewer than twenty at most two"
    capped = f"; data.val_images={wanted}, {most}" if held_out < wanted else " (data.val_images)"
    return f"{train} images to train on, {held_out} held out for validation{capped}"
