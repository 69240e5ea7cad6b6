"""LPIPS, the learned perceptual distance, made so that training can compute the target's features once.

Source: Zhang, Isola, Efros, Shechtman, Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", CVPR 2018, equation 1; linear heads v0.1 of the authors' `lpips` package, backbones of torchvision.
"""

import importlib.util
import logging
import os
import pickle
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from latentvae.base.errors import LatentVAEError, MissingWeightsError

logger = logging.getLogger(__name__)

LPIPSNet = Literal["alex", "squeeze", "vgg"]

PATIENCE = 1.5  # seconds for the weights' server to answer

WEIGHTS_ENV = "LATENTVAE_LPIPS"

# lpips.normalize_tensor's: changing it changes the distance.
EPS = 1e-10


class _Backbone(NamedTuple):
    """What LPIPS reads from one torchvision model."""

    model: str  # name in torchvision.models; weight files start with it
    taps: tuple[int, ...]  # indices in `model.features` whose outputs are compared
    min_size: int  # below this a pooling layer has nothing left to pool


# Each tap is the last layer of a slice in the authors' lpips/pretrained_networks.py.
_BACKBONES: dict[str, _Backbone] = {
    "alex": _Backbone("alexnet", (1, 4, 7, 9, 11), 31),
    "squeeze": _Backbone("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12), 17),
    "vgg": _Backbone("vgg16", (3, 8, 15, 22, 29), 16),
}


class _UnitChannels(torch.autograd.Function):
    """y = scale * x / (|x| + eps), the norm over channels, in at least float32.

    Written out because autograd would write several more maps as large as the network's largest.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        # squares of features overflow in half precision
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # (B, C, h, w)
        norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        inverse = (norm + EPS).reciprocal()
        ctx.save_for_backward(x, scale, norm, inverse)
        return (wide * inverse).mul_(scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, scale, norm, inverse = ctx.saved_tensors
        wide = x.to(norm.dtype)
        grad = grad * scale
        # what of the gradient lies along x only changes its length, which is divided out
        along = (grad * wide).sum(1, keepdim=True) * inverse / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        grad = grad.addcmul_(wide, along, value=-1).mul_(inverse.masked_fill(norm == 0, 0))
        return grad.to(x.dtype), None


class _SquaredDistance(torch.autograd.Function):
    """Sum of (f0 - f1)^2 over channels, mean over positions: (B,). Writes fewer maps than autograd."""

    @staticmethod
    def forward(ctx: Any, f0: Tensor, f1: Tensor) -> Tensor:
        difference = f0 - f1
        ctx.save_for_backward(difference)
        return difference.square().sum((1, 2, 3)) / difference[0, 0].numel()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (difference,) = ctx.saved_tensors
        slope = (2 * grad / difference[0, 0].numel()).view(-1, 1, 1, 1)
        grad0 = difference * slope if ctx.needs_input_grad[0] else None
        grad1 = difference * -slope if ctx.needs_input_grad[1] else None
        return grad0, grad1


class LPIPS(nn.Module):
    """The LPIPS distance with frozen weights; make one with `load_lpips`.

    The distance is `sum over layers, mean over positions, sum over channels of w * (f0 - f1)^2`. As w >= 0,
    its square root goes into the features; the distance is then a squared Euclidean distance of features, and
    the target's features need computing only once:

        with torch.no_grad():
            target = lpips.features(images)
        perceptual_loss = lpips.distance_from_features(target, lpips.features(reconstructions)).mean()

    Convolutions follow autocast; norms and sums are float32 whatever autocast says.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: LPIPSNet, backbone: nn.Sequential, heads: list[Tensor]) -> None:
        """Freeze `backbone` (torchvision's `model.features`) and `heads` (one (C,) tensor >= 0 per tap)."""
        super().__init__()
        self.net = net
        spec = _BACKBONES[net]
        self.taps, self.min_size = spec.taps, spec.min_size
        # nothing behind the last tap is looked at
        self.backbone = backbone[: max(spec.taps) + 1]
        # lpips.ScalingLayer: ImageNet's mean and deviation, for images in [-1, 1] instead of [0, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])
        for i, head in enumerate(heads):
            self.register_buffer(f"root{i}", head.sqrt()[None, :, None, None])
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Measure the perceptual distance of each pair; 0 is identical.

        Args:
            images: (B, 3 or 1, H, W) float in [-1, 1]; one channel is repeated to three. Values outside are
                not clipped, so that a gradient can lead them back.
            reconstructions: the same shape and range. Gradients flow to both.

        Returns:
            (B,) float32, as `lpips.LPIPS(net)(images, reconstructions)` gives.

        Raises:
            LatentVAEError: on a wrong shape, dtype, number of channels, or images below the network's minimum
                (alex 31, squeeze 17, vgg 16 pixels).
        """
        if images.shape != reconstructions.shape:
            raise LatentVAEError(
                f"LPIPS compares images of one shape, but images are {tuple(images.shape)} and "
                f"reconstructions {tuple(reconstructions.shape)}. Crop the padding off the reconstructions."
            )
        return self.distance_from_features(self.features(images), self.features(reconstructions))

    def features(self, images: Tensor) -> list[Tensor]:
        """Compute the normalised, weighted features of images; under `torch.no_grad()` for a fixed target.

        Args and errors as `forward`. Returns one (B, C, h, w) float32 tensor per layer.
        """
        self._check(images)
        # (B, 3, H, W), then (B, C, h, w) of each layer
        x = (images - self.shift) / self.scale  # repeats one channel to three by broadcasting
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # oneDNN's fast layout
        features: list[Tensor] = []
        for i, layer in enumerate(self.backbone):
            x = layer(x)
            if i in self.taps:
                features.append(_UnitChannels.apply(x, getattr(self, f"root{len(features)}")))
        return features

    def distance_from_features(self, features0: list[Tensor], features1: list[Tensor]) -> Tensor:
        """Sum the squared differences of two lists from `features`, averaged over positions: (B,) float32."""
        pairs = zip(features0, features1, strict=True)
        return torch.stack([_SquaredDistance.apply(f0, f1) for f0, f1 in pairs]).sum(0)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            raise LatentVAEError(
                f"LPIPS wants a float tensor (B, 3 or 1, H, W) in [-1, 1], got {images.dtype} of shape "
                f"{tuple(images.shape)}. Convert the images first."
            )
        if min(images.shape[2:]) < self.min_size:
            raise LatentVAEError(
                f"LPIPS with the '{self.net}' network needs images of {self.min_size} pixels or more on each "
                f"side, got {images.shape[2]}x{images.shape[3]} (height x width). Use larger crops or images."
            )


def smallest_side(net: LPIPSNet) -> int:
    """Of images that a network can judge, in pixels; known without its weights."""
    return _BACKBONES[net].min_size


def load_lpips(net: LPIPSNet, weights: str | Path | None = None, download: bool | None = None) -> LPIPS:
    """Load LPIPS with pretrained weights, or fail: never with a random backbone.

    Args:
        net: backbone. "vgg" is usual for training, "alex" for reporting, "squeeze" is the cheapest.
        weights: a .safetensors file keyed as torchvision's `model.features` ("0.weight", or
            "features.0.weight"), or a folder with files named alexnet*, squeezenet1_1*, vgg16*. None looks at
            the environment variable LATENTVAE_LPIPS (file or folder), then in torchvision's cache.
        download: fetch torchvision's weights into its cache when they are found nowhere, with a progress bar.
            None: if HF_HUB_OFFLINE is not set and their server answers within a second or two.

    Returns:
        A module on the CPU in float32, frozen, in eval mode.

    Raises:
        MissingWeightsError: the weights are nowhere.
        LatentVAEError: unknown net, or a file that is not this network's weights.
    """
    if net not in get_args(LPIPSNet):
        raise LatentVAEError(f"unknown LPIPS network {net!r}; choose one of {', '.join(get_args(LPIPSNet))}.")
    path = _find(net, weights, download)
    with torch.device("meta"):  # no random initialisation, no draw from the global generator
        backbone = models.get_model(_BACKBONES[net].model, weights=None).features
    state = _read(path)
    # by hand: load_state_dict would name every key at once
    _check_state(state, backbone.state_dict(), net, path)
    backbone.load_state_dict({k: v.float() for k, v in state.items()}, strict=True, assign=True)
    return LPIPS(net, backbone, _heads(net))


def _find(net: LPIPSNet, weights: str | Path | None, download: bool | None) -> Path:
    """Look for weights at the given path, or else in the environment's, or else in torchvision's cache."""
    place = weights or os.environ.get(WEIGHTS_ENV)
    reason = ""
    if place:
        found = _in_place(net, Path(place).expanduser())
        if found is not None:
            return found
        reason = f"{place} holds no {_BACKBONES[net].model}*.safetensors"
    if weights:  # a path was asked for: weights from elsewhere would be a surprise
        raise _missing(net, reason)
    reason += ", " * bool(reason)
    url = str(models.get_model_weights(_BACKBONES[net].model).IMAGENET1K_V1.url)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if cached.is_file():
        return cached
    if not (_may_download(url) if download is None else download):
        raise _missing(net, f"{reason}torchvision's cache has no {cached.name}, and there is no connection")
    logger.info("fetching %s of LPIPS, once: %s to %s", _BACKBONES[net].model, url, cached)
    try:
        torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise _missing(net, f"{reason}downloading {url} failed ({error})") from error
    return cached


def _may_download(url: str) -> bool:
    """Whether a download may be tried and would not hang: its server takes a connection in time.

    Asked first because a machine without a route can wait minutes for a name, which no figure is worth.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    host = str(urlsplit(url).hostname)
    answered: list[bool] = []

    def knock() -> None:
        with suppress(OSError), socket.create_connection((host, 443), timeout=PATIENCE):
            answered.append(True)

    # a thread of its own that nobody waits for: looking up a name has no time limit
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answered)


