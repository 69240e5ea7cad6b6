"""`latentvae doctor --speed`: which way of computing a model is the fastest on this CPU."""

from __future__ import annotations

from typing import Any

from latentvae import runtime
from latentvae.base.errors import LatentVAEError
from latentvae.cli.options import tell
from latentvae.cli.session import Session


def tell_speed(session: Session, size: int) -> None:
    """Measure every way for images of size x size pixels, unless that was done before; and list them.

    Raises:
        LatentVAEError: the model is not on a CPU.
    """
    vae = session.load()
    if vae.device.type != "cpu":
        raise LatentVAEError(
            f"--speed compares ways of a CPU, and {vae.device} was chosen: pass --device cpu."
        )
    found = runtime.choosing.speeds(vae, size)
    machine, place = runtime.measurements.machine(), runtime.measurements.place()
    lines = [f"{session.chosen}, {size} x {size} px, fp32, on {machine}"]
    lines += [line for verb, choice in found.items() for line in _lines(verb, choice)]
    lines += ['latentvae.optimize(vae, backend="fastest") computes so.', f"Kept in {place}"]
    tell({"model": session.chosen, "machine": machine, "kept_in": str(place), **found}, lines, session.json)


def _lines(verb: str, choice: dict[str, Any]) -> list[str]:
    """The seconds of every way, and the layers that another kernel computes than usual."""
    usual = choice["seconds"]["usual"]
    lines = [f"{verb}: {choice['way']} (of an image of {choice['timed_side']} x {choice['timed_side']} px)"]
    for way, seconds in choice["seconds"].items():
        lines.append(f"  {way:10}{seconds:9.4f} s, {usual / seconds:.2f} x as fast as usual")
    if choice["way"] == "layers":
        kernels = choice["layers"].items()
        lines += [f"    {name}: {'Winograd' if winograd else 'direct'}" for name, winograd in kernels]
    return lines
