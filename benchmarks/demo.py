"""How long visitors of the demo wait, and what it keeps: `python benchmarks/demo.py [--requests 100]`.

A server in a process of its own, asked over HTTP as its page asks, without a browser's own time: until the
page is up, until the first picture after it, until the first picture after an upload (of 512 px, and of 12
megapixels, of which the page takes a copy and shows a preview first), each bundled model's round trip, memory
before and after many requests of several kinds (neither with `--requests 0`), and how long it takes to end
while a page is open.
"""

import argparse
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from machine import machine
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SMALL, PREVIEW = "first picture, 512 px", "first picture, 12 megapixels: a preview"
COPY = "picture of its copy of 2 megapixels"
WANTED = {"page up": 5.0, SMALL: 2.0, PREVIEW: 4.0, COPY: 4.0, "Ctrl-C": 2.0}


def picture(width: int, height: int, seed: int) -> bytes:
    """A JPEG of smooth noise: neither flat, nor larger than a camera's."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def upload(web: httpx.Client, data: bytes, name: str = "photo.jpg") -> dict[str, Any]:
    """What a call names an upload by."""
    (path,) = web.post("/gradio_api/upload", files={"files": (name, data)}).json()
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def events(web: httpx.Client, name: str, *values: Any) -> Iterator[tuple[str, Any]]:
    """What comes back of a call, as it comes: "generating" is a first part."""
    call = f"/gradio_api/call/{name}"
    number = web.post(call, json={"data": list(values)}).json()["event_id"]
    with web.stream("GET", f"{call}/{number}") as answer:
        kind = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                if kind == "error":
                    raise RuntimeError(f"{name} failed: {line}")
                yield kind, json.loads(line.removeprefix("data: "))


def result(web: httpx.Client, name: str, *values: Any) -> Any:
    """All that comes back."""
    *_, (_, last) = events(web, name, *values)
    return last


def parts(web: httpx.Client, data: bytes, model: str) -> list[float]:
    """Seconds from the upload to each part: of what is large a preview, the reconstruction, its figures."""
    start = time.perf_counter()
    # the page's own event, which takes a copy of what is large
    found = events(web, "reconstruct_pressed", upload(web, data), model, "mode", 0)
    return [time.perf_counter() - start for kind, _ in found if kind == "generating"]


def ask_many(web: httpx.Client, model: str, count: int) -> None:
    """Requests of several kinds and sizes, one after the other."""
    for number in range(count):
        photo = upload(web, picture(256 + 32 * (number % 5), 256, number))
        kinds: tuple[tuple[Any, ...], ...] = (
            ("reconstruct", photo, model, "mode", 0),
            ("compress", photo, model, 50),
            ("compare", photo, model, [".lvae", "JPEG", "WebP", model], 40),
            ("interpolate", photo, photo, model, 3, "linear"),
            ("vary", photo, model, 1, 2, 0),
        )
        result(web, *kinds[number % len(kinds)])


def wait_until_up(url: str, process: "subprocess.Popen[bytes]") -> float:
    """Seconds until the page answers."""
    start = time.perf_counter()
    while process.poll() is None:
        try:
            if httpx.get(url, timeout=60, trust_env=False).status_code == 200:
                return time.perf_counter() - start
        except httpx.ConnectError:
            time.sleep(0.05)
    raise RuntimeError(f"the demo ended with {process.returncode}")


def measure(url: str, process: "subprocess.Popen[bytes]", requests: int) -> Iterator[tuple[str, float]]:
    """What was measured, and seconds or gigabytes of it, as they come; ends the server."""
    yield "page up", wait_until_up(url, process)
    with httpx.Client(base_url=url, timeout=None, trust_env=False) as web:
        config = web.get("/config").json()
        pickers = (
            each["props"] for each in config["components"] if each["props"].get("elem_id") == "lv-model"
        )
        models = [name for name, _ in next(pickers)["choices"]]
        small, large = picture(512, 512, 1), picture(4000, 3000, 2)
        start = time.perf_counter()
        result(web, "reconstruct", upload(web, picture(64, 64, 1)), models[0], "mode", 0)
        yield "from the page to the models", time.perf_counter() - start
        time.sleep(20)  # what the page does for itself at first: visitors come before it, but not between
        yield SMALL, statistics.median(parts(web, small, models[0])[0] for _ in range(3))
        preview, whole, *_ = zip(*(parts(web, large, models[0]) for _ in range(3)), strict=True)
        yield PREVIEW, statistics.median(preview)
        yield COPY, statistics.median(whole)
        photo = upload(web, small)
        for model in models if requests else ():
            times = [result(web, "reconstruct", photo, model, "mode", 0)[4]["seconds"] for _ in range(3)]
            yield f"{model}: there and back, 512 px, least of 3", min(times)
        memory = psutil.Process(process.pid).memory_info
        if requests:
            ask_many(web, models[0], 5)  # each kind once, whose buffers and kernels stay
            yield "memory, GB", memory().rss / 1e9
            ask_many(web, models[0], requests)
            yield f"memory after {requests} requests, GB", memory().rss / 1e9
        with web.stream("GET", "/gradio_api/heartbeat/benchmark"):
            start = time.perf_counter()
            process.send_signal(signal.SIGINT)
            process.wait(120)
            yield "Ctrl-C", time.perf_counter() - start


def main() -> None:
    """Serve, ask, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100)
    options = parser.parse_args()
    # shells have what runs in their background ignore it, and so would the server
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "latentvae", "demo", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    print(machine())
    print(f"load (tasks that run or wait for a core, mean of a minute): {os.getloadavg()[0]:.1f}")
    print("| what | measured | wanted on idle cores |\n|---|---|---|")
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            for name, value in measure(f"http://127.0.0.1:{port}", process, options.requests):
                print(f"| {name} | {value:.2f} | {WANTED.get(name, '')} |", flush=True)
        finally:
            process.kill()
    print(f"load afterwards: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
