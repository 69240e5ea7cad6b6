"""`latentvae export`: from a training checkpoint, or any model, to a folder that stock diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentvae import images, measure, models, runtime, training
from latentvae.base.errors import LatentVAEError
from latentvae.base.files import check_folder
from latentvae.cli.options import Program, output_folder, tell
from latentvae.cli.session import Session, takes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

STATISTICS_IMAGES = 200  # latent statistics move by under 1 % from there on

PushToHub = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="Upload to this hub repository. Default: nowhere."),
]
Subfolder = Annotated[
    str, typer.Option(help="Folder of the hub repository to put the model into: vae in a pipeline's.")
]
BaseModel = Annotated[
    str | None, typer.Option(help="Hub id of the parent, for the card. Default: the run's model.init.")
]
ShardSize = Annotated[
    str | None, typer.Option(help="Split weights into files of at most this, such as 300MB.")
]
ProgramOption = Annotated[
    Program | None,
    typer.Option("--for", help="Add PROGRAM.safetensors, folded as this program reads it right."),
]
Source = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Run folder, checkpoint folder, or any model.")
]
Out = Annotated[Path | None, typer.Argument(metavar="OUT", help="The same as --output.", show_default=False)]
To = Annotated[
    Literal["diffusers", "onnx", "openvino"],
    typer.Option(
        help="onnx, openvino: encoder and decoder as graphs of these, for any size, compared with torch "
        "number by number (extras `onnx`, `openvino`). No card and no upload."
    ),
]
Decoder = Annotated[
    str | None,
    typer.Option(help="Run, checkpoint or model to take the decoder from, where the halves learned apart."),
]
Images = Annotated[
    Path | None, typer.Option(help="Images for the latent statistics of a model trained from scratch.")
]
Licence = Annotated[
    str, typer.Option(help="Licence of the weights, for the card: an identifier of the hub, such as mit.")
]
TrainedOn = Annotated[str, typer.Option(help="The data and its terms, for the model card.")]
Metrics = Annotated[
    Path | None, typer.Option(help="Output of `latentvae evaluate --json`, for the model card.")
]


@takes(..., "json")
def export(
    session: Session,
    source: Source,
    out: Out = None,
    output: Annotated[Path, output_folder("Folder to write; becomes the model.")] = Path("vae"),
    to: To = "diffusers",
    decoder: Decoder = None,
    images: Images = None,
    ema: Annotated[bool, typer.Option(help="Averaged weights rather than the last ones.")] = True,
    name: Annotated[str, typer.Option(help="For the model card.")] = "latentvae model",
    licence: Licence = "unknown",
    trained_on: TrainedOn = "not stated",
    training: Annotated[str | None, typer.Option(help="How it was trained, for the model card.")] = None,
    metrics: Metrics = None,
    half: Annotated[bool, typer.Option("--half", help="One file of fp16 weights: half the size.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export.")] = False,
    base_model: BaseModel = None,
    max_shard_size: ShardSize = None,
    push_to_hub: PushToHub = None,
    subfolder: Subfolder = "",
    private: Annotated[bool, typer.Option("--private", help="Make the hub repository private.")] = False,
    program: ProgramOption = None,
) -> None:
    """Export a checkpoint (or convert any model) and prove it by reloading it in stock diffusers."""
    models.licences.check_licence(licence)
    if not push_to_hub:  # the folder here has no such things, and would seem to
        _refuse_of_hub({"--subfolder": subfolder, "--private": private})
    output = out or output
    # before anything is measured; again when it is written
    instead = "Choose another --output"
    check_folder(output, "export", models.loading.SIDECAR, overwrite=overwrite, instead=instead)
    vae, state = _load_halves(source, decoder, ema)
    if to != "diffusers":
        given = {"--half": half, "--for": program, "--max-shard-size": max_shard_size}
        given |= {"--push-to-hub": push_to_hub}
        _export_graphs(session, vae, state, output, to, images, overwrite, given)
        return
    said = {"name": name, "licence": licence, "trained_on": trained_on}
    provenance = _provenance(state, base_model, training, metrics, said, models.loading.window_of(vae))
    if push_to_hub:
        # before the statistics: what the hub would refuse costs no minutes
        models.publishing.check_publishable(push_to_hub, provenance)
    if program:
        models.formats.adapting.target_config(dict(vae.config), program)  # refused now rather than then
    session.vae = vae  # as it is: speed-ups are not exported
    statistics = _measure(session, images, state)
    folder = models.exporting.export(
        vae,
        output,
        statistics=statistics,
        provenance=provenance,
        half=half,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        programs=[program] if program else (),
        force_upcast=measure.diagnosis.wants_upcast(vae),
    )
    url = _upload(folder, push_to_hub, subfolder, private)
    done = f"Exported {folder}, reloaded in diffusers without a difference."
    lines = [done, *_notes(folder, provenance, url)]
    _finish(session, {"export": str(folder), "hub": url}, lines, statistics)


def _finish(
    session: Session,
    result: dict[str, Any],
    lines: list[str],
    statistics: models.latents.LatentStatistics | None,
) -> None:
    """Tell what was exported, and end."""
    figures = statistics.as_dict() if statistics else None
    tell({**result, "latent_statistics": figures, **session.passed_over}, lines, session.json)
    session.finish(statistics.image_count if statistics else 0)


def _export_graphs(
    session: Session,
    vae: AutoencoderKL,
    state: dict[str, Any],
    output: Path,
    to: runtime.graphs.files.Engine,
    images: Path | None,
    overwrite: bool,
    given: dict[str, Any],
) -> None:
    """Export encoder and decoder as graphs of another engine.

    Args:
        state: of the checkpoint that the model comes from; empty for other models.
        given: options by name that weights alone have.

    Raises:
        LatentVAEError: one of these was given.
    """
    for option, value in given.items():
        if value:
            raise LatentVAEError(f"{option} is of weights; graphs of {to} have none such. Leave it out.")
    session.vae = vae
    statistics = _measure(session, images, state)
    vae = models.exporting.prepare_export(session.vae, statistics)
    graphs = runtime.graphs.files
    differences = graphs.export_graphs(vae, output, to, overwrite=overwrite)
    sizes = ", ".join(f"{batch} of {height}x{width}" for batch, height, width in graphs.SIZES)
    opset = f" (opset {graphs.OPSET})" if to == "onnx" else ""
    lines = [f"Exported {output} as graphs of {to}{opset}, for any batch, height and width."]
    lines += [
        f"{part}: largest difference from torch {difference:.1e} of the range (latents: {sizes})."
        for part, difference in differences.items()
    ]
    _finish(session, {"export": str(output), "to": to, "differences": differences}, lines, statistics)


def _notes(folder: Path, provenance: models.card.Provenance, url: str | None) -> Iterator[str]:
    """What to say of an export: who reads it otherwise, a parent without a link, its address."""
    exported = json.loads((folder / "config.json").read_text(encoding="utf-8"))  # with its own factors
    yield from models.formats.programs.program_notes(exported)
    parent = provenance.base_model
    if parent and not models.card.is_hub_id(parent):
        yield f"The card names {Path(parent).name!r} as the parent, but links to none: that is no hub id."
    if url:
        yield f"Uploaded to {url}."


def _upload(folder: Path, repository: str | None, subfolder: str, private: bool) -> str | None:
    """Where the export lies on the hub now; None where no repository was named."""
    if not repository:
        return None
    return models.publishing.publish(folder, repository, subfolder=subfolder, private=private)


def _provenance(
    state: dict[str, Any],
    base_model: str | None,
    training: str | None,
    metrics: Path | None,
    said: dict[str, str],
    window: images.scans.Window | None,
) -> models.card.Provenance:
    """For the card: what people say, and else what a run's `state` knows."""
    config = state.get("config", {})
    return models.card.Provenance(
        # the run knows its parent; of other models people must say it
        base_model=base_model or config.get("model", {}).get("init"),
        training=training or (f"{state['step']} steps" if state else "not stated"),
        metrics=_read_metrics(metrics) if metrics else {},
        config=config,
        intensity_range=(window.low, window.high) if window else None,
        **said,
    )


