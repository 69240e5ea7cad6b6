"""The tab Fill in: paint over what is missing, and have it completed."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any, Literal

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from latentvae import images
from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.demo import snippets, views
from latentvae.demo.desk import Tab
from latentvae.demo.guard import HEAVY, guarded
from latentvae.demo.widgets import brush, brush_html, png_data_url
from latentvae.toolbox import editing

if TYPE_CHECKING:
    import torch

MASK_BYTES = 4 << 20  # in base64; `Limits.input_bytes` leaves room for it
SHAPE_SLACK = 0.03  # of the ratio of width to height, in which mask and picture may differ


class FillIn(Tab):
    """Handlers and layout."""

    _example = ""  # its path, when there is a page

    def run(
        self,
        photo: str | None,
        mask: str,
        model: str,
        method: Literal["project", "optimise"] = "project",
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  # how gradio wants it
    ) -> tuple[Any, ...]:
        """Complete a picture where a mask is white; all other pixels stay as they are.

        Args:
            photo: any image file; large ones are shrunk.
            mask: a PNG as a data URL ("data:image/png;base64,..."), of the picture's proportions.
            model: one of the names that the picker offers.
            method: "project" encodes and decodes three times; "optimise" fits the latents to the known
                pixels, which takes about a minute.

        Returns:
            The picture with its hole, and completed; figures as HTML; the completed picture, and the mask of
            its size, as PNG.
        """
        with self.desk.models.use(model) as chosen:
            read = self.desk.read_small(photo, chosen.channels)
            image = read.image
            missing = _read_mask(mask, *image.shape[-2:])
            if not bool(missing.any()):
                raise ImageError("Nothing is painted yet: paint over what should be filled in.")
            # gradients need float32; one pass after the other does not
            vae = chosen.exact if method == "optimise" else chosen.swift
            total = 2 * editing.fill.STEPS[method]  # for the trial on hidden pixels, and for the picture
            done = iter(range(total + 1))
            result = editing.fill.fill(
                vae,
                image[None],
                missing,
                method=method,
                progress=lambda: progress((next(done, total), total), "Filling in"),
            )
        # grey, the middle of [-1, 1]
        hole = image.masked_fill(missing, 0.0)
        share = float(missing.float().mean())
        shown = [
            (f"{100 * share:.1f} %", "was missing", f"of {image.shape[-1]} x {image.shape[-2]} pixels"),
            (f"{100 * result.detail:.0f} %", "of the model's detail", "helped on pixels hidden as a test"),
            (f"{result.plate:.2f}", "thin plate", "the rest is a smooth continuation"),
        ]
        picture = views.keep_png(result.images[0], f"{read.stem}.filled.png")
        pair = (views.show(hole, "hole.png"), views.show(result.images[0], "filled.png"))
        white = missing[None].float() * 2 - 1
        return pair, views.tiles(shown), picture, views.keep_png(white, f"{read.stem}.mask.png")

    def show(self, photo: str | None) -> tuple[Any, Any]:
        """The picture under the brush, with nothing painted yet.

        Args:
            photo: any image file; None takes it away.
        """
        if photo == self._example:  # as the page was opened: its strokes stay
            return gr.skip(), gr.skip()
        try:
            return brush_html(None if photo is None else self._small(photo)), ""
        except LatentVAEError as error:
            return brush_html(None, str(error)), ""

    def _small(self, photo: str) -> Image.Image:
        return images.saving.to_pil(self.desk.read_small(photo).image)

    def build(self, model: gr.Dropdown, tab: gr.Tab) -> None:
        """Lay the tab out and connect it; opening it shows the example's result."""
        desk = self.desk
        photo = desk.shared
        self._example = photo.value["path"]
        small = desk.example_picture()
        small.thumbnail((desk.limits.explore_side,) * 2)
        with gr.Row(elem_classes="lv-split"):
            with desk.controls():
                method = gr.Radio(
                    ["project", "optimise"],
                    value="project",
                    label="Method",
                    info="Seconds, or about a minute for a closer fit.",
                )
                button = gr.Button("Fill in", variant="primary")
            with desk.results() as message:
                view, mask = brush(small, _scratches(*small.size))
                pair = desk.slider("lv-filled", "With its hole and Filled in")
                shown = gr.HTML(label="Figures")
                with gr.Row(elem_classes="lv-downloads"):
                    saved = gr.DownloadButton("Download the picture (PNG)", size="md")
                    white = gr.DownloadButton("Download the mask (PNG)", size="md")
        photo.change(
            guarded(self.show),
            photo,
            [view, mask],
            api_name="brush",
            api_visibility="undocumented",
            show_progress="hidden",
            concurrency_id=HEAVY,
            concurrency_limit=1,
        )
        # not live on a new picture: it has to be painted on first
        inputs, outputs = [photo, mask, model, method], [pair, shown, saved, white]
        events: dict[str, Any] = {"button": button, "message": message, "live": [tab.select]}
        desk.connect(self.run, inputs, outputs, "fill", snippet=snippets.fill, **events)


def _read_mask(mask: str, height: int, width: int) -> torch.Tensor:
    """Which pixels (height, width) a mask covers with white, from a data URL of a PNG of any size.

    Raises:
        ImageError: no data URL of a picture, too large, or of other proportions than the picture's.
    """
    kind, _, text = (mask or "").partition(",")
    if not text:
        raise ImageError("Nothing is painted yet: paint over what should be filled in.")
    if kind != "data:image/png;base64" or len(text) > MASK_BYTES:
        raise ImageError("The mask must be a PNG as a data URL, data:image/png;base64,... of up to 4 MB.")
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ImageError(f"The mask is no base64 ({error}): encode the PNG again.") from error
    read = images.reading.load_image
    white = read(data, name="the mask", background=(0, 0, 0), max_pixels=1 << 22, channels=1)[0] > 0
    high, wide = white.shape  # of the brush's canvas, or of whatever a client sends
    if abs(wide / high * height / width - 1) > SHAPE_SLACK:
        raise ImageError(
            f"The mask is {wide} x {high} pixels and the picture {width} x {height}: paint on this one."
        )
    # the nearest pixel, in whole numbers: nothing is half painted
    rows = (np.arange(height) * high) // height
    columns = (np.arange(width) * wide) // width
    return white[rows][:, columns]


def _scratches(width: int, height: int) -> str:
    """A mask with a few strokes, to begin with."""
    picture = Image.new("L", (width, height))
    pen, random = ImageDraw.Draw(picture), np.random.default_rng(4)  # the same strokes for everybody
    for _ in range(5):
        steps = np.cumsum(random.normal(0, 0.04, (9, 2)) + random.normal(0, 0.06, 2), 0)
        points = (random.uniform(0.15, 0.85, 2) + steps) * (width, height)
        pen.line([tuple(point) for point in points], fill=255, width=max(3, width // 60), joint="curve")
    return png_data_url(picture)
