"""Many clients at once: each is answered or politely refused, and nothing is left behind."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import textured
from demo_server import free_port, stored, tiny_export
from PIL import Image

pytest.importorskip("gradio")
import httpx
from gradio_client import Client, handle_file

CLIENTS, REQUESTS = 32, 10
MEMORY = 300e6  # bytes that the server may have more than before
KEEP, SWEEP = 40, 2  # seconds: files must outlive the queue

PROGRAM = """
import sys
from latentvae.demo.guard import Limits
from latentvae.demo.server import serve
serve([sys.argv[1]], port=int(sys.argv[2]), limits=Limits(keep_seconds={keep}, sweep_seconds={sweep}))
"""


@dataclass(frozen=True)
class Server:
    """One in a process of its own."""

    url: str
    process: psutil.Process
    folder: Path

    def memory(self) -> int:
        return int(self.process.memory_info().rss)


@pytest.mark.slow
def test_the_page_is_laid_out_before_pytorch_is_there() -> None:
    program = "import sys, latentvae.demo.server; print([*{'torch', 'diffusers'} & set(sys.modules)])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    model, port, temporary = tiny_export(tmp_path), free_port(), tmp_path / "tmp"
    temporary.mkdir()
    program = PROGRAM.format(keep=KEEP, sweep=SWEEP)
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log.txt").open("wb")
    with subprocess.Popen(
        [sys.executable, "-c", program, str(model), str(port)], env=environment, stdout=log, stderr=log
    ) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(url, process, tmp_path / "log.txt")
            yield Server(url, psutil.Process(process.pid), temporary)
        finally:
            process.terminate()
            process.wait(30)
            log.close()


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(480):
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.25)
    raise AssertionError(f"the server did not start: {log.read_text()}")


def ask(url: str, photo: bytes, number: int) -> str:
    """One request by plain HTTP: "answered", "refused", or what else came."""
    with httpx.Client(base_url=url, timeout=120) as web:
        files = {"files": (f"photo{number}.png", photo)}
        (path,) = web.post("/gradio_api/upload", files=files).json()
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "tiny-model", "mode", number]
        answer = web.post("/gradio_api/call/reconstruct", json={"data": data})
        if answer.status_code == 503:
            return "refused" if "Queue is full" in answer.text else answer.text
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text}"
        event = answer.json()["event_id"]
        with web.stream("GET", f"/gradio_api/call/reconstruct/{event}") as events:
            text = "".join(events.iter_text())
        return "answered" if "event: complete" in text else text


@pytest.mark.slow
def test_32_clients_with_10_requests_each(server: Server, tmp_path: Path) -> None:
    place = tmp_path / "photo.png"
    Image.fromarray(textured(64, 48, 1)).save(place)
    photo = place.read_bytes()
    files = set(server.folder.rglob("*"))  # those of the page itself, and their folders
    assert ask(server.url, photo, 0) == "answered"
    before = server.memory()

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = Counter(
            pool.map(lambda number: ask(server.url, photo, number), range(CLIENTS * REQUESTS), chunksize=1)
        )
    assert found.total() == CLIENTS * REQUESTS
    assert found.keys() <= {"answered", "refused"}, found
    assert found["answered"] >= 24  # at least what fits into the queue
    assert ask(server.url, photo, 1) == "answered"

    time.sleep(KEEP + 3 * SWEEP)
    left = set(server.folder.rglob("*")) - files
    assert not left, sorted(left)[:5]
    grown = server.memory() - before
    print(f"{dict(found)}, memory {grown / 1e6:+.0f} MB")
    assert grown < MEMORY
    client = Client(server.url, download_files=str(tmp_path / "downloads"), verbose=False)
    result = client.predict(handle_file(place), "tiny-model", "mode", 0, api_name="/reconstruct")
    assert result[4]["width"] == 64


@pytest.mark.slow
def test_the_folder_goes_with_the_server(server: Server, tmp_path: Path) -> None:
    assert stored(server.folder)
    server.process.send_signal(2)  # Ctrl-C
    server.process.wait(30)
    assert stored(server.folder) == []
    assert not list(server.folder.glob("latentvae-demo-*"))
