"""Jobs that end when nobody waits for them any more, and that say how far they are on one bar."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import gradio as gr
from gradio.context import LocalContext
from gradio.helpers import TrackedIterable

# An endpoint's events on the page; page.js and `Desk.connect` know them too.
KINDS = ("live", "pressed", "full")
MODULE_CALL = "_call_impl"  # of torch.nn.Module: what every call of one goes through
ALONE = ("decode",)  # tabs' second parts, which follow no picture

_stopped: WeakSet[Any] = WeakSet()  # events whose visitor pressed Stop
_here = threading.local()  # .event: what this thread computes for


class Stopped(Exception):
    """Nobody waits for this job: `asked` if its visitor pressed Stop."""

    def __init__(self, asked: bool) -> None:
        super().__init__()
        self.asked = asked


def stoppable(results: Iterator[Any]) -> Iterator[Any]:
    """The same results, computed only while somebody waits for them.

    Raises:
        Stopped: the page was closed, Stop was pressed, or the same visitor asked for something else.
    """
    blocks, name = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
    queue = None if blocks is None else blocks._queue  # which is false where nothing waits
    event = None if queue is None else queue.event_ids_to_events.get(name or "")
    while True:
        # not held over a yield: another thread may go on from there
        with _watched(queue, event):
            try:
                result = next(results)
            except StopIteration:
                return
        yield result


@contextmanager
def _watched(queue: Any, event: Any) -> Iterator[None]:
    """Have every module that is called in this thread ask first whether the event still matters."""

    def ask(frame: Any, kind: str, _: Any) -> None:
        # nowhere else: a lock that is taken must be given back
        if kind == "call" and frame.f_code.co_name == MODULE_CALL:
            _check()

    _here.event, _here.queue = event, queue
    _check()
    before = sys.getprofile()
    # no hook of torch: with one, even a global one, an optimised model runs as stock
    sys.setprofile(ask)
    try:
        yield
    finally:
        sys.setprofile(before)
        _here.event = None


def _check() -> None:
    event = getattr(_here, "event", None)
    if event is None:
        return
    if event in _stopped:
        raise Stopped(asked=True)
    if not event.alive or _is_superseded(event, _here.queue):
        raise Stopped(asked=False)


def _is_superseded(event: Any, queue: Any) -> bool:
    """Whether its visitor has asked for something else since: another picture, tab or option."""
    return _follows(event) and any(
        each.session_hash == event.session_hash and each.enqueue_time > event.enqueue_time and _follows(each)
        for each in list(queue.event_ids_to_events.values())
    )


def _follows(event: Any) -> bool:
    name, _, kind = str(event.fn.api_name).rpartition("_")
    return kind in KINDS and name not in ALONE


def stop(request: gr.Request) -> None:
    """End what is computed for, or awaited by, the visitor who asks."""
    blocks = LocalContext.blocks.get(None)
    for event in list(blocks._queue.event_ids_to_events.values()) if blocks else ():
        if event.session_hash == request.session_hash:
            _stopped.add(event)


def one_bar(queue: Any) -> None:
    """Show a job's progress as one bar from 0 to 1, whatever bars its parts have.

    A handler's `progress((1, 3), "Decoding")` says that the second of three parts begins, and
    `progress(0.2, ...)` that the rest does; bars of tqdm fill the part that they are in.
    """
    show = queue.set_progress
    parts: WeakKeyDictionary[Any, tuple[float, float, str]] = WeakKeyDictionary()  # begin, length, words
    shown: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

    def set_progress(event_id: str, iterables: list[Any] | None) -> None:
        event = queue.event_ids_to_events.get(event_id)
        if event is None or not iterables:
            return
        _check()
        last = iterables[-1]
        share = last.progress if last.progress is not None else (last.index or 0) / (last.length or 1)
        if last._tqdm is None:
            length = 1 / last.length if last.length else 1 - share
            parts[event] = (share, length, last.desc or "")
            share = 0.0
        begin, length, words = parts.get(event, (0.0, 1.0, last.desc or ""))
        # never back: some parts have several bars
        shown[event] = max(shown.get(event, 0.0), min(1.0, begin + length * share))
        show(event_id, [TrackedIterable(None, None, None, words, None, None, shown[event])])

    queue.set_progress = set_progress