def _read_metrics(path: Path) -> dict[str, Any]:
    """What `latentvae evaluate --json` printed, without the figures of single images.

    Raises:
        LatentVAEError: it is something else.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        # single images are of no use on a card, and may be named privately
        return {"mean": metrics["mean"], "protocol": metrics["protocol"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LatentVAEError(
            f"{path} cannot be read as metrics ({error!r}); wanted what `latentvae evaluate --json` prints."
        ) from error


def _find_checkpoint(source: Path) -> Path | None:
    """The checkpoint that `source` is, or the newest whole one of the run it is; None for others."""
    checkpoint = training.checkpoint
    # a checkpoint that was named is checked, and no other taken in its place
    if (source / checkpoint.MANIFEST).is_file():
        return checkpoint.resolve(str(source), source.parent)
    # of a run the newest that is whole: a kill may have cut the last one short
    if (source / "checkpoints").is_dir():
        return checkpoint.resolve("latest", source / "checkpoints")
    return None


def _load_halves(source: str, decoder: str | None, ema: bool) -> tuple[AutoencoderKL, dict[str, Any]]:
    """As `_load_any`, with the decoder of another run or model where one is named."""
    vae, state = _load_any(source, ema)
    return (models.exporting.join_halves(vae, _load_any(decoder, ema)[0]) if decoder else vae), state


def _load_any(source: str, ema: bool) -> tuple[AutoencoderKL, dict[str, Any]]:
    """The model of a checkpoint and its state.json; of anything else the model, and nothing."""
    checkpoint = _find_checkpoint(Path(source))
    return (models.loading.load(source), {}) if checkpoint is None else _load_checkpoint(checkpoint, ema)


def _load_checkpoint(checkpoint: Path, ema: bool) -> tuple[AutoencoderKL, dict[str, Any]]:
    """The model in a checkpoint, and its state.json."""
    vae = models.loading.load(checkpoint / ("ema.safetensors" if ema else "model.safetensors"))
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    limits = state["config"]["data"].get("range")  # missing in checkpoints of earlier versions
    models.loading.set_window(vae, images.scans.Window(*limits) if limits else None)
    return vae, state


def _measure(
    session: Session, images: Path | None, state: dict[str, Any]
) -> models.latents.LatentStatistics | None:
    """Latent statistics of `images`, or of the run's own data; None where a parent's factors stay.

    Raises:
        LatentVAEError: a model trained from scratch, and no images to measure.
    """
    model = state["config"]["model"] if state else {}
    parent = model.get("init") or model.get("teacher")
    # what was trained on the parent's latents must go on reading these, so its factors are copied
    if parent and images is not None:
        raise LatentVAEError(
            f"this run keeps the latent space of {parent}, so new statistics would "
            "move it. Leave --images out."
        )
    if images is not None:
        return _measure_files(session, images)
    # a model that is no checkpoint has its factors already
    if parent or not state:
        return None
    return _measure_training_data(session.vae, state["config"]["data"])


def _measure_files(session: Session, place: Path) -> models.latents.LatentStatistics:
    """Latent statistics of whole images, evenly chosen."""
    paths = session.find_images([place])
    # evenly: files that follow each other are often of one scene
    some = training.data.sources.evenly(len(paths), STATISTICS_IMAGES)
    read = session.read_images([paths[number] for number in some])
    try:
        return models.latents.compute_latent_statistics(session.vae, (image[None] for _, image, _ in read))
    except ValueError:
        session.finish(0)  # says that no image could be read at all
        raise


def _measure_training_data(vae: AutoencoderKL, config: dict[str, Any]) -> models.latents.LatentStatistics:
    """Latent statistics of what the run was trained on, as the run itself measures them at its end."""
    try:
        # the config may be of an older version, or its folder gone: both end in the same advice
        data = training.config.DataConfig.model_validate(config)
        source, _ = training.data.crops.split_sources(data)
        return training.validation.training_statistics(vae, source, data)
    except (LatentVAEError, ValueError) as error:
        raise LatentVAEError(
            f"latent statistics need images, and the run's own cannot be used: {error} Pass --images FOLDER, "
            "pictures like those it was trained on."
        ) from error


def _refuse_of_hub(options: dict[str, object]) -> None:
    for option, value in options.items():
        if value:
            raise LatentVAEError(
                f"{option} is of the hub's repository: name that with --push-to-hub, or leave it out."
            )
