"""`latentvae shards`: a store as WebDataset shards."""

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from latentvae import store
from latentvae.cli.options import Json, StoreArgument, counted, tell


def shards(
    source: StoreArgument,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the tars.", show_default=False)],
    images_per_shard: Annotated[int, typer.Option(min=1, help="Images of one tar.")] = 1000,
    json: Json = False,
) -> None:
    """Export a store's moments and captions as WebDataset shards: latents-000000.tar, and so on."""
    count = store.format.read_manifest(source).count
    with tqdm(total=count, unit="image", disable=count < 2) as progress:
        tars = store.webdataset.export_webdataset(
            source, output, images_per_shard=images_per_shard, progress=progress.update
        )
    # the names are numbered, so the last tells them all
    number = tars[-1].stem.rpartition("-")[2]
    # as WebDataset takes it: braces stand for all numbers between
    pattern = tars[0].name if len(tars) == 1 else f"latents-{{000000..{number}}}.tar"
    result = {"images": count, "tars": [str(tar) for tar in tars]}
    tell(result, [f"{counted(count, 'image')} in {output / pattern}"], json)
