"""The tab Vary: samples of an image's posterior, spread by a temperature."""

from __future__ import annotations

from typing import Any

import gradio as gr

from latentvae.demo import snippets, views
from latentvae.demo.desk import Tab
from latentvae.toolbox import editing

FPS = 3.0
MOST = 9


class Vary(Tab):
    """Handler and layout."""

    def run(
        self,
        photo: str | None,
        model: str,
        temperature: float = 100,
        copies: float = 4,
        seed: float = 0,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  # how gradio wants it
    ) -> tuple[Any, ...]:
        """Decode samples around a picture's latents.

        Args:
            photo: any image file.
            model: one of the names that the picker offers.
            temperature: 0 gives the reconstruction, 1 a sample of the posterior, more is no longer what the
                encoder said.
            copies: 1 to 9. seed: other seeds, other copies.

        Returns:
            The copies; the same as an animated WebP; figures as HTML; the same as JSON.
        """
        count = max(1, min(int(copies), MOST))  # not left to gradio's check of the slider
        with self.desk.models.use(model) as chosen:
            read = self.desk.read_small(photo, chosen.channels)
            found = editing.vary.Variations(chosen.swift, read.image, seed=int(seed or 0))
            made = []
            for copy in range(count):
                progress((copy, count), "Decoding")
                made.append(found.image(float(temperature), copy))
            original = editing.vary.Reference(read.image, self.desk.models.lpips)
            rebuilt = found.reconstruction
            plain = editing.vary.Reference(rebuilt, self.desk.models.lpips)
            near = [(original.distance(each), plain.distance(each)) for each in made]
        spread = found.spread
        pictures = [
            (
                views.show(each, f"copy {number}.png"),
                f"copy {number}: {views.number(distance.psnr, 1, ' dB')}",
            )
            for number, (each, (distance, _)) in enumerate(zip(made, near, strict=True), 1)
        ]
        # copies that are equal to the picture have an infinite PSNR, which no mean survives
        mean_psnr = sum(min(each.psnr, 99.0) for each, _ in near) / count
        shown = [
            (views.number(mean_psnr, 2, " dB"), "PSNR to the picture", "mean of the copies"),
            (f"{100 * spread.ratio * temperature:.2g} %", "of the latents' own spread", "added to them"),
            (f"{100 * spread.ratio:.2g} %", "at temperature 1", "what the encoder itself leaves open"),
        ]
        facts = {
            "model": chosen.name,
            "temperature": temperature,
            "posterior_std": spread.posterior_std,
            "latents_std": spread.latents_std,
            "lpips_to_original": [each.lpips for each, _ in near],
            "lpips_to_reconstruction": [each.lpips for _, each in near],
        }
        # the reconstruction first: copies spread around it, not around the picture
        frames = [rebuilt, *made]
        animation = views.keep_animation(frames, f"{read.stem}.copies.webp", FPS)
        return pictures, animation, views.tiles(shown), facts

    def build(self, model: gr.Dropdown, tab: gr.Tab) -> None:
        """Lay the tab out and connect it; opening it shows the example's result."""
        desk = self.desk
        photo = desk.shared
        with gr.Row(elem_classes="lv-split"):
            with desk.controls():
                temperature = gr.Slider(
                    0, 400, 150, step=1, label="Temperature", info="1 is a sample of the posterior."
                )
                copies = gr.Slider(1, MOST, 4, step=1, label="Copies")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                button = gr.Button("Vary", variant="primary")
            with desk.results() as message:
                pictures = desk.gallery("Copies")
                shown = gr.HTML(label="Figures")
                animation = desk.picture(
                    "The reconstruction, then every copy", elem_id="lv-copies", height=420
                )
                with gr.Accordion("Figures as JSON", open=False):
                    facts = gr.JSON(label="Figures as JSON", show_label=False)
        inputs, outputs = [photo, model, temperature, copies, seed], [pictures, animation, shown, facts]
        live = [tab.select, temperature.release, copies.release, seed.input]
        events: dict[str, Any] = {"button": button, "message": message, "live": live}
        desk.connect(self.run, inputs, outputs, "vary", snippet=snippets.vary, **events)
