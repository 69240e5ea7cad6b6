"""The tab Compare: up to six ways there and back, side by side, with their errors and a table that sorts."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np

from latentvae import demo, images, measure
from latentvae.base.errors import LatentVAEError
from latentvae.codec import rivals
from latentvae.demo import snippets, views
from latentvae.demo.desk import Tab
from latentvae.demo.guard import Photo
from latentvae.demo.widgets import Pane, panes_html, sorting_table, zoom_panes

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from latentvae.demo.ways import Trip

MOST = 6
STANDARD = (snippets.LVAE, *rivals.WITHIN)

Row = dict[str, Any]
# of the table: what the column is called, and each row's words and what they are sorted by
HEAD = ("Way", "With", "Bytes", "Bits per pixel", "PSNR", "SSIM", "LPIPS", "Encode", "Decode", "Peak memory")


class Compare(Tab):
    """Handler and layout."""

    def run(
        self,
        photo: str | None,
        model: str,
        against: Sequence[str] = STANDARD,
        quality: float = 40,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  # how gradio wants it
    ) -> tuple[Any, ...]:
        """Put a picture through up to six ways and back, and measure each.

        Args:
            photo: any image file, of any size.
            model: writes the .lvae file whose bytes JPEG, WebP and AVIF get too.
            against: one to six of ".lvae", "JPEG", "WebP", "AVIF" and the names of models (whose latents are
                not quantised: no file).
            quality: of the .lvae file, 1 to 100.

        Returns:
            Pictures, error maps and table as HTML; a row of figures for each way as JSON; all of it on one
            sheet, as PNG; the table as CSV.
        """
        chosen = list(dict.fromkeys(against))
        if not 1 <= len(chosen) <= MOST:
            raise LatentVAEError(f"{len(chosen)} ways came; compare one to {MOST} with the original.")
        with self.desk.models.use(model) as used:
            read = self.desk.read(photo, used.channels)
            file = None
            # the .lvae file's bytes are the other files' budget, even where it is not shown itself
            if set(STANDARD) & set(chosen):
                progress((0, len(chosen) + 1), "Compressing")
                file = demo.ways.by_lvae(snippets.LVAE, used, read.image, int(quality))
        size = f"{read.info.width} x {read.info.height} pixels"
        panes, small, rows = [_pane(read, "Original", read.image, size)], [views.view(read.image)], []
        for number, name in enumerate(chosen):
            progress((number + 1, len(chosen) + 1), name)
            trip = self._go(name, read.image, model, file)
            rows.append(self._measure(trip, read))
            # its floats go with it: of a picture in full size they are 200 MB
            panes.append(_pane(read, name, trip.image, _caption(rows[-1]), trip.file))
            small.append(views.view(trip.image))
        shown = panes_html(panes, sorting_table(HEAD, [_cells(row) for row in rows]))
        return shown, rows, _sheet(read, small, rows), _csv(read, rows)

    def _go(self, name: str, image: torch.Tensor, model: str, file: Trip | None) -> Trip:
        models = self.desk.models
        peer = models.peers.get(name)
        # a model is lent to all of them: what else the server does then waits, and takes no time or memory
        with models.use(model if peer or (file and name in STANDARD) else name) as used:
            if peer:
                return demo.ways.by_peer(peer, image)
            if file is None or name not in STANDARD:
                return demo.ways.by_model(used, image)
            return file if name == snippets.LVAE else demo.ways.by_codec(image, name, len(file.file or b""))

    def _measure(self, trip: Trip, read: Photo) -> Row:
        metrics = measure.metrics.Metrics(self.desk.models.lpips)
        (found,) = metrics.add(trip.name, read.image[None], trip.image[None])
        size = None if trip.file is None else len(trip.file)
        return {
            "name": trip.name,
            "how": trip.how,
            "bytes": size,
            "bpp": None if size is None else 8 * size / (read.info.width * read.info.height),
            # no number in JSON where the pictures are equal, or too small to measure
            "psnr": found.psnr if math.isfinite(found.psnr) else None,
            "ssim": found.ssim if math.isfinite(found.ssim) else None,
            "lpips": found.lpips,
            "encode_seconds": round(trip.encode_seconds, 4),
            "decode_seconds": round(trip.decode_seconds, 4),
            "peak_bytes": trip.peak_bytes,
        }

    def build(self, model: gr.Dropdown, tab: gr.Tab) -> None:
        """Lay the tab out and connect it; opening it shows the example's result."""
        desk = self.desk
        photo = desk.shared
        with gr.Column(elem_classes="lv-split"):
            with gr.Row(elem_classes="lv-side"):
                against = gr.CheckboxGroup(
                    [*STANDARD, *desk.models.names, *desk.models.peers],
                    value=list(STANDARD),
                    label="Compare",
                    info="Up to six. Other files get the bytes of the .lvae file; models make no file.",
                    scale=3,
                )
                with gr.Column(scale=1, min_width=240):
                    quality = gr.Slider(1, 100, 40, step=1, label="Quality of .lvae")
                    button = gr.Button("Compare", variant="primary")
            with desk.results() as message:
                view = zoom_panes("lv-compare")
                with gr.Row(elem_classes="lv-downloads"):
                    sheet = gr.DownloadButton("Download all on a sheet (PNG)", size="md")
                    table = gr.DownloadButton("Download the table (CSV)", size="md", elem_id="lv-table-file")
                gr.HTML(
                    '<p class="lv-note">Times and memory are those of one run on this machine, as busy as it '
                    "is; figures are those of the whole picture.</p>"
                )
                with gr.Accordion("Figures as JSON", open=False):
                    rows = gr.JSON(label="Figures as JSON", show_label=False)
        inputs, outputs = [photo, model, against, quality], [view, rows, sheet, table]
        live = [tab.select, against.input, quality.release]
        events: dict[str, Any] = {"button": button, "message": message, "live": live, "whole": True}
        desk.connect(self.run, inputs, outputs, "compare", snippet=snippets.compare, **events)


