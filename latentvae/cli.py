"""The `latentvae` command. Exit codes: 0 done, 1 a bug, 2 bad input, 3 done but some inputs were skipped,
4 training stopped by a signal after saving, 5 `doctor` found that fp16 does not work.
"""

import io
import json
import logging
import os
import sys

import typer

from latentvae import __version__
from latentvae.commands.agree import agree
from latentvae.commands.anomaly import anomaly
from latentvae.commands.compress import compress, decompress
from latentvae.commands.convert import convert
from latentvae.commands.decode import decode
from latentvae.commands.demo import demo
from latentvae.commands.doctor import doctor
from latentvae.commands.encode import encode
from latentvae.commands.evaluate import evaluate
from latentvae.commands.export import export
from latentvae.commands.features import features
from latentvae.commands.fill import fill
from latentvae.commands.info import info
from latentvae.commands.interpolate import interpolate
from latentvae.commands.prior import prior
from latentvae.commands.project import project
from latentvae.commands.reconstruct import reconstruct
from latentvae.commands.sample import sample
from latentvae.commands.shards import shards
from latentvae.commands.train import train
from latentvae.commands.vary import vary
from latentvae.commands.verify import verify
from latentvae.errors import LatentVAEError

EXIT_BAD_INPUT = 2

app = typer.Typer(
    name="latentvae",
    help="Image VAEs for latent diffusion: reconstruct, encode, compress, train, export.",
    epilog="Exit codes: 0 done, 1 a bug, 2 bad input, 3 done but some inputs were skipped, "
    "4 training stopped by a signal or train.max_minutes after saving, 5 `doctor` found that fp16 does not "
    "work, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
VERBS = (
    *(reconstruct, evaluate, info),
    *(encode, decode, verify, shards),
    *(compress, decompress),
    *(sample, interpolate, vary, fill),
    *(project, features),
    *(train, export, convert, doctor, agree),
    demo,
)
for verb in VERBS:
    app.command()(verb)
app.add_typer(anomaly, name="anomaly")
app.add_typer(prior, name="prior")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"latentvae {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Image VAEs for latent diffusion: reconstruct, encode, compress, train, export."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command line; bad input ends with a message on standard error and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # a broken or offline hub must not hold up a run that never needed it
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app(args=arguments)
    except LatentVAEError as error:
        if "--json" in arguments:
            typer.echo(json.dumps({"error": str(error)}))
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
