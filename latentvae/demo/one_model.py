"""A model of the page: loaded, and its precision chosen. Torch and diffusers are imported here.

The page itself is up before they are: the other modules of this room name them in types alone.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from latentvae.base.errors import LatentVAEError, MissingWeightsError, ModelError
from latentvae.images.tensors import Padding
from latentvae.measure.lpips import LPIPS, load_lpips
from latentvae.models.fingerprint import weight_hash
from latentvae.models.latents import Posterior, decode, encode
from latentvae.models.loading import load
from latentvae.models.spaces import Autoencoder, load_autoencoder
from latentvae.runtime.optimize import optimize
from latentvae.runtime.tiling.planning import plan
from latentvae.runtime.tiling.switch import enable_exact_tiling

logger = logging.getLogger(__name__)

TRIAL_SIDE = 256  # pixels of the image that precisions are timed on
FIRST_SIDE = 64  # and of one that they are timed on before
FASTER = 0.85  # of float32's time that bfloat16 must stay below to be worth its rounding
HOPELESS = 2.0  # times of float32's: a CPU without bfloat16 may take ten, which are not waited for


@dataclass(frozen=True)
class Model:
    """One choice of the picker.

    Attributes:
        name: what visitors call it.
        exact: in float32: encodes, so that latents and files do not depend on what this machine is fast at.
        swift: the same weights, or those in bfloat16 once this machine was found faster at it: draws
            pictures.
        weights_sha256: of `exact`.
    """

    name: str
    exact: AutoencoderKL
    swift: AutoencoderKL
    weights_sha256: str

    @property
    def channels(self) -> int:
        """Of its images: 1 or 3."""
        return int(self.exact.config["in_channels"])

    @property
    def precision(self) -> str:
        """What pictures are decoded in, for people."""
        return "bf16" if self.swift.dtype == torch.bfloat16 else "fp32"

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[Posterior, Padding]:
        """`latents.encode`, exactly; images (1, C, H, W) in [-1, 1]."""
        return encode(self.exact, images)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, padding: Padding | None = None) -> torch.Tensor:
        """`latents.decode`, swiftly: latents (1, c, h, w) to images (1, C, H, W)."""
        return decode(self.swift, latents, padding)

    @torch.no_grad()
    def sketch(self, images: torch.Tensor) -> torch.Tensor:
        """Images (1, C, H, W) there and back, both swiftly: not quite what `encode` and `decode` give."""
        posterior, padding = encode(self.swift, images)
        return self.decode(posterior.mode(), padding)

    def peak_bytes(self, width: int, height: int) -> int:
        """What an image of so many pixels takes at most, there and back; 0 where that cannot be planned."""
        try:
            plans = [plan(each, height, width) for each in (self.exact, self.swift)]
        except ModelError:
            return 0
        images = 4 * self.channels * width * height  # float32, and what came back is as large
        return 2 * images + max(plans[0].encode.peak_bytes, plans[1].decode.peak_bytes)

    @staticmethod
    def draw(posterior: Posterior, latents: str, seed: int) -> torch.Tensor:
        """Latents (1, c, h, w): the posterior's "mode", or a "sample" of it."""
        return (
            posterior.mode() if latents == "mode" else posterior.sample(torch.Generator().manual_seed(seed))
        )


@dataclass(frozen=True)
class Peer:
    """An AutoencoderTiny, which takes part in comparisons alone: it has no posterior.

    Attributes:
        name: what visitors call it.
        vae: in float32.
        tile_above: pixels of a side above which images go in its own tiles, which overlap.
    """

    name: str
    vae: AutoencoderTiny
    tile_above: int

    @property
    def channels(self) -> int:
        """Of its images: 1 or 3."""
        return int(self.vae.config["in_channels"])

    @property
    def ratio(self) -> int:
        """Pixels of a side that become one position."""
        return int(self.vae.spatial_scale_factor)


def load_either(name: str, source: str | Path, tile_above: int) -> Model | Peer:
    """A model, or a peer, by the name of a bundled one or from a folder or file.

    Raises:
        ModelError: it cannot be loaded, or its images are neither grey nor RGB.
    """
    found: Autoencoder = load_autoencoder(source)
    if found.config["in_channels"] not in (1, 3):
        raise ModelError(
            f"{source} takes {found.config['in_channels']} channels; pictures have 1 or 3. Leave it out."
        )
    if isinstance(found, AutoencoderTiny):
        return Peer(name, found, tile_above)
    _tile(optimize(found), tile_above)
    return Model(name, found, found, weight_hash(found))


def find_lpips() -> tuple[LPIPS | None, str | None]:
    """The network of LPIPS, or why there is none."""
    try:
        return load_lpips("alex", download=False), None  # the page fetches nothing
    except MissingWeightsError as error:
        logger.info("LPIPS is left out: %s", error)
        return None, "the weights of its network are not installed on this server"


def swifter(
    model: Model, source: str | Path, tile_above: int, turn: Callable[[], AbstractContextManager[None]]
) -> AutoencoderKL | None:
    """A copy of a model in bfloat16, if this machine is faster at it; each trial has a `turn` of its own."""
    swift = optimize(load(source, dtype=torch.bfloat16))
    if not _is_faster(swift, model.exact, turn):
        return None
    _tile(swift, tile_above)
    return swift


def _tile(vae: AutoencoderKL, tile_above: int) -> None:
    """Tile large images exactly; a model with blocks that cannot be tiled takes them whole."""
    try:
        enable_exact_tiling(vae, tile_above, progress=True)
    except LatentVAEError as error:
        logger.warning("large images are not tiled: %s", error)


def _is_faster(
    swift: AutoencoderKL, exact: AutoencoderKL, turn: Callable[[], AbstractContextManager[None]]
) -> bool:
    """Whether bfloat16 pays, measured after a first time that warms both up, each time in a `turn`."""
    both = (swift, exact)

    def least(side: int, times: int) -> tuple[float, float]:
        # the least of each: what else the machine does only ever adds
        fast, slow = (
            min(each) for each in zip(*(_times(both, side, turn) for _ in range(times)), strict=True)
        )
        return fast, slow

    fast, slow = least(FIRST_SIDE, 2)
    if fast > HOPELESS * slow:
        return False
    least(TRIAL_SIDE, 1)
    fast, slow = least(TRIAL_SIDE, 2)
    return fast < FASTER * slow


def _times(
    models: Sequence[AutoencoderKL], side: int, turn: Callable[[], AbstractContextManager[None]]
) -> list[float]:
    """Seconds that each takes for a round trip, in their order."""
    found = []
    for vae in models:
        with turn():
            start = time.perf_counter()
            _round_trip(vae, side)
            found.append(time.perf_counter() - start)
    return found


@torch.no_grad()
def _round_trip(vae: Any, side: int) -> None:
    images = torch.zeros(1, vae.config["in_channels"], side, side, dtype=vae.dtype)
    vae.decode(vae.encode(images).latent_dist.mode())
