"""The tab Compare: models, and JPEG and WebP at equal bytes, side by side on one crop."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import gradio as gr
import torch
from PIL import Image

from latentvae.base.errors import LatentVAEError
from latentvae.codec import compression as codec
from latentvae.demo import views
from latentvae.demo.desk import Tab
from latentvae.demo.guard import Photo
from latentvae.demo.widgets import Pane, panes_html, zoom_panes
from latentvae.images.reading import load_image
from latentvae.images.saving import to_pil
from latentvae.measure.metrics import Metrics
from latentvae.models.latents import reconstruct

MOST = 3
Side = Literal["64", "128", "256", "512"]  # as text: so gradio describes choices to clients
LVAE, JPEG, WEBP = ".lvae", "JPEG", "WebP"
QUALITIES = {JPEG: (1, 95), WEBP: (0, 100)}  # above 95 JPEG only grows, says Pillow

Entry = tuple[str, torch.Tensor, str, int | None]  # title, image, what it took, bytes


class Compare(Tab):
    """Handler and layout."""

    def run(
        self,
        photo: str | None,
        model: str,
        against: Sequence[str] = (LVAE, JPEG, WEBP),
        quality: float = 40,
        across: float = 0.35,
        down: float = 0.4,
        side: Side = "128",
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  # how gradio wants it
    ) -> tuple[Any, ...]:
        """Show one crop of a picture after several treatments, and measure the whole picture.

        Args:
            photo: any image file, of any size.
            model: writes the .lvae file whose bytes JPEG and WebP get too.
            against: one to three of ".lvae", "JPEG", "WebP" and the models' names (whose latents are not
                quantised: no file).
            quality: of the .lvae file, 1 to 100.
            across, down: the crop's middle, as shares of width and height, 0 to 1.
            side: of the crop in pixels.

        Returns:
            The crops as HTML; a row of figures for each treatment as JSON.
        """
        if not 1 <= len(against) <= MOST:
            raise LatentVAEError(f"{len(against)} choices came; compare one to {MOST} with the original.")
        with self.desk.models.use(model) as chosen:
            read = self.desk.read(photo, chosen.channels)
            budget, entries = None, []
            # the .lvae file's bytes are JPEG's and WebP's budget, even where it is not shown itself
            if {LVAE, JPEG, WEBP} & set(against):
                progress(0.1, "Compressing")
                budget = codec.compress(chosen.exact, read.image[None], quality=int(quality))
        for number, name in enumerate(against):  # each takes its own model, now that none is held
            progress((number + 1) / (MOST + 1), name)
            entries.append(self._treat(name, read, model, budget))
        box = _crop_box(read, across, down, int(side))
        rows, shown = [], [Pane("Original", _size_of(read, box), _cut(read.image, box))]
        for title, image, how, size in entries:
            row = self._measure(title, read, image, how, size)
            rows.append(row)
            shown.append(Pane(title, _caption(row), _cut(image, box)))
        return panes_html(shown), rows

    def _treat(self, name: str, read: Photo, model: str, data: bytes | None) -> Entry:
        if name in (JPEG, WEBP) and data is not None:
            coded = best_within(read.image, name, len(data))
            how = f"quality {coded.quality}" + ("" if coded.fits else ", its smallest")
            return name, coded.image, how, coded.size
        with self.desk.models.use(model if name == LVAE else name) as used:
            if name == LVAE and data is not None:
                decoded = codec.decode_payload(used.swift, *codec.unpack(data))[0]
                return f".lvae, {used.name}", decoded, "latents, quantised", len(data)
            # (1, C, H, W): a model of grey images among those of colour
            rebuilt = reconstruct(used.swift, _as_channels(read.image, used.channels)[None])
            image = _as_channels(rebuilt.reconstructions[0], read.image.shape[0])
            return used.name, image, "no file: latents not quantised", None

    def _measure(
        self, title: str, read: Photo, image: torch.Tensor, how: str, size: int | None
    ) -> dict[str, Any]:
        (row,) = Metrics(self.desk.models.lpips).add(title, read.image[None], image[None])
        figures = {"psnr": row.psnr, "ssim": row.ssim, "lpips": row.lpips}
        return {"name": title, "how": how, "bytes": size, **figures}

    def build(self, model: gr.Dropdown, tab: gr.Tab) -> None:
        """Lay the tab out and connect it; opening it shows the example's result."""
        desk = self.desk
        photo = desk.shared
        with gr.Row(elem_classes="lv-split"):
            with desk.controls():
                against = gr.CheckboxGroup(
                    [LVAE, JPEG, WEBP, *desk.models.names],
                    value=[LVAE, JPEG, WEBP],
                    label="Compare",
                    info="Up to three. JPEG and WebP get the bytes of the .lvae file.",
                )
                quality = gr.Slider(1, 100, 40, step=1, label="Quality of the .lvae file")
                with gr.Accordion("Where to look", open=False):
                    across = gr.Slider(0, 1, 0.35, step=0.01, label="Across")
                    down = gr.Slider(0, 1, 0.4, step=0.01, label="Down")
                    side = gr.Radio([*get_args(Side)], value="128", label="Side of the crop, pixels")
                button = gr.Button("Compare", variant="primary")
            with desk.results() as message:
                view = zoom_panes("lv-compare")
                gr.HTML('<p class="lv-note">Figures are those of the whole picture.</p>')
                with gr.Accordion("Figures as JSON", open=False):
                    rows = gr.JSON(label="Figures as JSON", show_label=False)
        inputs, outputs = [photo, model, against, quality, across, down, side], [view, rows]
        live = [tab.select, quality.release, across.release, down.release, side.input]
        events: dict[str, Any] = {"button": button, "message": message, "live": live, "whole": True}
        desk.connect(self.run, inputs, outputs, "compare", **events)


