"""Tiny random VAEs of every structure, and proof of what computes them."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from latentvae.models.presets import block_types
from latentvae.runtime.kernels import compiled, groupnorm, winograd


def tiny_autoencoder(channels: int = 4, seed: int = 0, **options: Any) -> AutoencoderTiny:
    """A random one of TAESD's class, of 1/8 of the side."""
    torch.manual_seed(seed)
    shape = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    return AutoencoderTiny(**{**shape, **blocks, "latent_channels": channels, **options}).eval()


def build(
    levels: int = 3, layers: int = 1, attention: bool = True, quant: bool = True, **options: Any
) -> Any:
    """A random float64 VAE, seen to use every weight: random norms and biases too."""
    torch.manual_seed(levels * 10 + layers)
    widths = (4, 8, 8, 12, 4)[:levels]
    vae = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=2,
        mid_block_add_attention=attention,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        sample_size=64,
        **block_types(widths),
        **options,
    )
    vae.double().eval()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vae


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes maps of any size worth the CPU's own kernels, and lists the kernels that ran."""
    made: list[str] = []

    def counting(name: str, function: Any) -> Any:
        def counted(*args: Any) -> Any:
            made.append(name + ("+" if len(args) > 3 and args[3] is not None else ""))
            return function(*args)

        return counted

    monkeypatch.setattr(compiled, "library", lambda: None)
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    monkeypatch.setattr(winograd, "MIN_PIXELS", 1)
    monkeypatch.setattr(groupnorm, "BLOCK", 40)
    monkeypatch.setattr(winograd, "convolve", counting("convolve", winograd.convolve))
    monkeypatch.setattr(groupnorm, "affine", counting("affine", groupnorm.affine))
    return made


def both(vae: Any, images: torch.Tensor, latents: torch.Tensor) -> list[torch.Tensor]:
    return [vae.encode(images).latent_dist.parameters, vae.decode(latents).sample]


def inputs(vae: Any, height: int = 3, width: int = 5, batch: int = 1) -> list[torch.Tensor]:
    """Images, with sides that the compression ratio does not divide, and latents."""
    ratio = 2 ** (len(vae.config.block_out_channels) - 1)
    images = torch.rand(batch, 3, height * ratio + ratio // 2, width * ratio, dtype=vae.dtype) * 2 - 1
    return [images, torch.randn(batch, vae.config.latent_channels, height, width, dtype=vae.dtype)]


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float = 1e-9) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()
