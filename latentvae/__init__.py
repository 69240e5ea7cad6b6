"""KL-regularised image VAEs for latent diffusion, as stock diffusers models.

`import latentvae` costs nothing: torch and diffusers are imported with the first name that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentvae.base.errors import LatentVAEError as LatentVAEError
    from latentvae.images.reading import find_images as find_images
    from latentvae.images.reading import load_image as load_image
    from latentvae.images.saving import save_image as save_image
    from latentvae.measure.evaluate import evaluate as evaluate
    from latentvae.models.exporting import export as export
    from latentvae.models.formats.writing import save as save
    from latentvae.models.latents import Posterior as Posterior
    from latentvae.models.latents import compute_latent_statistics as compute_latent_statistics
    from latentvae.models.latents import decode as decode
    from latentvae.models.latents import encode as encode
    from latentvae.models.latents import reconstruct as reconstruct
    from latentvae.models.latents import scale as scale
    from latentvae.models.latents import unscale as unscale
    from latentvae.models.loading import bundled as bundled
    from latentvae.models.loading import load as load
    from latentvae.models.presets import PRESETS as PRESETS
    from latentvae.models.presets import build as build
    from latentvae.pipelines.agree import agree as agree
    from latentvae.pipelines.preview import preview as preview
    from latentvae.pipelines.swap import swap as swap
    from latentvae.runtime.optimize import optimize as optimize
    from latentvae.runtime.patches import restore as restore
    from latentvae.runtime.tiling.planning import plan as plan
    from latentvae.runtime.tiling.switch import enable_exact_tiling as enable_exact_tiling
    from latentvae.store.buckets import BucketBatchSampler as BucketBatchSampler
    from latentvae.store.dataset import LatentDataset as LatentDataset
    from latentvae.store.encoding import encode_folder as encode_folder
    from latentvae.store.webdataset import export_webdataset as export_webdataset

__version__ = "0.1.0"

_HOME = {
    "LatentVAEError": "base.errors",
    "evaluate": "measure.evaluate",
    "export": "models.exporting",
    "save": "models.formats.writing",
    "find_images": "images.reading",
    "load_image": "images.reading",
    "save_image": "images.saving",
    "Posterior": "models.latents",
    "compute_latent_statistics": "models.latents",
    "decode": "models.latents",
    "encode": "models.latents",
    "reconstruct": "models.latents",
    "scale": "models.latents",
    "unscale": "models.latents",
    "PRESETS": "models.presets",
    "build": "models.presets",
    "bundled": "models.loading",
    "load": "models.loading",
    "optimize": "runtime.optimize",
    "restore": "runtime.patches",
    "agree": "pipelines.agree",
    "preview": "pipelines.preview",
    "swap": "pipelines.swap",
    "BucketBatchSampler": "store.buckets",
    "LatentDataset": "store.dataset",
    "encode_folder": "store.encoding",
    "export_webdataset": "store.webdataset",
    "enable_exact_tiling": "runtime.tiling.switch",
    "plan": "runtime.tiling.planning",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentvae' has no attribute {name!r}")
    return getattr(import_module(f"latentvae.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