def _in_place(net: LPIPSNet, place: Path) -> Path | None:
    """Return the weight file at `place`; None for a folder without one for this net."""
    if place.is_file():
        return place
    if not place.is_dir():
        raise _missing(net, f"the path {place} does not exist")
    # torchvision adds a hash to the model's name, and people a version
    files = sorted(place.glob(f"{_BACKBONES[net].model}*.safetensors"))
    return files[0] if files else None


def _missing(net: LPIPSNet, reason: str) -> MissingWeightsError:
    model = _BACKBONES[net].model
    return MissingWeightsError(
        f"no weights for LPIPS '{net}': {reason}. Once online: torchvision.models.{model}"
        f"(weights='DEFAULT'); or a path of {model}*.safetensors in {WEIGHTS_ENV} or an option."
    )


def _read(path: Path) -> dict[str, Tensor]:
    """Read safetensors, or torchvision's own pickle from its cache without executing it; drop the prefix."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if path.suffix != ".safetensors" and path.parent != cache:
        raise LatentVAEError(
            f"LPIPS weights must be .safetensors, got {path}: a pickle can run code. Leave torchvision's own "
            f"in its cache ({cache}) and give no path, or convert the file."
        )
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise LatentVAEError(f"cannot read LPIPS weights {path} ({error}). Fetch them again.") from error
    # A whole model's file has the prefix, and a classifier that is not wanted.
    part = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
    return part or state


def _check_state(state: dict[str, Tensor], wanted: dict[str, Tensor], net: str, path: Path) -> None:
    """Raise naming the first key that is missing, too many, or of another shape."""
    for key in sorted(wanted.keys() | state.keys()):
        if key not in state:
            problem = f"key '{key}' is missing"
        elif key not in wanted:
            problem = f"unknown key '{key}'"
        elif state[key].shape != wanted[key].shape:
            problem = f"'{key}' is {tuple(state[key].shape)}, wanted {tuple(wanted[key].shape)}"
        else:
            continue
        raise LatentVAEError(
            f"{path} is not for LPIPS '{net}': {problem}. Give the features of torchvision's "
            f"{_BACKBONES[net].model}, or a folder that holds several networks' files."
        )


def _heads(net: LPIPSNet) -> list[Tensor]:
    """Read the linear heads v0.1, one (C,) tensor per layer: all that the package lpips serves for here."""
    package = importlib.util.find_spec("lpips")  # importing it would add 1.5 s of scipy
    if package is None or package.origin is None:
        raise MissingWeightsError(
            "LPIPS's heads come with the package 'lpips', which is missing: install it."
        )
    path = Path(package.origin).parent / "weights" / "v0.1" / f"{net}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{i}.model.1.weight"].flatten() for i in range(len(_BACKBONES[net].taps))]
