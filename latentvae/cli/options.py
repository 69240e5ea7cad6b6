"""Options that verbs share, and how their results are told."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.models import OptionInfo

from latentvae.models.shipped import DEFAULT_MODEL

EXIT_SKIPPED = 3
EXIT_INTERRUPTED = 130  # as shells have it: 128 and the number of SIGINT

# below where people are, and never among their images: see places.check_output
OUTPUT = Path("latentvae-output")

CLOSEST_MODEL = "sd3-small"  # of the bundled ones to the original picture (docs/models.md)


def model_option(default: str) -> Any:
    """The option --model, where `default` is the bundled model that is taken without it."""
    words = "Bundled name, diffusers folder, *.safetensors file or hub id."
    return Annotated[str | None, typer.Option("--model", "-m", help=words, show_default=default)]


# Verbs about one model take it as an argument; --model is there too, because people type it by habit.
ModelArgument = Annotated[
    str | None, typer.Argument(help="As --model of the other verbs.", show_default=DEFAULT_MODEL)
]
SameModel = Annotated[str | None, typer.Option("--model", "-m", help="The same, as other verbs take it.")]
# as in models.formats, which would have to be loaded for it
Format = Literal["diffusers", "ldm", "single-file"]
Program = Literal["comfyui", "a1111", "forge", "flux", "sd-scripts"]
Photos = Annotated[list[Path], typer.Argument(help="Images or folders.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the fastest there is.")]
Precision = Annotated[
    Literal["fp32", "bf16", "fp16"],
    typer.Option(
        help="Arithmetic of the model. fp32: exact. bf16, fp16: half the memory, and faster where the "
        "hardware computes in them."
    ),
]
# vgg is the largest by far; alex is what papers report
LPIPSNet = Annotated[
    Literal["alex", "squeeze", "vgg"],
    typer.Option(help="Network that LPIPS looks through; lower is closer with each."),
]
LPIPSWeights = Annotated[
    Path | None,
    typer.Option(
        help="Backbone of LPIPS: file or folder. Default: $LATENTVAE_LPIPS, then torchvision's cache."
    ),
]
Sample = Annotated[bool, typer.Option(help="Decode a sample of the posterior instead of its mode.")]
Seed = Annotated[int, typer.Option(help="Seed of what is drawn: the same number, the same draw.")]
TileSize = Annotated[
    int | None,
    typer.Option(
        min=16,
        help="Compute images in tiles of at most this side, in pixels: smaller ones take less memory and "
        "more time, the result is the same. Default: tiles only where an image would not fit.",
    ),
]
Scratch = Annotated[
    Path | None,
    typer.Option(
        help="Folder for what tiles leave for one another, in place of memory: for images too large for that."
    ),
]
# the same of `decode` and `shards`
StoreArgument = Annotated[
    Path,
    typer.Argument(metavar="STORE", help="A folder that `latentvae encode` wrote.", show_default=False),
]
StoreAddress = Annotated[
    str,
    typer.Argument(
        metavar="STORE", help="A folder that `latentvae encode` wrote, or its address.", show_default=False
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(min=1, help="Images of more pixels (width x height) are skipped.", show_default="178956970"),
]


def output_folder(purpose: str) -> OptionInfo:
    """The option --output, of a verb that writes files of its own naming into a folder."""
    return typer.Option("--output", "-o", help=purpose)


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 image, 2 images."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """Seconds in words that are as rough as an estimate."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def is_first_process() -> bool:
    """Whether this is the process that speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def tell(result: dict[str, Any], lines: Iterable[str], as_json: bool) -> None:
    """Print a result as one JSON object, or as lines for people, on standard output."""
    if as_json:
        print_json(result)
        return
    for line in lines:
        typer.echo(line)


def print_json(result: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    typer.echo(json.dumps(result))  # in ASCII: names need not be UTF-8
