"""`latentvae export`: from a training checkpoint, or any model, to a folder that stock diffusers loads."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from latentvae.base.errors import LatentVAEError
from latentvae.cli.options import Json
from latentvae.cli.session import finish, print_json, read_images
from latentvae.images.reading import find_images
from latentvae.models.card import Provenance
from latentvae.models.exporting import export as run
from latentvae.models.formats.programs import program_notes
from latentvae.models.latents import compute_latent_statistics
from latentvae.models.loading import load
from latentvae.models.publishing import check_publishable, publish
from latentvae.training.checkpoint import MANIFEST, resolve
from latentvae.training.config import DataConfig
from latentvae.training.data.crops import split_sources
from latentvae.training.data.sources import evenly
from latentvae.training.validation import training_statistics

STATISTICS_IMAGES = 200  # latent statistics move by under 1 % from there on


Source = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Run folder, checkpoint folder, or any model.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; becomes the model.")]
Images = Annotated[
    Path | None, typer.Option(help="Images for the latent statistics of a model trained from scratch.")
]
Averaged = Annotated[bool, typer.Option(help="Averaged weights rather than the last ones.")]
Name = Annotated[str, typer.Option(help="For the model card.")]
Licence = Annotated[str, typer.Option(help="Of the weights, for the model card.")]
TrainedOn = Annotated[str, typer.Option(help="The data and its terms, for the model card.")]
Training = Annotated[str | None, typer.Option(help="How it was trained, for the model card.")]
Measured = Annotated[
    Path | None, typer.Option(help="Output of `latentvae evaluate --json`, for the model card.")
]
Half = Annotated[bool, typer.Option("--half", help="One file of fp16 weights: half the size.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an earlier export.")]
BaseModel = Annotated[
    str | None, typer.Option(help="Hub id of the parent, for the card. Default: the run's model.init.")
]
MaxShardSize = Annotated[
    str | None, typer.Option(help="Split weights into files of at most this, such as 300MB.")
]
PushToHub = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="Upload to this hub repository. Default: nowhere."),
]
Subfolder = Annotated[str, typer.Option(help="Of the hub repository, for the model; vae in a pipeline's.")]
Private = Annotated[bool, typer.Option("--private", help="Make the hub repository private.")]


def export(
    source: Source,
    output: Output = Path("vae"),
    images: Images = None,
    ema: Averaged = True,
    name: Name = "latentvae model",
    licence: Licence = "unknown",
    trained_on: TrainedOn = "not stated",
    training: Training = None,
    metrics: Measured = None,
    half: Half = False,
    overwrite: Overwrite = False,
    base_model: BaseModel = None,
    max_shard_size: MaxShardSize = None,
    push_to_hub: PushToHub = None,
    subfolder: Subfolder = "",
    private: Private = False,
    json: Json = False,
) -> None:
    """Export a checkpoint (or convert any model) and prove it by reloading it in stock diffusers."""
    vae, state = load_any(source, ema)
    provenance = Provenance(
        name=name,
        licence=licence,
        base_model=base_model or state.get("config", {}).get("model", {}).get("init"),
        trained_on=trained_on,
        training=training or (f"{state['step']} steps" if state else "not stated"),
        metrics=read_metrics(metrics) if metrics else {},
        config=state.get("config", {}),
    )
    if push_to_hub:
        check_publishable(push_to_hub, provenance)
    skipped: list[dict[str, str]] = []
    statistics = measure(vae, images, state, skipped)
    write = partial(run, vae, output, statistics=statistics, provenance=provenance)
    folder = write(half=half, overwrite=overwrite, max_shard_size=max_shard_size)
    url = publish(folder, push_to_hub, subfolder=subfolder, private=private) if push_to_hub else None
    if json:
        figures = statistics.as_dict() if statistics else None
        print_json({"export": str(folder), "latent_statistics": figures, "hub": url})
    else:
        typer.echo(f"Exported {folder}, reloaded in diffusers without a difference.")
        for note in [*program_notes(vae.config), *([f"Uploaded to {url}."] if url else [])]:
            typer.echo(note)
    finish(skipped, statistics.image_count if statistics else 0)


def read_metrics(path: Path) -> dict[str, Any]:
    """What `latentvae evaluate --json` printed, without the figures of single images.

    Raises:
        LatentVAEError: it is something else.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        return {"mean": metrics["mean"], "protocol": metrics["protocol"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LatentVAEError(
            f"{path} cannot be read as metrics ({error!r}); wanted what `latentvae evaluate --json` prints."
        ) from error


def find_checkpoint(source: Path) -> Path | None:
    """The checkpoint that `source` is, or the newest whole one of the run it is; None for others."""
    if (source / MANIFEST).is_file():
        return resolve(str(source), source.parent)
    if (source / "checkpoints").is_dir():
        return resolve("latest", source / "checkpoints")
    return None


def load_any(source: str, ema: bool) -> tuple[Any, dict[str, Any]]:
    """The model of a checkpoint and its state.json; of anything else the model, and nothing."""
    checkpoint = find_checkpoint(Path(source))
    return (load(source), {}) if checkpoint is None else load_checkpoint(checkpoint, ema)


def load_checkpoint(checkpoint: Path, ema: bool) -> tuple[Any, dict[str, Any]]:
    """The model in a checkpoint, and its state.json."""
    vae = load(checkpoint / ("ema.safetensors" if ema else "model.safetensors"))
    return vae, json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def measure(vae: Any, images: Path | None, state: dict[str, Any], skipped: list[dict[str, str]]) -> Any:
    """Latent statistics of `images`, or of the run's own data; None where a parent's factors stay.

    Raises:
        LatentVAEError: a model trained from scratch, and no images to measure.
    """
    model = state["config"]["model"] if state else {}
    parent = model.get("init") or model.get("teacher")
    if parent and images is not None:
        raise LatentVAEError(
            f"this run keeps the latent space of {parent}, so new statistics would "
            "move it. Leave --images out."
        )
    if images is not None:
        return measure_files(vae, images, skipped)
    if parent or not state:
        return None
    return measure_training_data(vae, state["config"]["data"])


def measure_files(vae: Any, images: Path, skipped: list[dict[str, str]]) -> Any:
    """Latent statistics of whole images, evenly chosen."""
    paths = find_images(images)
    some = evenly(len(paths), STATISTICS_IMAGES)
    read = read_images([paths[number] for number in some], vae, skipped)
    try:
        return compute_latent_statistics(vae, (image[None] for _, image, _ in read))
    except ValueError:
        finish(skipped, 0)  # says that no image could be read at all
        raise


def measure_training_data(vae: Any, config: dict[str, Any]) -> Any:
    """Latent statistics of what the run was trained on, as the run itself measures them at its end."""
    try:
        data = DataConfig.model_validate(config)
        return training_statistics(vae, split_sources(data)[0], data)
    except (LatentVAEError, ValueError) as error:
        raise LatentVAEError(
            f"latent statistics need images, and the run's own cannot be used: {error} Pass --images FOLDER, "
            "pictures like those it was trained on."
        ) from error
