"""`latentvae verify`: whether a store is whole."""

from typing import Annotated

import typer

from latentvae import store
from latentvae.base.errors import StoreError
from latentvae.cli.options import Json, StoreAddress, counted, print_json

EXIT_DAMAGED = 2  # as any bad input


def verify(
    folder: StoreAddress,
    sources: Annotated[
        bool, typer.Option("--sources", help="Also read every image's file: is it what was encoded?")
    ] = False,
    json: Json = False,
) -> None:
    """Check every shard of a store against its hashes and its index; exit code 2 where something is wrong."""
    # no bar for programs, which may take both streams for one
    problems = store.verification.verify(folder, progress=not json)
    manifest = store.format.read_manifest(folder)
    # of a damaged index there is nothing to ask for
    asked = sources and not problems
    changed = store.verification.verify_sources(folder, progress=not json) if asked else []
    if json:
        print_json({"store": str(folder), "images": manifest.count, "problems": problems, "sources": changed})
        if problems or changed:  # no StoreError, for which the command would print a second JSON object
            raise typer.Exit(EXIT_DAMAGED)
        return
    if problems:
        for problem in problems:
            typer.echo(problem, err=True)
        raise StoreError(
            f"{folder} is damaged, as named above. `latentvae encode` with its images encodes those "
            "shards again."
        )
    if changed:
        for problem in changed:
            typer.echo(problem, err=True)
        raise StoreError(
            f"{counted(len(changed), 'image')} of {folder}: the file is gone or another, as named above. "
            "`latentvae encode --rehash` with the files as they are encodes those that have changed."
        )
    images, shards = counted(manifest.count, "image"), counted(len(manifest.shards), "shard")
    typer.echo(f"{images} in {shards}: whole.")
