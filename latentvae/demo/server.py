"""Serving the page on one machine, with a folder of its own that goes when the server does."""

import errno
import gc
import inspect
import io
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from latentvae.base.errors import LatentVAEError
from latentvae.demo.guard import Gate, Limits, LocalBlocks
from latentvae.demo.loaded_models import Models
from latentvae.demo.page import build_page, head
from latentvae.demo.theme import make_theme
from latentvae.demo.tools import PLACE, offer_tools
from latentvae.demo.widgets import static

logger = logging.getLogger(__name__)

HOST, PORT = "127.0.0.1", 7860
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # as `ipv6` leaves them; browsers write [::1]
LPIPS = "LATENTVAE_LPIPS"
WARM_UP = "warm-up"  # the name of a thread
PATIENCE = 0.5  # seconds that a page is given to end
CHATTY = ("mcp", "python_multipart")  # log every request, and visitors' mistakes as warnings
# gradio reads these while it builds and launches a page: no telemetry, no sharing, no second server.
SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_NODE_SERVER_NAME": "",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # A page asks itself whether it is up, and for what tools ask, which no proxy between this machine and the
    # internet can answer. The lower spelling first: Windows knows one variable by both, and the last one
    # restored stays.
    "no_proxy": "*",
    "NO_PROXY": "*",
}


def serve(
    sources: Sequence[str | Path] = (),
    host: str = HOST,
    port: int = PORT,
    limits: Limits | None = None,
    mcp: bool = False,
) -> None:
    """Serve the page until Ctrl-C, SIGTERM or the terminal closes; each way visitors' files are deleted.

    What is computed goes on in its thread, for which a process waits that ends in the usual way.

    Args: as those of `start`.
    """
    if threading.current_thread() is threading.main_thread():  # Python sets signals in no other
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
            signal.signal(signal.SIGHUP, signal.default_int_handler)
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.ERROR)
    # absolute, because the working directory changes; what is no path is a bundled model's name
    resolved = [str(Path(source).resolve()) if Path(source).exists() else str(source) for source in sources]
    with workplace():
        page = start(resolved, host, port, limits, say=_say, mcp=mcp)
        gc.freeze()  # what is there by now stays, and need not be looked at again
        gc.enable()  # who starts the page may have disabled it
        if mcp:
            _say(f"tools (MCP) on {address(page)}{PLACE}")
        # flushed: who starts the server from a program waits for this line
        print(f"latentvae demo on {address(page)} (Ctrl-C ends it)", flush=True)
        try:
            while page.is_running:  # not block_thread, which waits for whoever has the page open
                time.sleep(0.1)
        except KeyboardInterrupt:
            _say("ending")
        end(page)


def _say(what: str) -> None:
    """What people who wait at a terminal are told; standard output is for the address."""
    # with its end of line in one piece: the thread that loads models tells people of them meanwhile
    print(f"latentvae demo: {what}\n", end="", file=sys.stderr, flush=True)


def end(page: LocalBlocks) -> None:
    """End a page, whoever has it open, in half a second or less."""
    page.is_running = False  # so that heartbeats stop
    page.app.stop_event.set()
    page._queue.close()
    page.server.force_exit = page.server.should_exit = True
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # or it logs that it was made to end
    deadline = time.monotonic() + PATIENCE
    # AnyIO's are those that handlers run in
    names = ("AnyIO", WARM_UP)
    working = [thread for thread in threading.enumerate() if thread.name.startswith(names)]
    for thread in (page.server.thread, *working):
        thread.join(max(0.0, deadline - time.monotonic()))


def start(
    sources: Sequence[str | Path] = (),
    host: str = HOST,
    port: int = PORT,
    limits: Limits | None = None,
    say: Callable[[str], None] = logger.info,
    mcp: bool = False,
) -> LocalBlocks:
    """Lay the page out and serve it in a thread, then load the models; call it inside `workplace`.

    Models that are named are loaded before: what is wrong with them is to be said at once.

    Args:
        sources: models beside the bundled ones: folders or files.
        host: address to listen on; 0.0.0.0 opens the page to the network.
        port: of it.
        limits: what visitors may ask.
        say: is told what is loading.
        mcp: serve the page's tools too, to programs that speak the Model Context Protocol.

    Returns:
        The page; `page.local_url` is its address, `page.close()` ends it.

    Raises:
        LatentVAEError: a model that cannot be loaded, or an address that cannot be served.
    """
    check_port(host, port)  # before the models load, which takes seconds
    limits = limits or default_limits(host)
    page = build_page(Models(sources, limits.tile_above, say), limits)
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    try:
        with redirect_stdout(io.StringIO()):  # gradio prints where tools are, before they are these
            page.launch(**_launch_options(page, host, port, folder, limits), mcp_server=mcp)
    except OSError as error:  # taken since it was checked, or a machine so busy that it took five seconds
        raise LatentVAEError(f"{host}:{port} could not be served ({error}): try again.") from error
    if mcp:
        offer_tools(page)
    # after the launch: what is in the folder by now belongs to the page
    Sweeper(folder, limits.keep_seconds, limits.sweep_seconds, page.asked_for).start()
    threading.Thread(target=_warm_up, args=[page], name=WARM_UP, daemon=True).start()
    return page


def _warm_up(page: LocalBlocks) -> None:
    """What the first visitors would wait for, done ahead of them."""
    try:
        for each in page.beforehand:
            if page.is_running:
                each()
    except Exception:  # whoever asks for the same is told what is wrong with it
        logger.exception("the demo could not warm up")


