"""`latentvae verify`: whether a store is whole."""

import typer

from latentvae import store
from latentvae.base.errors import StoreError
from latentvae.cli.options import Json, StoreArgument, print_json

EXIT_DAMAGED = 2  # as any bad input


def verify(
    folder: StoreArgument,
    json: Json = False,
) -> None:
    """Check every shard of a store against its hashes and its index; exit code 2 where something is wrong."""
    # no bar for programs, which may take both streams for one
    problems = store.verification.verify(folder, progress=not json)
    manifest = store.format.read_manifest(folder)
    if json:
        print_json({"store": str(folder), "images": manifest.count, "problems": problems})
        if problems:  # no StoreError, for which the command would print a second JSON object
            raise typer.Exit(EXIT_DAMAGED)
        return
    if problems:
        for problem in problems:
            typer.echo(problem, err=True)
        raise StoreError(
            f"{folder} is damaged, as named above. `latentvae encode` with its images encodes those "
            "shards again."
        )
    typer.echo(f"{manifest.count} images in {len(manifest.shards)} shards: whole.")
