"""Encoding and reading at the scale of a cluster: what each of its parts costs.

    python benchmarks/scale.py planning                     a million members of 1,000 tars: time and memory
    python benchmarks/scale.py reading                      a store beside a .npz for each image
    python benchmarks/scale.py object-store PHOTOS          tars in an object store, beside the bare model
    python benchmarks/scale.py shuffling PHOTOS             crops from there, by images and by shards
    python benchmarks/scale.py ray PHOTOS                   two workers of Ray beside two processes

The two sides of a ratio take turns in one run, and each round is said when it is done. The object store is
moto's server of S3, a process beside, on 127.0.0.1. Ray's workers and the processes have imported all there
is, and begin with a model to make ready. Where other work shares the cores, seconds of CPU say more than
those of the clock; those of the object store's server are not among them, those of Ray's own processes are.
"""

import argparse
import copy
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from machine import machine
from PIL import Image
from store import model_seconds, plain_seconds, ready

import latentvae
from latentvae.cli.encode import equip_node, tile_large
from latentvae.images.reading import find_images
from latentvae.images.resizing import Preprocessing
from latentvae.images.sources import open_source
from latentvae.store.cluster import Ray
from latentvae.store.dataset import LatentDataset
from latentvae.store.encoding import Workload, encode_folder
from latentvae.store.format import (
    Entry,
    Manifest,
    place_shard,
    shard_name,
    stage_shard,
    tensor_name,
    write_manifest,
)
from latentvae.store.parts import Part
from latentvae.store.planning import find_sources, plan_shards
from latentvae.store.settings import SHARD_SIZE
from latentvae.training.config import DataConfig
from latentvae.training.data.crops import CropSequence

MEMBERS = 1000  # of a tar
SIDE, CHANNELS = 64, 4  # latents of 512 px, of SD


def planning(arguments: argparse.Namespace) -> str:
    """A million members, planned in a fresh process, with nothing but headers read."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        write_tars(Path(folder), arguments.tars, arguments.captions)
        command = [sys.executable, __file__, "planning", "--measure", folder]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return (
        "| tars | images | listing, s | shards, s | CPU, s | memory, MB |\n|---|---|---|---|---|---|\n"
        f"| {arguments.tars:,} | {found['images']:,} | {found['listing']:.1f} | {found['planning']:.1f} | "
        f"{found['cpu']:.1f} | {found['bytes'] / 1e6:.0f} |"
    )


def write_tars(folder: Path, count: int, texts: bool = False) -> None:
    """Tars of a thousand small pictures, or of 500 and a caption for each; all alike."""
    picture, packed = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(picture, "PNG")
    kinds = {".png": picture.getvalue(), **({".txt": b"a red square"} if texts else {})}
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for member in range(MEMBERS // len(kinds)):
            for suffix, data in kinds.items():
                header = tarfile.TarInfo(f"{member:06d}{suffix}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    for number in range(count):
        (folder / f"{number:05d}.tar").write_bytes(packed.getvalue())


def measure_planning(folder: Path) -> None:
    """Print what listing and planning the tars of a folder take."""
    process = psutil.Process()
    before, start, cpu = process.memory_info().rss, time.perf_counter(), time.process_time()
    sources = find_sources(f"{folder}/*.tar", folder / "none", Counter())
    listed = time.perf_counter()
    plan = plan_shards([], list(sources), SHARD_SIZE, False)
    assert sum(len(shard.keys) for shard in plan.shards) == len(sources)
    figures = {
        "images": len(sources),
        "listing": listed - start,
        "planning": time.perf_counter() - listed,
        "cpu": time.process_time() - cpu,
        "bytes": psutil.Process().memory_info().rss - before,
    }
    print(json.dumps(figures))


def reading(arguments: argparse.Namespace) -> str:
    """Random images of a bf16 store, and the same as files of their own."""
    count, rows = arguments.images, []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as place:
        store, files = Path(place) / "store", Path(place) / "npz"
        write_both(store, files, count)
        numbers = np.random.default_rng(0).integers(count, size=arguments.reads).tolist()
        dataset = LatentDataset(store, mode="moments")
        sides: dict[str, tuple[Path, Callable[[int], Any]]] = {
            "store, bf16": (store, lambda number: dataset[number]["moments"]),
            ".npz for each, float32": (files, partial(read_npz, files)),
        }
        for name, (folder, read) in sides.items():
            found = list(folder.iterdir())
            forget(found)
            turns = [took(read, numbers) for _ in range(2)]
            total = sum(path.stat().st_size for path in found)
            cells = [f"{seconds:.1f} | {cpu:.1f}" for seconds, cpu in turns]
            rows.append(f"| {name} | {len(found):,} | {total / 1e6:,.0f} | {' | '.join(cells)} |")
        same = all(torch.equal(dataset[n]["moments"], read_npz(files, n)) for n in numbers[:100])
    assert same
    return "\n".join(
        [
            f"| {count:,} images | files | MB | {len(numbers):,} at random, s | CPU, s | again, s | CPU, s |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def write_both(store: Path, files: Path, count: int) -> None:
    """Random moments as a store, and each as a file."""
    store.mkdir()
    files.mkdir()
    name, records = tensor_name(SIDE, SIDE), []
    for number, first in enumerate(range(0, count, SHARD_SIZE)):
        rows = range(first, min(first + SHARD_SIZE, count))
        moments = torch.randn(len(rows), 2 * CHANNELS, SIDE, SIDE).to(torch.bfloat16)
        entries = []
        for at, row in enumerate(rows):
            np.savez(files / f"{row:08d}.npz", moments=moments[at].float().numpy())
            size = {"width": 512, "height": 512, "resized": None, "cropped": None, "padding": (0, 0, 0, 0)}
            file = {"sha256": "0" * 64, "size_bytes": 0, "mtime_ns": 0}
            entries.append(Entry(f"{row:08d}.png", "", tensor=name, offset=at, **size, **file))
        record = stage_shard(store, shard_name(number), {name: moments}, entries, [])
        place_shard(store, record)
        records.append(record)
    common = {"dtype": "bf16", "precision": "fp32", "flips": False, "batch_size": 8, "shard_size": SHARD_SIZE}
    vae = {"weights_sha256": "", "config": {"latent_channels": CHANNELS}, "scaling_factor": 1.0}
    write_manifest(
        store, Manifest(shift_factor=0.0, preprocessing=Preprocessing(), shards=records, **common, **vae)
    )


def read_npz(files: Path, number: int) -> torch.Tensor:
    """The moments of an image from its file."""
    with np.load(files / f"{number:08d}.npz") as file:
        return torch.from_numpy(file["moments"])


def forget(files: list[Path]) -> None:
    """Have the system drop what it keeps of files in memory, where it can be asked to."""
    for path in files if hasattr(os, "posix_fadvise") else []:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def took(read: Callable[[int], Any], numbers: list[int]) -> tuple[float, float]:
    """Seconds to read these images, of the clock and of this process's CPU."""
    start, cpu = time.perf_counter(), time.process_time()
    for number in numbers:
        read(number)
    return time.perf_counter() - start, time.process_time() - cpu


