"""The one error that means "the input is at fault": the command line prints it without a stack trace."""


class LatentVAEError(Exception):
    """Bad input. The message says what came, what was wanted and what to do."""


class ImageError(LatentVAEError):
    """An image, or a folder of images, that cannot be used."""


class SourceError(LatentVAEError):
    """Training images that were there when the run began and are gone: no image of theirs can be skipped."""


class ModelError(LatentVAEError):
    """A model that cannot be found, or is no AutoencoderKL."""


class MissingWeightsError(LatentVAEError):
    """Weights of a pretrained network that are neither in a cache nor at a given path."""


class ConfigError(LatentVAEError):
    """A training configuration that cannot work."""


class StoreError(LatentVAEError):
    """Latents on disk that are damaged, in use, made by another model, or cannot be written."""


class CodecError(LatentVAEError):
    """A compressed image that is damaged, too large, or needs another model."""
