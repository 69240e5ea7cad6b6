"""`latentvae features`: pooled latents as a table for other tools."""

from pathlib import Path
from typing import Annotated

import typer

from latentvae.base.files import make_folder
from latentvae.cli.gathering import Grid, Labels, Request, Size, Sources, gather
from latentvae.cli.options import counted, tell
from latentvae.cli.session import Session, takes
from latentvae.toolbox import atlas


@takes("model", ..., "device", "json")
def features(
    session: Session,
    sources: Sources,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="*.npy or *.parquet.", show_default=False)],
    grid: Grid = 4,
    labels: Labels = None,
    size: Size = 256,
) -> None:
    """Write one row of numbers for each image: its latents, pooled, with its key and label.

    OUT.npy is float32 (images, features), and OUT.json beside it says keys, labels and columns; OUT.parquet
    has them all in one table.
    """
    # before the model: an ending that cannot be written, or a file that is no earlier table
    atlas.features.check_format(output)
    make_folder(output.parent)  # before minutes of encoding
    found = gather(session, Request(sources, grid, labels, size, with_pictures=False))
    if found.gallery.keys:  # none: all were skipped, and no empty table is written
        table = found.gallery.features
        files = [str(file) for file in table.save(output)]
        about, count = table.about(), table.values.shape[1]
        labelled = {"features": count, "labels_from": found.gallery.labels_from}
        result = {"files": files, "images": len(table.keys), **labelled, **about}
        lines = [
            f"{counted(len(table.keys), 'image')}, {count} features each: {about['pooling']}.",
            *(f"Note: {note}" for note in found.notes),
            f"Written: {', '.join(files)}",
        ]
        tell({**result, "notes": found.notes, **session.passed_over}, lines, session.json)
    session.finish(len(found.gallery))
