"""What the tabs share: models, limits, the example, and components that look and behave alike."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw, ImageOps

from latentvae import images
from latentvae.demo import views
from latentvae.demo.guard import HEAVY, Limits, Photo, guarded, read_photo
from latentvae.demo.jobs import KINDS, stop
from latentvae.demo.loaded_models import Models
from latentvae.demo.on_page import Copied, on_page
from latentvae.demo.snippets import curl
from latentvae.models.shipped import SAMPLE_PICTURE

PART = 160  # pixels of a side of the odd example's parts
SESSION_SECONDS = 3600  # what a visitor saw last is kept
COPIES = 64  # of large pictures that are found again
PHOTO = "lv-photo"  # the class of inputs for one picture
SIMPLE = (gr.Dropdown, gr.Radio, gr.CheckboxGroup, gr.Slider, gr.Number)  # whose values are JSON as they are


# beside the cat, by what each is hard for: latentvae/models/assets/README.md has their sources
_NAMES = ("Face", "Text", "Grass", "Drawing", "Night", "Screen", "Coffee")
EXAMPLES = {"Cat": SAMPLE_PICTURE} | {
    name: SAMPLE_PICTURE.with_name(f"{name.lower()}.jpg") for name in _NAMES
}


class Desk:
    """One server's models and limits, handed to every tab."""

    example = SAMPLE_PICTURE

    def __init__(self, models: Models, limits: Limits) -> None:
        self.models, self.limits = models, limits
        self._copies = lru_cache(COPIES)(self._copy)
        self.opened: Any = None  # the page's own event
        self.shared: Any = None  # the page's picture
        self.beforehand: list[Callable[[], object]] = []  # of the tabs: what the page computes when it is up

    def read(self, photo: str | None, channels: int = 3, *, shrunk: bool = False) -> Photo:
        """An uploaded image, whole, within this server's limits: wider ones if it will be `shrunk`."""
        return read_photo(photo, self.limits, channels, shrunk=shrunk)

    def read_small(self, photo: str | None, channels: int = 3, side: int | None = None) -> Photo:
        """The same, shrunk for tabs that decode many pictures of it, or to a longer side of `side` pixels."""
        read = self.read(photo, channels, shrunk=True)
        return replace(read, image=images.resizing.thumbnail(read.image, side or self.limits.explore_side))

    @staticmethod
    def size(photo: str) -> tuple[int, int]:
        """Width and height by a picture's header; 0 where it has none: reading it says what is wrong."""
        return images.reading.read_size(Path(photo)) or (0, 0)

    def copied(self, photo: str | None) -> Copied:
        """A picture of at most `limits.copy_pixels` in place of a larger one, by its header."""
        if photo is None or math.prod(self.size(photo)) <= self.limits.copy_pixels:
            return Copied(photo)
        found = self._copies(photo)
        if not Path(found.path or "").is_file():  # swept
            self._copies.cache_clear()
            found = self._copies(photo)
        return found

    def _copy(self, photo: str) -> Copied:
        read = read_photo(photo, self.limits, shrunk=True)
        high, wide = read.image.shape[-2:]
        shrink = math.sqrt(self.limits.copy_pixels / (high * wide))
        side = int(shrink * max(high, wide))
        small = images.resizing.thumbnail(read.image, side)
        size = f"{small.shape[2]} x {small.shape[1]}"
        words = f"{read.name} has {wide} x {high} pixels; this is of a copy of {size}."
        possible = high * wide <= self.limits.pixels
        return Copied(
            views.keep_png(small, f"{read.stem}.png"),
            words if possible else f"{words} The whole is too large for this server.",
            1 / shrink**2 if possible else 0.0,
            side,
            (wide, high),
        )

    @staticmethod
    def controls() -> gr.Column:
        """The narrow column, of what a visitor gives (on a phone below the other)."""
        return gr.Column(scale=1, min_width=280, elem_classes="lv-side")

    @staticmethod
    @contextmanager
    def results() -> Iterator[list[Any]]:
        """The wide column, of what comes back.

        Yields:
            Its message, the button "full size", and where progress is shown.
        """
        with gr.Column(scale=3, min_width=320, elem_classes="lv-results"):
            with gr.Row(elem_classes="lv-work"):  # seen while something is computed: page.js
                bar = gr.HTML("", elem_classes="lv-bar")
                gr.Button("Stop", size="sm", min_width=90, elem_classes="lv-stop").click(
                    stop, None, None, api_visibility="undocumented", queue=False
                )
            message = gr.HTML("", visible=False, elem_classes="lv-message")
            yield [message, gr.Button("Full size", visible=False, size="sm", elem_classes="lv-quiet"), bar]

    @staticmethod
    def photo(
        label: str = "Picture", value: str = str(SAMPLE_PICTURE), offer_examples: bool = True
    ) -> gr.Image:
        """An input for one picture: drop, paste, take, or an example. Handlers get its path, unread."""
        photo = gr.Image(
            value,
            label=label,
            type="filepath",
            image_mode=None,  # our loader reads the file: gradio would convert it
            format="png",
            sources=["upload", "clipboard", "webcam"],
            buttons=[],
            height=260,
            elem_classes=PHOTO,
        )
        # gradio would open the file, and fail on a bad one without a word; `LocalBlocks` has checked its
        # path. (Of this one alone: for a class derived from a component gradio writes a file beside it.)
        photo.preprocess = lambda payload: payload and payload.path  # type: ignore[method-assign, assignment, return-value]
        if offer_examples:
            with gr.Row(elem_classes="lv-examples"):
                for name, example in EXAMPLES.items():
                    button = gr.Button(name, icon=example, size="sm", min_width=0, elem_classes="lv-quiet")
                    # past the queue: it computes nothing
                    button.click(
                        partial(_take, example), None, photo, api_visibility="undocumented", queue=False
                    )
        return photo

    @staticmethod
    def example_picture() -> Image.Image:
        """The example; by Pillow, as the page is laid out before there is PyTorch."""
        with Image.open(SAMPLE_PICTURE) as opened:
            return opened.convert("RGB")

    def second_example(self) -> str:
        """The example in its mirror, for a way from one to the other, as a file of the page."""
        return views.keep_view(ImageOps.mirror(self.example_picture()), "chelsea-turned.png")

    @staticmethod
    def photos(label: str, pictures: Sequence[Image.Image]) -> gr.Gallery:
        """An input for several pictures, those given in it already. Handlers get their paths, unread."""
        return gr.Gallery(
            [views.keep_view(each, f"part {number}.png") for number, each in enumerate(pictures, 1)],
            label=label,
            type="filepath",
            format="png",
            columns=3,
            height="auto",
            interactive=True,
            file_types=["image"],
            object_fit="cover",
            elem_classes="lv-gallery",
            buttons=[],
        )

    def parts(self, painted: int | None = None) -> list[Image.Image]:
        """Nine parts of the example, one of them painted over if its number is given."""
        picture = self.example_picture()
        # squares of one picture that overlap: alike, as what an odd one is found among must be
        places = [(left, top) for top in (0, 70, 140) for left in (20, 110, 200)]
        parts = [picture.crop((left, top, left + PART, top + PART)) for left, top in places]
        if painted is not None:
            ImageDraw.Draw(parts[painted]).rectangle((40, 60, 119, 83), fill=(13, 153, 242))
        return parts

    @staticmethod
    def picture(
        label: str,
        value: Any = None,
        elem_id: str | None = None,
        *,
        height: int | None = None,
        bare: bool = False,
    ) -> gr.Image:
        """An output for one picture, never re-encoded with a loss; `bare` leaves its label to the page."""
        return gr.Image(
            value,
            label=label,
            show_label=not bare,
            height=height,
            elem_classes="lv-strip" if bare else None,
            format="png",  # gradio's default, WebP, changed pixels by up to 230 of 255
            interactive=False,
            elem_id=elem_id,
            buttons=["download", "fullscreen"],
        )

    @staticmethod
    def slider(elem_id: str, label: str, value: Any = None) -> gr.ImageSlider:
        """Two pictures of one size under a divider that is dragged; page.css writes its label on them."""
        return gr.ImageSlider(
            value,
            label=label,
            show_label=False,
            format="png",
            max_height=560,
            interactive=False,
            elem_id=elem_id,
            elem_classes="lv-pair",
            buttons=["download", "fullscreen"],
        )

    @staticmethod
    def gallery(label: str, value: Any = None, columns: int = 2) -> gr.Gallery:
        """Several pictures with captions."""
        return gr.Gallery(
            value,
            label=label,
            format="png",
            columns=columns,
            height="auto",
            interactive=False,
            object_fit="contain",
            elem_classes=["lv-gallery", "lv-shown"],
            buttons=["download", "fullscreen"],  # not "share", which would send pictures away
        )

    def _shrinker(self, inputs: Sequence[Any], whole: bool) -> Callable[[list[Any]], Copied]:
        """Puts copies of large pictures among a handler's values, and tells of the first where `whole`."""
        places = [place for place, each in enumerate(inputs) if each.elem_classes == [PHOTO]]
        model = next(place for place, each in enumerate(inputs) if each.elem_id == "lv-model")

        def shrink(values: list[Any]) -> Copied:
            copies = [self.copied(values[place]) for place in places]
            for place, each in zip(places, copies, strict=True):
                values[place] = each.path
            if not copies or not whole:
                return Copied(None)
            (first, *_) = copies
            return replace(
                first, peak_bytes=self.models.peak_bytes(values[model], first.size) if first.larger else 0
            )

        return shrink

    def connect(
        self,
        run: Callable[..., Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        api_name: str,
        *,
        button: gr.Button,
        message: Sequence[Any],
        live: Sequence[Any] = (),
        on_page_run: Callable[..., Any] | None = None,
        whole: bool = False,
        follows: bool = True,
        snippet: Callable[..., str] | None = None,
    ) -> list[Any]:
        """Have a button call a handler, `live` events too, and make it an endpoint; returns its events.

        All of them wait in one queue, in which one job runs at a time, and end when their visitor has asked
        for something else (jobs.py). Live events whose inputs are those of the one before change nothing:
        browsers report a picture as changed when its tab is first drawn, and an upload twice. What goes wrong
        is said in `message`, and old results go; who calls the endpoint gets an error. The page calls
        `on_page_run` where that differs, with copies of large pictures; where `whole`, it says so, and offers
        the full size. `snippet` gives the lines of "Show Python", to which those of curl are added. What
        `follows` is made anew for another picture or model.
        """
        common: dict[str, Any] = {"concurrency_id": HEAVY, "concurrency_limit": 1}
        # nobody presses it: an endpoint belongs to some event, and the page's own take and give more
        gr.Button(visible=False).click(
            guarded(run), list(inputs), list(outputs), api_name=api_name, show_progress="hidden", **common
        )
        follow = _follow_button(api_name, follows)
        # in one place: a browser on the server's own cores takes a third of them to animate it on seven
        common["show_progress_on"] = message[2]
        seen = gr.State(None, time_to_live=SESSION_SECONDS)
        triggers = dict(zip(KINDS, ([follow.click, *live], [button.click], [message[1].click]), strict=True))
        empty = ["" if isinstance(each, gr.HTML) else None for each in outputs]
        snippets = ([snippet] if snippet else []) + _asking(api_name, inputs)
        code = _code(python=snippet is not None, curl=len(snippets) > (snippet is not None))
        events = [
            gr.on(
                own,
                on_page(
                    on_page_run or run,
                    *(len(inputs), empty),
                    always=name != "live",
                    shrink=None if name == "full" else self._shrinker(inputs, whole),
                    snippets=snippets,
                ),
                [seen, *inputs],
                [seen, *message[:2], *code, *outputs],
                api_name=f"{api_name}_{name}",
                api_visibility="undocumented",
                trigger_mode="multiple",  # the last one ends those before it
                **common,
            )
            for name, own in triggers.items()
        ]
        for each in events:
            each.then(None, None, None, js=f"() => lvUnveil('{follow.elem_id}')")
        return events


def _follow_button(api_name: str, follows: bool) -> gr.Button:
    """What page.js presses in the open tab when the page's picture or model is another."""
    # "hidden", not False: what is invisible to gradio is not in the page
    return gr.Button(
        visible="hidden", elem_classes="lv-follow" if follows else None, elem_id=f"lv-follow-{api_name}"
    )


def _asking(api_name: str, inputs: Sequence[Any]) -> list[Callable[..., str]]:
    """What gives an endpoint's lines of curl; none for one that takes several pictures, or a painted mask."""
    photos = [place for place, each in enumerate(inputs) if each.elem_classes == [PHOTO]]
    others = [each for place, each in enumerate(inputs) if place not in photos]
    if not photos or not all(isinstance(each, SIMPLE) for each in others):
        return []
    return [partial(curl, api_name, photos)]


def _code(*, python: bool, curl: bool) -> list[gr.Code]:
    """Where "Show Python" has its lines, and those of a shell."""
    shown = [("Python", "python")] * python + [("curl", "shell")] * curl
    if not shown:
        return []
    with gr.Accordion(f"Show {' and '.join(name for name, _ in shown)}", open=False):
        return [
            # as high as its lines: gradio measures the least height while it is hidden, where all are broken
            gr.Code(language=kind, label=name, interactive=False, wrap_lines=True, lines=1)  # type: ignore[arg-type]
            for name, kind in shown
        ]


class Tab(ABC):
    """A tab of the page: its handlers, which are endpoints too, and its layout."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    @abstractmethod
    def build(self, model: gr.Dropdown, tab: gr.Tab) -> None:
        """Lay the tab out and connect it: to the page's model picker, and to its own being opened."""


def _take(example: Path) -> str:
    """An example as if it had been uploaded."""
    return views.keep(example.read_bytes(), example.name)
