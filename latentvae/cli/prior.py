"""`latentvae prior fit`: learn what latents look like, so that new ones can be drawn."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from latentvae.base.errors import LatentVAEError
from latentvae.base.optional import need
from latentvae.cli.decode import load_same_model
from latentvae.cli.options import Device, Json, Model
from latentvae.cli.session import EXIT_INTERRUPTED, load_model, make_folder, print_json, usable_device
from latentvae.images.reading import find_images
from latentvae.store.dataset import LatentDataset
from latentvae.store.encoding import Workload, encode_folder
from latentvae.store.format import MANIFEST
from latentvae.toolbox.priors.diffusion import DiffusionSettings, check_settings, fit_diffusion
from latentvae.toolbox.priors.latent_set import LatentSet
from latentvae.toolbox.priors.mixture import fit_mixture
from latentvae.toolbox.priors.prior import Prior, check_target

Kind = Literal["gaussian", "mixture", "diffusion"]

prior = typer.Typer(
    help="Learn a prior over latents to draw new images from.", no_args_is_help=True, add_completion=False
)


@prior.callback()
def verbs() -> None:
    """Learn a prior over latents to draw new images from."""


@prior.command()
def fit(
    store: Annotated[
        Path, typer.Argument(help="Store that `encode` wrote, or a folder of images.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(metavar="PRIOR", help="Folder to write.", show_default=False)],
    kind: Annotated[
        Kind,
        typer.Option(
            "--kind",
            "-k",
            help="gaussian, mixture: seconds. diffusion: a network; minutes for 32 px images, hours for "
            "256 px ones on a CPU (lower --steps, --batch-size); Ctrl-C ends it and keeps what was learned.",
        ),
    ] = "mixture",
    components: Annotated[int, typer.Option(min=2, help="Gaussians of a mixture.")] = 10,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Principal components of a Gaussian or mixture. Default: all, at most 256."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a diffusion prior.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Of those.")] = 64,
    width: Annotated[int, typer.Option(min=16, help="Channels of its network; a multiple of 8.")] = 64,
    lr: Annotated[float, typer.Option(help="Its learning rate at the beginning.")] = 1e-3,
    by_class: Annotated[
        bool, typer.Option("--by-class", help="Learn each label's images apart (diffusion).")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the fit.")] = 0,
    size: Annotated[
        int | None, typer.Option(min=8, help="Pixels of the middle crop of a folder's images.")
    ] = None,
    model: Model = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Learn a prior from the latents of a store: writes a folder that `sample` and diffusers read.

    Kinds: gaussian (mean and covariance, seconds), mixture (of several), diffusion (a network, minutes).
    A folder of images is encoded first, by --model at --size.
    """
    settings = DiffusionSettings(steps, batch_size, lr, width=width, by_class=by_class, seed=seed)
    place = usable_device(device)
    check(kind, settings, folder)
    latents = read(store, size, model, device)
    made: Prior
    if kind == "diffusion":
        made = fit_diffusion(latents, settings, device=place)
    else:
        made = fit_mixture(latents, components=components if kind == "mixture" else 1, rank=rank, seed=seed)
    stopped = made.card.fit.get("steps_done", steps) < steps
    if stopped:
        folder = free_place(folder)
    made.save(folder)
    tell(made, folder, json)
    if stopped:
        typer.echo("stopped: the prior holds what was learned by then.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED)


def check(kind: Kind, settings: DiffusionSettings, folder: Path) -> None:
    """Refuse, before minutes of training, what could not be trained or saved.

    Raises:
        LatentVAEError: settings out of range or of another kind, a missing extra, a folder of other things.
    """
    if kind == "diffusion":
        check_settings(settings)
    elif settings.by_class:
        raise LatentVAEError(f"--by-class is of --kind diffusion; {kind} came.")
    else:
        need("sklearn")
    check_target(folder.resolve())
    make_folder(folder.resolve().parent)


def free_place(folder: Path) -> Path:
    """The folder, or FOLDER.stopped where an earlier prior is: it may have taken hours.

    Raises:
        LatentVAEError: that one holds other things.
    """
    place = folder.with_name(f"{folder.name}.stopped") if folder.exists() else folder
    check_target(place.resolve())
    return place


def read(store: Path, size: int | None, model: str | None, device: str | None) -> LatentSet:
    """The latents of a store; of a folder of images after encoding it to a store that is then thrown away.

    Raises:
        LatentVAEError: neither of both.
    """
    if not store.is_dir() or (store / MANIFEST).is_file():
        if not store.exists():
            raise LatentVAEError(f"{store} does not exist; wanted a latent store, or a folder of images.")
        latents = LatentSet(store, progress=True)
        if model is not None:
            load_same_model(LatentDataset(store), model, device, "fp32")
        return latents
    find_images(store)  # its error says what was wanted
    if size is None:
        raise LatentVAEError(f"{store} is a folder of images: say at what --size to crop and encode them.")
    with tempfile.TemporaryDirectory() as scratch:
        vae = load_model(model, device, "fp32")
        report = encode_folder(
            vae, store, Path(scratch) / "store", size=size, crop=True, workload=Workload(progress=True)
        )
        for failure in report.failures:
            typer.echo(f"failed: {failure.reason}", err=True)
        return LatentSet(Path(scratch) / "store")


def tell(made: Prior, folder: Path, as_json: bool) -> None:
    """Print what was learned."""
    card = made.card
    if as_json:
        print_json({"prior": str(folder), **asdict(card)})
        return
    shape = "x".join(map(str, card.latent_shape))
    typer.echo(f"{card.kind} prior of {card.images} images, latents {shape}, VAE {card.weights_sha256[:12]}.")
    if card.images < card.fit["store_images"]:
        typer.echo(f"Note: {card.fit['store_images']} images are in the store; memory holds {card.images}.")
    if card.kind == "diffusion":
        typer.echo(
            f"{card.fit['parameters'] / 1e6:.1f} M parameters, {card.fit['steps_done']} of "
            f"{card.fit['steps']} steps, loss of the last 100: {card.fit['loss']:.4f}."
        )
    else:
        fit = card.fit
        parts = (
            f", {fit['components']} parts that differ in {fit['mixed_rank']}" if fit["components"] > 1 else ""
        )
        typer.echo(
            f"{fit['rank']} of {fit['dimensions']} principal components{parts}; they hold "
            f"{100 * fit['variance_in_rank']:.1f} % of the variance, the rest is drawn as independent noise."
        )
    typer.echo(f"Written: {folder}. Next: latentvae sample {folder} --model THE_SAME -o samples")
