"""The tab Find the odd one: several images, each judged by all the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from latentvae import images
from latentvae.base.errors import LatentVAEError
from latentvae.demo import snippets, views
from latentvae.demo.desk import Tab
from latentvae.demo.guard import Photo
from latentvae.toolbox import anomaly

if TYPE_CHECKING:
    import torch

    from latentvae.toolbox.anomaly.calibration import Verdict
    from latentvae.toolbox.anomaly.terms import Look

SHADE = 0.55  # how much of a heat map covers its picture


class FindOdd(Tab):
    """Handler and layout."""

    def run(
        self,
        photos: list[tuple[str, str | None]] | None,
        model: str,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  # how gradio wants it
    ) -> tuple[Any, ...]:
        """Rank pictures from odd to usual, each compared with all the others.

        Args:
            photos: six or more image files; large ones are shrunk.
            model: one of the names that the picker offers.

        Returns:
            Heat maps, the oddest first; figures of the oddest as HTML; all as JSON, ranked.
        """
        files, least = [path for path, _ in photos or []], anomaly.calibration.LEAST
        most = self.desk.limits.images
        if not least < len(files) <= most:
            raise LatentVAEError(
                f"{len(files)} pictures came: each is compared with the others, so {least + 1} to {most} are "
                "needed. Add some that are alike, and the one you wonder about."
            )
        with self.desk.models.use(model) as chosen:
            read: list[Photo] = []
            looks: list[Look] = []
            for number, file in enumerate(files):
                progress((number, len(files)), "Looking")
                read.append(self.desk.read_small(file, chosen.channels))  # whole they would be gigabytes
                image = read[-1].image[None]
                looks.append(anomaly.terms.look(chosen.swift, image, self._network(image)))
            # terms are compared, so all have LPIPS or none: a picture can be too small for it
            if any("lpips" not in one.terms for one in looks):
                for one in looks:
                    for term in anomaly.terms.LPIPS_TERMS:
                        one.terms.pop(term, None)
            net = "alex" if "lpips" in looks[0].terms else None
            verdicts = []
            for number, one in enumerate(looks):
                progress((number, len(looks)), "Comparing")
                others = looks[:number] + looks[number + 1 :]  # not itself: it would look usual
                verdicts.append(anomaly.calibration.calibrate(chosen.swift, others, net).judge(one))
        order = sorted(range(len(read)), key=lambda number: -verdicts[number].score)
        return self._show([(read[number], verdicts[number]) for number in order], chosen.name)

    def _network(self, image: torch.Tensor) -> Any:
        network = self.desk.models.lpips
        return network if network and min(image.shape[-2:]) >= network.min_size else None

    @staticmethod
    def _show(ranked: Sequence[tuple[Photo, Verdict]], model: str) -> tuple[Any, ...]:
        maps = [
            (
                _heat_map(photo, verdict, f"heat {rank}.png"),
                f"{rank}. {photo.name}: {verdict.score:z.1f}",
            )  # z: never -0.0
            for rank, (photo, verdict) in enumerate(ranked, 1)
        ]
        first, second = ranked[0][1].score, ranked[1][1].score
        shown = [
            (ranked[0][0].name, "the oddest", "of these pictures"),
            (f"{first:.1f}", "its score", "0 is usual, above 1 is rare"),
            (f"{second:.1f}", "the next one's", "how clear it is"),
        ]
        rows = [
            {"rank": rank, "name": photo.name, "score": verdict.score, "terms": verdict.terms}
            for rank, (photo, verdict) in enumerate(ranked, 1)
        ]
        return maps, views.tiles(shown), {"model": model, "terms": anomaly.terms.TERMS, "images": rows}

    def lines(self, photos: snippets.Photos, model: str, side: int = 0) -> str:
        """Of "Show Python"."""
        return snippets.odd(photos, model, side, net=None if self.desk.models.lpips is None else "alex")

    def build(self, model: gr.Dropdown, tab: gr.Tab) -> None:
        """Lay the tab out and connect it; opening it shows the example's result."""
        desk = self.desk
        with gr.Row(elem_classes="lv-split"):
            with desk.controls():
                photos = desk.photos("Alike, and an odd one", desk.parts(painted=4))
                button = gr.Button("Find the odd one", variant="primary")
            with desk.results() as message:
                shown = gr.HTML(label="Figures")
                maps = desk.gallery("The oddest first", columns=3)
                gr.HTML(
                    '<p class="lv-note">Bright is where a picture is rebuilt worse than the others are in '
                    "their worst place or, where no two pictures are alike, where it is unlike the rest of "
                    "itself. With so few pictures a score is a hint; calibrate on hundreds with "
                    "<code>latentvae anomaly</code>.</p>",
                )
                with gr.Accordion("Ranking as JSON", open=False):
                    facts = gr.JSON(label="Ranking as JSON", show_label=False)
        inputs, outputs = [photos, model], [maps, shown, facts]
        events: dict[str, Any] = {"button": button, "message": message, "live": [tab.select]}
        desk.connect(self.run, inputs, outputs, "odd", snippet=self.lines, **events)


def _heat_map(photo: Photo, verdict: Verdict, name: str) -> str:
    """A picture, darkened and greyed, with its heat over it, as a file of the page."""
    heat = images.tensors.from_uint8(images.drawing.colour_heat(verdict.heat.numpy()))
    grey = photo.image.mean(0, keepdim=True).expand(3, -1, -1)
    # grey, so that colours are the heat's alone
    return views.show(grey.lerp(heat, SHADE), name)
