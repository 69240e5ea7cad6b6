"""The gate before gradio's own routes: those that fetch addresses or serve no purpose here are closed."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from starlette.responses import JSONResponse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PREFIX = "/gradio_api"
CLOSED = (
    *("/proxy=", "/stream", "/component_server", "/process_recording", "/vibe-", "/undo-vibe", "/dev/"),
    *("/deep_link", "/custom_component", "/monitoring", "/profiling", "/login", "/token"),
)
MESSAGE = "This server opens no addresses and no files but those that were uploaded to it or made by it."


class Gate:
    """ASGI middleware."""

    def __init__(self, app: Any, max_body: int) -> None:
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403 (closed) or 413 (too large)."""
        if scope["type"] == "http":
            path = unquote(unquote(scope["path"])).removeprefix(PREFIX)
            if is_closed(path):
                await JSONResponse({"detail": MESSAGE}, 403)(scope, receive, send)
                return
            if self._length(scope) > self.max_body:
                await JSONResponse({"detail": "This is too large for this server."}, 413)(
                    scope, receive, send
                )
                return
        await self.app(scope, receive, send)

    @staticmethod
    def _length(scope: Scope) -> int:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit():
                return int(value)
        return 0


def is_closed(path: str) -> bool:
    """Whether a path below gradio's prefix is not served: it leads elsewhere, or is not needed."""
    if path.startswith(("/file=", "/file/")):
        target = path[len("/file=") :].lower()
        return "://" in target or target.startswith(("http:", "https:", "//"))
    return path.startswith(CLOSED)
