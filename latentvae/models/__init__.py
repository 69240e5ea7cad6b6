"""The VAE itself, always a stock AutoencoderKL. Imports images, base.

In: a name, folder, file or hub id. Out: a model, its latents, exports that stock diffusers loads.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
