"""Pictures and figures as the page shows them."""

from __future__ import annotations

import html
import io
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gradio.utils import get_upload_folder
from PIL import Image

from latentvae import images
from latentvae.toolbox import editing

if TYPE_CHECKING:
    import torch

    from latentvae.measure.metrics import ImageMetrics

VIEW_SIDE = 1600  # pixels that a screen shows of a picture's longer side; downloads are whole
CHANNEL_SIDE = 256  # pixels to which channels of latents are enlarged
NAME_BYTES = 150  # of a result without its suffix; file systems take 255
SPREAD = 3.0  # standard deviations that reach black and white in a picture of a latent channel

Figure = tuple[str, str, str]  # value, name, what it means


def view(image: torch.Tensor) -> Image.Image:
    """One image (C, H, W) near [-1, 1] for the screen."""
    return images.saving.to_pil(images.resizing.thumbnail(image, VIEW_SIDE)).convert("RGB")


def show(image: torch.Tensor, name: str) -> str:
    """The same as a PNG file of the page."""
    return keep_view(view(image), name)


def keep_view(picture: Image.Image, name: str) -> str:
    """A picture as a PNG file of the page; packed less, in a third of the time gradio would take."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return keep(buffer.getvalue(), name)


def error_view(original: Image.Image, other: Image.Image) -> Image.Image:
    """The error map of two pictures, black where they are equal."""
    return Image.fromarray(images.drawing.colour_error(images.drawing.error_map(original, other)))


def channel_views(latents: torch.Tensor) -> list[tuple[str, str]]:
    """Each channel of latents (1, C, h, w) in grey, enlarged by a whole number, with its range."""
    pictures = []
    for number, plane in enumerate(latents[0].float().cpu(), 1):
        spread = SPREAD * float(plane.std(correction=0)) or 1.0  # 0 where all are equal
        level = ((plane - plane.mean()) / spread).clamp(-1, 1)
        grey = Image.fromarray((level.numpy() * 127.5 + 127.5).round().astype(np.uint8))
        # nearest and by a whole number: every position stays a square of one grey
        factor = max(1, round(CHANNEL_SIDE / max(grey.size)))
        large = grey.resize((grey.width * factor, grey.height * factor), Image.Resampling.NEAREST)
        low, high = float(plane.min()), float(plane.max())
        file = keep_view(large, f"channel {number}.png")
        pictures.append((file, f"channel {number}: {low:.1f} to {high:.1f}"))
    return pictures


def tiles(figures: Sequence[Figure], note: str = "") -> str:
    """Figures as a row of large numbers, each with its name and what it means."""
    cells = "".join(
        f'<div class="lv-figure" title="{html.escape(hint)}"><b>{html.escape(value)}</b>'
        f"<span>{html.escape(name)}</span><small>{html.escape(hint)}</small></div>"
        for value, name, hint in figures
    )
    below = f'<p class="lv-note">{html.escape(note)}</p>' if note else ""
    return f'<div class="lv-figures">{cells}</div>{below}'


def distances(row: ImageMetrics | None) -> list[Figure]:
    """How far a picture is from its original; dashes for one that is not measured yet."""
    found = [
        (number(row.psnr if row else None, 2, " dB"), "PSNR", "pixel by pixel; higher is closer"),
        (number(row.ssim if row else None, 3), "SSIM", "structure; 1 is the same"),
    ]
    if row is None or row.lpips is not None:
        found.append(
            (number(row.lpips if row else None, 3), "LPIPS", "how different it looks; 0 is the same")
        )
    return found


def sentence(notes: Sequence[str]) -> str:
    """Notes in one line."""
    return " · ".join(note[:1].upper() + note[1:] for note in notes)


def number(value: float | None, digits: int, unit: str = "") -> str:
    """A figure for people; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}{unit}"


def size(count: int) -> str:
    """Bytes for people."""
    return (
        f"{count} bytes"
        if count < 1000
        else f"{count / 1000:.1f} kB"
        if count < 1e6
        else f"{count / 1e6:.2f} MB"
    )


def keep(data: bytes, name: str) -> str:
    """Put a file where the page offers it for download, and deletes it later."""
    # cut in bytes, not characters: that is what file systems count
    path = Path(name)
    short = path.stem.encode()[:NAME_BYTES].decode(errors="ignore") + path.suffix
    # a folder of its own: gradio names folders by content, and so writes a file again while it is sent
    file = Path(tempfile.mkdtemp(dir=get_upload_folder()), Path(short).name).resolve()
    file.write_bytes(data)
    return str(file)


def keep_png(image: torch.Tensor, name: str) -> str:
    """The same for an image (C, H, W), whole, as PNG."""
    return keep_view(images.saving.to_pil(image), name)


def keep_animation(frames: torch.Tensor | Sequence[torch.Tensor], name: str, fps: float) -> str:
    """The same for frames (F, C, H, W) as an endless WebP."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.webp")  # a name can be too long for a file
        editing.interpolate.save_animation(frames, path, fps)
        return keep(path.read_bytes(), name)
