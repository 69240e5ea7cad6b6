"""What the tabs share: models, limits, the example, and components that look and behave alike."""

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from latentvae.demo import views
from latentvae.demo.limits import Limits, guarded
from latentvae.demo.models import Models

EXAMPLE = Path(__file__).parents[1] / "assets" / "chelsea.png"
HEAVY = "heavy"  # the queue of all that computes: one job at a time


class Desk:
    """One server's models and limits, handed to every tab."""

    example = EXAMPLE

    def __init__(self, models: Models, limits: Limits) -> None:
        self.models, self.limits = models, limits

    def photo(self, label: str = "Picture", value: str | None = str(EXAMPLE)) -> gr.Image:
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
        button = gr.Button("Take the example", size="sm", variant="secondary", elem_classes="lv-quiet")
        button.click(
            take_example, None, photo, api_name="example", api_visibility="undocumented", queue=False
        )
        return photo

    @staticmethod
    def picture(label: str, value: Any = None, elem_id: str | None = None) -> gr.Image:
        """An output for one picture, never re-encoded with a loss."""
        return gr.Image(
            value,
            label=label,
            format="png",
            interactive=False,
            elem_id=elem_id,
            buttons=["download", "fullscreen"],
        )

    @staticmethod
    def slider(label: str, value: Any = None, elem_id: str | None = None) -> gr.ImageSlider:
        """Two pictures of one size under a divider that is dragged."""
        return gr.ImageSlider(
            value, label=label, format="png", max_height=560, interactive=False, elem_id=elem_id
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
            elem_classes="lv-gallery",
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
    ) -> None:
        """Have a button, and the endpoint /API_NAME, call a handler; `live` events too, once there is input.

        All of them wait in one queue, in which one job runs at a time.
        """
        common: dict[str, Any] = {
            "inputs": list(inputs),
            "outputs": list(outputs),
            "concurrency_id": HEAVY,
            "concurrency_limit": 1,
        }
        button.click(guarded(run), api_name=api_name, **common)
        if live:
            gr.on(
                list(live),
                guarded(unless_empty(run)),
                api_name=f"{api_name}_live",
                api_visibility="undocumented",
                trigger_mode="always_last",
                **common,
            )


def unless_empty(run: Callable[..., Any]) -> Callable[..., Any]:
    """A handler that leaves the page as it is while its first input is empty: clearing is no request."""

    @functools.wraps(run)
    def live(first: Any, *others: Any, **options: Any) -> Any:
        return run(first, *others, **options) if first else gr.skip()

    live.__signature__ = inspect.signature(run)  # type: ignore[attr-defined]
    return live


def take_example() -> str:
    """The example picture."""
    return views.keep(EXAMPLE.read_bytes(), EXAMPLE.name)
