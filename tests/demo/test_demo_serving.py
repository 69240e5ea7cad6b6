"""Where and how the demo is served: past proxies, on IPv6, to several visitors at once."""

import io
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import textured
from demo_server import free_port, running
from PIL import Image

pytest.importorskip("gradio")
import httpx

PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


@pytest.fixture(scope="module")
def page(model: Path) -> Iterator[Any]:
    """Served while the environment names a proxy that does not answer."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PROXIES:
            patch.setenv(name, f"http://127.0.0.1:{free_port()}")
        with running(model, patch) as served:
            yield served


def ask(web: httpx.Client, name: str, data: list[Any]) -> Any:
    """What an endpoint gives, as JSON."""
    event = web.post(f"/gradio_api/call/{name}", json={"data": data}).json()["event_id"]
    text = web.get(f"/gradio_api/call/{name}/{event}").text
    assert "event: complete" in text, text
    return json.loads(text.rsplit("data: ", 1)[1])


def files_in(value: Any) -> set[str]:
    if isinstance(value, dict):
        found = {value["path"]} if isinstance(value.get("path"), str) else set()
        return found.union(*map(files_in, value.values()))
    return set().union(*map(files_in, value)) if isinstance(value, list) else set()


def test_a_proxy_is_not_asked_for_the_page_itself(web: httpx.Client) -> None:
    assert web.get("/config").status_code == 200  # and so it has started


def test_two_visitors_with_one_picture_get_files_of_their_own(web: httpx.Client, tmp_path: Path) -> None:
    def upload(name: str, seed: int) -> Any:
        Image.fromarray(textured(48, 40, seed)).save(tmp_path / name)
        (path,) = web.post(
            "/gradio_api/upload", files={"files": (name, (tmp_path / name).read_bytes())}
        ).json()
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    photo, other = upload("a.png", 1), upload("b.png", 2)
    group = [{"image": upload(f"{seed}.png", seed), "caption": None} for seed in range(6)]
    requests: dict[str, list[Any]] = {
        "reconstruct": [photo, "tiny-model", "mode", 0],
        "compress": [photo, "tiny-model", 50],
        "interpolate": [photo, other, "tiny-model", 3, "linear"],
        "vary": [photo, "tiny-model", 0, 2, 0],
        "sample": [None, "tiny-model", "standard", "64", 2, 0],
        "odd": [group, "tiny-model"],
    }
    for name, data in requests.items():
        first, second = (files_in(ask(web, name, data)) for _ in range(2))
        assert first, name
        assert not first & second, name


@pytest.mark.parametrize("host", ["::1", "::"])
def test_ipv6_is_served(model: Path, host: str) -> None:
    from latentvae.demo import server

    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with pytest.MonkeyPatch.context() as patch, running(model, patch, host=host) as served:
        where = server.address(served)
        assert where.startswith("http://[::1]:")
        with httpx.Client(base_url=where, timeout=30, trust_env=False) as web:
            assert web.get("/config").status_code == 200
            answer = web.get("/config", headers={"Origin": "https://elsewhere.invalid"})
            assert (answer.status_code == 403) == (host != "::")  # a network's names are not ours to know
            assert web.get("/config", headers={"Origin": where.rstrip("/")}).status_code == 200


def test_the_quota_is_for_strangers() -> None:
    from latentvae.demo.server import default_limits

    assert default_limits("0.0.0.0").stored_bytes == default_limits("::").stored_bytes == 2 * 2**30
    for host in ("127.0.0.1", "localhost", "::1", "[::1]"):
        assert default_limits(host).stored_bytes > 2**50


def test_an_open_page_does_not_hold_the_server_up(model: Path) -> None:
    from latentvae.demo import server

    with (
        pytest.MonkeyPatch.context() as patch,
        running(model, patch) as served,
        httpx.Client(base_url=served.local_url, timeout=30, trust_env=False) as visitor,
        visitor.stream("GET", "/gradio_api/queue/data?session_hash=a"),
        visitor.stream("GET", "/gradio_api/heartbeat/a"),
    ):
        start = time.monotonic()
        server.end(served)
        assert time.monotonic() - start < 2
        served.server.thread.join(30)
        assert not served.server.thread.is_alive()


def test_what_is_said_comes_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads speak: one that serves the page, and one that loads its models."""
    from latentvae.demo import server

    pieces = io.StringIO()
    written: list[str] = []
    monkeypatch.setattr(pieces, "write", written.append)
    monkeypatch.setattr(sys, "stderr", pieces)
    server._say("loading f8c4-small")
    assert [each for each in written if each] == ["latentvae demo: loading f8c4-small\n"]
