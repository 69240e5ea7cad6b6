"""KL-regularised image VAEs for latent diffusion, as stock diffusers models.

`import latentvae` costs nothing: torch and diffusers are imported with the first name that needs them
(types: `__init__.pyi`).
"""

from latentvae.base import lazy

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
    "bundled": "models.shipped",
    "load": "models.loading",
    "optimize": "runtime.optimize",
    "restore": "runtime.patches",
    "make_seamless": "runtime.seamless",
    "agree": "pipelines.agree",
    "preview": "pipelines.preview",
    "swap": "pipelines.swap",
    "BucketBatchSampler": "store.buckets",
    "LatentDataset": "store.dataset",
    "LatentStream": "store.stream",
    "encode_folder": "store.encoding",
    "export_webdataset": "store.webdataset",
    "enable_exact_tiling": "runtime.tiling.switch",
    "plan": "runtime.tiling.planning",
}

__all__ = sorted(_HOME)  # noqa: PLE0605

__getattr__ = lazy.importer(__name__, _HOME)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
