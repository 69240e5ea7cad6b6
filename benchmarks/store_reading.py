"""Opening and reading stores of up to a million images, and what a billion need.

    python benchmarks/store_reading.py --images-per-second 40 --processes 64

The stores are synthetic: indexes as `latentvae encode` writes them, and shards of zeros that take no space.
Each store is measured in a process of its own. Reading is from the page cache, without a disk, and in seconds
of this process's CPU, so that other processes do not count.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from latentvae.images.resizing import Preprocessing
from latentvae.store.dataset import LatentDataset
from latentvae.store.format import (
    Entry,
    Manifest,
    ShardRecord,
    index_path,
    shard_name,
    tensor_name,
    tensors_path,
    write_manifest,
)

CHANNELS, SIDE = 4, 32  # of f8c4 latents of 256 x 256 pixels
MOMENTS_BYTES = 2 * CHANNELS * SIDE * SIDE * 2  # bf16
BILLION = 10**9
Figures = dict[str, Any]


def template() -> bytes:
    """An index line of usual length, with KEY and ROW to be replaced."""
    entry = Entry(
        key="KEY",
        source="photographs/KEY",
        sha256="0123456789abcdef" * 4,
        size_bytes=123456,
        mtime_ns=1700000000123456789,
        width=640,
        height=480,
        resized=(341, 256),
        cropped=(42, 0, 256, 256),
        padding=(0, 0, 0, 0),
        tensor=tensor_name(SIDE, SIDE),
        offset=0,
        caption={"caption": "a photograph of something, described in a dozen words or so"},
    )
    return entry.line().replace(b'"offset":0', b'"offset":ROW')


def write_store(folder: Path, count: int, shard_size: int, *, shards: bool = True) -> int:
    """A store of zeros; returns the bytes of its indexes. Without `shards` its manifest alone."""
    records, line, index_bytes = [], template(), 0
    folder.mkdir(parents=True)
    for number, first in enumerate(range(0, count, shard_size)):
        rows = min(shard_size, count - first)
        name = shard_name(number)
        if shards:
            keys = (b"%03d/%09d.jpg" % (number % 1000, first + row) for row in range(rows))
            lines = (line.replace(b"KEY", key).replace(b"ROW", b"%d" % row) for row, key in enumerate(keys))
            index_bytes += index_path(folder, name).write_bytes(b"".join(lines))
            _write_zeros(tensors_path(folder, name), rows)
        records.append(ShardRecord(name=name, count=rows, sha256="0" * 64, index_sha256="1" * 64))
    write_manifest(folder, _manifest(shard_size, records))
    return index_bytes


def _manifest(shard_size: int, records: list[ShardRecord]) -> Manifest:
    return Manifest(
        weights_sha256="2" * 64,
        config={"latent_channels": CHANNELS},
        scaling_factor=0.18215,
        shift_factor=0.0,
        preprocessing=Preprocessing(policy="centre-crop", size=256),
        dtype="bf16",
        precision="fp32",
        flips=False,
        batch_size=8,
        shard_size=shard_size,
        shards=records,
    )


def _write_zeros(path: Path, rows: int) -> None:
    length = rows * MOMENTS_BYTES
    shape = [rows, 2 * CHANNELS, SIDE, SIDE]
    header = {tensor_name(SIDE, SIDE): {"dtype": "BF16", "shape": shape, "data_offsets": [0, length]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + length)


def measure(store: Path, reads: int) -> Figures:
    """Open a store in this process, use every shard once, and read random images twice.

    The first time the system maps the rows and what it reads ahead; the second time is the dataset's own.
    """
    gc.collect()
    before, anonymous = resident()
    start = time.perf_counter()
    dataset = LatentDataset(store)
    figures: Figures = {"open_seconds": time.perf_counter() - start}
    figures["open_bytes"] = resident()[0] - before
    if reads:
        numbers = np.random.default_rng(0).integers(len(dataset), size=reads)
        figures["shard_microseconds"] = _read(
            dataset, np.arange(0, len(dataset), dataset.manifest.shard_size)
        )
        figures["first_microseconds"] = _read(dataset, numbers)
        figures["microseconds"] = _read(dataset, numbers)
        figures["read_bytes"] = resident()[1] - anonymous
    return figures


def resident() -> tuple[int, int]:
    """This process's memory in bytes: all, and what no mapped file holds, which cannot be evicted."""
    memory = psutil.Process().memory_info()
    return memory.rss, memory.rss - getattr(memory, "shared", 0)


