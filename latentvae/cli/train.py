"""`latentvae train`: one process with all cores; GPUs go through `accelerate launch train/train.py`."""

from dataclasses import asdict
from typing import Annotated

import typer

from latentvae.cli.options import Json
from latentvae.cli.session import print_json

EXIT_INTERRUPTED = 4


def train(
    config: Annotated[str, typer.Option("--config", "-c", help="A recipe's name or a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Override a setting: section.key=value. Repeatable."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="'latest' or a checkpoint folder: continue that run.")
    ] = None,
    find_batch_size: Annotated[
        bool, typer.Option("--find-batch-size", help="Say how large a batch fits, and do not train.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a VAE on images (a folder, parquet, WebDataset shards); ends with an export in OUTPUT/vae.

    Recipes: tiny, digits, f8c4-small, f8c16-small, f8c4-small-gpu, f8c16-small-gpu, f8c4. Settings and their
    reasons: latentvae/training/config.py.
    """
    from latentvae.training.batch_size import find_batch_size as find
    from latentvae.training.loop import TrainingInterrupted
    from latentvae.training.loop import train as run
    from latentvae.training.recipes import load_config
    from latentvae.training.setup import is_first_process

    checked = load_config(config, settings)
    if find_batch_size:
        fit = find(checked)
        if json:
            print_json(asdict(fit))
        else:
            typer.echo(fit.advice())
        return
    try:
        exported = run(checked, resume)
    except TrainingInterrupted as stop:
        typer.echo(str(stop), err=True)
        if json and is_first_process():
            print_json({"checkpoint": str(stop.checkpoint), "interrupted": True})
        raise typer.Exit(EXIT_INTERRUPTED) from stop
    if not is_first_process():
        return
    if json:
        print_json({"export": str(exported), "output": checked.output})
    else:
        typer.echo(f"Exported {exported}. Try: latentvae reconstruct --model {exported}")
