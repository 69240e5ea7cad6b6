"""What reading takes, in bytes a pixel, and what a phone's photograph takes: seconds and peak memory.

Each measurement is a process of its own. Of reading, the peak is what the process holds above what it held
with a small image loaded; of a verb it is the whole process, as `/usr/bin/time -v` has it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
from machine import Peak, machine
from PIL import Image

from latentvae.images.reading import load_image

SIZES = {12: (4000, 3000), 24: (6000, 4000)}  # megapixels, as phones make them
VERBS = ("reconstruct", "compress", "demo")


def main() -> None:
    """Measure both, or only what one file takes to read (`--read`, which the others call)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photo", type=Path, help="a photograph, which is enlarged")
    parser.add_argument("--read", action="store_true", help="print what reading it takes, in bytes a pixel")
    parser.add_argument("--demo", action="store_true", help="read it as the demo does, and print its size")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES), help="megapixels")
    parser.add_argument("--verbs", nargs="*", default=VERBS)
    options = parser.parse_args()
    if options.read:
        print(f"{bytes_per_pixel(options.photo):.1f}")
    elif options.demo:
        print(tuple(demo_image(options.photo).shape))
    else:
        print(machine())
        with tempfile.TemporaryDirectory() as folder:
            report_reading(enlarged(options.photo, SIZES[12]), Path(folder))
            for size in options.sizes:
                report_verbs(enlarged(options.photo, SIZES[size]), size, options.verbs, Path(folder))


def enlarged(photo: Path, size: tuple[int, int]) -> Image.Image:
    """A photograph in landscape of that size, with grain: JPEGs of smooth pictures are far too small."""
    picture = Image.open(photo).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    levels = np.asarray(picture).astype(np.int16)
    levels += np.random.default_rng(0).integers(-6, 7, levels.shape, dtype=np.int16)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def report_reading(picture: Image.Image, folder: Path) -> None:
    """Bytes a pixel of the usual kinds of file."""
    clear = picture.copy()
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    deep = np.asarray(picture).astype(np.uint16) * 257
    files = {name: folder / name for name in ("rgb.jpg", "rgb.png", "rgba.png", "rgb16.tif", "grey16.png")}
    picture.save(files["rgb.jpg"], quality=92)
    picture.save(files["rgb.png"], compress_level=1)
    clear.save(files["rgba.png"], compress_level=1)
    tifffile.imwrite(files["rgb16.tif"], deep, photometric="rgb", compression="zlib", rowsperstrip=64)
    Image.fromarray(deep[..., 0]).save(files["grey16.png"], compress_level=1)
    print("\n| file | bytes a pixel |\n|---|---|")
    for name, file in files.items():
        print(f"| {name} | {Run(__file__, file, '--read').stdout.strip()} |", flush=True)
        file.unlink()


def bytes_per_pixel(file: Path) -> float:
    """The most that reading holds at once, the result included."""
    image = Image.new("RGB", (64, 64))
    load_image(image)  # what is imported and kept at the first time
    with Peak() as peak:
        loaded = load_image(file)
    return peak.bytes / (loaded.shape[1] * loaded.shape[2])


def demo_image(file: Path) -> np.ndarray:
    """A picture as the demo has it from an upload that it shrinks."""
    from latentvae.demo.guard import Limits, read_photo

    return read_photo(str(file), Limits(), shrunk=True).image.numpy()


def report_verbs(picture: Image.Image, megapixels: int, verbs: list[str], folder: Path) -> None:
    """Seconds, of the clock and of the processor, and peak memory of each verb on one JPEG."""
    photo = folder / f"{megapixels}.jpg"
    picture.save(photo, quality=92)
    print(f"\n{megapixels} megapixels, JPEG of {photo.stat().st_size / 1e6:.1f} MB")
    print("\n| verb | seconds | of them computing | peak GB |\n|---|---|---|---|")
    commands = {
        "reconstruct": ("-m", "latentvae", "reconstruct", photo, "-o", folder / "out"),
        "compress": ("-m", "latentvae", "compress", photo, folder / f"{megapixels}.lvae"),
        "demo": (__file__, photo, "--demo"),
    }
    for verb in verbs:
        start = time.perf_counter()
        done = Run(*commands[verb])
        clock = time.perf_counter() - start
        print(f"| `{verb}` | {clock:.0f} | {done.seconds:.0f} | {done.peak / 1e9:.1f} |", flush=True)


class Run:
    """A Python process, its output, seconds of processor time and peak memory in bytes."""

    def __init__(self, *arguments: object) -> None:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        self.stdout = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{arguments} ended with {status}")
        self.seconds = usage.ru_utime + usage.ru_stime
        self.peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