def _pane(read: Photo, title: str, image: torch.Tensor, caption: str, file: bytes | None = None) -> Pane:
    """A picture of the page, whole, as the page zooms to its pixels; and what is taken home of it."""
    picture = views.keep_view(images.saving.to_pil(image).convert("RGB"), f"{read.stem}.{_bare(title)}.png")
    links = [("PNG", picture)]
    if file is not None:
        suffix = _bare(title)
        links.append((f".{suffix}", views.keep(file, f"{read.stem}.{suffix}")))
    return Pane(title, caption, picture, (read.info.width, read.info.height), links)


def _cells(row: Row) -> list[tuple[str, float | str | None]]:
    """A row of the table."""
    size = row["bytes"]
    same = row["psnr"] is None
    return [
        (row["name"], row["name"]),
        (row["how"], row["how"]),
        ("-" if size is None else views.size(size), size),
        (views.number(row["bpp"], 3), row["bpp"]),
        ("∞" if same else f"{row['psnr']:.2f} dB", math.inf if same else row["psnr"]),
        (views.number(row["ssim"], 3), row["ssim"]),
        (views.number(row["lpips"], 3), row["lpips"]),
        *((_seconds(row[key]), row[key]) for key in ("encode_seconds", "decode_seconds")),
        (f"{row['peak_bytes'] / 1e6:.0f} MB", row["peak_bytes"]),
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _caption(row: Row, *, how: bool = True) -> str:
    """What stands over a picture on the page; on the sheet its name, in place of how it was made."""
    found = {words: cell for words, (cell, _) in zip(HEAD, _cells(row), strict=True)}
    parts = [row["how" if how else "name"], found["PSNR"]]
    if row["bytes"] is not None:
        parts.insert(1, found["Bytes"])
    if row["lpips"] is not None:
        parts.append(f"LPIPS {found['LPIPS']}")
    return " · ".join(parts)


def _bare(title: str) -> str:
    """A way's name within a file's."""
    return title.strip(".").replace("/", "-").lower()


def _csv(read: Photo, rows: Sequence[Row]) -> str:
    """The table as a file of the page."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return views.keep(text.getvalue().encode(), f"{read.stem}.compared.csv")


def _sheet(read: Photo, pictures: Sequence[Image.Image], rows: Sequence[Row]) -> str:
    """Pictures, the first being the original, over error maps, as a file of the page."""
    errors = [views.error_view(pictures[0], each) for each in pictures[1:]]
    # (3, H, W) each
    shown, below = (
        [images.tensors.from_uint8(np.asarray(each)) for each in row] for row in (pictures, errors)
    )
    titles = ["Original", *(_caption(row, how=False) for row in rows)]
    blank = shown[0].new_ones(shown[0].shape)
    drawn = images.drawing.grid([shown, [blank, *below]], titles)
    return views.keep_view(drawn, f"{read.stem}.compared.png")
