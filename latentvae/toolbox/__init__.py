"""What a VAE is for besides pipelines: four rooms that do not know each other.

May import: store, measure, models, images, base. In: images, or a store. Out: new images (priors), changed
ones (editing), verdicts (anomaly), maps (atlas).
"""
