"""Options that verbs share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Bundled name, diffusers folder, *.safetensors file or hub id.",
        show_default="f8c4-small",
    ),
]
ModelArgument = Annotated[
    str | None, typer.Argument(help="As --model of the other verbs.", show_default="f8c4-small")
]
SameModel = Annotated[str | None, typer.Option("--model", "-m", help="The same, as other verbs take it.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the fastest there is.")]
Precision = Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Arithmetic of the model.")]
LPIPSNet = Annotated[Literal["alex", "squeeze", "vgg"], typer.Option(help="Backbone of LPIPS.")]
LPIPSWeights = Annotated[
    Path | None,
    typer.Option(
        help="Backbone of LPIPS: file or folder. Default: $LATENTVAE_LPIPS, then torchvision's cache."
    ),
]
Sample = Annotated[bool, typer.Option(help="Decode a sample of the posterior instead of its mode.")]
Seed = Annotated[int, typer.Option(help="Of the samples.")]
TileSize = Annotated[
    int | None,
    typer.Option(
        min=16, help="Tile images above this side, with exact results. Default: those that would not fit."
    ),
]
Store = Annotated[
    Path | None, typer.Option(help="Folder for maps of tiled images that would not fit in memory either.")
]
