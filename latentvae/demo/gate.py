"""The gate before gradio's own routes: those that fetch addresses or serve no purpose here are closed."""

import os
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.responses import JSONResponse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PREFIX = "/gradio_api"
CLOSED = (
    *("/proxy=", "/stream", "/component_server", "/process_recording", "/vibe-", "/undo-vibe", "/dev/"),
    *("/run-history", "/runs"),  # keeps visitors' runs on the hub, with the host's own token
    *("/deep_link", "/custom_component", "/monitoring", "/profiling", "/login", "/token"),
)
MESSAGE = "This server opens no addresses and no files but those that were uploaded to it or made by it."


TOO_LARGE = "This is too large for this server."
FULL = "This server holds as many files as it takes for now: try again in a while."


class Gate:
    """ASGI middleware.

    Args:
        app: what it stands before.
        max_body: bytes of a request, counted as they come: a request need not say its length, or can lie.
        folder: of uploads and results.
        max_stored: bytes in that folder from which on uploads are refused.
    """

    def __init__(self, app: Any, max_body: int, folder: Path, max_stored: int) -> None:
        self.app, self.max_body = app, max_body
        self.folder, self.max_stored = folder, max_stored

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403 (closed), 413 (too large) or 507 (no room)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = unquote(unquote(scope["path"])).removeprefix(PREFIX)
        if is_closed(path):
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
            return {"type": "http.disconnect"} if came > self.max_body else message

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal answered
            if came <= self.max_body or answered:
                answered = True
                await send(message)

        try:
            await self.app(scope, count, answer)
        except Exception:
            if came <= self.max_body:
                raise
        if came > self.max_body and not answered:
            await JSONResponse({"detail": TOO_LARGE}, 413)(scope, receive, send)

    @staticmethod
    def _length(scope: Scope) -> int:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit():
                return int(value)
        return 0


def stored_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; those that vanish meanwhile do not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(place, name).lstat().st_size
    return total


def is_closed(path: str) -> bool:
    """Whether a path below gradio's prefix is not served: it leads elsewhere, or is not needed."""
    if path.startswith(("/file=", "/file/")):
        target = path[len("/file=") :].lower()
        return "://" in target or target.startswith(("http:", "https:", "//"))
    return path.startswith(CLOSED)
