"""One call of a verb: the options it shares with others, its model, its images, and what was skipped."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import typer
from tqdm import tqdm
from typer.models import ArgumentInfo

from latentvae import images, measure, models, runtime
from latentvae.base.errors import ImageError, LatentVAEError, MissingWeightsError, TooManyPixels
from latentvae.cli import options
from latentvae.models.shipped import DEFAULT_MODEL

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

# for `takes`, of verbs that measure, and of verbs that work on images of any size
LPIPS_OPTIONS = ("lpips_net", "lpips_weights")
LARGE = 4_000_000  # pixels above which an image takes minutes on a CPU, and its time is told first
IMAGE_OPTIONS = ("device", "precision", "tile_size", "scratch", "max_pixels", "json")


@dataclass
class Session:
    """What a verb works with. The first fields are options; `takes` says which of them a verb has.

    Attributes:
        vae: the model, once `load` was called.
        skipped: path and reason of each input that could not be used, as --json shows them.
        left_out: files of folders that are no image that can be read, by suffix.
        of_verb: names of the options that this verb has.
        by_size: whether an image's size decides the precision, as --precision auto has it.
        told: pixels above which an image's time is told.
        bundled: the model where none is named.
    """

    model: options.model_option(DEFAULT_MODEL) = None  # type: ignore[valid-type]
    lpips_net: options.LPIPSNet = "alex"
    lpips_weights: options.LPIPSWeights = None
    device: options.Device = None
    # exact where a verb has no such option
    precision: options.Precision = "fp32"
    tile_size: options.TileSize = None
    scratch: options.Scratch = None
    max_pixels: options.MaxPixels = None
    json: options.Json = False
    vae: "AutoencoderKL" = field(init=False)
    skipped: list[dict[str, str]] = field(init=False, default_factory=list)
    left_out: Counter[str] = field(init=False, default_factory=Counter)
    of_verb: frozenset[str] = field(init=False, default=frozenset())
    by_size: bool = field(init=False, default=False)
    told: int = field(init=False, default_factory=lambda: LARGE)
    _models: "dict[str, AutoencoderKL]" = field(init=False, default_factory=dict)
    bundled: str = field(init=False, default=DEFAULT_MODEL)

    @property
    def passed_over(self) -> dict[str, Any]:
        """What was not used, for --json: inputs that could not be, and other files of folders."""
        return {"skipped": self.skipped, "left_out": dict(self.left_out)}

    @property
    def chosen(self) -> str:
        """The model that is named, or else the verb's own."""
        return self.model or self.bundled

    def find_images(self, paths: Sequence[Path]) -> list[Path]:
        """The image files that are named or lie in the named folders; what else lies there is told.

        Raises:
            ImageError: there is none, or a path is missing.
        """
        files = images.reading.find_images(paths, self.left_out)
        if self.left_out and options.is_first_process():
            typer.echo(images.kinds.describe(self.left_out), err=True)
        return files

    def load(self) -> "AutoencoderKL":
        """The model: it takes seconds, so whatever can be refused without it is refused before."""
        if self.scratch is not None:
            runtime.tiling.maps.check_scratch_folder(self.scratch)
        self.vae = self._loaded(self.precision)
        return self.vae

    def _loaded(self, precision: str) -> "AutoencoderKL":
        """The model in a precision; it stays, for a folder may hold images of all sizes."""
        if precision not in self._models:
            self._models[precision] = runtime.devices.load_model(self.chosen, self.device, precision)
        return self._models[precision]

    def find_lpips(self) -> "tuple[measure.lpips.LPIPS | None, str | None]":
        """The LPIPS network, or None and the reason. Named weights that cannot be used are an error."""
        try:
            network = measure.lpips.load_lpips(self.lpips_net, self.lpips_weights)
            return network.to(self.vae.device), None
        except MissingWeightsError as error:
            if self.lpips_weights is not None:
                raise
            return None, str(error)  # a table with an empty column beats none: many machines are offline

    def fit(self, path: Path, height: int, width: int) -> None:
        """Have the model tile an image of so many pixels if it must; ImageError where even that fails."""
        runtime.tiling.fitting.tile_to_fit(self.vae, path, height, width, self.tile_size, self.scratch)

    def _prepare(self, path: Path, height: int, width: int) -> list[str]:
        """As `fit`, in the precision for its size where that decides; tells the time of a large image first.

        Returns:
            A note on the precision, where it is not that of other images.
        """
        if self.by_size:
            half = height * width > LARGE and self._halves_well()
            self.vae = self._loaded("bf16" if half else "fp32")
        if height * width > self.told:
            # an image little larger than one before takes little longer
            self.told = 2 * height * width
            self._tell_time(path, height, width)
        self.fit(path, height, width)
        halved = self.by_size and self._models.get("bf16") is self.vae
        return ["computed in bf16, as it is large (--precision fp32: exactly)"] if halved else []

    def _halves_well(self) -> bool:
        """Whether this is a CPU that computes in bf16, up to four times as fast; GPUs need no help."""
        device = self.vae.device
        return device.type == "cpu" and runtime.devices.has_fast_bfloat16(device)

    def _tell_time(self, path: Path, height: int, width: int) -> None:
        """How long encoding and decoding an image takes at least, and what would be faster.

        Large maps leave the caches that a small image fits in, and figures and files are not counted.
        """
        seconds = runtime.tiling.fitting.estimate(
            self.vae, height, width, self.tile_size, on_disk=self.scratch is not None
        )
        exact = self.vae.dtype.itemsize == 4
        faster = [
            option
            for option, helps in (
                ("--precision bf16", exact and self._halves_well()),
                (f"--model {DEFAULT_MODEL}", self.chosen == options.CLOSEST_MODEL),
                ("--size 2048", "size" in self.of_verb),
            )
            if helps and option.split()[0][2:] in self.of_verb
        ]
        words = (
            f"{path}: {height * width / 1e6:.1f} megapixels take at least {options.duration(seconds)} to "
            f"encode and decode here{'' if exact else ' in half precision'}"
        )
        if options.is_first_process():
            tqdm.write(words + (f"; faster: {', '.join(faster)}." if faster else "."), file=sys.stderr)

    def read_images(
        self, paths: list[Path], longest: int | None = None
    ) -> "Iterator[tuple[Path, torch.Tensor, images.reading.ImageInfo]]":
        """(path, image, info) of each file that can be read and fits into memory; the others are skipped.

        While an image (C, H, W) is out, the model tiles if it must. With `longest`, larger images are shrunk
        to that many pixels along their longer side first.
        """
        # files are read as the model takes them: grey for one channel
        channels = image_channels(self.vae)
        for path in tqdm(paths, unit="image", disable=len(paths) < 2 or not options.is_first_process()):
            try:
                most = self.max_pixels or images.reading.MAX_PIXELS
                window = models.loading.window_of(self.vae)
                image, info = images.scans.load(path, channels, window, max_pixels=most)
                if longest is not None and max(image.shape[-2:]) > longest:
                    image = images.resizing.thumbnail(image, longest)
                    info.notes.append(f"shrunk from {info.width}x{info.height} px (--size)")
                info.notes.extend(self._prepare(path, *image.shape[-2:]))
            except ImageError as error:
                self.skip(path, error)
                continue
            # outside of `try`: what a verb raises over its image is not an error of reading
            yield path, image, info

    def read_centres(self, paths: list[Path], vae: Any, size: int) -> "Iterator[tuple[Path, torch.Tensor]]":
        """(path, centre) of each file, read as `vae` takes it: at most `size` x `size` pixels, (1, C, h, w).

        Raises:
            LatentVAEError: none can be read.
        """
        found, window = 0, models.loading.window_of(vae)
        for path in paths:
            try:
                image, _ = images.scans.load(path, image_channels(vae), window)
            except ImageError as error:
                self.skip(path, error)
                continue
            found += 1
            # the centre, unscaled: resizing would smooth what overflows and what is hard to decode
            top, left = (max(side - size, 0) // 2 for side in image.shape[-2:])
            yield path, image[None, :, top : top + size, left : left + size]
        # here and not in the verb, which would go on with probes alone
        if paths and not found:
            self.finish(0)

    def skip(self, path: Path | str, error: LatentVAEError) -> None:
        """Name an input that is left out on standard error, beside the progress bar and not in it.

        Raises:
            LatentVAEError: this very error, where the others would fail like it: the disk is full.
        """
        if error.ends_run:
            raise error
        if isinstance(error, TooManyPixels) and "max_pixels" in self.of_verb:
            error = TooManyPixels(f"{error}, or raise --max-pixels if you trust the file")
        self.skipped.append({"path": str(path), "reason": str(error)})
        tqdm.write(f"skipped: {error}", file=sys.stderr)

    def skip_all(self, paths: list[str], error: LatentVAEError) -> None:
        """Leave several inputs out for one reason, which is said once."""
        self.skip(paths[0], error)
        self.skipped.extend({"path": path, "reason": str(error)} for path in paths[1:])

    def finish(self, done: int) -> None:
        """End with exit code 3 where some inputs were skipped, or left out for want of a package.

        Raises:
            LatentVAEError: all of them were.
        """
        skipped = len(self.skipped)
        if not skipped:
            if images.kinds.wants_extra(self.left_out):
                raise typer.Exit(options.EXIT_SKIPPED)
            return
        if not done:
            first = self.skipped[0]["reason"]
            if skipped == 1:
                raise LatentVAEError(f"the only image could not be read: {first}")
            raise LatentVAEError(f"none of the {skipped} images could be read; the first: {first}")
        were = "was" if skipped == 1 else "were"
        of = f"{skipped} of {options.counted(done + skipped, 'image')}"
        if options.is_first_process():
            typer.echo(f"{of} {were} skipped, as named above.", err=True)
        raise typer.Exit(options.EXIT_SKIPPED)


def takes(
    *order: str | EllipsisType, bundled: str = DEFAULT_MODEL, default: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb, whose first parameter is its `session`, options of Session on the command line.

    Typer reads a verb's options from its signature. So `@takes("model", ..., "device", "json")` above
    `def verb(session, photos, size)` makes a function that looks like
    `def verb(photos, model, size, device, json)` and calls yours with a Session of the three. Types, defaults
    and help are those of Session's fields.

    Args:
        order: of the options in `--help`. `...` stands for the verb's own; one of those may also be named, to
            stand between shared ones.
        bundled: the model of this verb where none is named.
        default: what `--help` calls that, where it is not always `bundled`.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        # in the order of the verb; evaluated, because many annotations of verbs are strings
        own = dict(signature(verb, eval_str=True).parameters)
        del own["session"]
        model = options.model_option(default or bundled)
        shared = {
            option.name: Parameter(
                option.name,
                Parameter.POSITIONAL_OR_KEYWORD,
                default=option.default,
                annotation=model if option.name == "model" else option.type,
            )
            for option in fields(Session)
            # a verb's own option of that name wins, with its own help: --tile-size of `fill`
            if option.init and option.name in order and option.name not in own
        }
        # arguments come first: they may have no default, and Python wants those before the rest
        names = [name for name, one in own.items() if _is_argument(one)]
        for name in order:
            if isinstance(name, str):
                names.append(name)
            else:
                names += [each for each in own if each not in order and each not in names]
        looks = Signature([(own | shared)[name] for name in names])

        @wraps(verb)
        def run(*values: Any, **named: Any) -> None:
            # Typer names all of them; from Python the first may be given by position
            given = looks.bind(*values, **named)
            given.apply_defaults()
            of_session = {name: given.arguments.pop(name) for name in shared}
            session = Session(**of_session)
            session.of_verb, session.bundled = frozenset(looks.parameters), bundled
            verb(session, **given.arguments)

        # both: Typer looks at the signature, and then at the annotations for types
        run.__signature__ = looks  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in looks.parameters.values()}
        return run

    return decorate


def _is_argument(parameter: Parameter) -> bool:
    return any(isinstance(each, ArgumentInfo) for each in getattr(parameter.annotation, "__metadata__", ()))


def image_channels(vae: "AutoencoderKL") -> int:
    """1 or 3, as the model takes.

    Raises:
        LatentVAEError: a model of other channels; image files do not hold those.
    """
    channels = vae.config["in_channels"]
    if channels not in (1, 3):
        raise LatentVAEError(
            f"this model takes {channels} channels; image files have 1 or 3. Use the Python functions."
        )
    return channels


def read_sidecar(source: str) -> dict[str, Any]:
    """What an export says of itself beside its weights; empty for models that say nothing."""
    place = Path(source)
    # a bundled name, an export, a pipeline with one
    folders = [models.shipped.WEIGHTS_DIR / source, place, place / "vae"]
    # of files alone: a folder in an export is another model, and the parent of a name is where we are
    if place.is_file():
        folders.append(place.parent)
    for folder in folders:
        sidecar = folder / models.loading.SIDECAR
        if sidecar.is_file():
            return json.loads(sidecar.read_text(encoding="utf-8"))
    return {}
