"""Latents on disk: shards of moments that people train from. Imports models, images, base.

In: folders of images. Out: a folder of shards, and datasets that read it.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
