"""The tab Compress: an image as a small file and back, and files of latents opened again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from latentvae import codec, demo, measure
from latentvae.base.errors import CodecError, LatentVAEError
from latentvae.demo import snippets, views
from latentvae.demo.desk import Tab
from latentvae.demo.guard import read_bytes

if TYPE_CHECKING:
    import torch

    from latentvae.demo.one_model import Model

INVITATION = (
    "An .lvae file, or latents that were downloaded in the tab Reconstruct (or any safetensors file with "
    "<code>latents</code> of this model), becomes a picture again here."
)


class Compress(Tab):
    """Handlers and layout."""

    def run(
        self,
        photo: str | None,
        model: str,
        quality: float = 50,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  # how gradio wants it
    ) -> tuple[Any, ...]:
        """Compress a picture to an .lvae file and decode that again.

        Args:
            photo: any image file, of any size.
            model: one of the names that the picker offers.
            quality: 1 (smallest) to 100 (best); 14 more halve the quantisation steps.

        Returns:
            Original and decoded picture; figures as HTML; the same as JSON; the .lvae file.
        """
        with self.desk.models.use(model) as chosen:
            read = self.desk.read(photo, chosen.channels)
            images = read.image[None]
            progress((0, 2), "Encoding")
            # exact encodes: the file does not depend on what this machine is fast at
            data = codec.compression.compress(chosen.exact, images, quality=int(quality))
            progress((1, 2), "Decoding")
            header, payload = codec.compression.unpack(data)
            decoded = codec.compression.decode_payload(chosen.swift, header, payload)
            metrics = measure.metrics.Metrics(self.desk.models.lpips, self.desk.models.lpips_missing_reason)
            (row,) = metrics.add(read.name, images, decoded)
        bpp = 8 * len(data) / (read.info.width * read.info.height)
        raw = read.image.numel()  # bytes at 8 bits
        shown = [
            (views.size(len(data)), "the whole file", f"{raw / len(data):.0f} times smaller than its pixels"),
            (f"{bpp:.3f}", "bits per pixel", "of the file, header and all"),
            *views.distances(row),
        ]
        facts: dict[str, Any] = {
            "bytes": len(data),
            "bpp": bpp,
            "psnr": row.psnr,
            "ssim": row.ssim,
            "lpips": row.lpips,
        }
        facts |= {"model": chosen.name, "quality": int(quality), "width": row.width, "height": row.height}
        return (
            (views.show(read.image, "original.png"), views.show(decoded[0], "decoded.png")),
            views.tiles(shown, views.sentence(read.info.notes)),
            facts,
            views.keep(data, f"{read.stem}.lvae"),
        )

    def open(self, file: str | None, model: str) -> tuple[Any, ...]:
        """Decode a file: .lvae, or latents that the tab Reconstruct gave (safetensors).

        Args:
            file: that file. The model is the one that it names, if it is here.
            model: used for latents that name no weights.

        Returns:
            The picture; figures as HTML; the picture as PNG.
        """
        data, name = read_bytes(file, "file", self.desk.limits)
        if data.startswith(codec.container.MAGIC):  # by its content: names lie
            image, used = self._open_lvae(data, name)
        else:
            image, used = self._open_latents(data, name, model)
        stem = name.split(".", maxsplit=1)[0] or "image"  # of photo.latents.safetensors: photo
        bpp = 8 * len(data) / (image.shape[-1] * image.shape[-2])
        shown = [
            (f"{image.shape[-1]} x {image.shape[-2]}", "pixels", f"decoded by {used}"),
            (views.size(len(data)), "the file", f"{bpp:.3f} bits per pixel"),
        ]
        picture = views.keep_png(image, f"{stem}.png")
        return views.show(image, "decoded.png"), views.tiles(shown), picture

    def _open_lvae(self, data: bytes, name: str) -> tuple[torch.Tensor, str]:
        # the header is checked before memory is taken for what it claims
        header, payload = codec.compression.unpack(data, name=name, max_pixels=self.desk.limits.pixels)
        self.desk.limits.check_side(name, header.width, header.height)
        with self.desk.models.use(self._model_of(header.weights.hex(), name)) as chosen:
            codec.compression.check_model(chosen.exact, header)
            return codec.compression.decode_payload(chosen.swift, header, payload)[0], chosen.name

    def _open_latents(self, data: bytes, name: str, model: str) -> tuple[torch.Tensor, str]:
        weights = demo.latents_file.weights_of(data)
        with self.desk.models.use(self._model_of(weights, name) if weights else model) as chosen:
            return self._decode(chosen, data, name), chosen.name

    def _decode(self, model: Model, data: bytes, name: str) -> torch.Tensor:
        found = demo.latents_file.latents_from_bytes(data, name, model, self.desk.limits)
        image = model.decode(found.latents, found.padding)[0]
        if not bool(image.isfinite().all()):  # finite latents, but so large that activations overflow
            raise LatentVAEError(f"{name} decodes to values that are no numbers: its latents are far off.")
        return image

    def _model_of(self, weights: str, name: str) -> str:
        found = self.desk.models.with_weights(weights)
        if found is None:
            raise CodecError(
                f"{name} was made with a model whose weight hash begins with {weights[:12]}, which is not on "
                f"this server (it has {', '.join(self.desk.models.names)}): start the demo with that --model."
            )
        return found

    def build(self, model: gr.Dropdown, tab: gr.Tab) -> None:
        """Lay the tab out and connect it; opening it shows the example's result."""
        desk = self.desk
        photo = desk.shared
        with gr.Row(elem_classes="lv-split"):
            with desk.controls():
                quality = gr.Slider(
                    1, 100, 50, step=1, label="Quality", info="14 more: steps half as long, a larger file."
                )
                button = gr.Button("Compress", variant="primary")
            with desk.results() as message:
                pair = desk.slider("lv-compress-slider", "Original and From the file")
                shown = gr.HTML(label="Figures")
                made = gr.DownloadButton("Download the file (.lvae)", size="md", elem_id="lv-lvae-file")
                with gr.Accordion("Figures as JSON", open=False):
                    facts = gr.JSON(label="Figures as JSON", show_label=False)
        outputs = [pair, shown, facts, made]
        live = [tab.select, quality.release]
        events: dict[str, Any] = {"button": button, "message": message, "live": live, "whole": True}
        events["snippet"] = snippets.compress
        desk.connect(self.run, [photo, model, quality], outputs, "compress", **events)
        gr.HTML('<h3 class="lv-part">Open a file</h3>')
        with gr.Row(elem_classes="lv-split"):
            with desk.controls():
                file = gr.File(
                    label="A file", file_types=[".lvae", ".safetensors"], height=150, elem_id="lv-open"
                )
                opening = gr.Button("Decode", variant="primary")
            with desk.results() as refusal:
                about = gr.HTML(
                    f'<p class="lv-note">{INVITATION}</p>', label="About the file", elem_id="lv-opened-about"
                )
                with gr.Column(visible=False) as result:
                    picture = desk.picture("Decoded", elem_id="lv-opened")
                    saved = gr.DownloadButton("Download the picture (PNG)", size="md")
        opened = [picture, about, saved]
        opening_events: dict[str, Any] = {"button": opening, "message": refusal, "live": [file.upload]}
        done = desk.connect(self.open, [file, model], opened, "decode", follows=False, **opening_events)
        for each in done:
            each.then(_show, saved, result, api_name="show", api_visibility="undocumented", queue=False)


def _show(picture: str | None) -> gr.Column:
    """Until a file is opened there is nothing to see."""
    return gr.Column(visible=picture is not None)
