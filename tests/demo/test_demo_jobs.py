"""Jobs end when nobody waits for them, and show how far they are on one bar."""

import contextvars
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import textured
from demo_server import running, tiny_export
from PIL import Image

pytest.importorskip("gradio")
import gradio as gr
import httpx
from gradio.context import LocalContext
from gradio.helpers import TrackedIterable

PATIENCE = 60  # seconds: a busy machine is no failure


class Event:
    """What of gradio's event counts."""

    def __init__(self, name: str, visitor: str, time: float) -> None:
        self.fn = SimpleNamespace(api_name=name)
        self.session_hash, self.enqueue_time, self.alive = visitor, time, True


def run_as(event: Event, others: list[Event], meanwhile: Callable[[Any], Any]) -> list[str]:
    """The results that a handler gives which calls a module before each, for an event in a queue."""
    from latentvae.demo.on_page import on_page

    events = {str(number): each for number, each in enumerate([event, *others])}
    blocks: Any = SimpleNamespace(_queue=SimpleNamespace(event_ids_to_events=events))
    layer = torch.nn.Identity()

    def handler(photo: str) -> Iterator[tuple[str]]:
        for result in ("first", "second", "third"):
            if result == "second":
                meanwhile(events)
            layer(torch.zeros(1))
            yield (result,)

    def call() -> list[str]:
        LocalContext.blocks.set(blocks)
        LocalContext.event_id.set("0")
        return [
            str(each[1].value) if isinstance(each[1], gr.HTML) and each[1].value else str(each[3])
            for each in on_page(handler, 1, [None])(None, "a.png")
        ]

    return contextvars.copy_context().run(call)


SKIPPED = str(gr.skip())


@pytest.mark.parametrize(
    ("name", "visitor", "ends"),
    [
        ("compare_live", "me", True),
        ("reconstruct_pressed", "me", True),
        ("reconstruct_live", "another", False),
        ("decode_live", "me", False),  # a file beside the picture
        ("brush", "me", False),
    ],
)
def test_a_visitors_next_job_ends_the_one_before(name: str, visitor: str, ends: bool) -> None:
    event = Event("reconstruct_live", "me", 1.0)
    found = run_as(event, [], lambda events: events.update(x=Event(name, visitor, 2.0)))
    assert found == (["first", SKIPPED] if ends else ["first", "second", "third"])
    # and not the other way round
    assert run_as(event, [Event(name, visitor, 0.5)], lambda _: None) == ["first", "second", "third"]


def test_stop_and_a_closed_page_end_a_job_in_the_middle() -> None:
    from latentvae.demo import jobs

    mine = Event("reconstruct_live", "me", 1.0)
    request: Any = SimpleNamespace(session_hash="me")
    said = run_as(mine, [], lambda _: jobs.stop(request))
    assert said == ["first", '<p role="status" class="lv-stopped">Stopped.</p>']
    others = Event("reconstruct_live", "another", 1.0)
    assert run_as(others, [], lambda _: jobs.stop(request)) == ["first", "second", "third"]
    closed = Event("reconstruct_live", "me", 1.0)
    assert run_as(closed, [], lambda _: setattr(closed, "alive", False)) == ["first", SKIPPED]
    # whatever became of the job, nothing is watched any more
    assert sys.getprofile() is None


def test_a_watched_model_runs_as_optimised(tmp_path: Path) -> None:
    from latentvae.demo.jobs import _watched
    from latentvae.models.loading import load
    from latentvae.runtime.optimize import optimize
    from latentvae.runtime.plain import attachment

    vae = optimize(load(tiny_export(tmp_path)))
    with _watched(None, None):
        assert all(
            attachment(module) is None for module in vae.modules() if isinstance(module, torch.nn.Conv2d)
        )


def test_a_page_that_is_closed_frees_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentvae.demo import one_model

    begun, ended = threading.Event(), threading.Event()

    def forever(*_: Any) -> None:
        begun.set()
        try:
            while True:
                torch.nn.Identity()(torch.zeros(1))
                time.sleep(0.01)
        finally:
            ended.set()

    Image.fromarray(textured(40, 40, 1)).save(tmp_path / "a.png")
    with running(tiny_export(tmp_path), monkeypatch) as page:
        for thread in threading.enumerate():
            if thread.name == "warm-up":
                thread.join(PATIENCE)
        monkeypatch.setattr(one_model, "decode", forever)
        (number,) = [key for key, fn in page.fns.items() if fn.api_name == "reconstruct_live"]
        with httpx.Client(base_url=f"{page.local_url}gradio_api", timeout=PATIENCE, trust_env=False) as web:
            files = {"files": ("a.png", (tmp_path / "a.png").read_bytes())}
            photo = {"path": web.post("/upload", files=files).json()[0], "meta": {"_type": "gradio.FileData"}}
            body = {"data": [None, photo, "tiny-model", "mode", 0], "fn_index": number, "session_hash": "s"}
            assert web.post("/queue/join", json=body).status_code == 200
            with web.stream("GET", "/queue/data", params={"session_hash": "s"}) as messages:
                parts = messages.iter_text()  # named, or the stream would close at once
                next(parts)
                assert begun.wait(PATIENCE)
                assert not ended.is_set()
            assert ended.wait(PATIENCE)  # or the next visitor would wait behind it


def test_one_bar_goes_from_0_to_1_over_all_parts() -> None:
    from latentvae.demo.jobs import one_bar

    shown: list[tuple[str, float]] = []
    queue: Any = SimpleNamespace(
        event_ids_to_events={"0": Event("reconstruct", "me", 1.0)},
        set_progress=lambda _, units: shown.append((units[0].desc, round(units[0].progress, 3))),
    )
    one_bar(queue)
    bar: Any = object()

    def tell(
        index: float | None, length: float | None, words: str, progress: float | None, tqdm: Any
    ) -> None:
        queue.set_progress("0", [TrackedIterable(None, index, length, words, "", tqdm, progress)])

    tell(0, 2, "Encoding", None, None)
    tell(5, 10, "encode: TFLOP", None, bar)
    tell(2, 10, "again", None, bar)  # a second bar in the same part
    tell(1, 2, "Decoding", None, None)
    tell(3, 4, "decode: TFLOP", None, bar)
    tell(None, None, "Measuring", 0.9, None)
    tell(1, 2, "", None, bar)
    assert shown == [
        ("Encoding", 0.0),
        ("Encoding", 0.25),
        ("Encoding", 0.25),
        ("Decoding", 0.5),
        ("Decoding", 0.875),
        ("Measuring", 0.9),
        ("Measuring", 0.95),
    ]
    queue.set_progress("no such job", [])
