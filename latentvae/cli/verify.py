"""`latentvae verify`: whether a store is whole."""

from pathlib import Path
from typing import Annotated

import typer

from latentvae.base.errors import StoreError
from latentvae.cli.options import Json, print_json
from latentvae.store import format, verification

EXIT_DAMAGED = 2  # as any bad input


def verify(
    store: Annotated[
        Path, typer.Argument(help="A folder that `latentvae encode` wrote.", show_default=False)
    ],
    json: Json = False,
) -> None:
    """Check every shard of a store against its hashes and its index; exit code 2 where something is wrong."""
    # no bar for programs, which may take both streams for one
    problems = verification.verify(store, progress=not json)
    manifest = format.read_manifest(store)
    if json:
        print_json({"store": str(store), "images": manifest.count, "problems": problems})
        if problems:  # no StoreError, for which the command would print a second JSON object
            raise typer.Exit(EXIT_DAMAGED)
        return
    if problems:
        for problem in problems:
            typer.echo(problem, err=True)
        raise StoreError(
            f"{store} is damaged, as named above. `latentvae encode` with its images encodes those "
            "shards again."
        )
    typer.echo(f"{manifest.count} images in {len(manifest.shards)} shards: whole.")