def _read(dataset: LatentDataset, numbers: np.ndarray) -> float:
    """Mean microseconds of reading these images."""
    start = time.process_time()
    for number in numbers.tolist():
        dataset[number]
    return 1e6 * (time.process_time() - start) / len(numbers)


def in_a_process(store: Path, reads: int) -> Figures:
    """The figures of `measure`, from a fresh process."""
    command = [sys.executable, __file__, "--measure", str(store), "--reads", str(reads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def billion(arguments: argparse.Namespace, line_bytes: float, folder: Path) -> Figures:
    """What 10^9 images need: the manifest is written and opened, the rest is counted."""
    size = arguments.billion_shard_size
    write_store(folder / "billion", BILLION, size, shards=False)
    rate = arguments.images_per_second * arguments.processes
    return {
        **in_a_process(folder / "billion", 0),
        "shards": -(-BILLION // size),
        "manifest_bytes": (folder / "billion" / "store.json").stat().st_size,
        "moments_bytes": BILLION * MOMENTS_BYTES,
        "index_bytes": BILLION * line_bytes,
        "shard_bytes": size * (MOMENTS_BYTES + line_bytes),
        "processes": arguments.processes,
        "hours": BILLION / rate / 3600,
    }


def table(rows: list[Figures]) -> str:
    """The measured rows as Markdown."""
    lines = [
        "| images | shards | opening, s | memory for it, MB | a shard's first image, µs | a random row, µs | "
        "again, µs | memory after reading, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row["count"], row["shards"], row["open_seconds"], row["open_bytes"] / 1e6)
        times = (row["shard_microseconds"], row["first_microseconds"], row["microseconds"])
        lines.append(
            "| {:,} | {:,} | {:.4f} | {:.1f} |".format(*cells)
            + " {:.0f} | {:.0f} | {:.0f} |".format(*times)
            + f" {row['read_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def paper(figures: Figures, arguments: argparse.Namespace) -> str:
    """The billion as Markdown."""
    rows = {
        "shards": f"{figures['shards']:,} of {arguments.billion_shard_size:,} images, "
        f"{figures['shard_bytes'] / 1e6:,.0f} MB each",
        "moments": f"{figures['moments_bytes'] / 1e12:.1f} TB (bf16, {2 * CHANNELS} x {SIDE} x {SIDE})",
        "indexes": f"{figures['index_bytes'] / 1e12:.2f} TB",
        "store.json": f"{figures['manifest_bytes'] / 1e6:.0f} MB; opening it takes "
        f"{figures['open_seconds']:.2f} s and {figures['open_bytes'] / 1e6:.0f} MB (measured)",
        "encoding": f"{figures['hours']:,.0f} hours with {arguments.processes:,} processes of "
        f"{arguments.images_per_second:g} images/s",
    }
    return "\n".join(
        ["| a billion images need | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    )


def main() -> None:
    """Measure, and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--shard-size", type=int, default=1024)
    parser.add_argument("--reads", type=int, default=5000)
    parser.add_argument("--images-per-second", type=float, default=50, help="of one process, as measured")
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--billion-shard-size", type=int, default=16384)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.reads)))
        return
    from machine import machine

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.counts:
            store = Path(folder, str(count))
            index_bytes = write_store(store, count, arguments.shard_size)
            shards = -(-count // arguments.shard_size)
            row = {"count": count, "shards": shards, "line_bytes": index_bytes / count}
            rows.append(row | in_a_process(store, arguments.reads))
        figures = billion(arguments, rows[-1]["line_bytes"], Path(folder))
    print(f"{machine()}\n\n{table(rows)}\n\n{paper(figures, arguments)}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine(), "rows": rows, "billion": figures}, indent=1)
        )


if __name__ == "__main__":
    main()
