"""How good reconstructions are, and whether half precision gives the same. Imports models, images, base.

In: images and a model. Out: figures, each with the protocol that gave it.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
