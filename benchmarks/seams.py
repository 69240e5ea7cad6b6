"""What tiling changes in a photograph: diffusers' tiles and ours, beside the untiled result.

    python benchmarks/seams.py photo.jpg --width 1536 --output seams.png

The bundled model encodes and decodes the photograph, enlarged, once whole, once with `vae.enable_tiling()`
and once with `latentvae.enable_exact_tiling(vae)`. The picture shows the differences to the whole, amplified.
"""

import argparse
import time
from pathlib import Path

import torch
from machine import Peak, machine
from PIL import Image

import latentvae
from latentvae.images.drawing import grid
from latentvae.images.tensors import from_uint8

AMPLIFY = 8


def enlarged(path: Path, width: int) -> torch.Tensor:
    """The photograph (1, 3, H, W) at a width, both sides multiples of 64."""
    image = Image.open(path).convert("RGB")
    size = (width // 64 * 64, round(image.height * width / image.width) // 64 * 64)
    resized = image.resize(size, Image.Resampling.LANCZOS)
    data = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return from_uint8(data.view(size[1], size[0], 3).permute(2, 0, 1))[None]


@torch.no_grad()
def main() -> None:
    """Print the differences, and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photo", type=Path)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--output", type=Path, default=Path("seams.png"))
    arguments = parser.parse_args()
    images = enlarged(arguments.photo, arguments.width)
    vae = latentvae.load()
    results, peaks, times = {}, {}, {}
    for way in ("whole", "diffusers' tiling", "exact tiling"):
        if way == "diffusers' tiling":
            vae.enable_tiling()
        if way == "exact tiling":
            latentvae.enable_exact_tiling(vae, memory=0)
        start = time.perf_counter()
        with Peak() as peak:
            results[way] = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        peaks[way], times[way] = peak.bytes, time.perf_counter() - start
    print(f"{tuple(images.shape)}; {machine()}\n")
    print("| way | largest difference, of 255 | mean | peak GB | s |\n|---|---|---|---|---|")
    tiles = []
    for way, result in results.items():
        difference = (result - results["whole"]).abs() * 127.5
        figures = (
            f"{difference.max():.4f} | {difference.mean():.5f} | {peaks[way] / 1e9:.2f} | {times[way]:.1f}"
        )
        print(f"| {way} | {figures} |", flush=True)
        if way != "whole":
            tiles.append((difference[0] / 127.5 * AMPLIFY - 1).clamp(-1, 1))
    titles = ["whole", *(f"{way}: difference x {AMPLIFY}" for way in list(results)[1:])]
    grid([[results["whole"][0], *tiles]], titles).save(arguments.output)


if __name__ == "__main__":
    main()
