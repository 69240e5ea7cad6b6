"""What a visitor may ask of the demo, and how everything else is refused.

In the order in which a request passes: by its route and size (`Gate`), by its inputs (`LocalBlocks`), by what
an uploaded file holds (`read_photo`), and by what goes wrong with it (`guarded`).
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

import anyio.to_thread
import gradio as gr
from gradio.utils import get_upload_folder
from starlette.responses import JSONResponse

from latentvae import images
from latentvae.base.errors import ImageError, LatentVAEError, TooManyPixels
from latentvae.demo.jobs import Stopped

if TYPE_CHECKING:
    import torch

    from latentvae.images.reading import ImageInfo

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PREFIX = "/gradio_api"
HEAVY = "heavy"  # the queue of all that computes: one job at a time
# Routes of gradio that this page does not use, by their beginnings.
CLOSED = (
    *("/proxy=", "/stream", "/component_server", "/process_recording", "/vibe-", "/undo-vibe", "/dev/"),
    *("/run-history", "/runs"),  # keeps visitors' runs on the hub, with the host's own token
    *("/deep_link", "/custom_component", "/monitoring", "/profiling", "/login", "/token"),
)
MESSAGE = "This server opens no addresses and no files but those that were uploaded to it or made by it."
TOO_LARGE = "This is too large for this server."
FULL = "This server holds as many files as it takes for now: try again in a while."
OWN_MACHINE = "run latentvae on your own machine"
EXPIRED = "This upload is no longer on the server, which deletes files after a while: upload it again."


@dataclass(frozen=True)
class Limits:
    """Of one server. The defaults suit a laptop that a few people visit at once."""

    upload_bytes: int = 32 * 2**20
    pixels: int = 1 << 24  # of an image; also the most that a compressed file may claim
    photo_pixels: int = 1 << 26  # of one that is shrunk once it is read: phones take 50 million
    copy_pixels: int = 2_000_000  # of what the page works on, unless full size is asked for
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

    def check_side(self, name: str, width: int, height: int) -> None:
        """Raises ImageError for a picture that is too long, however few its pixels are."""
        if max(width, height) > self.side:
            raise ImageError(
                f"{name} is {width} x {height} pixels; up to {self.side} a side are taken: cut it in parts, "
                "or run latentvae on your own machine."
            )


class Gate:
    """ASGI middleware.

    Args:
        app: what it stands before.
        max_body: bytes of a request, counted as they come: a request need not say its length, or can lie.
        folder: of uploads and results.
        max_stored: bytes in that folder from which on uploads are refused.
        names: of this machine, by which pages that ask must have been opened; none: any page may ask. (gradio
            asks this itself, but knows no IPv6.)
    """

    def __init__(
        self, app: Any, max_body: int, folder: Path, max_stored: int, names: Sequence[str] = ()
    ) -> None:
        self.app, self.max_body, self.names = app, max_body, names
        self.folder, self.max_stored = folder, max_stored

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403 (closed), 413 (too large) or 507 (no room)."""
        if scope["type"] != "http":  # "lifespan": the server's start and end
            await self.app(scope, receive, send)
            return
        # until nothing is encoded twice: file=http%253A%252F%252F... is an address too
        path = unquote(unquote(scope["path"])).removeprefix(PREFIX)
        if _is_closed(path) or self._is_foreign(scope):
            await JSONResponse({"detail": MESSAGE}, 403)(scope, receive, send)
        elif self._length(scope) > self.max_body:
            await JSONResponse({"detail": TOO_LARGE}, 413)(scope, receive, send)
        elif path == "/upload" and stored_bytes(self.folder) > self.max_stored:
            await JSONResponse({"detail": FULL}, 507)(scope, receive, send)
        else:
            await self._counted(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on until its body is too large; then it is cut off, and answered 413."""
        came, answered = 0, False

        async def count() -> MutableMapping[str, Any]:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            # as if the visitor had left: what reads the body then stops
            return {"type": "http.disconnect"} if came > self.max_body else message

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal answered
            # an answer that has begun must end; one that begins after the cut is none to the request
            if came <= self.max_body or answered:
                answered = True
                await send(message)

        try:
            await self.app(scope, count, answer)
        except Exception:  # of an app that was cut off nothing better is expected
            if came <= self.max_body:
                raise
        if came > self.max_body and not answered:
            await JSONResponse({"detail": TOO_LARGE}, 413)(scope, receive, send)

    def _is_foreign(self, scope: Scope) -> bool:
        """Whether a page of another site asks."""
        origin = _header(scope, b"origin")
        return bool(self.names and origin) and urlsplit(origin).hostname not in self.names

    @staticmethod
    def _length(scope: Scope) -> int:
        value = _header(scope, b"content-length")
        return int(value) if value.isdigit() else 0


def _header(scope: Scope, name: bytes) -> str:
    """A header of a request, empty where there is none."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def stored_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; those that vanish meanwhile do not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(place, name).lstat().st_size
    return total


def _is_closed(path: str) -> bool:
    """Whether a path below gradio's prefix is not served: it leads elsewhere, or is not needed."""
    if path.startswith(("/file=", "/file/")):
        # gradio opens such an address itself, or sends the visitor there: either is more than it should
        target = path[len("/file=") :].lower()
        return "://" in target or target.startswith(("http:", "https:", "//"))
    return path.startswith(CLOSED)


class LocalBlocks(gr.Blocks):
    """A page that takes uploaded files only: no URLs, which gradio would fetch, no paths of the server."""

    def __init__(self, limits: Limits, **options: Any) -> None:
        super().__init__(**options)
        self.limits = limits
        self.beforehand: list[Callable[[], object]] = []  # called in a thread once the page is up
        self.ready: Callable[[], object] = lambda: None  # waits until there is all that computing needs

    def get_api_info(self, *args: Any, **options: Any) -> Any:
        """What endpoints take: files have to be given, and examples name local ones.

        gradio would offer the page's own pictures, and addresses, which `preprocess_data` refuses.
        """
        info = super().get_api_info(*args, **options)
        for endpoint in info["named_endpoints"].values():
            for each in endpoint["parameters"]:
                example = _example_files(each["component"])
                if example is not None:
                    each.update(parameter_has_default=False, parameter_default=None, example_input=example)
        return info

    def asked_for(self) -> list[str]:
        """Every file that a request names which waits or is worked on."""
        bodies = [event.data for event in list(self._queue.event_ids_to_events.values())]
        return [path for body in bodies if body for path in _files_in(body.data)]

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> Any:
        """Refuse what was not uploaded before gradio looks at it, and say what is wrong with what was."""
        if len(json.dumps(inputs)) > self.limits.input_bytes:  # gradio keeps them for each session
            raise _refusal("These inputs are too large: pictures are uploaded, and their names sent.")
        for path in _files_in(inputs):
            check_uploaded(path)
        # two threads that import modules which import each other can see halves of them
        if block_fn.concurrency_id == HEAVY:
            await anyio.to_thread.run_sync(self.ready)
        try:
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except gr.Error as error:
            error.print_exception = False  # a visitor's mistake is no matter for the server's log
            raise
        except Exception as error:  # gradio opens images with Pillow, and reports nothing of what that says
            # in a thread: other visitors need not wait until pictures are read
            raise _refusal(await anyio.to_thread.run_sync(self._explain, inputs)) from error

    def _explain(self, inputs: list[Any]) -> str:
        for path in _files_in(inputs):
            try:
                read_photo(path, self.limits)
            except LatentVAEError as error:
                return str(error)
        return "These inputs cannot be used: look at the API page for what each of them must be."


def _example_files(component: str) -> Any:
    """What the API page's snippets give to a component that takes files; None for one that takes none."""

    def file(name: str) -> dict[str, Any]:
        return {"path": name, "url": name, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    if component == "Gallery":
        return [{"image": file(f"photo{number}.jpg"), "caption": None} for number in range(1, 7)]
    name = {"Image": "photo.jpg", "File": "photo.lvae"}.get(component)
    return name and file(name)


def check_uploaded(path: str) -> None:
    """Raise gr.Error unless a path is a file below gradio's folder of uploads and results."""
    folder = Path(get_upload_folder()).resolve()
    try:
        file = Path(path).resolve()  # links and .. followed: what counts is where the file lies
        inside, there = file.is_relative_to(folder), file.is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        inside = there = False
    if not inside:
        raise _refusal(
            "Only uploaded files are taken, no addresses and no files of this server: upload the picture "
            "itself."
        )
    if not there:
        raise _refusal(EXPIRED)


def _files_in(value: Any) -> Iterator[str]:
    """Every path, and every address or data URL in its stead, in a request's JSON."""
    if isinstance(value, dict):
        url = value.get("url")
        # gradio takes the url where there is no path, and images from a data URL even where there is one
        if isinstance(value.get("path"), str):
            yield value["path"]
        elif isinstance(url, str):
            yield url
        if isinstance(url, str) and url.startswith("data:"):
            yield url
        for part in value.values():
            yield from _files_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from _files_in(part)


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


def read_photo(path: str | None, limits: Limits, channels: int = 3, *, shrunk: bool = False) -> Photo:
    """Read an uploaded image, by its content alone; one that will be `shrunk` may have more pixels.

    Raises:
        ImageError: no image, a damaged one, too many pixels, or an animation with too many frames.
    """
    data, name = read_bytes(path, "picture", limits)
    most = limits.photo_pixels if shrunk else limits.pixels
    try:
        image, info = images.reading.load_image_with_info(data, name=name, max_pixels=most, channels=channels)
    except TooManyPixels as error:
        raise ImageError(f"{error}, or {OWN_MACHINE}") from error
    limits.check_side(name, info.width, info.height)
    if info.frames > limits.frames:
        raise ImageError(
            f"{name} is an animation of {info.frames} frames; pictures, and animations of up to "
            f"{limits.frames} frames (of which the first is used), are taken: save one frame as PNG."
        )
    return Photo(image, name, info)


def guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Have a handler fail with a message that a visitor can act on; what is our fault goes to the log.

    One that yields its results in parts stays one that does.
    """

    @functools.wraps(handler)
    def run(*args: Any, **options: Any) -> Any:
        with refusing():
            return handler(*args, **options)

    @functools.wraps(handler)
    def run_in_parts(*args: Any, **options: Any) -> Iterator[Any]:
        with refusing():
            yield from handler(*args, **options)

    # one function cannot be both: a yield anywhere in it would make every handler a generator to gradio
    chosen: Any = run_in_parts if inspect.isgeneratorfunction(handler) else run
    chosen.__signature__ = inspect.signature(handler)  # gradio finds names, types and gr.Progress in it
    return cast(Callable[..., Any], chosen)


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what goes wrong inside into a gr.Error for visitors; see `guarded`."""
    try:
        yield
    except (gr.Error, Stopped):  # made for visitors already
        raise
    except LatentVAEError as error:
        raise _refusal(str(error)) from error
    except Exception as error:
        logger.exception("the demo failed")
        raise _refusal(
            "Something went wrong on this server, and it was logged. Try again with another picture or "
            "other settings."
        ) from error


def _refusal(message: str) -> gr.Error:
    """What the page shows, and what a client is told."""
    first, space, rest = message.partition(" ")
    if first.isalpha():  # no file's name
        first = first.capitalize()
    return gr.Error(f"{first}{space}{rest}", title="This did not work", print_exception=False)
