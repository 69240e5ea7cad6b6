"""The files that hold a VAE: diffusers' and LDM's names, bare, prefixed or inside a whole checkpoint."""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
