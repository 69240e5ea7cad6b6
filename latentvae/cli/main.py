"""The `latentvae` command. Exit codes: 0 done, 1 a bug, 2 bad input, 3 done but some inputs were skipped,
4 training stopped by a signal after saving, 5 `doctor` found that fp16 does not work, 6 `agree` found that B
cannot take A's place.
"""

import io
import json
import logging
import os
import sys
import warnings
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from latentvae import __version__
from latentvae.base.errors import LatentVAEError
from latentvae.cli.options import is_first_process

EXIT_BAD_INPUT = 2
ABOUT = "Image VAEs for latent diffusion: reconstruct, encode, compress, train, export."

# In the order of `latentvae --help`, which must not wait for torch: so the first paragraph of each verb's
# docstring stands here again, and a test compares them. A verb is the function of its name in the module of
# its name, or a Typer app of that name where it has verbs of its own.
VERBS = {
    "reconstruct": "Reconstruct images: writes NAME.reconstruction.png and NAME.comparison.png, and prints a "
    "table.",
    "evaluate": "Measure reconstructions of images, each at its own size, and print a table.",
    "info": "Print a model's config, parameters, compression ratio, channels and latent statistics.",
    "encode": "Encode images to a store of latents to train from; run again, it only does what has changed.",
    "decode": "Decode a store to pictures: KEY.png for each image, of the size that was encoded, without "
    "padding.",
    "verify": "Check every shard of a store against its hashes and its index; exit code 2 where something is "
    "wrong.",
    "shards": "Export a store's moments and captions as WebDataset shards: latents-000000.tar, and so on.",
    "hand-over": "Write a store as the cache of another tool that trains on latents, and say what it cannot "
    "take.",
    "compress": "Compress an image, or a folder; prints the bits per pixel of whole files, and what decoding "
    "them gives.",
    "decompress": "Decompress an image that `latentvae compress` wrote, or a folder of them.",
    "sample": "Draw new images: writes samples/*.png, samples.png (a grid) and samples.json.",
    "interpolate": "Interpolate between images: writes a strip, an animation and the size of each step.",
    "vary": "Vary images: writes copies (their captions too) and a contact sheet, and prints how far they "
    "are.",
    "fill": "Fill in the missing pixels of an image: writes NAME.filled.png, NAME.comparison.png and "
    "NAME.fill.json.",
    "project": "Map images by their latents: writes projection.html to hover over, .png, .json, and "
    "clusters.csv.",
    "features": "Write one row of numbers for each image: its latents, pooled, with its key and label.",
    "train": "Train a VAE on images (a folder, parquet, WebDataset shards); ends with an export in "
    "OUTPUT/vae.",
    "export": "Export a checkpoint (or convert any model) and prove it by reloading it in stock diffusers.",
    "convert": "Convert a VAE, and prove it by reading it back. No weight changes but by --dtype and --for.",
    "plan": "Say what an image of some size takes: memory and time, whole and in exact tiles, and what to "
    "choose.",
    "doctor": "Say whether fp16 and bf16 give what fp32 gives: each layer's largest value, overflows, error "
    "in dB.",
    "agree": "Say whether a diffusion model trained on A's latents can use B: each decodes the latents of "
    "both.",
    "diffusability": "Train a small diffusion model on each VAE's latents, and compare how well it learns "
    "them.",
    "demo": "Open a page to try it all in the browser: reconstruct, compare, compress, interpolate, fill in.",
    "anomaly": "Find odd images, by what is usual among normal ones.",
    "prior": "Learn a prior over latents to draw new images from.",
}
ELSEWHERE = {"decompress": "compress"}  # verb -> module, where it has another name


def load_verb(name: str) -> Any:
    """The Typer app of a verb; imports the verb's module."""
    function = name.replace("-", "_")
    verb = getattr(import_module(f"latentvae.cli.{ELSEWHERE.get(name, function)}"), function)
    if isinstance(verb, typer.Typer):
        return verb
    alone = typer.Typer(add_completion=False)
    alone.command()(verb)  # without a callback Typer takes the one command for the whole app
    return alone


class _Verb(TyperCommand):
    """A verb as the list shows it; its module is imported when its own arguments are read."""

    # Any, because Typer may have a copy of click inside, whose types are not those of the package click
    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """The context of the real command: click runs `context.command`, so that takes over from here."""
        return typer.main.get_command(load_verb(str(self.name))).make_context(
            info_name, args, parent, **extra
        )


class _Verbs(TyperGroup):
    """All verbs, none of them imported."""

    def __init__(self, **settings: Any) -> None:
        # Typer makes the group, and would fill it with verbs that are imported already
        super().__init__(**settings)
        self.commands.update({name: _Verb(name, help=line) for name, line in VERBS.items()})


app = typer.Typer(
    cls=_Verbs,
    name="latentvae",
    help=ABOUT,
    epilog="Exit codes: 0 done, 1 a bug, 2 bad input, 3 done but some inputs were skipped, "
    "4 training stopped by a signal or train.max_minutes after saving, 5 `doctor` found that fp16 does not "
    "work, 6 `agree` found that B cannot take A's place, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"latentvae {__version__}")
        raise typer.Exit


@app.callback(help=ABOUT)
def common(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Options of the command itself; this also makes it a group, though it has no verb of its own."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; bad input ends with a message on standard error and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    # images come from files here, which are read to the right scale: this is a bright one
    warnings.filterwarnings("ignore", message=r"images from .*: if these are in \[0, 1\]")
    # a line for each request to the hub, and for each place where credentials are, says nothing to people
    for chatty in ("httpx", "botocore", "aiobotocore", "azure"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # a broken or offline hub must not hold up a run that never needed it
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        # LatentVAEError alone: the stack trace of a bug is what a report of it needs
        app(args=arguments)
    except LatentVAEError as error:
        # whoever reads JSON from standard output must find some; people read standard error
        if "--json" in arguments and is_first_process():
            typer.echo(json.dumps({"error": str(error)}))
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
