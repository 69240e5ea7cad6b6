"""Images through a model and back, one by one."""

import pytest
import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import LatentVAEError
from latentvae.measure.evaluate import Evaluator, evaluate
from latentvae.measure.metrics import NO_RATE


def test_an_image_that_cannot_be_measured_is_named_once(tiny_vae: AutoencoderKL) -> None:
    """So that training and the command line say which one it was."""
    broken = torch.full((3, 32, 32), float("nan"))
    with pytest.raises(LatentVAEError, match=r"^7\.png: (?!7\.png)"):
        Evaluator(tiny_vae).add("7.png", broken)
    with pytest.raises(LatentVAEError, match=r"^7\.png: (?!7\.png)"):
        evaluate(tiny_vae, [("7.png", broken)])


def test_a_sample_depends_on_the_name_and_the_seed_alone(tiny_vae: AutoencoderKL) -> None:
    """So that several processes, each with a share of the images, draw what one does."""
    images = {name: torch.rand(3, 32, 32) * 2 - 1 for name in ("a.png", "b.png")}

    def figures(names: list[str], seed: int = 0) -> dict[str, float]:
        found = evaluate(tiny_vae, [(name, images[name]) for name in names], latents="sample", seed=seed)
        return {row.name: row.psnr for row in found.images}

    both = figures(["a.png", "b.png"])
    assert figures(["b.png"])["b.png"] == both["b.png"]
    assert figures(["b.png"], seed=1)["b.png"] != both["b.png"]


def test_a_constant_variance_gives_no_rate(tiny_vae: AutoencoderKL) -> None:
    """Students of teachers without variances: the KL would measure the constant."""
    image = torch.rand(3, 32, 32) * 2 - 1
    assert evaluate(tiny_vae, [("a.png", image)]).rate_bpp is not None
    with torch.no_grad():
        tiny_vae.quant_conv.weight[4:] = 0
        tiny_vae.quant_conv.bias[4:] = -10.0
    found = evaluate(tiny_vae, [("a.png", image)])
    assert found.rate_bpp is None
    assert "per source pixel" not in found.table()
    assert f"No bpp: {NO_RATE}." in found.table()
