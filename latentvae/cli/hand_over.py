"""`latentvae hand-over`: a store as other tools' caches."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from tqdm import tqdm

from latentvae import store
from latentvae.cli.options import EXIT_SKIPPED, Json, StoreArgument, counted, tell

SHOWN = 20  # images left to the tool that are named; --json has all


def hand_over(
    source: StoreArgument,
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="Where the tool looks: its folder of images (sd-scripts, ai-toolkit), or of its cache.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Literal["ai-toolkit", "diffusers", "npz", "onetrainer", "sd-scripts", "simpletuner", "webdataset"],
        typer.Option(
            help="The tool; npz: one file an image, for whoever reads NumPy. diffusers and onetrainer say "
            "why not.",
            show_default=False,
        ),
    ],
    family: Annotated[
        Literal["flux", "sd", "sd3", "sdxl"] | None,
        typer.Option(help="What the tool trains.", show_default="sdxl with 4 latent channels, flux with 16"),
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="One draw of each posterior, by its key, instead of the mean.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a store as the cache of another tool that trains on latents, and say what it cannot take.

    Images that the tool would scale or crop otherwise are left to it, named, with exit code 3. No file that
    is there is replaced. docs/latents.md has what is known of each tool.
    """
    count = store.format.read_manifest(source).count
    # not at once: what is refused is refused before the first image
    with tqdm(total=count, unit="image", disable=json or count < 2, delay=0.5) as progress:
        if to == "webdataset":
            tars = store.webdataset.export_webdataset(source, output, progress=progress.update)
            done = store.handing.HandOver(f"{counted(len(tars), 'tar')} of up to 1000 images", [], count)
        else:
            done = store.handing.hand_over(
                source, output, to, family=family, sample=sample, progress=progress.update
            )
    for key, reason in list(done.untaken.items())[:SHOWN]:
        typer.echo(f"left to {to}: {key}: {reason}", err=True)
    if len(done.untaken) > SHOWN:
        typer.echo(f"left to {to}: {len(done.untaken) - SHOWN} more", err=True)
    result = {"to": to, "output": str(output), "images": done.images, "settings": done.settings}
    lines = [f"{done.images} of {count} images in {output}.", f"{to}: {done.settings}"]
    lines += [f"not taken: {line}" for line in done.lost]
    tell({**result, "lost": done.lost, "untaken": done.untaken}, lines, json)
    if done.untaken:
        raise typer.Exit(EXIT_SKIPPED)
