"""Images changed through their latents: between two (interpolate), around one (vary), into a hole (fill).

May import: measure, models, images, base; none of the other three rooms of the toolbox. In: a VAE, images
(C, H, W) in [-1, 1]. Out: images as float tensors, and figures about them.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
