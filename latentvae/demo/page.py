"""The page: a head with the model picker, and a tab for each capability."""

import gradio as gr

from latentvae.demo.compare import Compare
from latentvae.demo.compress import Compress
from latentvae.demo.desk import Desk, Tab
from latentvae.demo.fill import FillIn
from latentvae.demo.guard import Limits, LocalBlocks
from latentvae.demo.interpolate import Interpolate
from latentvae.demo.loaded_models import Models
from latentvae.demo.odd import FindOdd
from latentvae.demo.reconstruct import Reconstruct
from latentvae.demo.sample import Sample
from latentvae.demo.vary import Vary

HEAD = """<div class="lv-head"><h1>latent<i>vae</i></h1>
<p>What an image autoencoder keeps of a picture, and what it loses.</p></div>"""

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
    with LocalBlocks(limits, title="latentvae", analytics_enabled=False) as page:
        with gr.Row(equal_height=True):
            with gr.Column(scale=3, min_width=300):
                gr.HTML(HEAD)
            with gr.Column(scale=2, min_width=280):
                model = gr.Dropdown(models.names, value=models.names[0], label="Model", elem_id="lv-model")
                about = gr.HTML(_describe(models, models.names[0]))
        with gr.Tabs():
            for title, name, tab in TABS:
                with gr.Tab(title, id=name) as place:
                    tab(desk).build(model, place)
        model.change(
            lambda name: _describe(models, name),
            model,
            about,
            api_name="describe_model",
            api_visibility="undocumented",
            queue=False,
        )
    # api_open would let requests past the queue, and so past its limits
    page.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)
    return page


def _describe(models: Models, name: str) -> str:
    """The line below the picker."""
    return f'<div class="lv-model-line">{models.summary(name)}</div>'
