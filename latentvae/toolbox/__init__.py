"""What a VAE is for besides pipelines. Imports store, measure, models, images, base.

In: images or a store. Out: new images, fillings, verdicts, maps. Four rooms that need not know each other.
"""
