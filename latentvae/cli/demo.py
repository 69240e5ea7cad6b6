"""`latentvae demo`: the page in the browser."""

import gc
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from latentvae import demo as page
from latentvae.base.optional import need


def demo(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 opens the page to your network.")
        # the page takes files from whoever reaches it
    ] = "127.0.0.1",
    model: Annotated[
        list[Path] | None,
        typer.Option(
            "--model",
            "-m",
            help="A model beside the bundled ones, or an AutoencoderTiny for Compare. Repeatable.",
        ),
    ] = None,
    mcp: Annotated[
        bool, typer.Option(help="Serve reconstruct, compress, decompress, compare as tools (MCP) too.")
    ] = False,
) -> None:
    """Open a page to try it all in the browser: reconstruct, compare, compress, interpolate, fill in."""
    typer.echo("latentvae demo: loading gradio", err=True)  # which takes seconds
    gc.disable()  # until the page is up, which is a seventh sooner: what is imported stays
    try:
        if mcp:  # first: its extra brings gradio too
            need("mcp", message="tools need {package}, which is not installed: {install}")
        need("gradio", message="the demo needs {package}, which is not installed: {install}")
        page.server.serve(model or [], host, port, mcp=mcp)
    finally:
        gc.enable()
    # a picture may be computed in a thread that nothing stops, and Python would wait for it
    sys.stdout.flush()
    os._exit(0)
