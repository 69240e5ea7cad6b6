"""What a visitor may ask of the demo, and how everything else is refused: with a message, never a trace."""

import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import anyio.to_thread
import gradio as gr
import torch

from latentvae.errors import ImageError, LatentVAEError
from latentvae.images import ImageInfo, load_image_with_info

logger = logging.getLogger(__name__)

EXPIRED = "This upload is no longer on the server, which deletes files after a while: upload it again."


@dataclass(frozen=True)
class Limits:
    """Of one server. The defaults suit a laptop that a few people visit at once."""

    upload_bytes: int = 32 * 2**20
    pixels: int = 1 << 24  # of an image; also the most that a compressed file may claim
    side: int = 16383  # pixels: WebP's limit, and the codec's steps are as many as a picture is long
    input_bytes: int = 5 << 20  # of a request that is no upload: a painted mask is the largest
    frames: int = 100  # of an animation whose first frame is used
    images: int = 24  # in the tabs that take several
    explore_side: int = 384  # pixels to which tabs that decode many pictures shrink them
    tile_above: int = 1024  # pixels of a side: larger images go in exact tiles
    waiting: int = 24  # requests in the queue; more are refused
    keep_seconds: int = 1800  # how long uploads and results stay on the disk
    stored_bytes: int = 2 * 2**30  # of uploads and results at once; then uploads are refused
    sessions: int = 256  # whose state is kept; the oldest are forgotten
    sweep_seconds: int = 120  # how often those that are older are deleted


@dataclass(frozen=True)
class Photo:
    """An uploaded image: (C, H, W) in [-1, 1], the name it was uploaded under, and what reading it took."""

    image: torch.Tensor
    name: str
    info: ImageInfo

    @property
    def stem(self) -> str:
        """The name without its suffix, for files made from it."""
        return Path(self.name).stem or "image"


def read_bytes(path: str | None, what: str, limits: Limits) -> tuple[bytes, str]:
    """The content of an uploaded file and its name, without its folder on this server.

    Raises:
        LatentVAEError: nothing was uploaded, or too much.
    """
    if not path:
        raise LatentVAEError(f"There is no {what} yet: upload one, or take the example.")
    file = Path(path)
    try:
        data = file.read_bytes() if file.stat().st_size <= limits.upload_bytes else None
    except FileNotFoundError as error:  # deleted while its request waited
        raise LatentVAEError(EXPIRED) from error
    if data is None:
        raise LatentVAEError(
            f"{file.name} is too large; files of up to {limits.upload_bytes / 2**20:.0f} MB are "
            "taken: make it smaller, or run latentvae on your own machine."
        )
    return data, file.name


def read_photo(path: str | None, limits: Limits, channels: int = 3) -> Photo:
    """Read an uploaded image, by its content alone.

    Raises:
        ImageError: no image, a damaged one, too many pixels, or an animation with too many frames.
    """
    data, name = read_bytes(path, "picture", limits)
    image, info = load_image_with_info(data, name=name, max_pixels=limits.pixels, channels=channels)
    check_side(name, info.width, info.height, limits)
    if info.frames > limits.frames:
        raise ImageError(
            f"{name} is an animation of {info.frames} frames; pictures, and animations of up to "
            f"{limits.frames} frames (of which the first is used), are taken: save one frame as PNG."
        )
    return Photo(image, name, info)


def check_side(name: str, width: int, height: int, limits: Limits) -> None:
    """Raises ImageError for a picture that is too long, however few its pixels are."""
    if max(width, height) > limits.side:
        raise ImageError(
            f"{name} is {width} x {height} pixels; up to {limits.side} a side are taken: cut it in parts, or "
            "run latentvae on your own machine."
        )


def guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Have a handler fail with a message that a visitor can act on; what is our fault goes to the log.

    One that yields its results in parts stays one that does.
    """

    @functools.wraps(handler)
    def run(*args: Any, **options: Any) -> Any:
        with _refusing():
            return handler(*args, **options)

    @functools.wraps(handler)
    def run_in_parts(*args: Any, **options: Any) -> Iterator[Any]:
        with _refusing():
            yield from handler(*args, **options)

    chosen: Any = run_in_parts if inspect.isgeneratorfunction(handler) else run
    chosen.__signature__ = inspect.signature(handler)  # gradio reads it
    return cast(Callable[..., Any], chosen)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except gr.Error:
        raise
    except LatentVAEError as error:
        raise refusal(str(error)) from error
    except Exception as error:
        logger.exception("the demo failed")
        raise refusal(
            "Something went wrong on this server, and it was logged. Try again with another picture or "
            "other settings."
        ) from error


def refusal(message: str) -> gr.Error:
    """What the page shows, and what a client is told."""
    first, space, rest = message.partition(" ")
    if first.isalpha():  # no file's name
        first = first.capitalize()
    return gr.Error(f"{first}{space}{rest}", title="This did not work", print_exception=False)


class LocalBlocks(gr.Blocks):
    """A page that takes uploaded files only: no URLs, which gradio would fetch, no paths of the server."""

    limits = Limits()

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> Any:
        """Refuse what was not uploaded before gradio looks at it, and say what is wrong with what was."""
        if len(json.dumps(inputs)) > self.limits.input_bytes:  # which gradio keeps for each session
            raise refusal("These inputs are too large: pictures are uploaded, and their names sent.")
        for path in files_in(inputs):
            check_uploaded(path)
        try:
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:  # gradio opens images with Pillow, and reports nothing of what that says
            # in a thread: other visitors need not wait until pictures are read
            raise refusal(await anyio.to_thread.run_sync(self._explain, inputs)) from error

    def _explain(self, inputs: list[Any]) -> str:
        for path in files_in(inputs):
            try:
                read_photo(path, self.limits)
            except LatentVAEError as error:
                return str(error)
        return "These inputs cannot be used: look at the API page for what each of them must be."


def check_uploaded(path: str) -> None:
    """Raise gr.Error unless a path is a file below gradio's folder of uploads and results."""
    from gradio.utils import get_upload_folder

    folder = Path(get_upload_folder()).resolve()
    try:
        file = Path(path).resolve()
        inside, there = file.is_relative_to(folder), file.is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        inside = there = False
    if not inside:
        raise refusal(
            "Only uploaded files are taken, no addresses and no files of this server: upload the picture "
            "itself."
        )
    if not there:
        raise refusal(EXPIRED)


def files_in(value: Any) -> Iterator[str]:
    """Every path, and every address or data URL in its stead, in a request's JSON."""
    if isinstance(value, dict):
        url = value.get("url")
        if isinstance(value.get("path"), str):
            yield value["path"]
        elif isinstance(url, str):
            yield url
        if isinstance(url, str) and url.startswith("data:"):
            yield url
        for part in value.values():
            yield from files_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from files_in(part)
