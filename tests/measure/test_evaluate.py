"""Images through a model and back, one by one."""

import pytest
import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import LatentVAEError
from latentvae.measure.evaluate import Evaluator, evaluate


def test_an_image_that_cannot_be_measured_is_named_once(tiny_vae: AutoencoderKL) -> None:
    """So that training and the command line say which one it was."""
    broken = torch.full((3, 32, 32), float("nan"))
    with pytest.raises(LatentVAEError, match=r"^7\.png: (?!7\.png)"):
        Evaluator(tiny_vae).add("7.png", broken)
    with pytest.raises(LatentVAEError, match=r"^7\.png: (?!7\.png)"):
        evaluate(tiny_vae, [("7.png", broken)])
