"""The page's tools for programs that speak the Model Context Protocol, by gradio's server of them."""

import html
import inspect
import json
import re
from typing import Any
from urllib.parse import unquote

from gradio.mcp import GradioMCPServer

from latentvae.base.errors import LatentVAEError
from latentvae.demo.guard import LocalBlocks, check_uploaded

PLACE = "gradio_api/mcp/"
TOOLS = {
    "reconstruct": "/reconstruct",
    "compress": "/compress",
    "decompress": "/decode",
    "compare": "/compare",
}
FILE = "/gradio_api/file="  # in addresses of the page's files


def offer_tools(page: LocalBlocks) -> None:
    """Have a page's tools, which gradio has made of all endpoints, be these four, and take uploads alone.

    Raises:
        LatentVAEError: gradio could not start its server.
    """
    server = page.mcp_server_obj
    if server is None:
        raise LatentVAEError(
            f"the server of tools did not start ({page.mcp_error}): leave out --mcp, or install "
            "what it asks for."
        )
    server.__class__ = _Tools  # gradio makes it itself, and asks nobody of which class
    server.tool_to_endpoint = {server.tool_prefix + name: endpoint for name, endpoint in TOOLS.items()}


class _Tools(GradioMCPServer):
    @property
    def _file_data_tool_description(self) -> str:
        return (
            " Files are uploaded first: POST them as `files` in a multipart form to /gradio_api/upload, "
            "which answers with a list of paths, or use a tool upload_file_to_gradio. Pass such a path; "
            "addresses of other servers are refused."
        )

    def get_fn_description(self, block_fn: Any, tool_name: str) -> tuple[str, dict[str, str]]:
        """What a tool does and gives, and what its arguments are.

        gradio's own cuts arguments off at the first line's end, and knows no `Yields:`.
        """
        doc = inspect.getdoc(block_fn.fn) or ""
        summary, arguments, results = (*re.split(r"\n\n(?:Args|Returns|Yields):\n", doc), "", "")[:3]
        found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", arguments, re.MULTILINE)
        # the first sentence: the page alone is given results twice
        returned = _one_line(results).partition(". ")[0].rstrip(".").replace("as HTML", "as text")
        about = f"{_one_line(summary)}{self._file_data_tool_description} Returns: {returned}."
        return about, {name: _one_line(text) for name, text in found}

    def simplify_filedata_schema(
        self, schema: dict[str, Any]
    ) -> tuple[dict[str, Any], list[list[str | int]]]:
        found, positions = super().simplify_filedata_schema(schema)
        for name, *_ in positions:
            found["properties"][name]["format"] = "the path that an upload to this server was answered with"
        return found, positions

    def convert_strings_to_filedata(self, value: Any, filedata_positions: list[list[str | int]]) -> Any:
        """Arguments with uploads in place of their paths, or of their addresses on this page.

        gradio's own would fetch addresses; and its client, which calls the endpoints, would open any path.
        """
        files = {where[0] for where in filedata_positions}
        return {key: _upload(each) if key in files else each for key, each in value.items()}

    def postprocess_output_data(self, data: Any, root_url: str) -> Any:
        """Results as text and pictures; figures as JSON, and what is HTML for eyes without its tags."""
        # without progress gradio hands all results on as one
        results = data[0] if len(data) == 1 and isinstance(data[0], tuple | list) else data
        return super().postprocess_output_data([_plain(each) for each in results], root_url)


def _upload(value: Any) -> dict[str, Any]:
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str):
        raise ValueError(f"a file's path was wanted, and {type(value).__name__} came: upload the file first.")
    _, found, after = path.rpartition(FILE)
    path = unquote(after) if found else path
    check_uploaded(path)
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plain(result: Any) -> Any:
    if isinstance(result, str):
        return _one_line(html.unescape(re.sub("<[^>]+>", " ", result)))
    if isinstance(result, dict) and "meta" in result:  # a file
        return result
    return json.dumps(result)
