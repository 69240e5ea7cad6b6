"""KL-regularised image VAEs for latent diffusion, as stock diffusers models.

`import latentvae` costs nothing: torch and diffusers are imported with the first name that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentvae.errors import LatentVAEError as LatentVAEError
    from latentvae.evaluation import evaluate as evaluate
    from latentvae.exporting import export as export
    from latentvae.formats.writing import save as save
    from latentvae.images import find_images as find_images
    from latentvae.images import load_image as load_image
    from latentvae.images import save_image as save_image
    from latentvae.latents import Posterior as Posterior
    from latentvae.latents import compute_latent_statistics as compute_latent_statistics
    from latentvae.latents import decode as decode
    from latentvae.latents import encode as encode
    from latentvae.latents import reconstruct as reconstruct
    from latentvae.latents import scale as scale
    from latentvae.latents import unscale as unscale
    from latentvae.model import bundled as bundled
    from latentvae.model import load as load
    from latentvae.optimization import optimize as optimize
    from latentvae.patches import restore as restore
    from latentvae.pipelines import agree as agree
    from latentvae.pipelines import swap as swap
    from latentvae.presets import PRESETS as PRESETS
    from latentvae.presets import build as build
    from latentvae.store.buckets import BucketBatchSampler as BucketBatchSampler
    from latentvae.store.dataset import LatentDataset as LatentDataset
    from latentvae.store.encoding import encode_folder as encode_folder
    from latentvae.store.webdataset import export_webdataset as export_webdataset
    from latentvae.tiling import enable_exact_tiling as enable_exact_tiling
    from latentvae.tiling import plan as plan

__version__ = "0.1.0"

_HOME = {
    "LatentVAEError": "errors",
    "evaluate": "evaluation",
    "export": "exporting",
    "save": "formats.writing",
    "find_images": "images",
    "load_image": "images",
    "save_image": "images",
    "Posterior": "latents",
    "compute_latent_statistics": "latents",
    "decode": "latents",
    "encode": "latents",
    "reconstruct": "latents",
    "scale": "latents",
    "unscale": "latents",
    "PRESETS": "presets",
    "build": "presets",
    "bundled": "model",
    "load": "model",
    "optimize": "optimization",
    "restore": "patches",
    "agree": "pipelines",
    "swap": "pipelines",
    "BucketBatchSampler": "store.buckets",
    "LatentDataset": "store.dataset",
    "encode_folder": "store.encoding",
    "export_webdataset": "store.webdataset",
    "enable_exact_tiling": "tiling",
    "plan": "tiling",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentvae' has no attribute {name!r}")
    return getattr(import_module(f"latentvae.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
