"""Which images are odd, compared with normal ones: terms of one image, a calibration on many, the ROC.

May import: measure, models, base; none of the other three rooms of the toolbox. In: a VAE and images. Out: a
`Calibration` (one file) that gives each image a `Verdict`: score, terms, heat map.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
