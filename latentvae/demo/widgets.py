"""Two widgets that gradio lacks: panes that zoom together, and a brush. Their CSS and scripts: static/."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import gradio as gr
from PIL import Image


def static(name: str) -> str:
    """A style sheet or a script of the page, which gradio takes as text."""
    return (files("latentvae.demo") / "static" / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Pane:
    """A picture with what is said of it."""

    title: str
    caption: str
    picture: Image.Image


def zoom_panes(elem_id: str) -> gr.HTML:
    """A place for several pictures, zoomed and moved together; its values come from `panes_html`."""
    return gr.HTML(
        label="Pictures side by side",
        css_template=static("panes.css"),
        js_on_load=static("panes.js"),
        elem_id=elem_id,
    )


def panes_html(panes: Sequence[Pane]) -> str:
    """The panes as HTML, each picture in it as PNG."""
    figures = "".join(
        f'<figure class="lv-pane"><figcaption><b>{html.escape(each.title)}</b>'
        f"<span>{html.escape(each.caption)}</span></figcaption>"
        f'<div class="lv-window"><img alt="{html.escape(each.title)}" draggable="false" '
        f'src="{png_data_url(each.picture)}"></div></figure>'
        for each in panes
    )
    # panes.js reads the steps: factors, and 0 for the whole crop again
    buttons = (
        '<button data-step="0.5" aria-label="Zoom out" type="button">&minus;</button>'
        '<button data-step="2" aria-label="Zoom in" type="button">+</button>'
        '<button data-step="0" aria-label="1:1, the whole crop" type="button">1:1</button>'
    )
    return (
        f'<div class="lv-panes">{figures}</div><div class="lv-zoom">{buttons}<output>1.0 times</output>'
        "<span>Wheel or pinch to zoom, drag to move: all panes follow.</span></div>"
    )


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
