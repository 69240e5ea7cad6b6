"""Exact tiling: the numbers of the whole image, in memory that the tile sets. Read `stages.py` first.

Two operations of an AutoencoderKL see the whole image: the statistics of each GroupNorm, and the attention of
the middle block. All else needs a halo of a pixel or two. So a model runs stage by stage: tiles stream
through the layers between two such points into a map, and give the next norm's statistics on the way.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
