"""Which weights a VAE has, as one hash: what latents on disk name, so that another VAE is refused."""

import hashlib

import torch
from diffusers import AutoencoderKL


def weight_hash(vae: AutoencoderKL) -> str:
    """SHA-256 of a VAE's weights as 64 hexadecimal digits: names, shapes and values in float32.

    The same for weights in half precision and for the same weights cast up to float32, on every device, in
    every memory layout, optimized and tiled or not. Weights rounded to a lower precision are others.
    """
    digest = hashlib.sha256()
    # names and shapes too: the same numbers in another place are other weights
    for name, tensor in sorted(vae.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        # little-endian whatever the machine is
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
