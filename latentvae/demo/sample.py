"""The tab Sample: new images from a prior over latents."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import gradio as gr

from latentvae import images, store
from latentvae.base.errors import LatentVAEError
from latentvae.demo import snippets, views
from latentvae.demo.desk import Tab
from latentvae.toolbox import editing, priors

if TYPE_CHECKING:
    from latentvae.demo.one_model import Model
    from latentvae.toolbox.priors.prior import Prior

MOST = 12
Side = Literal["64", "128", "256"]  # as text: so gradio describes choices to clients
LEAST_LEARNED = 4


class Sample(Tab):
    """Handler and layout."""

    def run(
        self,
        photos: list[tuple[str, str | None]] | None,
        model: str,
        prior: Literal["gaussian", "standard"] = "gaussian",
        side: Side = "128",
        count: float = 8,
        seed: float = 0,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  # how gradio wants it
    ) -> tuple[Any, ...]:
        """Draw latents from a prior and decode them.

        Args:
            photos: what the Gaussian is fitted to, four or more; the standard normal prior needs none.
            model: one of the names that the picker offers.
            prior: "gaussian" is fitted to the pictures' latents; "standard" is the normal distribution that
                the KL term pulls towards.
            side: of the new pictures in pixels: 64, 128 or 256.
            count: 1 to 12.
            seed: other seeds, other pictures.

        Returns:
            The new pictures; what was drawn from, as JSON.
        """
        if prior not in ("gaussian", "standard") or side not in get_args(Side):
            raise LatentVAEError(f"prior {prior!r} and side {side} came; choose from those that are offered.")
        wanted = max(1, min(int(count), MOST))  # not left to gradio's check of the slider
        with self.desk.models.use(model) as chosen:
            if prior == "standard":
                drawn_from: Prior = priors.prior.StandardNormal(chosen.exact, int(side), int(side))
            else:
                progress(0.1, "Encoding the pictures")
                drawn_from = self._fit([path for path, _ in photos or []], chosen, int(side))
            progress(0.6, "Drawing")
            drawn = priors.sampling.sample(chosen.exact, drawn_from, wanted, int(seed or 0))
        pictures = [
            (views.show(image, f"draw {number}.png"), f"draw {number}")
            for number, image in enumerate(drawn, 1)
        ]
        facts = {"model": chosen.name, "prior": prior, "learned_from": drawn_from.card.images, "seed": seed}
        return pictures, {**facts, "fit": drawn_from.card.fit}

    def _fit(self, files: list[str], model: Model, side: int) -> Prior:
        """A Gaussian fitted to squares of the pictures and their mirror images."""
        most = self.desk.limits.images
        if not LEAST_LEARNED <= len(files) <= most:
            raise LatentVAEError(
                f"{len(files)} pictures came to learn from; give {LEAST_LEARNED} to {most}, or draw from the "
                "standard normal prior, which needs none."
            )
        # a store in a folder of its own: priors learn from stores, and all of it goes at the end
        with tempfile.TemporaryDirectory() as folder:
            pictures, latents = Path(folder, "pictures"), Path(folder, "store")
            pictures.mkdir()
            for number, file in enumerate(files):
                image = editing.interpolate.match_size(
                    self.desk.read(file, model.channels, shrunk=True).image, side, side
                )
                # mirrored too: twice the latents to fit; (C, H, W)
                for name, each in (("a", image), ("b", image.flip(2))):
                    images.saving.save_image(each, pictures / f"{number:02d}{name}.png")
            store.encoding.encode_folder(
                model.exact, pictures, latents, dtype="fp32", weights_sha256=model.weights_sha256
            )
            return priors.mixture.fit_mixture(priors.latent_set.LatentSet(latents))

    def build(self, model: gr.Dropdown, tab: gr.Tab) -> None:
        """Lay the tab out and connect it; opening it shows the example's result."""
        desk = self.desk
        with gr.Row(elem_classes="lv-split"):
            with desk.controls():
                photos = desk.photos("Pictures to learn from", desk.parts())
                prior = gr.Radio(
                    [("Gaussian of the pictures", "gaussian"), ("standard normal", "standard")],
                    value="gaussian",
                    label="Prior",
                )
                side = gr.Radio([*get_args(Side)], value="128", label="Side, pixels")
                count = gr.Slider(1, MOST, 8, step=1, label="Pictures")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                button = gr.Button("Sample", variant="primary")
            with desk.results() as message:
                pictures = desk.gallery("New pictures", columns=4)
                gr.HTML(
                    '<p class="lv-note">With a small KL weight latents are far from standard normal, and '
                    "draws from that are noise. A Gaussian has the pictures' colours and shapes at "
                    "best. <code>latentvae prior fit -k diffusion</code> trains a better one on a store.</p>"
                )
                with gr.Accordion("What was drawn from", open=False):
                    facts = gr.JSON(label="What was drawn from", show_label=False)
        inputs, outputs = [photos, model, prior, side, count, seed], [pictures, facts]
        live = [tab.select, prior.input, side.input, count.release, seed.input]
        events: dict[str, Any] = {"button": button, "message": message, "live": live}
        desk.connect(self.run, inputs, outputs, "sample", snippet=snippets.sample, **events)
