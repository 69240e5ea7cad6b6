"""Many images in a second: all cores on one image or batch after the other, against a core for each image.

    python benchmarks/many.py --model f8c4-small --side 256 --count 8

The second is how `latentvae encode` and `decode` work. OpenVINO's own way is a stream for each core. All ways
take turns in one process; the best turn of each counts.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from machine import machine

from latentvae.models.loading import load
from latentvae.models.presets import PRESETS, build
from latentvae.runtime import side_by_side
from latentvae.runtime.graphs import tracing
from latentvae.runtime.optimize import optimize

Way = Callable[[], object]


@torch.inference_mode()
def run(vae: Any, verb: str, x: torch.Tensor) -> torch.Tensor:
    """What `encode` or `decode` gives."""
    return vae.encode(x).latent_dist.parameters if verb == "encode" else vae.decode(x).sample


def streams(half: Any, images: list[torch.Tensor], threads: int) -> Way:
    """OpenVINO with a stream for each core, of our folded graph."""
    package = tracing.openvino()
    model = tracing.openvino_model(tracing.traceable(half), tracing.example_of(half))
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    queue = package.AsyncInferQueue(package.Core().compile_model(model, "CPU", settings), threads)

    def all_of_them(_: object = model) -> None:  # the model holds the weights
        for image in images:
            queue.start_async([image.numpy()])
        queue.wait_all()

    return all_of_them


def ways(vae: Any, verb: str, x: torch.Tensor, threads: int) -> dict[str, Way]:
    """What is compared, by name; each computes all of x (B, C, H, W)."""
    ours = optimize(copy.deepcopy(vae))
    graph = optimize(copy.deepcopy(vae), backend="openvino")
    images = [image[None] for image in x]

    def together(model: Any, size: int) -> None:
        for at in range(0, len(x), size):
            run(model, verb, x[at : at + size])

    def side(model: Any) -> None:
        list(side_by_side.run((partial(run, model, verb, image) for image in images), threads))

    return {
        "ours, one by one": partial(together, ours, 1),
        "ours, batches of 4": partial(together, ours, 4),
        "ours, side by side": partial(side, ours),
        "ours in OpenVINO, one by one": partial(together, graph, 1),
        "ours in OpenVINO, streams": streams(
            vae.encoder if verb == "encode" else vae.decoder, images, threads
        ),
    }


def main() -> None:
    """Measure every way, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="f8c4-small", help="a preset, random, or a model by its path")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    vae = build(arguments.model) if arguments.model in PRESETS else load(arguments.model)
    vae.eval().requires_grad_(False)
    threads, side = torch.get_num_threads(), arguments.side
    print(f"{arguments.model}, {side} px, {arguments.count} images, {threads} threads; {machine()}\n")
    print("| case | images/s | x one by one |\n|---|---|---|")
    for verb in ("decode", "encode"):
        channels = vae.config["in_channels" if verb == "encode" else "latent_channels"]
        x = torch.randn(arguments.count, channels, *[side if verb == "encode" else side // 8] * 2).clamp(
            -1, 1
        )
        compared = ways(vae, verb, x, threads)
        best = dict.fromkeys(compared, float("inf"))
        for turn in range(arguments.rounds + 1):  # the first compiles
            for name, way in compared.items():
                start = time.perf_counter()
                way()
                if turn:
                    best[name] = min(best[name], time.perf_counter() - start)
        first = best["ours, one by one"]
        for name, seconds in best.items():
            print(f"| {verb} {name} | {arguments.count / seconds:.2f} | {first / seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
