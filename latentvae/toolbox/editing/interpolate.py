"""Frames between images: latents along a line or an arc, decoded, and how far apart they look."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.images import drawing, resizing, saving
from latentvae.images.tensors import to_uint8
from latentvae.measure.lpips import LPIPS
from latentvae.models.latents import decode, encode

Route = Literal["linear", "spherical"]

NARROW = 64  # times the pixels wanted that an image may have before it is cropped to them
STRIP_COLUMNS = 9
STRIP_CELL = 256  # display pixels of a frame's longer side
ANIMATIONS: dict[str, dict[str, Any]] = {
    ".webp": {"format": "WEBP", "lossless": True},  # the ends stay the reconstructions
    ".gif": {"format": "GIF", "optimize": False},  # 256 colours
}


@dataclass(frozen=True)
class Interpolation:
    """The way from the first image to the last, by way of those between.

    Attributes:
        frames: (F, C, H, W) near [-1, 1], float32 (float64 for such a model), on the CPU.
        latents: (F, c, h, w), unscaled, that the frames were decoded from.
        positions: F numbers: 0 is the first image, 1 the second, 0.5 half-way between the two.
    """

    frames: Tensor
    latents: Tensor
    positions: list[float]


@dataclass(frozen=True)
class Step:
    """How far apart two frames are, both rounded to 8 bits."""

    rms: float  # root mean square difference in levels, 0..255
    lpips: float | None  # None without a network, or where the frames are too small for it


@torch.no_grad()
def interpolate(
    vae: AutoencoderKL,
    images: Sequence[Tensor],
    frames: int = 9,
    route: Route = "spherical",
    progress: bool = False,
) -> Interpolation:
    """Walk through the latents (posterior modes) of images, in their order, and decode each step.

    The frames at whole positions are exactly `reconstruct`'s reconstructions. Frames are decoded one by one,
    so that how many there are changes none of them.

    Args:
        images: two or more of (C, H, W) in [-1, 1], all of one size; see `match_size`.
        frames: from one image to the next, both counted; 2 or more.
        route: "linear", or "spherical": see `interpolate_latents`.
        progress: show a bar on standard error.

    Raises:
        LatentVAEError: fewer than two images, sizes that differ, or an unknown route.
    """
    _check(images, frames, route)
    # one by one as well: in a batch an image's latents would be rounded otherwise than `reconstruct`'s
    encoded = [encode(vae, image[None]) for image in images]
    ends, padding = [posterior.mode().cpu() for posterior, _ in encoded], encoded[0][1]
    latents = [ends[0]]
    for start, end in pairwise(ends):
        latents += interpolate_latents(start, end, frames, route)[1:]  # the first is there already
    first = decode(vae, latents[0], padding).cpu()
    decoded = first.new_empty(len(latents), *first.shape[1:])  # once, as they may be gigabytes
    decoded[0] = first[0]
    for number in tqdm(range(1, len(latents)), unit="frame", disable=not progress):
        decoded[number] = decode(vae, latents[number], padding)[0].cpu()
    positions = [number / (frames - 1) for number in range(len(latents))]
    return Interpolation(decoded, torch.cat(latents), positions)


def interpolate_latents(start: Tensor, end: Tensor, frames: int, route: Route) -> list[Tensor]:
    """Latents from `start` to `end`, (1, c, h, w) each; the first and the last are those two themselves.

    "spherical" turns about the mean of both per channel. On photographs, with f8c4-small's first weights,
    half-way frames then keep 0.99 of the images' contrast (about 0: 0.93, linear: 0.64), encode back to their
    latents more closely than those of a line, and LPIPS steps are more even.

    Args:
        frames: how many, both ends counted.
    """
    weights = [number / (frames - 1) for number in range(1, frames - 1)]
    if route == "linear":
        inner = [torch.lerp(start, end, weight) for weight in weights]
    else:
        mean = torch.lerp(start, end, 0.5).mean((2, 3), keepdim=True)  # (1, c, 1, 1)
        inner = [slerp(start, end, weight, mean) for weight in weights]
    return [start, *inner, end]


def slerp(start: Tensor, end: Tensor, weight: float, mean: Tensor | float = 0.0) -> Tensor:
    """Turn latents from `start` to `end` about `mean` at constant speed, their norm going along linearly.

    Each image's latents are one vector. A straight line passes near the mean, where latents are weaker than
    any image's and decode to pictures with less contrast. Where there is no arc (equal or opposite
    directions, or latents that are the mean itself), it is the straight line. After Shoemake, "Animating
    rotation with quaternion curves", SIGGRAPH 1985. Computed in float64.

    Args:
        start: (B, c, h, w).
        end: the same shape.
        weight: 0 is `start`, 1 is `end`.
        mean: broadcasts to the latents.
    """
    centre = mean.cpu().double() if isinstance(mean, Tensor) else mean
    first, last = (latents.cpu().double() - centre for latents in (start, end))
    norms = [torch.linalg.vector_norm(each, dim=(1, 2, 3), keepdim=True) for each in (first, last)]
    # latents that are the mean have no direction: 0 instead of NaN, and the line below
    tiny = torch.finfo(torch.float64).tiny
    one, other = first / norms[0].clamp_min(tiny), last / norms[1].clamp_min(tiny)
    # Kahan's formula: exact for small angles, where the arc cosine of a product is not
    chords = [
        torch.linalg.vector_norm(each, dim=(1, 2, 3), keepdim=True) for each in (one - other, one + other)
    ]
    angle = 2 * torch.atan2(*chords)
    sine = torch.sin(angle)
    norm = torch.lerp(norms[0], norms[1], weight)
    arc = (torch.sin((1 - weight) * angle) * one + torch.sin(weight * angle) * other) / sine * norm
    # also opposite directions: through which of all the planes would they turn?
    flat = (sine < 1e-9) | (norms[0] == 0) | (norms[1] == 0)
    return (torch.where(flat, torch.lerp(first, last, weight), arc) + centre).to(start)


@torch.no_grad()
def step_sizes(frames: Tensor, lpips: LPIPS | None = None) -> list[Step]:
    """Measure from each frame (F, C, H, W) in [-1, 1] to the next: F - 1 steps."""
    small = lpips is not None and min(frames.shape[-2:]) < lpips.min_size
    network = None if small else lpips
    steps: list[Step] = []
    before: Tensor | None = None
    features: list[Tensor] = []
    for frame in frames:
        levels = to_uint8(frame[None]).float()  # as people get them: in files
        seen = network.features(levels.to(network.shift) / 127.5 - 1) if network else []
        if before is not None:
            distance = network.distance_from_features(features, seen).item() if network else None
            steps.append(Step((levels - before).square().mean().sqrt().item(), distance))
        before, features = levels, seen  # each frame goes through the network once, not twice
    return steps


def match_size(image: Tensor, height: int, width: int) -> Tensor:
    """Scale an image (C, H, W) until it just covers height x width, and cut out the middle.

    Raises:
        ImageError: so long and narrow that hardly anything of it would be left.
    """
    old_height, old_width = image.shape[-2:]
    scale = max(height / old_height, width / old_width)
    resized = max(width, round(scale * old_width)), max(height, round(scale * old_height))
    if resized[0] * resized[1] > NARROW * height * width:  # a line of pixels would become terabytes
        raise ImageError(
            f"an image of {old_width}x{old_height} px would be scaled to {resized[0]}x{resized[1]} px to cut "
            f"{width}x{height} px out of it: crop it first, or leave it out."
        )
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    # None where nothing is to be resized: resampling to the same size would still change pixels
    target = None if resized == (old_width, old_height) else resized
    geometry = resizing.Geometry(target, (left, top, width, height))
    return geometry.apply(image)


def strip(interpolation: Interpolation, steps: Sequence[Step]) -> Image.Image:
    """Draw the frames in rows, each under its position and the step from the frame before it."""
    titles = [f"{interpolation.positions[0]:.2f}"]
    for position, step in zip(interpolation.positions[1:], steps, strict=True):
        size = f"rms +{step.rms:.1f}" if step.lpips is None else f"LPIPS +{step.lpips:.3f}"
        titles.append(f"{position:.2f}  {size}")
    cells = [resizing.thumbnail(frame, STRIP_CELL) for frame in interpolation.frames]
    rows = [slice(first, first + STRIP_COLUMNS) for first in range(0, len(cells), STRIP_COLUMNS)]
    drawn = [drawing.grid([cells[row]], titles[row]) for row in rows]
    area = max(row.width for row in drawn), sum(row.height for row in drawn)
    canvas = Image.new("RGB", area, drawing.WHITE)
    for number, row in enumerate(drawn):
        canvas.paste(row, (0, sum(each.height for each in drawn[:number])))
    return canvas


def save_animation(frames: Tensor | Sequence[Tensor], path: str | Path, fps: float = 10.0) -> None:
    """Write frames (F, C, H, W) in [-1, 1] as an endless lossless WebP or a GIF, by suffix.

    Raises:
        ImageError: another suffix, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in ANIMATIONS:
        raise ImageError(f"{path} ends in '{path.suffix}': animations are saved as {', '.join(ANIMATIONS)}")
    first, *others = [saving.to_pil(frame).convert("RGB") for frame in frames]
    duration = round(1000 / fps)  # of a frame, in ms
    options = {**ANIMATIONS[path.suffix.lower()], "duration": duration, "loop": 0}  # 0: for ever
    saving.save_picture(first, path, save_all=True, append_images=others, **options)


def _check(images: Sequence[Tensor], frames: int, route: str) -> None:
    if route not in get_args(Route):
        raise LatentVAEError(f"route {route!r} came; choose one of {', '.join(get_args(Route))}.")
    if len(images) < 2:
        raise LatentVAEError(
            f"{len(images) or 'no'} image came, but there is a way only between two or more."
        )
    if frames < 2:
        raise LatentVAEError(f"frames={frames} came, but both ends are frames: pass 2 or more.")
    sizes = [tuple(image.shape[-2:]) for image in images]
    other = next((size for size in sizes if size != sizes[0]), None)
    if other is not None:
        raise ImageError(
            f"images of {sizes[0][1]}x{sizes[0][0]} and {other[1]}x{other[0]} px came, but frames have one "
            "size: scale and crop the others first (match_size; --fit on the command line)."
        )
