"""Image files and tensors. Imports base.

In: files as people have them. Out: upright sRGB tensors (C, H, W) in [-1, 1], and pictures for people.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