def default_limits(host: str) -> Limits:
    """What visitors may ask; no quota on one's own machine, where what fills the disk is one's own."""
    return Limits(stored_bytes=sys.maxsize) if host.strip("[]") in LOOPBACK else Limits()


def address(page: LocalBlocks) -> str:
    """Where the page is, as a browser on this machine takes it."""
    return str(page.local_url).replace("//[::]:", "//[::1]:")


def _launch_options(page: LocalBlocks, host: str, port: int, folder: Path, limits: Limits) -> dict[str, Any]:
    """All that `page.launch` is told."""
    bare = host.strip("[]")
    return dict(
        server_name=f"[{bare}]" if ":" in bare else host,  # as addresses of pages write IPv6
        server_port=port,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        allowed_paths=[],
        blocked_paths=[str(Path(__file__).parents[1])],
        max_file_size=limits.upload_bytes,
        strict_cors=True,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        # or gradio asks its own page whether it is up, and gives up after three seconds of a busy machine
        _frontend=False,
        footer_links=["api"],
        theme=make_theme(),
        css=static("page.css"),
        head=head(page),
        state_session_capacity=limits.sessions,
        app_kwargs={"middleware": _middleware(bare, folder, limits)},
        **_no_history(page),
    )


def _middleware(host: str, folder: Path, limits: Limits) -> list[Middleware]:
    """What requests pass first, the outermost at the front."""
    # an upload's body is its file and a little around it: boundaries, names
    limited = (Gate, limits.upload_bytes + 2**20, folder, limits.stored_bytes)
    if host not in LOOPBACK:  # by which names the network knows this machine is not ours to know
        return [Middleware(*limited)]
    # or a page elsewhere, whose name is made to lead here, could use the server
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    return [trusted, Middleware(*limited, names=LOOPBACK)]


def _no_history(page: LocalBlocks) -> dict[str, Any]:
    """Newer versions of gradio keep runs on the hub, and older ones do not know the option."""
    return {"run_history": False} if "run_history" in inspect.signature(page.launch).parameters else {}


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be served.

    Raises:
        LatentVAEError: the port is taken or not allowed, or the host is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            # or the connections of a server that has just ended would keep the port for minutes
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:  # OverflowError: no port has such a number
        if isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            raise LatentVAEError(
                f"{host!r} is no address of this machine ({getattr(error, 'strerror', error)}): give "
                "--host 127.0.0.1 or, for the network, 0.0.0.0."
            ) from error
        raise LatentVAEError(
            f"{host}:{port} cannot be served ({getattr(error, 'strerror', None) or error}): another program "
            "may use it. Choose another one with --port, or end that program."
        ) from error


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Variables of the process, as they were afterwards."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


@contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder for uploads and results, as gradio's and the process's own, removed at the end."""
    here = Path.cwd()
    folder = Path(tempfile.mkdtemp(prefix="latentvae-demo-"))
    files = folder / "files"
    files.mkdir()
    empty = folder / "empty"
    empty.mkdir()
    values = {**SETTINGS, "GRADIO_TEMP_DIR": str(files), "GRADIO_EXAMPLES_CACHE": str(empty)}
    if LPIPS in os.environ:  # the working directory changes
        values[LPIPS] = str(Path(os.environ[LPIPS]).absolute())
    with environment(values):
        os.chdir(empty)  # gradio serves files of the working directory to its own handlers
        try:
            yield files
        finally:
            os.chdir(here)  # before the folder goes: Windows removes no directory that a process is in
            shutil.rmtree(folder, ignore_errors=True)


class Sweeper(threading.Thread):
    """Deletes what is older than `keep_seconds` below a folder, every `sweep_seconds`, until that is gone.

    Files that are there when it is made belong to the page, and stay; so do those that are `asked_for`,
    however long a request waits. (gradio's own, `delete_cache`, forgets the files of clients without a
    session.)
    """

    def __init__(
        self,
        folder: Path,
        keep_seconds: float,
        sweep_seconds: float,
        asked_for: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        super().__init__(name="sweeper", daemon=True)
        self.folder, self.keep_seconds, self.sweep_seconds = folder, keep_seconds, sweep_seconds
        self.asked_for = asked_for
        self.own = {Path(place, name) for place, _, names in os.walk(folder) for name in names}

    def run(self) -> None:
        """Sweep again and again."""
        while self.folder.is_dir():
            self.sweep(time.time())
            time.sleep(self.sweep_seconds)

    def sweep(self, now: float) -> None:
        """Delete what is too old at this time (seconds since 1970), and folders that are empty then."""
        for asked in self.asked_for():
            with suppress(OSError, ValueError):  # gone, or no name for a file
                # a request may name any file of this machine
                if Path(asked).resolve().is_relative_to(self.folder.resolve()):
                    os.utime(asked, (now, now))
        for place, _, names in os.walk(self.folder, topdown=False):  # so that a folder comes after its files
            emptied = False
            for file in (Path(place, name) for name in names):
                if file not in self.own and self._is_old(file, now):
                    with suppress(OSError):  # gone already, or open on Windows: the next time
                        file.unlink()
                        emptied = True
            # a new folder that is empty yet: an upload into it may be on its way
            if Path(place) != self.folder and (emptied or self._is_old(Path(place), now)):
                with suppress(OSError):  # not empty
                    Path(place).rmdir()

    def _is_old(self, path: Path, now: float) -> bool:
        try:
            found = path.lstat()
        except OSError:
            return False
        # both times: gradio's copies carry their original's mtime
        return max(found.st_mtime, found.st_ctime) < now - self.keep_seconds
