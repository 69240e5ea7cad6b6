"""PSNR in the hole of `latentvae fill` beside classic inpainting: Telea, Navier-Stokes, biharmonic.

    pip install opencv-python-headless scikit-image
    python benchmarks/filling.py --images ../shared/photos/val --count 4 --size 128

Holes: 10, 30 and 50 % of the pixels at random, and one box of a third of the side in the middle. PSNR is over
the missing pixels alone, after 8-bit rounding; a row's figure is the mean over the images. "decoded" is the
model's own picture, "smooth" the blend without the model: what "filled" is above it, the model gave.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from machine import DEVICE, machine
from skimage.restoration import inpaint_biharmonic
from tqdm import tqdm

import latentvae
from latentvae.images.reading import find_images, load_image
from latentvae.images.tensors import from_uint8, to_uint8
from latentvae.toolbox.editing.fill import fill, hole_psnr

RADIUS = 3  # pixels, of OpenCV's methods: the usual choice
Row = tuple[str, str, float, float]  # hole, method, dB, seconds


def holes(size: int) -> dict[str, torch.Tensor]:
    """The masks (size, size), True where a pixel is missing."""
    random = torch.Generator().manual_seed(1)
    made = {f"{share} %": torch.rand(size, size, generator=random) * 100 < share for share in (10, 30, 50)}
    box = torch.zeros(size, size, dtype=torch.bool)
    box[size // 3 : 2 * size // 3, size // 3 : 2 * size // 3] = True
    return {**made, "box": box}


def opencv(flag: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One of OpenCV's methods."""

    def run(images: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        picture = to_uint8(images)[0].permute(1, 2, 0).contiguous().numpy()
        return from_uint8(cv2.inpaint(picture, missing.numpy().astype(np.uint8) * 255, RADIUS, flag))[None]

    return run


def biharmonic(images: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """The biharmonic method of scikit-image."""
    picture = images[0].permute(1, 2, 0).double().numpy()
    found = inpaint_biharmonic(picture, missing.numpy(), channel_axis=-1)
    return torch.from_numpy(found).permute(2, 0, 1)[None].float()


CLASSICS = {
    "Telea": opencv(cv2.INPAINT_TELEA),
    "Navier-Stokes": opencv(cv2.INPAINT_NS),
    "biharmonic": biharmonic,
}


def measure(vae: Any, images: torch.Tensor, size: int, methods: list[str]) -> Iterator[Row]:
    """Every hole by every method."""
    for hole, missing in holes(size).items():
        for name, classic in CLASSICS.items():
            start = time.perf_counter()
            filled = classic(images.masked_fill(missing, 0.0), missing)
            yield hole, name, hole_psnr(filled, images, missing), time.perf_counter() - start
        for method in methods:
            start = time.perf_counter()
            result = fill(vae, images.to(DEVICE), missing, method=method)  # type: ignore[arg-type]
            took = time.perf_counter() - start
            tqdm.write(f"{hole} {method}: plate {result.plate:.2f}, detail {result.detail:.2f}")
            parts = {"decoded": result.decoded, "smooth": result.smooth, "filled": result.images}
            for part, filled in parts.items():
                yield hole, f"{method}: {part}", hole_psnr(filled, images, missing), took


def table(rows: list[Row]) -> list[dict[str, Any]]:
    """Means over the images, one line for each method."""
    lines = []
    for name in dict.fromkeys(row[1] for row in rows):
        line: dict[str, Any] = {"method": name}
        for hole in dict.fromkeys(row[0] for row in rows):
            line[hole] = float(np.mean([row[2] for row in rows if row[:2] == (hole, name)]))
        line["seconds"] = float(np.mean([row[3] for row in rows if row[1] == name]))
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model", default=None)
    parser.add_argument("--count", type=int, default=4, help="images, evenly spaced in the folder")
    parser.add_argument("--size", type=int, default=128, help="side of the centre crop, pixels")
    parser.add_argument("--methods", nargs="+", default=["optimise", "project", "one_pass"])
    parser.add_argument("--output", type=Path, default=None, help="JSON of the table")
    options = parser.parse_args()
    vae = latentvae.load(options.model, device=DEVICE)
    files = find_images(options.images)
    rows: list[Row] = []
    for path in tqdm(files[:: max(1, len(files) // options.count)][: options.count], unit="image"):
        images = load_image(path)[None]
        top, left = ((side - options.size) // 2 for side in images.shape[-2:])
        crop = images[..., top : top + options.size, left : left + options.size]
        rows += measure(vae, crop.contiguous(), options.size, options.methods)
    lines = table(rows)
    columns = list(lines[0])
    print("  ".join([f"{columns[0]:22}", *(f"{name:>8}" for name in columns[1:])]))
    for line in lines:
        print("  ".join([f"{line['method']:22}", *(f"{line[name]:8.2f}" for name in columns[1:])]))
    print(machine())
    if options.output:
        result = {"machine": machine(), "size": options.size, "images": options.count, "table": lines}
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
