"""What the verbs share: model and device, images, output folders and the --json convention."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from diffusers import AutoencoderKL
from tqdm import tqdm

from latentvae.base.errors import ImageError, LatentVAEError, MissingWeightsError
from latentvae.images.reading import load_image_with_info
from latentvae.images.resizing import thumbnail
from latentvae.measure.lpips import LPIPS, load_lpips
from latentvae.models.loading import load
from latentvae.runtime.optimize import optimize
from latentvae.runtime.tiling.fitting import tile_to_fit

LONGEST_NAME = 255  # bytes of a file name that common file systems take
EXIT_SKIPPED = 3
EXIT_INTERRUPTED = 130  # as shells have it


def load_model(model: str | None, device: str | None, precision: str) -> AutoencoderKL:
    """The model, optimized, at this precision.

    Raises:
        LatentVAEError: no such model or device, or no room on it.
    """

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    place = usable_device(device)
    try:
        return optimize(load(model, dtype=dtype, device=place))
    except torch.OutOfMemoryError as error:
        raise LatentVAEError(f"the model does not fit on {place}: {error}. Try --device cpu.") from error


def usable_device(device: str | None) -> torch.device:
    """The device that was named, or the best one.

    Raises:
        LatentVAEError: it is not there.
    """

    try:
        place = torch.device(device or best_device())
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
        raise LatentVAEError(f"device {device!r} cannot be used: {error}. Try --device cpu.") from error
    return place


def best_device() -> str:
    """cuda, mps or cpu."""

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_lpips(net: Any, weights: Path | None, device: torch.device) -> tuple[LPIPS | None, str | None]:
    """The LPIPS network, or None and the reason. Weights that were named and cannot be used are an error."""

    try:
        return load_lpips(net, weights).to(device), None
    except MissingWeightsError as error:
        if weights is not None:
            raise
        return None, str(error)


def image_channels(vae: AutoencoderKL) -> int:
    """1 or 3, as the model takes.

    Raises:
        LatentVAEError: a model of other channels; image files do not hold those.
    """
    channels = vae.config["in_channels"]
    if channels not in (1, 3):
        raise LatentVAEError(
            f"this model takes {channels} channels; image files have 1 or 3. Use the Python functions."
        )
    return channels


def read_images(
    paths: list[Path],
    vae: AutoencoderKL,
    skipped: list[dict[str, str]],
    tile_size: int | None = None,
    store: Path | None = None,
    longest: int | None = None,
) -> Iterator[tuple[Path, Any, Any]]:
    """(path, image, info) of each file that can be read and fits into memory; the others are skipped.

    While an image is out, the VAE tiles if it must: see `tile_to_fit`. With `longest`, larger images are
    shrunk to that many pixels along their longer side first.
    """

    channels = image_channels(vae)
    for path in tqdm(paths, unit="image", disable=len(paths) < 2):
        try:
            image, info = load_image_with_info(path, channels=channels)
            if longest is not None:
                image = shrink(image, longest)
            height, width = image.shape[-2:]
            tile_to_fit(vae, path, height, width, tile_size, store)
        except ImageError as error:
            skip(path, error, skipped)
            continue
        yield path, image, info


def shrink(image: torch.Tensor, longest: int) -> torch.Tensor:
    """An image (C, H, W) with at most `longest` pixels along its longer side."""

    return thumbnail(image, longest)


def skip(path: Path, error: LatentVAEError, skipped: list[dict[str, str]]) -> None:
    """Name a file that is left out on standard error, beside the progress bar and not in it."""

    skipped.append({"path": str(path), "reason": str(error)})
    tqdm.write(f"skipped: {error}", file=sys.stderr)


def short_names(files: list[Path], sources: list[Path]) -> dict[Path, Path]:
    """What to call each file: its path below the folder it was found in; a file named itself has no folder.

    Suffixes stay: a.jpg and a.png are two images. Where two files would be called the same, all are called by
    their path below what they have in common.
    """
    names = {file: _below(file, sources) for file in files}
    if len(set(names.values())) == len(names):
        return names
    places = {file: Path(os.path.normpath(file.absolute())) for file in files}
    common = os.path.commonpath([place.parent for place in places.values()])
    return {file: place.relative_to(common) for file, place in places.items()}


def _below(path: Path, sources: list[Path]) -> Path:
    for source in sources:
        if source.is_dir() and path.is_relative_to(source):
            return path.relative_to(source)
    return Path(path.name)


def check_output(output: Path, sources: list[Path]) -> None:
    """Refuse to write among the originals: the next run would take what this one writes for some.

    Raises:
        LatentVAEError: the output is in a folder of images, or the folder of one.
    """
    target = output.resolve()
    for source in sources:
        place = source.resolve()
        among = target.is_relative_to(place) if source.is_dir() else target == place.parent
        if among:
            raise LatentVAEError(
                f"the output {output} lies among the images ({source}), so that another run would take what "
                "this one writes for images too: choose another --output."
            )


def make_folder(folder: Path) -> Path:
    """Create an output folder.

    Raises:
        LatentVAEError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".latentvae-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise LatentVAEError(f"{folder} cannot be written to ({reason}). Choose another folder.") from error
    return folder


def with_ending(name: str, ending: str, key: str | None = None) -> str:
    """A file's name with an ending added; one that is too long for that is cut, and gets a hash of `key`."""
    if len(os.fsencode(name + ending)) <= LONGEST_NAME:
        return name + ending
    ending = f"~{hashlib.sha256(os.fsencode(key or name)).hexdigest()[:16]}{ending}"
    while len(os.fsencode(name)) + len(ending) > LONGEST_NAME:
        name = name[:-1]
    return name + ending


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def finish(skipped: list[dict[str, str]], done: int) -> None:
    """End with exit code 3 where some inputs were skipped.

    Raises:
        LatentVAEError: all of them were.
    """
    if skipped and not done:
        first = skipped[0]["reason"]
        if len(skipped) == 1:
            raise LatentVAEError(f"the only image could not be read: {first}")
        raise LatentVAEError(f"none of the {len(skipped)} images could be read; the first: {first}")
    if skipped:
        were = "was" if len(skipped) == 1 else "were"
        of = f"{len(skipped)} of {counted(done + len(skipped), 'image')}"
        typer.echo(f"{of} {were} skipped, as named above.", err=True)
        raise typer.Exit(EXIT_SKIPPED)


def print_json(result: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    typer.echo(json.dumps(result))  # in ASCII: names need not be UTF-8
