"""How fast a folder is encoded to a store, against the model alone on tensors that are ready.

    python benchmarks/store.py ../shared/photos/val --count 32

All do the same batches of the same sizes in turns, so that a machine that others use too slows all alike; the
model alone goes both ways, batches side by side as the store has them, and one after the other with all of
torch's threads, and the share is of the faster. The store's time holds everything: finding, hashing, decoding
and preparing the images, and writing, with every file made durable.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from machine import DEVICE, machine

import latentvae
from latentvae.images.reading import find_images
from latentvae.models.loading import spatial_compression_ratio
from latentvae.store.encoding import Workload, encode_folder
from latentvae.store.pipeline import Computer, Loaded, Loader, feed
from latentvae.store.planning import ShardWork, find_sources
from latentvae.store.settings import preprocessing, rows_at_once


def ready(vae: AutoencoderKL, folder: Path) -> list[list[Loaded]]:
    """The batches that encoding the folder makes, loaded."""
    sources = find_sources(folder, folder / "none")
    ratio = spatial_compression_ratio(vae)
    loader = Loader(sources, preprocessing(vae, None, False), ratio, rows_at_once(vae, None), False)
    work = ShardWork("latents-00000", tuple(sources))
    return [batch.images for batch in feed(loader, [work], 2) if batch.images]


def model_seconds(vae: AutoencoderKL, batches: list[list[Loaded]], threads: int) -> float:
    """How long the model takes for the batches."""
    with Computer(vae, torch.bfloat16, threads, rows_at_once(vae, None)) as computer:
        start = time.perf_counter()
        for future in [computer.submit(batch) for batch in batches]:
            future.result()
        return time.perf_counter() - start


@torch.inference_mode()
def plain_seconds(vae: AutoencoderKL, batches: list[list[Loaded]]) -> float:
    """How long the model takes for them one after the other, with all of torch's threads in each."""
    start = time.perf_counter()
    for batch in batches:
        images = torch.stack([one.image for one in batch]).to(DEVICE, vae.dtype)
        vae.encode(images).latent_dist.parameters.cpu()
    return time.perf_counter() - start


def store_seconds(vae: AutoencoderKL, folder: Path, threads: int) -> tuple[float, float]:
    """How long a new store of the folder takes, and the share of it that the model waited."""
    with tempfile.TemporaryDirectory() as place:
        report = encode_folder(vae, folder, Path(place) / "store", workload=Workload(threads))
    return report.seconds, report.waiting


def main() -> None:
    """Print the row, and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=64, help="images to take from the folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    vae = latentvae.load(dtype=getattr(torch, arguments.precision), device=DEVICE)
    latentvae.optimize(vae)
    with tempfile.TemporaryDirectory() as place:
        for path in find_images(arguments.photos)[: arguments.count]:
            shutil.copy(path, place)
        batches = ready(vae, Path(place))
        count = sum(map(len, batches))
        model_seconds(vae, batches[:2], arguments.threads)  # warm up
        bare, plain, stored = [], [], []
        for _ in range(arguments.repeats):
            bare.append(model_seconds(vae, batches, arguments.threads))
            plain.append(plain_seconds(vae, batches))
            stored.append(store_seconds(vae, Path(place), arguments.threads))
    ratio = statistics.median(
        min(one, other) / seconds for one, other, (seconds, _) in zip(bare, plain, stored, strict=True)
    )
    row = {
        "images": count,
        "model_images_per_second": count / statistics.median(bare),
        "model_with_all_threads_images_per_second": count / statistics.median(plain),
        "store_images_per_second": count / statistics.median(seconds for seconds, _ in stored),
        "share": ratio,
        "waiting": statistics.median(waiting for _, waiting in stored),
        "machine": machine(),
    }
    names = ("side by side", "all threads")
    print(f"| images | model {names[0]}, images/s | {names[1]} | to a store | share | model waited |")
    print("|---|---|---|---|---|---|")
    keys = ("model_", "model_with_all_threads_", "store_")
    speeds = " | ".join(f"{row[key + 'images_per_second']:.2f}" for key in keys)
    print(f"| {count} | {speeds} | {ratio:.1%} | {row['waiting']:.1%} |\n\n{row['machine']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
