"""What the tabs share: models, limits, the example, and components that look and behave alike."""

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
import torch

from latentvae.demo import views
from latentvae.demo.guard import Limits, Photo, guarded, read_photo
from latentvae.demo.loaded_models import Models
from latentvae.images.reading import load_image
from latentvae.images.resizing import thumbnail
from latentvae.models.loading import SAMPLE_PICTURE

PART = 160  # pixels of a side of the odd example's parts
SESSION_SECONDS = 3600  # what a visitor saw last is kept
HEAVY = "heavy"  # the queue of all that computes: one job at a time


class Desk:
    """One server's models and limits, handed to every tab."""

    example = SAMPLE_PICTURE

    def __init__(self, models: Models, limits: Limits) -> None:
        self.models, self.limits = models, limits

    def read(self, photo: str | None, channels: int = 3) -> Photo:
        """An uploaded image, whole, within this server's limits."""
        return read_photo(photo, self.limits, channels)

    def read_small(self, photo: str | None, channels: int = 3) -> Photo:
        """The same, shrunk for tabs that decode many pictures of it."""
        read = self.read(photo, channels)
        return replace(read, image=thumbnail(read.image, self.limits.explore_side))

    @staticmethod
    def controls() -> gr.Column:
        """The narrow column, of what a visitor gives."""
        return gr.Column(scale=1, min_width=280, elem_classes="lv-side")

    @staticmethod
    def results() -> gr.Column:
        """The wide column, of what comes back; on a phone below the other."""
        return gr.Column(scale=3, min_width=320)

    @staticmethod
    def photo(
        label: str = "Picture", value: str = str(SAMPLE_PICTURE), offer_example: bool = True
    ) -> gr.Image:
        """An input for one picture: drop, paste, take, or the example. Handlers get its path, unread."""
        photo = gr.Image(
            value,
            label=label,
            type="filepath",
            image_mode=None,  # our loader reads the file: gradio would convert it
            format="png",
            sources=["upload", "clipboard", "webcam"],
            buttons=[],
            height=260,
            elem_classes="lv-photo",
        )
        if offer_example:
            button = gr.Button("Take the example", size="sm", variant="secondary", elem_classes="lv-quiet")
            # past the queue: it computes nothing
            button.click(
                _take_example, None, photo, api_name="example", api_visibility="undocumented", queue=False
            )
        return photo

    @staticmethod
    def second_example() -> torch.Tensor:
        """The example (C, H, W) in its mirror, for a way from one to the other."""
        return load_image(SAMPLE_PICTURE).flip(2)

    @staticmethod
    def photos(label: str, images: Sequence[torch.Tensor]) -> gr.Gallery:
        """An input for several pictures, those given in it already. Handlers get their paths, unread."""
        return gr.Gallery(
            [views.keep_png(image, f"part {number}.png") for number, image in enumerate(images, 1)],
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

    @staticmethod
    def parts(painted: int | None = None) -> list[torch.Tensor]:
        """Nine parts (C, H, W) of the example, one of them painted over if its number is given."""
        image = load_image(SAMPLE_PICTURE)
        # squares of one picture that overlap: alike, as what an odd one is found among must be
        places = [(top, left) for top in (0, 70, 140) for left in (20, 110, 200)]
        parts = [image[:, top : top + PART, left : left + PART].clone() for top, left in places]
        if painted is not None:
            parts[painted][:, 60:84, 40:120] = torch.tensor([-0.9, 0.2, 0.9])[:, None, None]
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
        )

    @staticmethod
    def connect(
        run: Callable[..., Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        api_name: str,
        *,
        button: gr.Button,
        live: Sequence[Any] = (),
        progress_on: Any = None,
    ) -> list[Any]:
        """Have a button, and the endpoint /API_NAME, call a handler; `live` events too, once there is input.

        All of them wait in one queue, in which one job runs at a time. Live events whose inputs are those of
        the one before change nothing: browsers report a picture as changed when its tab is first drawn. The
        progress is shown on one output, the first or `progress_on`.

        Returns:
            The events, for what follows them.
        """
        common: dict[str, Any] = {"concurrency_id": HEAVY, "concurrency_limit": 1}
        # on one output: a browser on the server's own cores takes a third of them to animate it on seven
        common["show_progress_on"] = outputs[0] if progress_on is None else progress_on
        events = [button.click(guarded(run), list(inputs), list(outputs), api_name=api_name, **common)]
        if live:
            seen = gr.State(None, time_to_live=SESSION_SECONDS)
            changed = gr.on(
                list(live),
                guarded(when_new(run, len(inputs), len(outputs))),
                [seen, *inputs],
                [seen, *outputs],
                api_name=f"{api_name}_live",
                api_visibility="undocumented",
                trigger_mode="always_last",  # of a slider moved meanwhile its last place counts
                **common,
            )
            events.append(changed)
        return events


class Tab(ABC):
    """A tab of the page: its handlers, which are endpoints too, and its layout."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    @abstractmethod
    def build(self, model: gr.Dropdown, tab: gr.Tab) -> None:
        """Lay the tab out and connect it: to the page's model picker, and to its own being opened."""


def when_new(run: Callable[..., Any], inputs: int, outputs: int) -> Callable[..., Any]:
    """A handler that leaves the page as it is where an input is empty, or nothing is new.

    It takes what it saw last, then `run`'s arguments, and gives what it saw, then `run`'s results.
    """

    def live(seen: str | None, *values: Any) -> Iterator[Any]:
        shown = hashlib.sha256(json.dumps(values[:inputs]).encode()).hexdigest()  # masks are megabytes
        if shown == seen or any(value in (None, "", []) for value in values[:inputs]):
            yield tuple(gr.skip() for _ in range(outputs + 1))
            return
        # always a generator itself, so that gradio treats both kinds of handlers alike
        if not inspect.isgeneratorfunction(run):
            yield (shown, *run(*values))
            return
        for result in run(*values):
            part = None in result  # what fails after a part can be tried again
            yield (gr.skip() if part else shown, *result)

    # gradio counts a handler's parameters, and finds gr.Progress among their defaults
    names = inspect.signature(run).parameters.values()
    last = inspect.Parameter("seen", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    live.__signature__ = inspect.Signature([last, *names])  # type: ignore[attr-defined]
    return live


def _take_example() -> str:
    """The example picture."""
    return views.keep(SAMPLE_PICTURE.read_bytes(), SAMPLE_PICTURE.name)
