"""A small VAE of digits for the experiments: trained by latentvae's engine, or read where it was."""

from pathlib import Path

from diffusers import AutoencoderKL
from digits import SIDE, Digits, write_digits

import latentvae
from latentvae.training.loop import train
from latentvae.training.recipes import load_config

STEPS = 200  # of 32 digits: half a minute on one core
# A Laplace likelihood of scale 0.05 (a fortieth of the range) against the KL: latents hold what a digit is.
KL_WEIGHT = 0.05


def digits_vae(digits: Digits, place: Path, steps: int = STEPS) -> AutoencoderKL:
    """The VAE in `place`/run/vae: 32 px to 4 x 4 latents of 4 channels; trained on the digits if not there.

    Args:
        digits: to learn from.
        place: folder of this VAE alone.
        steps: of the optimizer, with 32 digits each.
    """
    exported = place / "run" / "vae"
    if not exported.is_dir():
        train(load_config("tiny", settings(write_digits(digits, place / "digits"), place / "run", steps)))
    return latentvae.optimize(latentvae.load(exported))


def settings(images: Path, output: Path, steps: int) -> list[str]:
    """What differs from the recipe `tiny`."""
    values = {
        "data.train": images,
        "data.crop": SIDE,
        "data.val_size": SIDE,
        "data.in_memory": "true",
        "data.workers": 0,
        "data.horizontal_flip": "false",  # a mirrored digit is none
        "model.overrides": "{in_channels: 1, out_channels: 1}",
        "loss.kl_weight": KL_WEIGHT,
        "train.batch_size": 32,
        "train.max_steps": steps,
        "train.validate_every": steps,
        "train.save_every": steps,
        "train.tracker": "none",
        "output": output,
    }
    return [f"{name}={value}" for name, value in values.items()]
