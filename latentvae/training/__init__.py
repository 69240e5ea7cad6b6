"""The training engine. Imports measure, models, images, base; the only room that imports accelerate.

In: a Config. Out: checkpoints, records, and an export. Read loop.py first: what comes before the first step
is in setup.py, what happens in one in step.py.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
