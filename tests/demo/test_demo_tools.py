"""The page's tools by the client of the Model Context Protocol: what they give, and what they refuse."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import textured
from demo_server import running
from PIL import Image
from typer.testing import CliRunner

from latentvae.base.errors import LatentVAEError
from latentvae.base.optional import install_command
from latentvae.cli import main as cli

pytest.importorskip("gradio")
import httpx


def test_without_its_package_the_option_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    # one command is to be enough
    monkeypatch.setitem(sys.modules, "mcp", None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(cli.app, ["demo", "--mcp"])
    assert isinstance(result.exception, LatentVAEError)
    assert install_command("mcp") in str(result.exception)


@pytest.fixture(scope="module")
def page(model: Path) -> Iterator[Any]:
    pytest.importorskip("mcp", reason="the extra mcp is not installed")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        with redirect_stdout(io.StringIO()) as said:
            served = stack.enter_context(running(model, patch, mcp=True))
        served.said = said.getvalue()
        # nothing answers there: tools ask the page directly
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        yield served


def ask(page: Any, what: Callable[[Any], Any]) -> Any:
    """What a client's session gives."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def talk() -> Any:
        async with (
            streamablehttp_client(f"{page.local_url}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            return await what(session)

    return anyio.run(talk)


def call(page: Any, name: str, **arguments: Any) -> tuple[bool, list[str], list[Image.Image]]:
    """Whether a tool refused, its words and its pictures."""
    found = ask(page, lambda session: session.call_tool(name, arguments))
    words = [each.text for each in found.content if each.type == "text"]
    pictures = [each.data for each in found.content if each.type == "image"]
    return (
        found.isError,
        words,
        [Image.open(io.BytesIO(base64.b64decode(data))) for data in pictures],
    )


def upload(page: Any, path: Path) -> str:
    with path.open("rb") as file:
        (place,) = httpx.post(f"{page.local_url}gradio_api/upload", files={"files": (path.name, file)}).json()
    return str(place)


def test_the_start_prints_nothing_before_the_address(page: Any) -> None:
    assert not page.said


def test_four_tools_say_what_they_take(page: Any) -> None:
    tools = {each.name: each for each in ask(page, lambda session: session.list_tools()).tools}
    assert sorted(tools) == ["compare", "compress", "decompress", "reconstruct"]
    for name, tool in tools.items():
        (file,) = tool.inputSchema["required"][:1]
        assert file == ("file" if name == "decompress" else "photo")
        assert "http" not in json.dumps(tool.inputSchema)
        assert "/gradio_api/upload" in tool.description
        assert " Returns: " in tool.description
        for about in (
            tool.description,
            *(each["description"] for each in tool.inputSchema["properties"].values()),
        ):
            assert about.endswith("."), about  # and is not cut off where a line ends
            assert ", sheet" not in about


def test_a_picture_goes_there_and_back(page: Any, tmp_path: Path) -> None:
    Image.fromarray(textured(61, 45, 1)).save(tmp_path / "a photo.png")
    photo = upload(page, tmp_path / "a photo.png")
    refused, words, (picture, *_) = call(page, "reconstruct", photo=photo)
    assert not refused
    assert picture.size == (61, 45)
    assert any(each.startswith("{") and json.loads(each).get("width") == 61 for each in words)
    assert not any("<div" in each for each in words)

    # an address of this page's own is a path of an upload too
    refused, words, _ = call(page, "compress", photo=f"{page.local_url}gradio_api/file={photo}", quality=60)
    assert not refused
    (file,) = (each for each in words if each.endswith(".lvae"))
    refused, words, (picture, *_) = call(page, "decompress", file=file)
    assert not refused
    assert picture.size == (61, 45)

    refused, words, _ = call(page, "compare", photo=photo, against=["JPEG", "tiny-model"])
    assert not refused
    assert not any("&minus;" in each for each in words)
    (rows,) = (json.loads(each) for each in words if each.startswith("["))
    assert [row["name"] for row in rows] == ["JPEG", "tiny-model"]


def test_addresses_and_files_of_the_server_are_refused(page: Any, tmp_path: Path) -> None:
    Image.fromarray(textured(61, 45, 1)).save(tmp_path / "own.png")
    asked = []
    with httpx.Client(base_url=page.local_url) as web:
        for place in (
            "http://127.0.0.1:9/cat.png",
            f"http://127.0.0.1:9/gradio_api/file={tmp_path / 'own.png'}",
            str(tmp_path / "own.png"),
            "file:///etc/hostname",
            "data:image/png;base64,AAAA",
        ):
            refused, words, pictures = call(page, "reconstruct", photo=place)
            asked.append(place)
            assert refused, place
            assert not pictures
            assert "nly uploaded files are taken" in " ".join(words), place
        assert web.get("/config").status_code == 200
    assert len(asked) == 5


def test_other_pages_may_not_use_the_tools(page: Any) -> None:
    answer = httpx.post(
        f"{page.local_url}gradio_api/mcp/",
        json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
        headers={"Origin": "https://elsewhere.invalid", "Accept": "application/json, text/event-stream"},
    )
    assert answer.status_code == 403
