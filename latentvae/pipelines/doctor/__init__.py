"""Whether a VAE survives half precision, and a rescaled copy that does."""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
