"""What a run is refused for before it starts: an error at the end would cost the training."""

import os
from pathlib import Path

from diffusers import AutoencoderKL

from latentvae.errors import ConfigError
from latentvae.exporting import SIDECAR
from latentvae.model import spatial_compression_ratio
from latentvae.perceptual import LPIPS
from latentvae.training import checkpoint
from latentvae.training.config import Config
from latentvae.training.sources import parts


def starting_point(config: Config, resume: str | None) -> Path | None:
    """The checkpoint to continue from, or None to start anew, once the output is known to be usable.

    Raises:
        ConfigError: nothing to resume, or an output that is another run's, not writable, or in the way.
    """
    folder = Path(config.output)
    _check_apart(folder, config)
    own = folder / "checkpoints"
    start = checkpoint.resolve(resume, own) if resume else None
    if checkpoint.listing(own) and (start is None or start.resolve().parent != own.resolve()):
        raise ConfigError(
            f"{folder} holds a run's checkpoints. Add --resume latest, or choose another output."
        )
    _check_writable(folder)
    exported = folder / "vae"
    if exported.is_file() or _holds_something_else(exported):
        raise ConfigError(
            f"{exported} is there and no earlier export, so the model could not be written to it. "
            "Choose another output."
        )
    return start


def check_crop(config: Config, vae: AutoencoderKL, lpips: LPIPS | None) -> None:
    """Refuse crops that the networks cannot take; a parent's shape is known only once it is loaded.

    Raises:
        ConfigError: names the size that fits.
    """
    crop, ratio = config.data.crop, spatial_compression_ratio(vae)
    if crop % ratio:
        raise ConfigError(
            f"data.crop={crop} is not a multiple of the compression ratio {ratio} of {config.model.init}; "
            f"use {(crop // ratio + 1) * ratio}."
        )
    if lpips is not None and crop < lpips.min_size:
        raise ConfigError(
            f"data.crop={crop} is too small for loss.perceptual_net={lpips.net}, which needs "
            f"{lpips.min_size} pixels. Use larger crops, or another network."
        )


def _check_apart(folder: Path, config: Config) -> None:
    """Pictures that a run writes among its images would be some of them when it is resumed."""
    for setting, spec in (("data.train", config.data.train), ("data.val", config.data.val)):
        places = [] if spec is None else [part.resolve() for part in parts(spec)]
        for place in (place for place in places if folder.resolve().is_relative_to(place)):
            raise ConfigError(
                f"output={folder} lies in {place}, the folder of {setting}: the pictures of a run would be "
                "taken for images when it is resumed. Choose an output elsewhere, such as "
                f"--set output={place.parent / 'runs'}."
            )


def _check_writable(folder: Path) -> None:
    """Look at the nearest folder that exists, so that nothing is made for a run that is refused later."""
    try:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        usable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    except OSError:  # a folder on the way that may not be entered
        usable = False
    if not usable:
        raise ConfigError(f"output={folder} cannot be written to. Choose another output.")


def _holds_something_else(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir()) and not (folder / SIDECAR).is_file()
