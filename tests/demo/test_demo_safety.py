"""Hostile requests to the demo: each is refused with a message, and the server goes on."""

import asyncio
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import textured
from demo_server import free_port, running, stored
from PIL import Image
from safetensors.torch import save

from latentvae.base.errors import LatentVAEError
from latentvae.codec import container

pytest.importorskip("gradio")
import httpx
from gradio_client import Client, handle_file

SECRET = "never to be seen"


@pytest.fixture(scope="module")
def page(model: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch, running(model, patch, upload_bytes=2 << 20) as served:
        yield served


@pytest.fixture(scope="module")
def good(page: Any) -> dict[str, Any]:
    """A picture that was uploaded."""
    buffer = io.BytesIO()
    Image.fromarray(textured(24, 16, 1)).save(buffer, "PNG")
    answer = httpx.post(
        f"{page.local_url}gradio_api/upload", files={"files": ("good.png", buffer.getvalue())}
    )
    return as_file(answer.json()[0])


@pytest.fixture(autouse=True)
def _alive(web: httpx.Client, good: dict[str, Any]) -> Iterator[None]:
    """After every attack the server still works."""
    yield
    assert "event: complete" in call(web, "reconstruct", [good, "tiny-model", "mode", 0])


def refused(client: Client, file: Path, name: str = "/reconstruct") -> str:
    """The message with which an upload is refused."""
    options = ("mode", 0) if name == "/reconstruct" else ()
    with pytest.raises(Exception) as caught:  # noqa: PT011  # of gradio's, by version
        client.predict(handle_file(file), "tiny-model", *options, api_name=name)
    message = str(caught.value)
    assert "Traceback" not in message
    assert str(file.parent) not in message
    assert "latentvae-demo-" not in message, message  # where the server keeps files
    return message


def white_png(width: int, height: int) -> bytes:
    """A whole PNG of one bit a pixel: hundreds of megabytes of rows in about one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + -(-width // 8)) * height), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header(client: Client, tmp_path: Path) -> None:
    data = white_png(50_000, 50_000)
    assert 0.9e6 < len(data) < 1.5e6
    (tmp_path / "bomb.png").write_bytes(data)
    assert "50000 x 50000" in refused(client, tmp_path / "bomb.png")


def test_a_long_animation_is_refused(client: Client, tmp_path: Path) -> None:
    screen = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)  # two colours, both black
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    (tmp_path / "long.gif").write_bytes(screen + 10_000 * frame + b";")
    assert Image.open(tmp_path / "long.gif").size == (1, 1)
    assert "10000 frames" in refused(client, tmp_path / "long.gif")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.png", b"I am no picture" * 10, "no image by its content"),
        (
            "drawing.svg",
            b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
            "an SVG drawing, which is not read",
        ),
        ("empty.png", b"", "empty"),
        ("script.html", b"<script>alert(1)</script>", "no image by its content"),
    ],
)
def test_what_is_no_image_is_refused(
    client: Client, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in refused(client, tmp_path / name)


def test_a_cut_off_jpeg_is_refused(client: Client, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(textured(200, 200, 1)).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    assert "truncated" in refused(client, tmp_path / "cut.jpg")


def test_files_with_lying_lengths_are_refused(client: Client, tmp_path: Path) -> None:
    Image.fromarray(textured(40, 32, 1)).save(tmp_path / "a.png")
    *_, file = client.predict(handle_file(tmp_path / "a.png"), "tiny-model", 50, api_name="/compress")
    data = Path(file).read_bytes()

    def lie(offset: int, value: int) -> bytes:
        changed = bytearray(data)
        struct.pack_into("<I", changed, offset, value)
        return bytes(changed[:-4]) + struct.pack("<I", zlib.crc32(bytes(changed[:-4])))

    lies = {
        "length.lvae": (lie(26 - 1, 2**31 - 1), "header says"),
        "width.lvae": (lie(13, 2**30), "px"),
        "cut.lvae": (data[:20], "cut off"),
        "longer.lvae": (data + b"x" * 100, "header says"),
        "empty.lvae": (b"", "safetensors"),
    }
    for name, (content, words) in lies.items():
        (tmp_path / name).write_bytes(content)
        message = refused(client, tmp_path / name, "/decode")
        assert words in message, (name, message)


def test_latents_that_lie_are_refused(client: Client, tmp_path: Path) -> None:
    good = {"latents": torch.zeros(1, 4, 2, 2)}
    lies = {
        "none": (save({"other": torch.zeros(2)}), "no latents"),
        "channels": (save({"latents": torch.zeros(1, 9, 2, 2)}), "choose the model"),
        "nan": (save({"latents": torch.full((1, 4, 2, 2), float("nan"))}), "NaN"),
        "padding": (save({**good, "padding": torch.tensor([0, 0, 0, 0, 999, 16])}), "padding"),
        "negative": (save({**good, "padding": torch.tensor([-8, 0, 8, 0, 16, 16])}), "padding"),
        "header": (struct.pack("<Q", 2**62) + b"{}", "no whole safetensors"),
    }
    for name, (content, words) in lies.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        message = refused(client, tmp_path / f"{name}.safetensors", "/decode")
        assert words in message, (name, message)
    Image.fromarray(textured(48, 40, 1)).save(tmp_path / "photo.png")
    photo = (tmp_path / "photo.png").rename(tmp_path / "photo.lvae")
    assert "no .lvae file by its content" in refused(client, photo, "/decode")


def test_latents_of_too_many_pixels_are_refused(client: Client, tmp_path: Path) -> None:
    many = torch.zeros(1, 4, 256, 1040, dtype=torch.float8_e5m2)  # 2080 x 8320 pixels in 1 MB
    (tmp_path / "many.safetensors").write_bytes(save({"latents": many}))
    assert "own machine" in refused(client, tmp_path / "many.safetensors", "/decode")


def test_too_large_an_upload_is_refused(web: httpx.Client) -> None:
    answer = web.post("/gradio_api/upload", files={"files": ("big.png", bytes((2 << 20) + 1000))})
    assert answer.status_code == 413
    answer = web.post("/gradio_api/upload", files={"files": ("bigger.png", bytes(5 << 20))})
    assert answer.status_code == 413


def call(web: httpx.Client, name: str, data: list[Any]) -> str:
    """Ask an endpoint by plain HTTP; returns its events as text."""
    answer = web.post(f"/gradio_api/call/{name}", json={"data": data})
    if answer.status_code != 200:
        return answer.text
    with web.stream("GET", f"/gradio_api/call/{name}/{answer.json()['event_id']}") as events:
        return "".join(events.iter_text())


def as_file(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text(SECRET)
    Image.fromarray(textured(24, 16, 1)).save(tmp_path / "secret.png")
    return tmp_path / "secret.txt"


def test_files_of_the_server_are_no_inputs(web: httpx.Client, page: Any, secret: Path) -> None:
    asset = Path(__file__).parents[2] / "latentvae" / "models" / "assets" / "chelsea.png"
    paths = [secret.with_suffix(".png"), asset, page.files / ".." / ".." / "x.png", Path("/etc/passwd")]
    for path in paths:
        said = call(web, "reconstruct", [as_file(str(path)), "tiny-model", "mode", 0])
        assert "event: error" in said
        assert "Only uploaded files" in said
        assert str(path) not in said
    said = call(web, "odd", [[{"image": as_file(str(asset))}] * 6, "tiny-model"])
    assert "Only uploaded files" in said
    said = call(web, "decode", [as_file("/etc/passwd"), "tiny-model"])
    assert "Only uploaded files" in said


def test_addresses_are_never_opened(
    web: httpx.Client, client: Client, page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradio import processing_utils, route_utils

    opened: list[str] = []

    async def fetch(url: str, *_: Any, **__: Any) -> Any:
        opened.append(str(url))
        raise AssertionError("fetched")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
    monkeypatch.setattr(processing_utils, "async_ssrf_protected_get", fetch)
    monkeypatch.setattr(route_utils, "secure_url_stream_response", fetch, raising=False)
    for url in (
        "http://127.0.0.1:1/a.png",
        "https://example.invalid/a.png",
        "HTTP://example.invalid/a",
        "ftp://a/b",
    ):
        said = call(web, "reconstruct", [as_file(url, url=url), "tiny-model", "mode", 0])
        assert "Only uploaded files" in said, said
        said = call(
            web, "reconstruct", [{"url": url, "meta": {"_type": "gradio.FileData"}}, "tiny-model", "mode", 0]
        )
        assert "event: error" in said
    data = "data:image/png;base64,iVBORw0KGgo="
    said = call(web, "reconstruct", [{"path": None, "url": data}, "tiny-model", "mode", 0])
    assert "Only uploaded files" in said
    for path in (
        "file=https://example.invalid/x",
        "file=http%3A%2F%2Fexample.invalid%2Fx",
        "proxy=https://hf.space/x",
    ):
        assert web.get(f"/gradio_api/{path}").status_code == 403
    assert opened == []


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../../../../../etc/passwd",
        "..%2f..%2f..%2f..%2fetc/passwd",
        "%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "....//....//etc/passwd",
        "{secret}",
        "{files}/../../../../../../etc/passwd",
        "{files}/../../..{secret}",
        "{package}/cli.py",
        "~/.bashrc",
        "\\\\server\\share\\x",
        "/proc/self/environ",
    ],
)
def test_the_file_endpoint_gives_no_files_of_the_server(
    web: httpx.Client, page: Any, secret: Path, path: str
) -> None:
    package = Path(__file__).parents[2] / "latentvae"
    filled = path.format(secret=secret, files=page.files, package=package)
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/svelte/"):
        answer = web.get(route + filled)
        assert answer.status_code in (403, 404), (route, answer.status_code)
        assert SECRET not in answer.text
        assert "root:" not in answer.text


def test_names_that_lead_elsewhere_stay_in_the_folder(web: httpx.Client, page: Any) -> None:
    buffer = io.BytesIO()
    Image.fromarray(textured(24, 16, 1)).save(buffer, "PNG")
    names = (
        "../../../../tmp/escaped-demo.png",
        "/tmp/escaped-demo.png",
        "..\\..\\escaped.png",
        "a\x00b.png",
        "x" * 400,
    )
    for name in names:
        answer = web.post("/gradio_api/upload", files={"files": (name, buffer.getvalue())})
        if answer.status_code == 200:
            (path,) = answer.json()
            assert Path(path).resolve().is_relative_to(page.files.resolve())
    assert not Path("/tmp/escaped-demo.png").exists()


def test_routes_that_serve_no_purpose_are_closed(web: httpx.Client) -> None:
    for path in (
        "monitoring",
        "gradio_api/vibe-code/",
        "gradio_api/deep_link",
        "gradio_api/custom_component/a/b/c/d",
    ):
        assert web.get(f"/{path}").status_code in (403, 404), path
    assert web.post("/gradio_api/component_server", json={}).status_code == 403
    assert web.post("/gradio_api/run/reconstruct", json={"data": []}).status_code in (403, 404)


def test_another_site_cannot_use_it(web: httpx.Client) -> None:
    answer = web.post(
        "/gradio_api/call/reconstruct",
        json={"data": [None, "tiny-model", "mode", 0]},
        headers={"Origin": "https://elsewhere.invalid"},
    )
    assert answer.headers.get("access-control-allow-origin") != "https://elsewhere.invalid"
    answer = web.get("/config", headers={"Origin": "null"})
    assert answer.headers.get("access-control-allow-origin") != "null"


def test_values_beyond_the_choices_are_refused(client: Client, tmp_path: Path) -> None:
    Image.fromarray(textured(24, 16, 1)).save(tmp_path / "a.png")
    file = handle_file(tmp_path / "a.png")
    for name, values in (
        ("/reconstruct", ("/etc/passwd", "mode", 0)),
        ("/reconstruct", ("tiny-model", "other", 0)),
        ("/reconstruct", ("tiny-model", "sample", "x")),
        ("/compress", ("tiny-model", 1e9)),
        ("/vary", ("tiny-model", float("1e30"), 10**9, 0)),
        ("/vary", ("tiny-model", -1, 1, 0)),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            client.predict(file, *values, api_name=name)
        assert "Traceback" not in str(caught.value)
        assert str(caught.value).strip()


def test_nothing_is_written_outside_the_folder(page: Any) -> None:
    assert json.dumps([str(file) for file in stored(page.files.parent)]).count("latentvae-demo-") > 0
    assert all(file.is_relative_to(page.files) for file in stored(page.files.parent))


def test_runs_are_not_kept_anywhere(web: httpx.Client) -> None:
    for path in ("/run-history/buckets", "/run-history/records", "/runs", "/runs/"):
        assert web.get(f"/gradio_api{path}").status_code == 403, path
        assert web.get(path).status_code == 403, path
    assert web.post("/gradio_api/run-history/connect", json={}).status_code == 403


def test_a_body_that_does_not_say_its_length_is_counted(web: httpx.Client) -> None:
    megabytes = (b" " * 2**20 for _ in range(16))  # 3 are taken here
    headers = {"content-type": "application/json"}
    status = None
    with suppress(httpx.TransportError):  # cut off while it was sending
        status = web.post("/gradio_api/queue/join", content=megabytes, headers=headers).status_code
    assert status in (413, None)


def test_another_name_for_this_machine_is_refused(web: httpx.Client) -> None:
    assert web.get("/config", headers={"host": "rebound.example"}).status_code == 400


def test_a_full_folder_takes_no_more(page: Any, tmp_path: Path) -> None:
    from latentvae.demo.guard import Gate, stored_bytes

    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(bytes(100))
    assert stored_bytes(tmp_path) == 100
    reached = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def ask(most: int) -> list[int]:
        answers: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            answers.append(message)

        scope = {"type": "http", "path": "/gradio_api/upload", "headers": []}
        await Gate(app, 1000, tmp_path, most)(scope, receive, send)
        return [each["status"] for each in answers if each["type"] == "http.response.start"]

    assert asyncio.run(ask(99)) == [507]
    assert not reached
    assert asyncio.run(ask(100)) == []
    assert reached == ["/gradio_api/upload"]


def test_a_body_is_cut_off_where_it_is_too_large(tmp_path: Path) -> None:
    from latentvae.demo.guard import Gate

    read = bytearray()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RuntimeError("cut off")
            read.extend(message["body"])

    async def ask() -> list[int]:
        answers: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": bytes(400), "more_body": True}

        async def send(message: Any) -> None:
            answers.append(message)

        await Gate(app, 1000, tmp_path, 1)({"type": "http", "path": "/queue", "headers": []}, receive, send)
        return [each["status"] for each in answers if each["type"] == "http.response.start"]

    assert asyncio.run(ask()) == [413]
    assert len(read) == 800


def test_long_names_are_cut_and_say_nothing_of_the_server(client: Client, tmp_path: Path) -> None:
    for name in ("a" * 200, "b" * 200):
        Image.fromarray(textured(64, 64, 0)).save(tmp_path / f"{name}.png")
    files = [handle_file(tmp_path / f"{name * 200}.png") for name in "ab"]
    animation, *_ = client.predict(*files, "tiny-model", 3, "linear", api_name="/interpolate")
    place = animation["path"] if isinstance(animation, dict) else animation
    assert Path(place).suffix == ".webp"
    assert len(Path(place).name.encode()) < 255


@pytest.mark.parametrize("values", [torch.full((6,), torch.nan), torch.full((6,), torch.inf), torch.zeros(5)])
def test_padding_that_is_no_numbers_is_named(values: torch.Tensor) -> None:
    from latentvae.demo.latents_file import _padding

    with pytest.raises(LatentVAEError, match="padding that does not fit"):
        _padding({"padding": values}, "a.safetensors", 8, 8)


@pytest.mark.slow
def test_a_stopped_server_leaves_no_files(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "LATENTVAE_LPIPS": "."}
    command = [sys.executable, "-m", "latentvae", "demo", "--port", str(free_port())]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert "latentvae demo on" in server.stdout.readline()
        assert list(tmp_path.glob("latentvae-demo-*"))
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert not list(tmp_path.glob("latentvae-demo-*"))


def test_a_line_of_pixels_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "line.png").write_bytes(white_png(2_000_000, 8))
    assert "2000000 x 8 pixels; up to 16383 a side" in refused(client, tmp_path / "line.png")
    for right, name in ((0, "wide.lvae"), (7, "padded.lvae")):
        header = container.Header(bytes(8), 2_000_000 - right, 8, right, 0, 3, 50, (0.1,) * 4)
        (tmp_path / name).write_bytes(container.pack(header, bytes(8)))
        assert "up to 16383 a side" in refused(client, tmp_path / name, "/decode")
    tensors = {"latents": torch.zeros(1, 4, 1, 16_000)}
    (tmp_path / "long.safetensors").write_bytes(save(tensors))
    assert "up to 16383 a side" in refused(client, tmp_path / "long.safetensors", "/decode")


def test_inputs_as_large_as_uploads_are_refused(web: httpx.Client, good: dict[str, Any]) -> None:
    assert "too large" in call(web, "reconstruct", [good, "a" * (6 << 20), "mode", 0])
