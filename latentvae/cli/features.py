"""`latentvae features`: pooled latents as a table for other tools."""

from pathlib import Path
from typing import Annotated, Any

import typer

from latentvae.cli.gathering import Grid, Labels, Request, Size, Sources, gather
from latentvae.cli.options import Device, Json, Model
from latentvae.cli.session import finish, make_folder, print_json
from latentvae.toolbox.atlas.features import check_format


def features(
    sources: Sources,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="*.npy or *.parquet.", show_default=False)],
    model: Model = None,
    grid: Grid = 4,
    labels: Labels = None,
    size: Size = 256,
    device: Device = None,
    json: Json = False,
) -> None:
    """Write one row of numbers for each image: its latents, pooled, with its key and label.

    OUT.npy is float32 (images, features), and OUT.json beside it says keys, labels and columns; OUT.parquet
    has them all in one table.
    """
    check_format(output)
    make_folder(output.parent)  # before minutes of encoding
    found = gather(Request(sources, model, device, grid, labels, size, with_pictures=False))
    if found.gallery.keys:
        table = found.gallery.features
        files = table.save(output)
        result: dict[str, Any] = {"files": [str(file) for file in files], "images": len(table.keys)}
        result |= {
            "features": table.values.shape[1],
            "labels_from": found.gallery.labels_from,
            **table.about(),
        }
        if json:
            print_json({**result, "notes": found.notes, "skipped": found.skipped})
        else:
            typer.echo(
                f"{len(table.keys)} images, {table.values.shape[1]} features each: {result['pooling']}."
            )
            for note in found.notes:
                typer.echo(f"Note: {note}")
            typer.echo(f"Written: {', '.join(result['files'])}")
    finish(found.skipped, len(found.gallery))
