"""`latentvae export`: from a training checkpoint, or any model, to a folder that stock diffusers loads."""

from pathlib import Path
from typing import Annotated, Any

import typer

from latentvae.commands.common import Json, print_json
from latentvae.errors import LatentVAEError

STATISTICS_IMAGES = 200  # latent statistics move by under 1 % from there on


def export(
    source: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Run folder, checkpoint folder, or any model.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; becomes the model.")
    ] = Path("vae"),
    images: Annotated[
        Path | None, typer.Option(help="Images for the latent statistics of a model trained from scratch.")
    ] = None,
    ema: Annotated[bool, typer.Option(help="Averaged weights rather than the last ones.")] = True,
    name: Annotated[str, typer.Option(help="For the model card.")] = "latentvae model",
    licence: Annotated[str, typer.Option(help="Of the weights, for the model card.")] = "unknown",
    trained_on: Annotated[
        str, typer.Option(help="The data and its terms, for the model card.")
    ] = "not stated",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
    json: Json = False,
) -> None:
    """Export a checkpoint (or convert any model) and prove it by reloading it in stock diffusers."""
    from latentvae.export import Provenance
    from latentvae.export import export as run
    from latentvae.model import load

    checkpoint = find_checkpoint(Path(source))
    state: dict[str, Any] = {}
    if checkpoint is None:
        vae = load(source)
    else:
        vae, state = load_checkpoint(checkpoint, ema)
    provenance = Provenance(
        name=name,
        licence=licence,
        base_model=state.get("config", {}).get("model", {}).get("init"),
        trained_on=trained_on,
        training=f"{state['step']} steps" if state else "not stated",
        config=state.get("config", {}),
    )
    statistics = measure(vae, images, state)
    folder = run(vae, output, statistics=statistics, provenance=provenance, overwrite=overwrite)
    if json:
        print_json({"export": str(folder), "latent_statistics": statistics.as_dict() if statistics else None})
    else:
        typer.echo(f"Exported {folder}, reloaded in diffusers without a difference.")


def find_checkpoint(source: Path) -> Path | None:
    """The checkpoint that `source` is, or the newest whole one of the run it is; None for others."""
    from latentvae.training.checkpoint import MANIFEST, resolve

    if (source / MANIFEST).is_file():
        return resolve(str(source), source.parent)
    if (source / "checkpoints").is_dir():
        return resolve("latest", source / "checkpoints")
    return None


def load_checkpoint(checkpoint: Path, ema: bool) -> tuple[Any, dict[str, Any]]:
    """The model in a checkpoint, and its state.json."""
    import json

    from latentvae.model import load

    vae = load(checkpoint / ("ema.safetensors" if ema else "model.safetensors"))
    return vae, json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def measure(vae: Any, images: Path | None, state: dict[str, Any]) -> Any:
    """Latent statistics of `images`, or of the run's own data; None where a parent's factors stay.

    Raises:
        LatentVAEError: a model trained from scratch, and no images to measure.
    """
    from latentvae.images import find_images, iter_images
    from latentvae.latents import compute_latent_statistics

    config = state.get("config", {})
    from_scratch = bool(state) and not config.get("model", {}).get("init")
    folder = images or (config["data"]["train"] if from_scratch else None)
    if folder is None:
        return None
    if not Path(folder).exists():
        raise LatentVAEError(
            f"latent statistics need images, and {folder} is not there. Pass --images FOLDER, pictures "
            "like those it was trained on."
        )
    paths = find_images(folder)
    some = paths[:: max(1, len(paths) // STATISTICS_IMAGES)][:STATISTICS_IMAGES]
    batches = (image[None] for _, image in iter_images(some, on_error=lambda path, error: None))
    return compute_latent_statistics(vae, batches)
