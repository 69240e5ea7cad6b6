"""Widgets that gradio lacks: panes that zoom together, and a brush. Their CSS and scripts: static/."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import gradio as gr
import numpy as np
from PIL import Image

from latentvae import images


def static(name: str) -> str:
    """A style sheet or a script of the page, which gradio takes as text."""
    return (files("latentvae.demo") / "static" / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Pane:
    """A picture with what is said of it.

    Attributes:
        title: names it; a row of a table of that name is sorted with it.
        caption: below.
        picture: file of the page, PNG.
        size: width and height of the picture in pixels.
        files: to take home: what each is called, and where it is; both of the page.
    """

    title: str
    caption: str
    picture: str
    size: tuple[int, int]
    files: Sequence[tuple[str, str]] = ()


def zoom_panes(elem_id: str) -> gr.HTML:
    """A place for pictures, zoomed and moved together; its values come from `panes_html`."""
    return gr.HTML(
        label="Pictures side by side",
        css_template=static("panes.css"),
        js_on_load=static("panes.js"),
        apply_default_css=False,  # tables and buttons have their own
        elem_id=elem_id,
    )


def panes_html(panes: Sequence[Pane], table: str) -> str:
    """Pictures of one size, the first being the original; below the others their errors; then a table."""
    # panes.js colours sums of three channels' errors, of which the last one stands for all that are larger
    colours = images.drawing.colour_error(np.arange(3 * images.drawing.ERROR_WHITE + 1) / 3).tobytes().hex()
    # and reads the steps: factors, 0 for the whole picture again, "1:1" for its pixels
    buttons = "".join(
        f'<button data-step="{step}" aria-label="{label}" type="button">{words}</button>'
        for step, label, words in (
            ("0.5", "Zoom out", "&minus;"),
            ("2", "Zoom in", "+"),
            ("0", "The whole picture", "Whole"),
            ("1:1", "1:1, pixel for pixel", "1:1"),
        )
    )
    figures = "".join(_figure(each, number > 0) for number, each in enumerate(panes))
    return (
        f'<div class="lv-panes" data-colours="{colours}" role="group" tabindex="0" aria-label="Pictures: '
        f'plus and minus zoom, arrow keys move">{figures}</div><div class="lv-zoom">{buttons}'
        f"<output>Whole</output><label>Tolerance of the error maps "
        f'<input type="range" min="0" max="{images.drawing.ERROR_WHITE}" value="0"><b>0 levels</b></label>'
        "<span>Click, wheel or pinch to zoom, drag to move: all pictures follow.</span></div>"
        f'<div class="lv-table" role="region" tabindex="0" aria-label="Figures">{table}</div>'
    )


def _figure(pane: Pane, with_error: bool) -> str:
    title, width, height = html.escape(pane.title), *pane.size
    window = f'<div class="lv-window" style="aspect-ratio: {width} / {height}">'
    below = (
        f'{window}<canvas role="img" aria-label="Error map of {title}"></canvas></div>'
        if with_error
        else '<p class="lv-legend">Errors, mean of the channels: black is none, white is '
        f"{images.drawing.ERROR_WHITE} of 255 levels or more. What is within the tolerance is black.</p>"
    )
    links = "".join(
        f'<a href="{address(file)}" download="{html.escape(Path(file).name)}">{html.escape(words)}</a>'
        for words, file in pane.files
    )
    return (
        f'<figure class="lv-pane" data-name="{title}"><figcaption><b>{title}</b>'
        f"<span>{html.escape(pane.caption)}</span></figcaption>"
        f'{window}<img alt="{title}" draggable="false" src="{address(pane.picture)}"></div>'
        f'{below}<p class="lv-under"><span></span>{links}</p></figure>'
    )


def sorting_table(head: Sequence[str], rows: Sequence[Sequence[tuple[str, float | str | None]]]) -> str:
    """A table whose rows panes.js sorts by what is clicked: cells are words, and what they are sorted by."""
    titles = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{html.escape(each)}</button></th>'
        for each in head
    )
    lines = ""
    for row in rows:
        cells = "".join(
            f'<td data-value="{"" if value is None else html.escape(str(value))}">{html.escape(words)}</td>'
            for words, value in row
        )
        lines += f'<tr data-name="{html.escape(row[0][0])}">{cells}</tr>'
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def address(file: str) -> str:
    """Where the browser gets a file of the page; relative, as a page may be served below another address."""
    return f"gradio_api/file={quote(file)}"


def brush(picture: Image.Image, strokes: str) -> tuple[gr.HTML, gr.Textbox]:
    """A brush over a picture, and the field that its strokes are handed on in, as a PNG's data URL.

    New pictures to paint on come from `brush_html`.
    """
    view = gr.HTML(
        brush_html(picture),
        css_template=static("brush.css"),
        js_on_load=static("brush.js"),
        elem_id="lv-painter",
    )
    # "hidden", not False: what is invisible to gradio is not in the page, where the script looks for it
    return view, gr.Textbox(strokes, label="Mask", visible="hidden", elem_id="lv-mask")


def brush_html(picture: Image.Image | None, instead: str = "Choose a picture to paint on.") -> str:
    """The brush over a picture, as HTML; without one, words in its place."""
    if picture is None:
        return f'<div class="lv-canvas"><div class="lv-empty">{html.escape(instead)}</div></div>'
    return (
        '<div class="lv-brush"><b>Paint over what is missing</b><label>Brush '
        '<input type="range" min="1" max="15" value="4" aria-label="Width of the brush"></label>'
        '<button type="button" data-act="undo">Undo</button>'
        '<button type="button" data-act="clear">Clear</button></div>'
        f'<div class="lv-canvas"><img alt="The picture to paint on" draggable="false" '
        f'src="{png_data_url(picture)}">'
        # of the picture's own pixels, whatever the screen makes of it: so the mask fits
        f'<canvas width="{picture.width}" height="{picture.height}"></canvas></div>'
    )


def png_data_url(picture: Image.Image) -> str:
    """A picture as PNG in base64, which needs no file on the server."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
