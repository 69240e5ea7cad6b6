"""The page: picture and model, which hold for all of it, and a tab for each capability."""

import html
import json

import gradio as gr

from latentvae.demo.compare import Compare
from latentvae.demo.compress import Compress
from latentvae.demo.desk import Desk, Tab
from latentvae.demo.fill import FillIn
from latentvae.demo.guard import Limits, LocalBlocks
from latentvae.demo.interpolate import Interpolate
from latentvae.demo.jobs import one_bar
from latentvae.demo.loaded_models import Models
from latentvae.demo.odd import FindOdd
from latentvae.demo.reconstruct import Reconstruct
from latentvae.demo.sample import Sample
from latentvae.demo.vary import Vary
from latentvae.demo.widgets import static

HEAD = """<div class="lv-head"><h1>latent<i>vae</i></h1>
<p>What an image autoencoder keeps of a picture, and what it loses.</p></div>"""

TITLE = "latentvae: what an image autoencoder keeps of a picture"
DESCRIPTION = (
    "Pictures through an image autoencoder and back, on your own machine: reconstruct, compare with JPEG and "
    "WebP, compress, interpolate, fill in."
)

# What visitors read, the tab's id in the page, and who lays it out
TABS: tuple[tuple[str, str, type[Tab]], ...] = (
    ("Reconstruct", "reconstruct", Reconstruct),
    ("Compare", "compare", Compare),
    ("Compress", "compress", Compress),
    ("Interpolate", "interpolate", Interpolate),
    ("Vary", "vary", Vary),
    ("Sample", "sample", Sample),
    ("Find the odd one", "odd", FindOdd),
    ("Fill in", "fill", FillIn),
)


def build_page(models: Models, limits: Limits) -> LocalBlocks:
    """Lay the page out; its theme and style sheet belong to its launch, in `server.start`."""
    desk = Desk(models, limits)
    with LocalBlocks(limits, title=TITLE, analytics_enabled=False) as page:
        desk.opened = page.load
        with gr.Row(elem_classes="lv-top"):
            with gr.Column(scale=3, min_width=300):
                gr.HTML(HEAD)
                model = gr.Dropdown(models.names, value=models.names[0], label="Model", elem_id="lv-model")
                about = gr.HTML('<div class="lv-model-line">Loading PyTorch and the models</div>')
            with gr.Column(scale=2, min_width=280):
                desk.shared = desk.photo()
        with gr.Tabs(overflow_behavior="wrap"):  # on a phone none hides behind three dots
            for title, name, tab in TABS:
                with gr.Tab(title, id=name, elem_id=f"lv-tab-{name}") as place:
                    tab(desk).build(model, place)
        page.ready = models.ready
        page.beforehand += [models.ready, *desk.beforehand, lambda: models.warm_up(lambda: page.is_running)]
        # in the browser alone: it knows which tab is open, and that one's button "follow" asks the server
        gr.on([desk.shared.change, model.change], None, js="() => lvFollow()")
        # model and tab stand in the address: it can be kept and sent on, and "back" stays on the page
        model.change(None, model, js="name => lvNote({ model: name })")
        again = gr.Button(visible="hidden", elem_id="lv-again")  # pressed by page.js on "back"
        gr.on([page.load, again.click], None, model, model, js="name => lvModel(name)")
        # on opening too: in which precision pictures are decoded is known once the models are warm
        gr.on(
            [page.load, model.change],
            lambda name: _describe(models, name),
            model,
            about,
            api_name="describe_model",
            api_visibility="undocumented",
            show_progress="hidden",
            queue=False,
        )
    # api_open would let requests past the queue, and so past its limits
    page.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)
    one_bar(page._queue)
    return page


def head(page: LocalBlocks) -> str:
    """What stands in the page's head: what it is, and the script that names its pictures."""
    pictures = {
        each.elem_id: each.label
        for each in page.blocks.values()
        if isinstance(each, gr.Image | gr.ImageSlider) and each.elem_id
    }
    (models,) = (
        [name for name, _ in each.choices]
        for each in page.blocks.values()
        if isinstance(each, gr.Dropdown) and each.elem_id == "lv-model"
    )
    about = html.escape(DESCRIPTION, quote=True)
    # as it stands in JSON "<" could end the script
    names = "\n".join(
        f"const {name} = {json.dumps(value)};".replace("<", "\\u003c")
        for name, value in (("PICTURES", pictures), ("MODELS", models))
    )
    return (
        f'<meta name="description" content="{about}"><meta property="og:description" content="{about}">'
        # its own scope
        f"<script>{{ {names}\n{static('page.js')} }}</script>"
    )


def _describe(models: Models, name: str) -> str:
    """The line below the picker, once the models are loaded."""
    return f'<div class="lv-model-line">{models.summary(name)}</div>'