class Side:
    """Seconds of the clock and of CPU that one side of a ratio took, round by round."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.seconds, self.cpu = list[float](), list[float]()

    def add(self, seconds: float, cpu: float) -> None:
        """One more round; said at once, as rounds are long."""
        self.seconds.append(seconds)
        self.cpu.append(cpu)
        print(f"{self.name}: {seconds:.1f} s, {cpu:.1f} s of CPU", file=sys.stderr, flush=True)

    def row(self, first: "Side") -> str:
        """A line of the table, with the shares of the first side's speed and of its CPU."""
        pairs = [(zip(first.seconds, self.seconds, strict=True)), (zip(first.cpu, self.cpu, strict=True))]
        shares = [statistics.median(one / other for one, other in each) for each in pairs]
        rate, cpu = self.count / statistics.median(self.seconds), statistics.median(self.cpu) / self.count
        return f"| {self.name} | {self.count} | {rate:.2f} | {shares[0]:.1%} | {cpu:.2f} | {shares[1]:.1%} |"


def compared(first: Side, other: Side) -> str:
    """A table of both."""
    return "\n".join(
        [
            "| | images | images/s | of the first | CPU s an image | of the first |",
            "|---|---|---|---|---|---|",
            *(each.row(first) for each in (first, other)),
            f"\nload {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else "",
        ]
    )


def object_store(arguments: argparse.Namespace) -> str:
    """Tars in an object store to a store, and the model alone on the batches of that."""
    vae = latentvae.optimize(latentvae.load())
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as place, served() as files:
        photos = Path(place) / "photos"
        photos.mkdir()
        for path in find_images(arguments.photos)[: arguments.images]:
            (photos / path.name).symlink_to(path.resolve())
        batches = ready(vae, photos)
        pack(sorted(photos.iterdir()), files, 4)
        model_seconds(vae, batches[:2], threads)
        count = sum(map(len, batches))
        bare, stored = Side("the model alone", count), Side("s3:// to a store", count)
        for number in range(arguments.rounds):
            bare.add(*min(model_alone(vae, batches, threads)))
            store, cpu = Path(place) / f"store{number}", time.process_time()
            report = encode_folder(vae, "s3://bench/*.tar", store, workload=Workload(threads))
            assert report.images == count
            stored.add(report.seconds, time.process_time() - cpu)
    return compared(bare, stored)


def model_alone(vae: Any, batches: Any, threads: int) -> Iterator[tuple[float, float]]:
    """Seconds, and those of CPU: batches side by side and, which one thread does alike, one after another."""
    ways = [partial(model_seconds, vae, batches, threads), partial(plain_seconds, vae, batches)]
    for way in ways if threads > 1 else ways[:1]:
        cpu = time.process_time()
        yield way(), time.process_time() - cpu


@contextmanager
def served() -> Iterator[Any]:
    """A server of S3 on this machine with a bucket, as fsspec sees it."""
    import s3fs

    port = 5557
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        files = s3fs.S3FileSystem()
        for _ in range(60):
            try:
                files.mkdir("bench")
                break
            except OSError:
                time.sleep(1)
        yield files
    finally:
        server.terminate()
        server.wait()


