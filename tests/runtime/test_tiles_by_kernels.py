"""Tiles of an optimized model: normalised and measured by the kernels that `optimize` brings."""

import pytest
import torch
from diffusers import AutoencoderKL

import latentvae
from latentvae.models.presets import block_types
from latentvae.runtime.kernels import compiled
from latentvae.runtime.tiling import layers, maps

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler is here")


def make() -> AutoencoderKL:
    """A small VAE as wide as the kernels need, with random weights, also in the norms."""
    torch.manual_seed(0)
    widths = (32, 32, 64)
    vae = AutoencoderKL(
        block_out_channels=widths, layers_per_block=1, norm_num_groups=4, **block_types(widths)
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_equal_those_of_torch(dtype: torch.dtype) -> None:
    size = layers.Stored("a map", (32, 65, 47))
    values = (torch.randn(1, 32, 65, 47) * torch.logspace(-2, 1, 32)[:, None, None] + 3).to(dtype)
    values = values.contiguous(memory_format=torch.channels_last)
    by_torch, by_kernels = maps.Statistics(), maps.Statistics()
    for row in maps.rows_of_boxes(size, 17):
        for box in row:
            by_torch.add(box.of(values))
            by_kernels.add(box.of(values), by_kernels=True)
    assert by_kernels.count == by_torch.count == 65 * 47
    for ours, known in zip(by_kernels.of_groups(4), by_torch.of_groups(4), strict=True):
        torch.testing.assert_close(ours, known, rtol=1e-6, atol=0)


def test_numbers_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, images = make(), torch.rand(1, 3, 72, 136) * 2 - 1
    moments, latents = vae.encode(images).latent_dist.parameters, torch.randn(1, 4, 18, 34)
    pictures = vae.decode(latents).sample
    latentvae.enable_exact_tiling(latentvae.optimize(vae), 32)
    used, affine = [], layers.Norm._affine_of_image
    monkeypatch.setattr(layers.Norm, "_affine_of_image", lambda norm: used.append(norm) or affine(norm))
    for optimized in (True, False):  # who asks for no kernels gets none
        used.clear()
        if not optimized:
            latentvae.restore(vae, "optimize")
        tiled = vae.encode(images).latent_dist.parameters, vae.decode(latents).sample
        assert bool(used) is optimized
        for ours, known in zip(tiled, (moments, pictures), strict=True):
            assert (ours - known).abs().max() < 1e-4 * known.abs().max()