def _crop_box(read: Photo, across: float, down: float, side: float) -> tuple[int, int, int]:
    """Left, top and side of a square crop, moved and shrunk until it lies in the picture."""
    width, height = read.info.width, read.info.height  # pixels, upright
    length = max(1, min(int(side), width, height))
    left, top = (
        round(min(max(share * total - length / 2, 0), total - length))
        for share, total in ((across, width), (down, height))
    )
    return left, top, length


def _size_of(read: Photo, box: tuple[int, int, int]) -> str:
    """What the crop shows of the picture."""
    return f"{box[2]} x {box[2]} of {read.info.width} x {read.info.height} pixels"


def _cut(image: torch.Tensor, box: tuple[int, int, int]) -> Any:
    left, top, side = box
    return to_pil(image[:, top : top + side, left : left + side]).convert("RGB")


def _as_channels(image: torch.Tensor, channels: int) -> torch.Tensor:
    """Grey for a model of grey images, and grey shown as RGB."""
    if image.shape[0] == channels:
        return image
    return image.mean(0, keepdim=True) if channels == 1 else image.expand(3, -1, -1)


def _caption(row: dict[str, Any]) -> str:
    parts = [] if row["bytes"] is None else [views.size(row["bytes"])]
    parts += [row["how"], views.number(row["psnr"], 2, " dB")]
    if row["lpips"] is not None:
        parts.append(f"LPIPS {row['lpips']:.3f}")
    return " · ".join(parts)


@dataclass(frozen=True)
class Coded:
    """An image through a codec.

    Attributes:
        image: (C, H, W) in [-1, 1], decoded again.
        size: of the file, in bytes.
        quality: what the codec was set to.
        fits: whether the file is no larger than was asked for; the codec's smallest may be.
    """

    image: torch.Tensor
    size: int
    quality: int
    fits: bool


def best_within(image: torch.Tensor, name: str, budget: int) -> Coded:
    """The best file of a format of at most `budget` bytes, or the smallest there is.

    Args:
        image: (C, H, W) in [-1, 1], C of 1 or 3.
        name: of the format, as Pillow writes it (JPEG: optimised, 4:2:0; WebP: its slowest method).
        budget: bytes.
    """
    picture = to_pil(image)
    low, high = QUALITIES[name]
    best, data = low, _encode(picture, name, low)
    fits = len(data) <= budget
    while fits and low < high:  # sizes grow with quality, so halving finds the best
        middle = (low + high + 1) // 2  # rounded up, or low and its neighbour would never end
        tried = _encode(picture, name, middle)
        if len(tried) <= budget:
            low, best, data = middle, middle, tried
        else:
            high = middle - 1
    decoded = load_image(data, name=name, channels=image.shape[0])
    return Coded(decoded, len(data), best, fits)


def _encode(picture: Image.Image, name: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    # what makes each smallest at its quality, or the comparison would flatter the model
    options = {"optimize": True} if name == JPEG else {"method": 6}
    picture.save(buffer, format=name.upper(), quality=quality, **options)
    return buffer.getvalue()
