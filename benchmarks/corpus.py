"""Every image file below a folder through our loader, in a process with a time limit; and other readers.

Test suites of decoders are what to point it at: damaged files, rare formats, and files made to fill memory.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import tempfile
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.images import kinds
from latentvae.images.reading import load_image_with_info
from latentvae.images.tensors import to_uint8

MAX_PIXELS = 40_000_000  # 0.8 GB while it is read
TOLERANCE = 4.0  # mean difference in levels of 255, above which readers disagree
HDR = ("OpenEXR", "Radiance HDR", "RAW")  # whose pictures are a matter of taste: not compared
WORDS = {  # of a refusal's message, and the class it is counted under
    "a format that is not read": ("which is not read", "is no image by its content"),
    "an extra is missing": ("pip install",),
    "more pixels than are taken": ("pixels",),
    "empty": ("0 bytes",),
    "values that have no scale": ("were wanted:", "unsigned"),
}


def main() -> None:
    """Count what became of each file, and list those that other readers show otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--limit", type=float, default=30, help="seconds for a file (default 30)")
    parser.add_argument("--magick", default="convert", help="ImageMagick, for what libvips does not read")
    parser.add_argument("--json", type=Path, help="where to write a line for each file")
    options = parser.parse_args()
    rows, worker = [], None
    for path in images_below(options.folders):
        worker = worker or Worker(options.magick)
        row = worker.ask(path, options.limit)
        if row["result"] in ("crash", "hang"):
            worker = None
        rows.append(row)
        if options.json:
            with options.json.open("a", encoding="utf-8") as file:
                print(json.dumps(row), file=file)
    report(rows)


def images_below(folders: list[Path]) -> list[Path]:
    """Files that are images by their names or first bytes, each content once, the smallest first."""
    found: dict[str, Path] = {}
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: (path.stat().st_size, path)):
        data = path.read_bytes()
        suffix = path.suffix.lower()
        known = suffix in kinds.SUFFIXES or suffix in kinds.MODULES or kinds.recognise(data[:4096])
        if known or any(kinds.openers(None, data[:4096])):
            found.setdefault(hashlib.sha256(data).hexdigest(), path)
    return list(found.values())


class Worker:
    """One process that reads files; a new one is needed after a crash or a hang."""

    def __init__(self, magick: str) -> None:
        self.here, there = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, magick))
        self.process.start()
        there.close()
        self.here.recv()  # its imports are not the first file's time

    def ask(self, path: Path, limit: float) -> dict[str, Any]:
        """What became of a file."""
        self.here.send(path)
        try:
            if self.here.poll(limit):
                return self.here.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return {"path": str(path), "result": "crash", "reason": f"exit code {self.process.exitcode}"}
        self.process.kill()
        return {"path": str(path), "result": "hang", "reason": f"more than {limit} s"}


def serve(requests: Connection, magick: str) -> None:
    """Say that the imports are done, then read files until the other end goes."""
    requests.send(None)
    while True:
        try:
            path = requests.recv()
        except EOFError:
            return
        requests.send({"path": str(path), **read(path, magick)})


def read(path: Path, magick: str) -> dict[str, Any]:
    """Load a file and compare it; what is not an error of ours is a traceback that a user would see."""
    try:
        images, info = load_image_with_info(path, max_pixels=MAX_PIXELS)
    except ImageError as error:
        return {"result": "refused", "class": refusal(str(error)), "reason": str(error)}
    except LatentVAEError as error:
        return {"result": "refused", "class": type(error).__name__, "reason": str(error)}
    except BaseException as error:
        return {"result": "error", "reason": f"{type(error).__name__}: {error}"}
    row: dict[str, Any] = {"result": "loaded", "format": info.format, "mode": info.mode, "notes": info.notes}
    if info.format not in HDR:
        row |= compare(to_uint8(images).permute(1, 2, 0).numpy().astype(np.int16), path, magick)
    return row


def refusal(message: str) -> str:
    """The class a message belongs to."""
    return next((name for name, words in WORDS.items() if any(word in message for word in words)), "damaged")


def compare(ours: np.ndarray, path: Path, magick: str) -> dict[str, Any]:
    """Mean difference (levels of 255) to libvips, and to ImageMagick where that is not small; or sizes."""
    found: dict[str, Any] = {}
    for name, reader in (("libvips", by_vips), ("ImageMagick", lambda path: by_magick(path, magick))):
        try:
            other = reader(path)
        except Exception as error:
            found[f"{name} says"] = str(error)[:200]
            continue
        if other.shape != ours.shape:
            found[name] = f"{other.shape[1]}x{other.shape[0]} instead of {ours.shape[1]}x{ours.shape[0]}"
            continue
        found[name] = round(float(np.abs(other.astype(np.int16) - ours).mean()), 2)
        if found[name] <= 1:
            break
    return found


def by_vips(path: Path) -> np.ndarray:
    """uint8 (H, W, 3): upright, in sRGB, on white."""
    import pyvips

    image = pyvips.Image.new_from_file(str(path), fail_on="error").autorot()
    if image.get_typeof("icc-profile-data"):
        image = image.icc_transform("srgb", embedded=True, intent="relative", black_point_compensation=True)
    image = image.colourspace("srgb")
    if image.hasalpha():
        image = image.flatten(background=[255, 255, 255])
    pixels = image.cast("uchar").numpy()
    return pixels if pixels.ndim == 3 and pixels.shape[2] == 3 else np.dstack([pixels] * 3)


def by_magick(path: Path, magick: str) -> np.ndarray:
    """The same by ImageMagick."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder, "sRGB.icc")
        profile.write_bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        steps = ["-auto-orient", "-background", "white", "-alpha", "remove", "-profile", str(profile)]
        command = [magick, f"{path}[0]", *steps, "-colorspace", "sRGB", "-type", "TrueColor", "-depth", "8"]
        done = subprocess.run([*command, "ppm:-"], capture_output=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(done.stderr.decode("utf-8", "replace").strip())
    return np.asarray(Image.open(io.BytesIO(done.stdout)).convert("RGB"))


def report(rows: list[dict[str, Any]]) -> None:
    """Print counts, and the pictures that every other reader shows otherwise."""
    print(f"{len(rows)} files, each content once")
    for result, count in Counter(row["result"] for row in rows).most_common():
        print(f"| {result} | {count} |")
    for name, count in Counter(row["class"] for row in rows if "class" in row).most_common():
        print(f"| refused: {name} | {count} |")
    for name, count in Counter(row["format"] for row in rows if "format" in row).most_common():
        print(f"| loaded: {name} | {count} |")
    compared = [(row, difference(row)) for row in rows if {"libvips", "ImageMagick"} & row.keys()]
    close, far = sum(n <= 1 for _, n in compared), [row for row, n in compared if n > TOLERANCE]
    print(f"compared {len(compared)}: {close} within a level of one reader, {len(far)} beyond {TOLERANCE:g}:")
    for row in [row for row in rows if row["result"] not in ("loaded", "refused")] + far:
        print(json.dumps(row))


def difference(row: dict[str, Any]) -> float:
    """To the reader that is nearest."""
    numbers = [row[name] for name in ("libvips", "ImageMagick") if isinstance(row.get(name), float)]
    return min(numbers, default=np.inf)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
