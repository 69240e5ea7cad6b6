"""`latentvae prior fit`: learn what latents look like, so that new ones can be drawn."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from latentvae import runtime, store
from latentvae.base.errors import LatentVAEError
from latentvae.base.files import check_local, make_folder
from latentvae.base.optional import need
from latentvae.cli.options import EXIT_INTERRUPTED, counted, tell
from latentvae.cli.session import Session, takes
from latentvae.cli.stores import load_same_model
from latentvae.toolbox import priors

Kind = Literal["gaussian", "mixture", "diffusion"]

prior = typer.Typer(
    help="Learn a prior over latents to draw new images from.", no_args_is_help=True, add_completion=False
)


@prior.callback()
def verbs() -> None:
    """Learn a prior over latents to draw new images from."""


KindOption = Annotated[
    Kind,
    typer.Option(
        "--kind",
        "-k",
        help="gaussian, mixture: seconds. diffusion: a network; minutes for 32 px images, hours for "
        "256 px ones on a CPU (lower --steps, --batch-size); Ctrl-C ends it and keeps what was learned.",
    ),
]
Source = Annotated[
    Path,
    typer.Argument(
        metavar="STORE", help="Store that `encode` wrote, or a folder of images.", show_default=False
    ),
]
Components = Annotated[
    int, typer.Option(min=2, help="Gaussians of a mixture; more are closer to the images, if many.")
]
Rank = Annotated[
    int | None,
    typer.Option(
        min=1, help="Principal components of a Gaussian or mixture; more keep more. Default: at most 256."
    ),
]
Width = Annotated[
    int, typer.Option(min=16, help="Channels of its network, a multiple of 8; more learn more, and slower.")
]


@prior.command()
@takes(..., "model", "device", "json")
def fit(
    session: Session,
    source: Source,
    folder: Annotated[Path, typer.Argument(metavar="PRIOR", help="Folder to write.", show_default=False)],
    kind: KindOption = "mixture",
    components: Components = 10,
    rank: Rank = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps of a diffusion prior: more learn more.")
    ] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in each of those steps.")] = 64,
    width: Width = 64,
    lr: Annotated[float, typer.Option(help="Its learning rate at the beginning.")] = 1e-3,
    by_class: Annotated[
        bool, typer.Option("--by-class", help="Learn each label's images apart (diffusion).")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the fit.")] = 0,
    size: Annotated[
        int | None, typer.Option(min=8, help="Pixels of the middle crop; a folder of images needs it.")
    ] = None,
) -> None:
    """Learn a prior from the latents of a store: writes a folder that `sample` and diffusers read.

    Kinds: gaussian (mean and covariance, seconds), mixture (of several), diffusion (a network, minutes).
    A folder of images is encoded first, by --model at --size.
    """
    diffusion = priors.diffusion
    settings = diffusion.DiffusionSettings(steps, batch_size, lr, width=width, by_class=by_class, seed=seed)
    # before the latents are read, which may take minutes
    place = runtime.devices.usable_device(session.device)
    _check(kind, settings, folder)
    latents = _read(session, source, size)
    made: priors.prior.Prior
    if kind == "diffusion":
        made = diffusion.fit_diffusion(latents, settings, device=place)
    else:
        made = priors.mixture.fit_mixture(
            latents, components=components if kind == "mixture" else 1, rank=rank, seed=seed
        )
    # Ctrl-C ends the fit early, and other kinds know no steps
    stopped = made.card.fit.get("steps_done", steps) < steps
    if stopped:
        folder = _free_place(folder)
    made.save(folder)
    tell({"prior": str(folder), **asdict(made.card)}, _lines(made.card, folder), session.json)
    if stopped:
        typer.echo("stopped: the prior holds what was learned by then.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED)


def _check(kind: Kind, settings: priors.diffusion.DiffusionSettings, folder: Path) -> None:
    """Refuse, before minutes of training, what could not be trained or saved.

    Raises:
        LatentVAEError: settings out of range or of another kind, a missing extra, a folder of other things.
    """
    if kind == "diffusion":
        priors.diffusion.check_settings(settings)
    elif settings.by_class:
        raise LatentVAEError(f"--by-class is of --kind diffusion; {kind} came.")
    else:
        need("sklearn")  # for principal components and mixtures
    check_local(folder)
    priors.prior.check_target(folder.resolve())  # "." has no name, and no parent to write beside it
    make_folder(folder.resolve().parent)


def _free_place(folder: Path) -> Path:
    """The folder, or FOLDER.stopped where an earlier prior is: it may have taken hours.

    Raises:
        LatentVAEError: that one holds other things.
    """
    # what was stopped may be worse than what is there
    place = folder.with_name(f"{folder.name}.stopped") if folder.exists() else folder
    priors.prior.check_target(place.resolve())
    return place


def _read(session: Session, source: Path, size: int | None) -> priors.latent_set.LatentSet:
    """The latents of a store; of a folder of images after encoding it to a store that is then thrown away.

    Raises:
        LatentVAEError: neither of both.
    """
    latent_set = priors.latent_set
    if not source.is_dir() or (source / store.format.MANIFEST).is_file():
        if not source.exists():
            raise LatentVAEError(f"{source} does not exist; wanted a latent store, or a folder of images.")
        latents = latent_set.LatentSet(source, progress=True)
        if session.model is not None:  # a check: the latents alone are learned from
            load_same_model(session, store.dataset.LatentDataset(source))
        return latents
    session.find_images([source])  # its error says what was wanted
    if size is None:
        raise LatentVAEError(f"{source} is a folder of images: say at what --size to crop and encode them.")
    # the prior keeps no images, so the store is of no use after it
    with tempfile.TemporaryDirectory() as scratch:
        vae = session.load()
        report = store.encoding.encode_folder(
            vae,
            source,
            Path(scratch) / "store",
            size=size,
            crop=True,
            workload=store.encoding.Workload(progress=True),
        )
        for failure in report.failures:
            typer.echo(f"failed: {failure.reason}", err=True)
        return latent_set.LatentSet(Path(scratch) / "store")


def _lines(card: priors.prior.PriorCard, folder: Path) -> list[str]:
    """What was learned, for people."""
    shape, learned = "x".join(map(str, card.latent_shape)), card.fit
    count, vae = counted(card.images, "image"), card.weights_sha256[:12]
    lines = [f"{card.kind} prior of {count}, latents {shape}, VAE {vae}."]
    if card.images < learned["store_images"]:
        lines.append(f"Note: {learned['store_images']} images are in the store; memory holds {card.images}.")
    if card.kind == "diffusion":
        lines.append(
            f"{learned['parameters'] / 1e6:.1f} M parameters, {learned['steps_done']} of "
            f"{learned['steps']} steps, loss of the last 100: {learned['loss']:.4f}."
        )
    else:
        parts = ""
        if learned["components"] > 1:
            parts = f", {learned['components']} parts that differ in {learned['mixed_rank']}"
        lines.append(
            f"{learned['rank']} of {learned['dimensions']} principal components{parts}; they hold "
            f"{100 * learned['variance_in_rank']:.1f} % of the variance, the rest is drawn as independent "
            "noise."
        )
    return [*lines, f"Written: {folder}. Next: latentvae sample {folder} --model THE_SAME -o samples"]
