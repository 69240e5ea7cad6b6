"""The training engine. Imports measure, models, images, base; the only room that imports accelerate.

In: a Config. Out: checkpoints, records, and an export.
"""
