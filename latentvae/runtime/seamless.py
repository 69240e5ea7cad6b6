"""Borders that meet: convolutions that see a map's other side beyond its border, for textures that tile."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from latentvae.base.errors import ModelError
from latentvae.runtime.patches import check_autoencoder, name_patches, patch, patches_of, restore
from latentvae.runtime.plain import change


def make_seamless(vae: AutoencoderKL, *, x: bool = True, y: bool = True) -> AutoencoderKL:
    """Have images repeat without a seam: every padded convolution wraps around; `restore` undoes it.

    `optimize` runs these convolutions as stock; exact tiling wraps its halo. A seamless texture wants a
    diffusion model that wraps as well. Called again, the new choice replaces the old one.

    Args:
        x: left and right borders meet.
        y: upper and lower borders meet.

    Returns:
        The same object.

    Raises:
        ModelError: not an AutoencoderKL, or one with convolutions that are padded by something else already.
    """
    check_autoencoder(vae)
    restore(vae, "seamless")
    convs = [(name, module) for name, module in vae.named_modules() if isinstance(module, nn.Conv2d)]
    padded = [(name, conv) for name, conv in convs if conv.padding not in ((0, 0), "valid")]
    for name, conv in padded:
        _check(name, conv)
    for _, conv in padded:
        if x or y:
            patch(conv, _FORWARDS[x, y], "seamless")
    name_patches(vae)
    return vae


def _check(name: str, conv: nn.Conv2d) -> None:
    """Refuse a convolution of which our forward would leave something out."""
    found = change(conv)
    if found is None and (conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
        found = f"pads by {conv.padding_mode}, {conv.padding}"
    if found is not None:
        raise ModelError(f"{name} {found}; wanted a stock convolution with zeros around it. Undo that first.")


def wraps(conv: Any) -> tuple[bool, bool]:
    """Along which axes, (y, x), a convolution sees the other side of its input beyond the border."""
    if conv.padding_mode == "circular":
        return True, True
    ours = patches_of(conv)
    function = dict(ours.functions).get("seamless") if ours is not None else None
    return _AXES.get(function, (False, False))


def _wrapped(self: nn.Conv2d, image: torch.Tensor, x: bool, y: bool) -> torch.Tensor:
    ours = patches_of(self)
    _check(ours.name if ours is not None else "a convolution", self)  # it may have been changed since
    height, width = map(int, self.padding)  # of zeros where it does not wrap
    across, down = x * width, y * height
    image = F.pad(image, (across, across, down, down), mode="circular")
    rest = (height - down, width - across)
    return F.conv2d(image, self.weight, self.bias, self.stride, rest, self.dilation, self.groups)


def _along_x(self: nn.Conv2d, image: torch.Tensor) -> torch.Tensor:
    return _wrapped(self, image, True, False)


def _along_y(self: nn.Conv2d, image: torch.Tensor) -> torch.Tensor:
    return _wrapped(self, image, False, True)


def _along_both(self: nn.Conv2d, image: torch.Tensor) -> torch.Tensor:
    return _wrapped(self, image, True, True)


_FORWARDS = {(True, False): _along_x, (False, True): _along_y, (True, True): _along_both}
_AXES: dict[Any, tuple[bool, bool]] = {function: (y, x) for (x, y), function in _FORWARDS.items()}
