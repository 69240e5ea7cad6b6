"""A VAE in a diffusers pipeline. Imports runtime, measure, models, images, base.

In: a pipeline and a VAE. Out: the pipeline with that VAE in it, or why that cannot work.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
