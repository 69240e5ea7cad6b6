"""A VAE rescaled so that it survives half precision; whether it does, measure/diagnosis.py says."""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
