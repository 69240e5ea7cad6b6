"""The tab Interpolate: the way from one image to another through the latents."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import gradio as gr

from latentvae.demo import snippets, views
from latentvae.demo.desk import Tab
from latentvae.toolbox import editing

FPS = 8.0


class Interpolate(Tab):
    """Handler and layout."""

    def run(
        self,
        first: str | None,
        second: str | None,
        model: str,
        frames: float = 9,
        route: Literal["spherical", "linear"] = "spherical",
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  # how gradio wants it
    ) -> tuple[Any, ...]:
        """Walk from one picture to another through the latents.

        Args:
            first, second: any image files. Large ones are shrunk, the second is cropped to the first's size.
            model: one of the names that the picker offers.
            frames: 2 to 17, both ends counted.
            route: "spherical" keeps contrast on the way, "linear" is the straight line.

        Returns:
            The frames there and back as an animated WebP; the frames as a strip; every step's size as JSON.
        """
        with self.desk.models.use(model) as chosen:
            one = self.desk.read_small(first, chosen.channels)
            # whole: it is cropped before it is shrunk
            other = self.desk.read(second, chosen.channels, shrunk=True)
            end = editing.interpolate.match_size(other.image, *one.image.shape[-2:])
            progress(0.1, "Encoding both")
            count = max(2, min(int(frames), 17))  # not left to gradio's check of the slider
            found = editing.interpolate.interpolate(
                chosen.swift, [one.image, end], count, route, progress=True
            )
            steps = editing.interpolate.step_sizes(found.frames, self.desk.models.lpips)
        # there and back, the ends once: the animation has no end
        turned = [*range(len(found.frames)), *range(len(found.frames) - 2, 0, -1)]
        name = f"{one.stem}-{other.stem}.webp"
        facts = {"model": chosen.name, "route": route, "positions": found.positions}
        return (
            views.keep_animation(found.frames[turned], name, FPS),
            views.keep_view(editing.interpolate.strip(found, steps), "frames.png"),
            {**facts, "steps": [asdict(step) for step in steps]},
        )

    def build(self, model: gr.Dropdown, tab: gr.Tab) -> None:
        """Lay the tab out and connect it; opening it shows the example's result."""
        desk = self.desk
        first = desk.shared
        with gr.Row(elem_classes="lv-split"):
            with desk.controls():
                second = desk.photo("To", desk.second_example(), False)
                frames = gr.Slider(3, 17, 9, step=1, label="Frames")
                route = gr.Radio(
                    ["spherical", "linear"],
                    value="spherical",
                    label="Route",
                    info="An arc keeps the contrast.",
                )
                button = gr.Button("Interpolate", variant="primary")
            with desk.results() as message:
                animation = desk.picture("There and back", elem_id="lv-animation", height=420)
                gr.HTML('<p class="lv-caption">Every frame, and how far it looks from the one before</p>')
                frames_view = desk.picture("Every frame, in a row", elem_id="lv-frames", bare=True)
                gr.HTML(
                    '<p class="lv-note">Between two photographs the way is a cross-fade: this '
                    "autoencoder keeps pictures, it does not understand them.</p>",
                )
                with gr.Accordion("Steps as JSON", open=False):
                    facts = gr.JSON(label="Steps as JSON", show_label=False)
        inputs, outputs = [first, second, model, frames, route], [animation, frames_view, facts]
        live = [tab.select, second.change, frames.release, route.input]
        events: dict[str, Any] = {"button": button, "message": message, "live": live}
        desk.connect(self.run, inputs, outputs, "interpolate", snippet=snippets.interpolate, **events)
