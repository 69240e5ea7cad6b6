"""Rate-distortion curves of `latentvae compress` beside JPEG and WebP: bits of whole files, PSNR, LPIPS.

    python benchmarks/small_files.py --images ../shared/photos/kodak --lpips ../shared/lpips \\
        --picture docs/compression.png

Every figure is a mean over the images; a file's bits are all of its bytes, headers included. JPEG and WebP
are Pillow's, at their slowest and smallest settings (optimized Huffman tables; method 6).
"""

import argparse
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import DEVICE, machine
from PIL import Image
from tqdm import tqdm

import latentvae
from latentvae.codec.compression import compress, decompress
from latentvae.images.reading import find_images, load_image
from latentvae.images.saving import to_pil
from latentvae.images.tensors import from_uint8
from latentvae.measure.lpips import load_lpips
from latentvae.measure.metrics import Metrics
from latentvae.models.shipped import bundled

QUALITIES = {"JPEG": (5, 8, 12, 16, 20, 30, 50), "WebP": (0, 2, 5, 10, 20, 35, 50)}
OURS = (8, 16, 24, 32, 40, 50, 70)
LEVELS = (0.40, 0.35, 0.30, 0.28, 0.26, 0.24, 0.20, 0.15, 0.10)  # of LPIPS, for the table of equal quality
Codec = Callable[[torch.Tensor, int], tuple[bytes, torch.Tensor]]


@dataclass
class Point:
    """The means of one codec at one quality."""

    codec: str
    quality: int
    bpp: float
    psnr: float
    ssim: float
    lpips: float


def pillow(name: str, **options: Any) -> Codec:
    """One of Pillow's codecs."""

    def run(images: torch.Tensor, quality: int) -> tuple[bytes, torch.Tensor]:
        buffer = io.BytesIO()
        to_pil(images).save(buffer, name, quality=quality, **options)
        return buffer.getvalue(), from_uint8(np.asarray(Image.open(buffer).convert("RGB")))[None]

    return run


def ours(model: str) -> Codec:
    """`latentvae compress` with a bundled model, or any other."""
    vae = latentvae.optimize(latentvae.load(model, device=DEVICE))

    def run(images: torch.Tensor, quality: int) -> tuple[bytes, torch.Tensor]:
        data = compress(vae, images, quality=quality)
        return data, decompress(vae, data).cpu()

    return run


def measure(
    name: str, codec: Codec, qualities: tuple[int, ...], files: list[Path], lpips: Any
) -> list[Point]:
    """The curve of one codec."""
    points = []
    for quality in tqdm(qualities, desc=name):
        metrics, rates = Metrics(lpips=lpips), []
        for path in files:
            images = load_image(path)[None]
            data, decoded = codec(images, quality)
            rates.append(8 * len(data) / (images.shape[2] * images.shape[3]))
            metrics.add(path.name, images, decoded)
        mean = metrics.summary()
        assert mean.lpips is not None
        points.append(Point(name, quality, float(np.mean(rates)), mean.psnr, mean.ssim, mean.lpips))
    return points


def rate_at(points: list[Point], lpips: float) -> float | None:
    """Bits per pixel at an LPIPS, log-linear between the two points around it; None outside the curve."""
    points = sorted(points, key=lambda point: point.lpips)
    known = [point.lpips for point in points]
    if not known[0] <= lpips <= known[-1]:
        return None
    return float(np.exp(np.interp(lpips, known, [np.log(point.bpp) for point in points])))


def report(curves: dict[str, list[Point]], count: int) -> str:
    """Both tables in Markdown: every point, and bits at equal LPIPS."""
    lines = [f"{count} images; {machine()}", "", "| codec | quality | bpp | PSNR, dB | SSIM | LPIPS-alex |"]
    lines.append("|---|---|---|---|---|---|")
    for point in (point for points in curves.values() for point in points):
        figures = f"{point.bpp:.3f} | {point.psnr:.2f} | {point.ssim:.3f} | {point.lpips:.3f}"
        lines.append(f"| {point.codec} | {point.quality} | {figures} |")
    names = [name for name in curves if name not in QUALITIES]
    lines += ["", f"| bpp at LPIPS | {' | '.join(curves)} | {' | '.join(f'{n} / WebP' for n in names)} |"]
    lines.append(f"|---|{'---|' * (len(curves) + len(names))}")
    for level in LEVELS:
        rates = {name: rate_at(points, level) for name, points in curves.items()}
        cells = [f"{rate:.3f}" if rate else "" for rate in rates.values()]
        for name in names:
            one, other = rates[name], rates["WebP"]
            cells.append(f"{one / other:.2f}" if one and other else "")
        lines.append(f"| {level:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """PSNR and LPIPS over bits per pixel, one line for each codec."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = {"psnr": "PSNR, dB (higher is better)", "lpips": "LPIPS-alex (lower is better)"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, points in curves.items():
            marker = "s" if name in QUALITIES else "o"
            axis.plot(
                [point.bpp for point in points],
                [getattr(point, key) for point in points],
                marker=marker,
                markersize=4,
                linestyle="--" if name in QUALITIES else "-",
                label=name if name in QUALITIES else f"latentvae {name}",
            )
        axis.set_xscale("log")
        axis.set_xticks([0.05, 0.1, 0.2, 0.3, 0.5, 1.0], ["0.05", "0.1", "0.2", "0.3", "0.5", "1"])
        axis.minorticks_off()
        axis.set_title(title)
        axis.set_xlabel("bits per pixel of the whole file")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure every codec, print the tables and draw the curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of RGB images")
    parser.add_argument("--lpips", required=True, help="folder of LPIPS backbone weights")
    parser.add_argument("--models", nargs="+", default=bundled(), help="as --model of the verbs take it")
    parser.add_argument("--qualities", type=int, nargs="+", default=OURS, help="of latentvae compress")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--picture", type=Path, help="also draw the curves here")
    arguments = parser.parse_args()
    files = find_images(arguments.images)
    lpips = load_lpips("alex", arguments.lpips)
    codecs = {"JPEG": pillow("JPEG", optimize=True), "WebP": pillow("WEBP", method=6)}
    curves = {name: measure(name, codec, QUALITIES[name], files, lpips) for name, codec in codecs.items()}
    for model in arguments.models:
        curves[model] = measure(model, ours(model), tuple(arguments.qualities), files, lpips)
    print(report(curves, len(files)))
    if arguments.picture:
        draw(curves, arguments.picture)
    if arguments.json:
        figures = {name: [vars(point) for point in points] for name, points in curves.items()}
        arguments.json.write_text(json.dumps({"machine": machine(), "curves": figures}, indent=1))


if __name__ == "__main__":
    main()
