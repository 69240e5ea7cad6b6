"""Nobody waits for what the page does for itself, and what a waiting request names is there in its turn."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import textured
from demo_server import running
from PIL import Image

pytest.importorskip("gradio")
import httpx
from gradio.utils import get_upload_folder

PATIENCE = 60  # seconds: a busy machine is no failure


def wait_until(done: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_visitor_comes_before_the_next_turn_of_the_warm_up(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentvae.demo import loaded_models, one_model

    turns: list[str] = []
    begun = threading.Event()

    def trial(*_: Any) -> None:
        turns.append("trial")
        begun.set()
        if len(turns) == 1:  # the visitor comes while the first one runs
            wait_until(lambda: models._visitors)

    monkeypatch.setattr(loaded_models, "bundled", list)
    monkeypatch.setattr(one_model, "_round_trip", trial)
    models = loaded_models.Models([model, model])
    warm_up = threading.Thread(target=models.warm_up)
    warm_up.start()
    assert begun.wait(PATIENCE)
    with models.use("tiny-model"):
        turns.append("visitor")
        time.sleep(0.05)  # time enough for a trial beside it, if there were one
    warm_up.join(PATIENCE)
    assert not warm_up.is_alive()
    assert turns[:3] == ["trial", "visitor", "trial"]


@pytest.mark.parametrize(("times", "faster", "sides"), [(10.0, False, {64}), (0.5, True, {64, 256})])
def test_a_hopeless_precision_is_not_tried_for_long(
    monkeypatch: pytest.MonkeyPatch, times: float, faster: bool, sides: set[int]
) -> None:
    from latentvae.demo import one_model

    now, seen = [0.0], set()

    def trial(seconds: float, side: int) -> None:
        now[0] += seconds
        seen.add(side)

    monkeypatch.setattr(one_model, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(one_model, "_round_trip", trial)
    found: Any = one_model._is_faster
    assert found(times, 1.0, nullcontext) is faster
    assert seen == sides


def test_an_upload_outlives_the_wait_of_its_request(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from latentvae.demo import loaded_models

    Image.fromarray(textured(40, 40, 1)).save(tmp_path / "a.png")
    lend, asked, go = loaded_models.Models.use, threading.Event(), threading.Event()

    @contextmanager
    def use(self: Any, name: str | None) -> Iterator[Any]:
        asked.set()
        assert go.wait(PATIENCE)
        with lend(self, name) as lent:
            yield lent

    with running(model, monkeypatch) as page:
        folder = Path(get_upload_folder())  # pages that have ended may have left theirs a while
        found = [each for each in threading.enumerate() if each.name == "sweeper"]
        (sweeper,) = [each for each in found if each.folder.resolve() == folder.resolve()]
        wait_until(lambda: not [each for each in threading.enumerate() if each.name == "warm-up"])
        monkeypatch.setattr(loaded_models.Models, "use", use)
        with httpx.Client(base_url=page.local_url, timeout=PATIENCE, trust_env=False) as web:
            photo = ("a.png", (tmp_path / "a.png").read_bytes())
            (path,) = web.post("/gradio_api/upload", files={"files": photo}).json()
            data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "tiny-model", "mode", 0]
            event = web.post("/gradio_api/call/reconstruct", json={"data": data}).json()["event_id"]
            try:
                assert asked.wait(PATIENCE)
                sweeper.sweep(time.time() + 1e6)  # as if it had waited for days
            finally:
                go.set()
            answer = web.get(f"/gradio_api/call/reconstruct/{event}").text
    assert "event: complete" in answer, answer
