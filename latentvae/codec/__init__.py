""".lvae files: the posterior's mode, quantised and entropy-coded. Imports models, images, base.

In: one image. Out: a small file that decodes to the same bytes of latents on every machine.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
