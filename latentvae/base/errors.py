"""The errors that mean "the input is at fault": the command line prints them without a stack trace.

LatentVAEError
  ImageError            one image, or a folder of them
    TooManyPixels       an image above a limit that its caller may raise
    NoMemoryError       the machine had none left for an image; nothing is wrong with that
  SourceError           training images that have gone
  ModelError            an AutoencoderKL
  MissingWeightsError   of LPIPS or rFID: figures are left out and say why
  ConfigError           of training
  StoreError            latents on disk
  CodecError            .lvae files
  SwapError, UnfixableError             of a pipeline's VAE: in pipelines/, which alone raises them
"""

import errno


class LatentVAEError(Exception):
    """Bad input. The message says what came, what was wanted and what to do.

    Attributes:
        ends_run: it is of the machine and not of one image: a full disk would refuse the next one too.
    """

    ends_run = False


class ImageError(LatentVAEError):
    """An image, or a folder of images, that cannot be used."""


class TooManyPixels(ImageError):
    """An image of more pixels than its caller takes."""


class NoMemoryError(ImageError):
    """Memory ran out over an image: the machine's state, not the image's fault, and worth another try."""


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


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch, Pillow and the system each have words for it."""
    if isinstance(error, MemoryError | NoMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    words = ("allocate memory", "out of memory", "bad_alloc", "decoder error -9")
    return isinstance(error, RuntimeError | OSError) and any(word in str(error).lower() for word in words)
