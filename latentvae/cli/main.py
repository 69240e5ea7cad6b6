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
from latentvae.base.errors import LatentVAEError
from latentvae.cli.agree import agree
from latentvae.cli.anomaly import anomaly
from latentvae.cli.compress import compress, decompress
from latentvae.cli.convert import convert
from latentvae.cli.decode import decode
from latentvae.cli.demo import demo
from latentvae.cli.doctor import doctor
from latentvae.cli.encode import encode
from latentvae.cli.evaluate import evaluate
from latentvae.cli.export import export
from latentvae.cli.features import features
from latentvae.cli.fill import fill
from latentvae.cli.info import info
from latentvae.cli.interpolate import interpolate
from latentvae.cli.prior import prior
from latentvae.cli.project import project
from latentvae.cli.reconstruct import reconstruct
from latentvae.cli.sample import sample
from latentvae.cli.shards import shards
from latentvae.cli.train import train
from latentvae.cli.vary import vary
from latentvae.cli.verify import verify

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
