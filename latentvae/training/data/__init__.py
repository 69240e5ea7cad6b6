"""Training images: sources by number, and the crops drawn from them.

Imports images and base, and of training its settings alone (config). In: what data.train and data.val name.
Out: batches of crops, and validation images.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
