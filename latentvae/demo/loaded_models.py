"""The models that visitors choose from, loaded once, used by one request at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from latentvae import demo
from latentvae import models as room
from latentvae.base.errors import ModelError
from latentvae.models.shipped import DEFAULT_MODEL, bundled

if TYPE_CHECKING:
    from latentvae.demo.one_model import Model, Peer
    from latentvae.measure.lpips import LPIPS

logger = logging.getLogger(__name__)


class Models:
    """All models of a server: the bundled ones and those named at its start.

    The bundled ones are right, and are loaded when they are first needed, or by `ready`: PyTorch comes with
    them, which takes longer than all else before a page is up.

    Args:
        sources: folders or files, as `load_autoencoder` takes them; an AutoencoderTiny is a peer.
        tile_above: pixels of a side above which images go in exact tiles.
        say: is told what is loading.

    Raises:
        ModelError: one of the sources cannot be loaded, or its images are neither grey nor RGB.
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
        self._tile_above, self._say = tile_above, say
        self._models: dict[str, Model] = {}
        self.peers: dict[str, Peer] = {}
        self._cold: dict[str, str | Path] = {}  # whose precision is not chosen yet, and where from
        self._sources: dict[str, str | Path] = {}
        for source in (*_default_first(bundled()), *sources):
            self._sources[self._free_name(source)] = source
        for name in list(self._sources)[len(bundled()) :]:  # before there is a page: they may be wrong
            self._load(name)
        if not self.names:
            raise ModelError("no model is bundled and none was named: give one with --model.")
        self._loading, self.loaded = threading.Lock(), False
        self.lpips: LPIPS | None = None
        self.lpips_missing_reason: str | None = None

    def ready(self) -> None:
        """Load what is not loaded yet, or wait until it is: nothing is computed before."""
        with self._loading:
            if self.loaded:
                return
            for name in self.names:
                if name not in self._models:
                    self._load(name)
            self.lpips, self.lpips_missing_reason = demo.one_model.find_lpips()
            self.loaded = True

    @property
    def names(self) -> list[str]:
        """What the picker offers, the first being its choice."""
        return [name for name in self._sources if name not in self.peers]

    @contextmanager
    def use(self, name: str | None) -> Iterator[Model]:
        """Lend a model; others wait, because exact tiling and the CPU's kernels keep buffers with it.

        Raises:
            ModelError: no such model here.
        """
        if name not in self.names:
            raise ModelError(f"there is no model {name!r} here: choose one of {', '.join(self.names)}.")
        self.ready()
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

    def warm_up(self, wanted: Callable[[], bool] = lambda: True) -> None:
        """Choose every model's precision, in turns that are short and come after every visitor's.

        Args:
            wanted: asked before each model; if not, the others stay as they are.
        """
        for name, source in list(self._cold.items()):
            if not wanted():
                return
            swift = demo.one_model.swifter(self._models[name], source, self._tile_above, self._aside)
            if swift is not None:
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

    def peak_bytes(self, name: str, size: tuple[int, int]) -> int:
        """What a picture of this width and height takes with a model; 0 where that is not known."""
        return self._models[name].peak_bytes(*size) if name in self._models else 0

    def summary(self, name: str) -> str:
        """What a model is, in a line."""
        self.ready()
        model = self._models[name]
        facts = room.loading.describe(model.exact)
        ratio = facts["spatial_compression_ratio"]
        precision = "" if name in self._cold else f" · pictures in {model.precision}"
        return (
            f"{facts['parameters'] / 1e6:.1f} M parameters · {ratio} x {ratio} pixels become one position of "
            f"{model.exact.config['latent_channels']} channels{precision}"
        )

    def _load(self, name: str) -> None:
        source = self._sources[name]
        self._say(f"loading {source}")
        found = demo.one_model.load_either(name, source, self._tile_above)
        if isinstance(found, demo.one_model.Peer):
            self.peers[name] = found
        else:
            self._models[name], self._cold[name] = found, source

    def _free_name(self, source: str | Path) -> str:
        """The end of a path; a folder called vae, or a file, says little without its parent."""
        path = Path(source)
        if str(source) in bundled():
            name = str(source)
        elif path.name == "vae" or path.suffix:
            name = "/".join(path.resolve().parts[-2:])
        else:
            name = path.resolve().name
        taken = sum(each == name or each.startswith(f"{name} (") for each in self._sources)
        return f"{name} ({taken + 1})" if taken else name


def _default_first(names: list[str]) -> list[str]:
    """The model that the page opens with, then the others.

    It is the quickest and writes the smallest files. `sd3-small` is closer to the original (Kodak: 28.7 dB
    and LPIPS 0.087, for 25.0 and 0.247), but takes 1.6 times as long there and back, as `flux-small` does,
    whose shape it has (benchmarks/demo.py, 512 px), and the first picture after an upload should be there in
    2 s, that of a copy of 2 megapixels in 4. Who stays can choose it; who has to wait leaves.
    """
    return sorted(names, key=lambda name: (name != DEFAULT_MODEL, name))
