"""Many small images to latents, each image on one core."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.images.resizing import thumbnail
from latentvae.images.scans import load
from latentvae.models.latents import encode
from latentvae.models.loading import window_of
from latentvae.runtime import side_by_side
from latentvae.runtime.memory import batches_at_once

SMALL = 1024  # pixels of a longer side: of larger ones the operations are worth sharing, and may be tiled

Encoded = tuple[torch.Tensor, torch.Tensor]  # an image (C, H, W), and its latents (1, C, h, w)


def images_at_once(vae: AutoencoderKL, longest: int) -> int:
    """How many images of that longer side are encoded side by side; 1 where one alone may be large."""
    if vae.device.type != "cpu" or longest > SMALL:
        return 1
    return batches_at_once(vae, longest, longest)


def encode_side_by_side(
    vae: AutoencoderKL, paths: Sequence[Path], channels: int, longest: int, count: int
) -> Iterator[tuple[Path, Encoded | LatentVAEError]]:
    """Read and encode images in threads of one core each; in their order, with the error of each that fails.

    Args:
        channels: of the model.
        longest: larger images are shrunk to so many pixels along their longer side.
        count: threads; twice as many images are in memory.
    """

    def work(path: Path) -> tuple[Path, Encoded | LatentVAEError]:
        try:
            image = thumbnail(load(path, channels, window_of(vae))[0], longest)
            with torch.no_grad():
                return path, (image, encode(vae, image[None])[0].mode())
        except ImageError as error:  # names the file
            return path, error
        except LatentVAEError as error:
            return path, LatentVAEError(f"{path}: {error}")

    yield from side_by_side.run((partial(work, path) for path in paths), count)
