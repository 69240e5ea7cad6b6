"""`latentvae train`: one process with all cores; GPUs go through `accelerate launch train/train.py`."""

from dataclasses import asdict
from typing import Annotated

import typer

from latentvae import images, training
from latentvae.cli.options import Json, print_json, tell

EXIT_SAVED = 4  # stopped by a signal or train.max_minutes, after a checkpoint


def train(
    config: Annotated[str, typer.Option("--config", "-c", help="A recipe's name or a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            help="Override a setting: section.key=value. Repeatable. Text as it is, nothing for none.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="'latest' or a checkpoint folder: continue that run. 'auto': continue where there is a "
            "checkpoint, else start; for launchers that restart."
        ),
    ] = None,
    find_batch_size: Annotated[
        bool, typer.Option("--find-batch-size", help="Say how large a batch fits, and do not train.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a VAE on images (a folder, parquet, WebDataset shards); ends with an export in OUTPUT/vae.

    Recipes: tiny, digits, scan, f8c4-small, f8c4-small-stages, f8c16-small, f8c4-small-gpu, f8c16-small-gpu,
    f8c4; into the latent spaces of others: sd-small, sdxl-small, sd3-small, flux-small. Settings and their
    reasons: latentvae/training/config.py.
    """
    checked = training.recipes.load_config(config, settings)
    if find_batch_size:
        found = training.batch_size.find_batch_size(checked)
        tell(asdict(found), [found.advice()], json)
        return
    try:
        exported = training.loop.train(checked, resume)
    except training.loop.TrainingInterrupted as stop:
        typer.echo(str(stop), err=True)
        if json and training.machine.is_first_process():
            print_json({"checkpoint": str(stop.checkpoint), "interrupted": True})
        raise typer.Exit(EXIT_SAVED) from stop
    if training.machine.is_first_process():  # of several that all come here one speaks
        left_out = training.data.sources.left_out(checked.data.train, checked.data.val)
        if left_out:
            typer.echo(images.kinds.describe(left_out), err=True)
        result = {"export": str(exported), "output": checked.output, "left_out": dict(left_out)}
        # exit code 0 whatever was left out: launchers would start a finished run again
        tell(result, [f"Exported {exported}. Try: latentvae reconstruct --model {exported}"], json)
