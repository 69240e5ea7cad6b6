"""The models that visitors choose from, loaded once, used by one request at a time."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from latentvae.base.errors import LatentVAEError, MissingWeightsError, ModelError
from latentvae.measure.lpips import LPIPS, load_lpips
from latentvae.models.fingerprint import weight_hash
from latentvae.models.loading import DEFAULT_MODEL, bundled, describe, load
from latentvae.models.spaces import Autoencoder, load_autoencoder
from latentvae.runtime.optimize import optimize
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
        exact: in float32: encodes, so that latents and files are the same on every machine.
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


class Models:
    """All models of a server: the bundled ones and those named at its start.

    Args:
        sources: folders or files, as `load_autoencoder` takes them; an AutoencoderTiny is a peer.
        tile_above: pixels of a side above which images go in exact tiles.
        say: is told what is loading.

    Raises:
        ModelError: one that cannot be loaded, or whose images are neither grey nor RGB.
    """

    def __init__(
        self,
        sources: Sequence[str | Path] = (),
        tile_above: int = 1024,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        # a plain lock can be taken again and again by one thread while another one waits for it
        self._turn = threading.Condition()
        self._taken, self._visitors = False, 0  # who computes now; those who do or wait for it
        self._tile_above = tile_above
        self._models: dict[str, Model] = {}
        self.peers: dict[str, Peer] = {}
        self._cold: dict[str, str | Path] = {}  # whose precision is not chosen yet, and where from
        own = _default_first(bundled())
        loaded = {}
        for source in (*sources, *own):  # those named at the start first: they may be wrong
            say(f"loading {source}")
            loaded[source] = self._load(source)
        for source in (*own, *sources):
            self._add(source, loaded[source])
        if not self._models:
            raise ModelError("no model is bundled and none was named: give one with --model.")
        self.lpips, self.lpips_missing_reason = _find_lpips()

    @property
    def names(self) -> list[str]:
        """What the picker offers, the first being its choice."""
        return list(self._models)

    @contextmanager
    def use(self, name: str | None) -> Iterator[Model]:
        """Lend a model; others wait, because exact tiling and the CPU's kernels keep buffers with it.

        Raises:
            ModelError: no such model here.
        """
        if name not in self._models:
            raise ModelError(f"there is no model {name!r} here: choose one of {', '.join(self.names)}.")
        with self._turn:
            self._visitors += 1
        try:
            with self._alone(lambda: True):
                yield self._models[name]
        finally:
            with self._turn:
                self._visitors -= 1
                self._turn.notify_all()

    @contextmanager
    def _alone(self, may: Callable[[], bool]) -> Iterator[None]:
        """Have the models for oneself, as soon as nobody else has them and one `may`."""
        with self._turn:
            self._turn.wait_for(lambda: not self._taken and may())
            self._taken = True
        try:
            yield
        finally:
            with self._turn:
                self._taken = False
                self._turn.notify_all()

    def warm_up(self) -> None:
        """Choose every model's precision, in turns that are short and come after every visitor's."""
        for name, source in list(self._cold.items()):
            exact = self._models[name].exact
            swift = optimize(load(source, dtype=torch.bfloat16))
            if _is_faster(swift, exact, self._aside):  # or the copy in bfloat16 is freed
                _tile(swift, self._tile_above)
                self._models[name] = replace(self._models[name], swift=swift)
            del self._cold[name]

    def _aside(self) -> AbstractContextManager[None]:
        """A turn for what can wait."""
        return self._alone(lambda: not self._visitors)

    def with_weights(self, start: str) -> str | None:
        """The name of the model whose weight hash begins so, or None."""
        return next(
            (name for name, each in self._models.items() if each.weights_sha256.startswith(start)), None
        )

    def summary(self, name: str) -> str:
        """What a model is, in a line."""
        model = self._models[name]
        facts = describe(model.exact)
        ratio = facts["spatial_compression_ratio"]
        precision = "" if name in self._cold else f" · pictures in {model.precision}"
        return (
            f"{facts['parameters'] / 1e6:.1f} M parameters · {ratio} x {ratio} pixels become one position of "
            f"{model.exact.config['latent_channels']} channels{precision}"
        )

    def _load(self, source: str | Path) -> Autoencoder:
        found = load_autoencoder(source)
        if found.config["in_channels"] not in (1, 3):
            raise ModelError(
                f"{source} takes {found.config['in_channels']} channels; pictures have 1 or 3. Leave it out."
            )
        if not isinstance(found, AutoencoderTiny):
            _tile(optimize(found), self._tile_above)
        return found

    def _add(self, source: str | Path, exact: Autoencoder) -> None:
        name = self._free_name(source)
        if isinstance(exact, AutoencoderTiny):
            self.peers[name] = Peer(name, exact, self._tile_above)
            return
        self._models[name] = Model(name, exact, exact, weight_hash(exact))
        self._cold[name] = source

    def _free_name(self, source: str | Path) -> str:
        """The end of a path; a folder called vae, or a file, says little without its parent."""
        path = Path(source)
        if str(source) in bundled():
            name = str(source)
        elif path.name == "vae" or path.suffix:
            name = "/".join(path.resolve().parts[-2:])
        else:
            name = path.resolve().name
        taken = sum(each == name or each.startswith(f"{name} (") for each in (*self._models, *self.peers))
        return f"{name} ({taken + 1})" if taken else name


def _default_first(names: list[str]) -> list[str]:
    """The model that the page opens with, then the others.

    It is the quickest and writes the smallest files. `flux-small` is closer to the original (Kodak: 26.7 dB
    and LPIPS 0.139, for 25.0 and 0.247), but takes 2.3 times as long there and back (benchmarks/demo.py, 512
    px), and the first picture after an upload should be there in 2 s, that of a copy of 2 megapixels in 4.
    Who stays can choose it; who has to wait leaves.
    """
    return sorted(names, key=lambda name: (name != DEFAULT_MODEL, name))


def _find_lpips() -> tuple[LPIPS | None, str | None]:
    try:
        return load_lpips("alex", download=False), None  # the page fetches nothing
    except MissingWeightsError as error:
        logger.info("LPIPS is left out: %s", error)
        return None, "the weights of its network are not installed on this server"


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
