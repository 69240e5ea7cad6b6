"""A set of images looked at as a whole: features of their latents, labels, groups, maps.

May import: runtime, store, models, images, base; none of the other three rooms of the toolbox. In: latents,
with their images and labels where there are any. Out: tables, clusters, points, pictures, one HTML page.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