def pack(photos: list[Path], files: Any, count: int) -> None:
    """Put photos into tars of the bucket."""
    for number in range(count):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for path in photos[number::count]:
                tar.add(path.resolve(), path.name)
        files.pipe_file(f"bench/{number:03d}.tar", packed.getvalue())


def shuffling(arguments: argparse.Namespace) -> str:
    """An epoch of training's crops from tars in an object store, shuffled by images and by shards."""
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as place, served() as files:
        os.environ["LATENTVAE_CACHE"] = place
        pack(find_images(arguments.photos)[: arguments.images], files, 8)
        source = open_source("s3://bench/*.tar")
        for name, at_once in (("each image by a request", None), ("two of eight shards at a time", 2)):
            sequence = CropSequence(source, DataConfig(shuffle_shards=at_once), 3, seed=0)
            turns = [took(sequence.__getitem__, list(range(len(source)))) for _ in range(arguments.rounds)]
            seconds, cpu = (statistics.median(each) for each in zip(*turns, strict=True))
            rows.append(f"| {name} | {len(source) / seconds:.1f} | {1000 * cpu / len(source):.1f} |")
    return "\n".join(["| | images/s | CPU ms an image |", "|---|---|---|", *rows])


def ray(arguments: argparse.Namespace) -> str:
    """Two workers of Ray, and two processes, of one core each."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray's are of lower priority otherwise
    import ray as package

    photos = find_images(arguments.photos)[: arguments.images]
    vae, options = latentvae.load(), {"shard_size": arguments.shard_size, "weights_sha256": "0" * 64}
    alone, shared = Side("two processes", len(photos)), Side("two workers of Ray", len(photos))
    package.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    engine = Ray(vae, partial(equip_node, precision="fp32", threads=1, workers=1), cores=1)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as place, two_processes(options) as in_processes:
        for number in range(arguments.rounds + 1):
            one, other = Path(place) / f"ray{number}", Path(place) / f"processes{number}"
            some = photos if number else photos[: 2 * arguments.shard_size]  # the first is for the imports
            took = [timed(partial(in_processes, some, other))]
            run = partial(encode_folder, vae, [*map(str, some)], one, workload=Workload(engine=engine))
            took.append(timed(partial(run, **options)))
            assert (one / "store.json").read_bytes() == (other / "store.json").read_bytes()
            if number:
                alone.add(*took[0])
                shared.add(*took[1])
    package.shutdown()
    return compared(alone, shared)


def timed(do: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and those of CPU of this process and of all that it has started."""
    before, start = cpu_seconds(), time.perf_counter()
    do()
    return time.perf_counter() - start, cpu_seconds() - before


def cpu_seconds() -> float:
    """Of this process and of all below it that are alive."""
    own = psutil.Process()
    return sum(sum(each.cpu_times()[:2]) for each in [own, *own.children(recursive=True)])


@contextmanager
def two_processes(options: dict[str, Any]) -> Iterator[Callable[[list[Path], Path], None]]:
    """Two processes that have imported all there is, and what has them encode."""
    context = multiprocessing.get_context("spawn")
    tasks, ended = [context.Queue() for _ in range(2)], context.Semaphore(0)
    parts = [context.Process(target=part, args=(options, rank, tasks[rank], ended)) for rank in range(2)]
    for process in parts:
        process.start()

    def encode(photos: list[Path], store: Path) -> None:
        for queue in tasks:
            queue.put((photos, store))
        for _ in parts:
            ended.acquire()

    yield encode
    for queue in tasks:
        queue.put(None)
    for process in parts:
        process.join()


def part(options: dict[str, Any], rank: int, tasks: Any, ended: Any) -> None:
    """One of two processes; makes its model ready each time, as a worker of Ray does for each run."""
    torch.set_num_threads(1)
    vae = latentvae.load()
    work = Workload(threads=1, workers=1, part=Part(rank, 2))
    while (task := tasks.get()) is not None:
        photos, store = task
        ready_vae = latentvae.optimize(copy.deepcopy(vae))
        tile_large(ready_vae)
        encode_folder(ready_vae, [*map(str, photos)], store, workload=work, **options)
        ended.release()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["planning", "reading", "object-store", "shuffling", "ray"])
    parser.add_argument("photos", type=Path, nargs="?", help="a folder of images")
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--captions", action="store_true", help="every second member is one")
    parser.add_argument("--images", type=int, default=None, help="default: 64; 10,000 for reading")
    parser.add_argument("--reads", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-size", type=int, default=8)
    parser.add_argument("--scratch", type=Path, help="folder for gigabytes of temporary files")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_planning(arguments.measure)
        return
    arguments.images = arguments.images or (10_000 if arguments.what == "reading" else 64)
    if arguments.what in ("object-store", "shuffling", "ray") and arguments.photos is None:
        parser.error("name a folder of images")
    functions = {
        "planning": planning,
        "reading": reading,
        "object-store": object_store,
        "shuffling": shuffling,
        "ray": ray,
    }
    print(functions[arguments.what](arguments), f"\n\n{machine()}")


if __name__ == "__main__":
    main()
