"""What latents look like, learned, so that new ones can be drawn: Gaussian, mixture, diffusion.

May import: store, measure, models, base; none of the other three rooms of the toolbox. In: a store of latents
of one size. Out: a `Prior` (one folder), and new images from it. `loading` knows all kinds; no kind knows
`loading`. `diffusability` asks how well one learns.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
