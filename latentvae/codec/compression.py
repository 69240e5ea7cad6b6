"""Compress images to small files: the posterior's mode, quantised and entropy-coded.

Files of a released version are read by every later one; docs/formats.md says what that takes.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import CodecError
from latentvae.base.repeatable import same_bits
from latentvae.codec.coding import entropy_decode, entropy_encode
from latentvae.codec.container import HASH_BYTES, VERSION, Header, pack, read_lvae, unpack
from latentvae.codec.quantisation import dequantise, in_steps, steps
from latentvae.models.fingerprint import weight_hash
from latentvae.models.latents import decode, encode
from latentvae.models.loading import load, spatial_compression_ratio
from latentvae.models.shipped import bundled

__all__ = ["check_model", "compress", "decode_payload", "decompress", "describe", "read_lvae", "unpack"]

DEFAULT_QUALITY = 50
# Weights that releases have bundled, by how their hash begins: name and the last release that has them. Files
# need them for ever, so whoever replaces a bundled model leaves its line here.
RELEASED = {
    "e7199bb1a8919be5": ("f8c4-small", "0.1.0"),
    "6c32fffc57779617": ("f8c16-small", "0.1.0"),
    "e2ff97b2c74fd32a": ("sd-small", "0.1.0"),
    "21188df5158a7b1e": ("sd-small", "0.1.0"),
    "d9a642ec8a12e13c": ("flux-small", "0.1.0"),
    "bd16be308854ff03": ("flux-small", "0.1.0"),
    "c00d295f7b91f220": ("sdxl-small", "0.1.0"),
    "937ad7dab5f35ea9": ("sdxl-small", "0.1.0"),
    "7ffea0e76b292efd": ("sd3-small", "0.1.0"),
    "8f0103560a4a7d40": ("sdxl-small", "0.1.0"),
}
RATE_WEIGHT = 0.05  # measured: more saves bits at equal PSNR, and costs some at equal LPIPS


@torch.no_grad()
def compress(vae: AutoencoderKL, images: torch.Tensor, *, quality: int = DEFAULT_QUALITY) -> bytes:
    """Compress one image to the bytes of an .lvae file.

    Args:
        vae: `decompress` needs the same weights, at the same precision.
        images: (1, C, H, W) in [-1, 1], of any size.
        quality: 1 (smallest) to 100 (best); 14 more halve the quantisation steps.

    Raises:
        CodecError: several images, another quality, or latents that cannot be quantised.
    """
    if images.ndim != 4 or images.shape[0] != 1:
        raise CodecError(
            f"images of shape {tuple(images.shape)} came; one at a time is compressed, (1, C, H, W)."
        )
    with same_bits():
        posterior, padding = encode(vae, images)  # (1, C, h, w)
    # the mode: a sample would spend bits on noise that the decoder does not miss
    chosen = steps(vae, posterior, quality)
    _, payload = entropy_encode(in_steps(posterior.mode(), chosen), RATE_WEIGHT)
    header = Header(
        weights=_short_hash(vae),
        width=padding.width,
        height=padding.height,
        right=padding.right,
        bottom=padding.bottom,
        image_channels=images.shape[1],
        quality=quality,
        steps=chosen,
    )
    return pack(header, payload)


def decompress(vae: AutoencoderKL, data: bytes, *, max_pixels: int = 1 << 24) -> torch.Tensor:
    """Decompress the bytes of an .lvae file to images (1, C, H, W) near [-1, 1], float32.

    Args:
        vae: the model that compressed it.
        max_pixels: refuse more, from the header: a file of two kilobytes can claim an image that
            takes tens of gigabytes to decode. For larger ones raise it, and `enable_exact_tiling` first.

    Raises:
        CodecError: no .lvae file, a damaged one, too many pixels, or another model's.
    """
    header, payload = unpack(data, max_pixels=max_pixels)
    check_model(vae, header)
    return decode_payload(vae, header, payload)


@torch.no_grad()
def decode_payload(vae: AutoencoderKL, header: Header, payload: bytes) -> torch.Tensor:
    """Images of a file that was read and whose model was checked; see `decompress`."""
    height, width = (side // spatial_compression_ratio(vae) for side in header.padded)
    # whole numbers (C, h, w): the same on every machine, as only integers decided how they were coded
    values = entropy_decode(payload, (len(header.steps), height, width))
    return decode(vae, dequantise(values, header.steps), header.padding)


def check_model(vae: AutoencoderKL, header: Header) -> None:
    """Refuse a file that another model wrote.

    Raises:
        CodecError: names the weights that are needed, and the bundled model that has them if one does.
    """
    if header.weights != _short_hash(vae):
        raise CodecError(
            f"this file needs the VAE whose weight hash begins with {header.weights.hex()}"
            f"{_whose(header.weights)}; this one's is {_short_hash(vae).hex()}. "
            "Give that one as --model, at the precision it compressed with."
        )
    ratio = spatial_compression_ratio(vae)
    channels = (vae.config["in_channels"], vae.config["latent_channels"])
    if channels != (header.image_channels, len(header.steps)) or any(
        padded % ratio or added >= ratio
        for padded, added in zip(header.padded, (header.bottom, header.right), strict=True)
    ):
        raise CodecError("this file is damaged: its sizes do not fit the model it names. Get it again.")


def describe(path: str | Path) -> dict[str, Any]:
    """What a file says of itself, as JSON values; `model` is the bundled model that decodes it, or None.

    Raises:
        CodecError: it cannot be read, or is damaged.
    """
    header, payload = read_lvae(path)
    size = Path(path).stat().st_size
    return {
        "file": str(path),
        "version": VERSION,
        "weights": header.weights.hex(),
        "model": bundled_model(header.weights),
        "released": RELEASED.get(header.weights.hex()),
        "quality": header.quality,
        "width": header.width,
        "height": header.height,
        "image_channels": header.image_channels,
        "latent_channels": len(header.steps),
        "bytes": size,
        "payload_bytes": len(payload),
        "bpp": 8 * size / (header.width * header.height),
    }


def _short_hash(vae: AutoencoderKL) -> bytes:
    return bytes.fromhex(weight_hash(vae))[:HASH_BYTES]


def bundled_model(weights: bytes) -> str | None:
    """The bundled model of these weights, as a file's header has them."""
    # each takes a load of its weights; where a release had them, its own name is the first to try
    known = RELEASED.get(weights.hex(), ("", ""))[0]
    names = sorted(bundled(), key=lambda name: name != known)
    return next((name for name in names if _short_hash(load(name)) == weights), None)


def _whose(weights: bytes) -> str:
    """Where weights are to be had, for messages."""
    name, released = bundled_model(weights), RELEASED.get(weights.hex())
    if name is not None:
        return f" (the bundled {name})"
    if released is not None:
        name, release = released
        return f" (the {name} of release {release}, since replaced: take its folder from that release)"
    return ""
