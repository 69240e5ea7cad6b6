"""The tab Reconstruct: an image through the model and back."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import gradio as gr

from latentvae import demo, measure
from latentvae.base.errors import LatentVAEError
from latentvae.demo import snippets, views
from latentvae.demo.desk import Desk, Tab

if TYPE_CHECKING:
    from latentvae.measure.metrics import ImageMetrics, MetricsSummary

ERROR_WHITE = 32  # as in images.drawing, which would have to be loaded for it

PREVIEW_ABOVE = 1_000_000  # pixels: what takes longer than about two seconds on two cores
PREVIEW_SIDE = 640  # pixels of a preview's longer side
SCALE = f"Error: black is none, white is {ERROR_WHITE} of 255 levels or more."


class Reconstruct(Tab):
    """Handlers and layout."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        self._example = ""  # its path, when there is a page
        self._once = threading.Lock()
        self._known: tuple[Any, ...] | None = None  # the example's result

    def run(
        self,
        photo: str | None,
        model: str,
        latents: Literal["mode", "sample"] = "mode",
        seed: float = 0,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  # how gradio wants it
    ) -> Iterator[tuple[Any, ...]]:
        """Encode a picture and decode it again, and measure what was lost.

        Args:
            photo: any image file, of any size.
            model: one of the names that the picker offers.
            latents: "mode" takes the most likely latents, "sample" draws them from the posterior.
            seed: of the sample.

        Yields:
            Original and reconstruction; the error map; the latent channels; figures as HTML; figures with
            their protocol as JSON; the reconstruction as PNG; moments, latents and padding as safetensors.
            Twice: the pictures at once, the rest when it is measured.
        """
        if latents not in ("mode", "sample"):
            raise LatentVAEError(f"latents {latents!r} came; choose mode or sample.")
        with self.desk.models.use(model) as chosen:  # not held over a yield: a visitor may never come back
            read = self.desk.read(photo, chosen.channels)
            images, start = read.image[None], time.perf_counter()
            progress((0, 2), "Encoding")
            posterior, padding = chosen.encode(images)
            drawn = chosen.draw(posterior, latents, int(seed or 0))
            progress((1, 2), "Decoding")
            rebuilt = chosen.decode(drawn, padding)
            seconds = time.perf_counter() - start
        # kept as files at once: gradio would pack both again for the second part
        before, after = views.view(read.image), views.view(rebuilt[0])
        pair = (views.keep_view(before, "original.png"), views.keep_view(after, "reconstruction.png"))
        # None clears what belongs to the picture before, and `desk.on_page` tells a part by it
        yield pair, None, None, views.tiles(_figures(None, seconds)), None, None, None
        metrics = measure.metrics.Metrics(
            self.desk.models.lpips, self.desk.models.lpips_missing_reason, latents
        )
        (row,) = metrics.add(read.name, images, rebuilt, posterior.known_kl())
        file = demo.latents_file.latents_to_bytes(chosen, posterior, drawn, padding)
        yield (
            pair,
            views.keep_view(views.error_view(before, after), "error.png"),
            views.channel_views(drawn),
            views.tiles(_figures(row, seconds), views.sentence([*read.info.notes, *metrics.summary().notes])),
            _details(metrics.summary(), chosen.name, chosen.precision, seconds),
            views.keep_png(rebuilt[0], f"{read.stem}.reconstruction.png"),
            views.keep(file, f"{read.stem}.latents.safetensors"),
        )

    def recall(
        self,
        photo: str | None,
        model: str,
        latents: Literal["mode", "sample"] = "mode",
        seed: float = 0,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  # how gradio wants it
    ) -> Iterator[tuple[Any, ...]]:
        """`run` for the page, on which everybody sees the example first: that is computed once."""
        if (photo, model, latents) != (self._example, self.desk.models.names[0], "mode"):
            yield from self._preview(photo, model)
            yield from self.run(photo, model, latents, seed, progress)
            return
        with self._once:
            files = [] if self._known is None else [*self._known[0], self._known[1], *self._known[-2:]]
            files += [] if self._known is None else [file for file, _ in self._known[2]]
            try:  # of today's date, or the sweeper would take them from under a visitor
                for file in files:
                    os.utime(file)
            except FileNotFoundError:
                self._known = None
            if self._known is None:
                *_, self._known = self.run(photo, model, latents, seed, progress)
        yield self._known

    def _preview(self, photo: str | None, model: str) -> Iterator[tuple[Any, ...]]:
        """A small copy, there and back, before a picture that would be waited for; roughly."""
        pixels = math.prod(self.desk.size(photo)) if photo else 0
        # in full size there has been a better one
        if not PREVIEW_ABOVE <= pixels <= self.desk.limits.copy_pixels:
            return
        with self.desk.models.use(model) as chosen:
            small = self.desk.read_small(photo, chosen.channels, PREVIEW_SIDE).image
            rebuilt = chosen.sketch(small[None])[0]
        pair = (views.show(small, "original.png"), views.show(rebuilt, "reconstruction.png"))
        words = f"A preview of {small.shape[2]} x {small.shape[1]} pixels; the picture follows."
        yield pair, None, None, views.tiles(_figures(None, None), words), None, None, None

    def build(self, model: gr.Dropdown, tab: gr.Tab) -> None:
        """Lay the tab out and connect it; opening the page shows the example's result."""
        desk = self.desk
        photo = desk.shared
        with gr.Row(elem_classes="lv-split"):
            with desk.controls():
                latents = gr.Radio(
                    ["mode", "sample"], value="mode", label="Latents", info="The most likely ones, or drawn."
                )
                seed = gr.Number(0, label="Seed of the sample", precision=0, minimum=0, visible=False)
                button = gr.Button("Reconstruct", variant="primary")
            with desk.results() as message:
                slider_view = desk.slider("lv-slider", "Original and Reconstruction")
                shown_view = gr.HTML("", label="Figures", elem_id="lv-figures")
                with gr.Row(elem_classes="lv-downloads"):
                    picture_file = gr.DownloadButton("Download the picture (PNG)", size="md")
                    tensors_file = gr.DownloadButton(
                        "Download the latents (safetensors)", size="md", elem_id="lv-latents-file"
                    )
                with gr.Row():
                    with gr.Column(min_width=280):
                        error_view = desk.picture("Error map", elem_id="lv-error")
                        gr.HTML(f'<p class="lv-note">{SCALE}</p>')
                    channels_view = desk.gallery("Latent channels")
                with gr.Accordion("Figures with their protocol", open=False):
                    protocol_view = gr.JSON(label="Figures with their protocol", show_label=False)
        latents.change(
            _show_seed, latents, seed, api_name="show_seed", api_visibility="undocumented", queue=False
        )
        self._example = photo.value["path"]
        desk.beforehand.append(lambda: list(self.recall(self._example, desk.models.names[0])))
        desk.connect(
            self.run,
            [photo, model, latents, seed],
            [slider_view, error_view, channels_view, shown_view, protocol_view, picture_file, tensors_file],
            "reconstruct",
            button=button,
            message=message,
            live=[desk.opened, tab.select, latents.input, seed.input],
            on_page_run=self.recall,
            whole=True,
            snippet=snippets.reconstruct,
        )


def _show_seed(latents: str) -> gr.Number:
    """A seed matters to samples only."""
    return gr.Number(visible=latents == "sample")


def _figures(row: ImageMetrics | None, seconds: float | None) -> list[views.Figure]:
    """The figures of one reconstruction for the page; dashes where they are not measured yet."""
    return [
        *views.distances(row),
        (
            views.number(row.rate_bpp if row else None, 2),
            "bits per pixel",
            "KL of the latents: a bound, no file size",
        ),
        (views.number(seconds, 2, " s"), "time", "encoding and decoding"),
    ]


def _details(summary: MetricsSummary, model: str, precision: str, seconds: float) -> dict[str, Any]:
    """The figures as JSON, with all that is needed to compare them with others."""
    (row,) = summary.as_dict()["images"]
    about = {"model": model, "seconds": round(seconds, 3), "decoded_in": precision}
    return {**row, **about, "protocol": asdict(summary.protocol), "notes": list(summary.notes)}
