"""`latentvae diffusability`: which of several VAEs has latents that a diffusion model learns more easily."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentvae import models, runtime
from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.cli.options import EXIT_INTERRUPTED, counted, tell
from latentvae.cli.session import LPIPS_OPTIONS, Session, takes
from latentvae.toolbox import priors

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

LEAST = 20  # images: a tenth of them is judged by, and two is the least that has a spread
TENTH = 10


@takes(..., *LPIPS_OPTIONS, "device", "json")
def diffusability(
    session: Session,
    vaes: Annotated[
        list[str], typer.Argument(metavar="VAE...", help="Models, each as --model of the other verbs.")
    ],
    photos: Annotated[Path, typer.Argument(help="Folder of images; every tenth is not trained on.")],
    seeds: Annotated[
        int,
        typer.Option(
            min=1, help="Diffusion models trained for each VAE: their spread says how much is chance."
        ),
    ] = 2,
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each.")] = 300,
    size: Annotated[int, typer.Option(min=32, help="Pixels of the images' middle squares.")] = 128,
    samples: Annotated[int, typer.Option(min=2, help="Pictures that each model draws.")] = 128,
    sampling_steps: Annotated[int, typer.Option(min=1, help="Steps of drawing them.")] = 20,
) -> None:
    """Train a small diffusion model on each VAE's latents, and compare how well it learns them.

    Prints denoising loss and Frechet distance of samples (of LPIPS's features, not FID), lower is better of
    both, each with its spread over seeds. Ctrl-C ends it with what is finished, and exit code 130.
    """
    bench_of = priors.diffusability
    settings = replace(
        bench_of.SETTINGS, steps=steps, warmup_steps=steps // 20, sampling_steps=sampling_steps
    )
    priors.diffusion.check_settings(settings)
    files = session.find_images([photos])
    loaded = _load(session, vaes)
    train, val = _read(session, files, size)
    lpips, reason = session.find_lpips()
    bench = bench_of.Bench(train, val, lpips, settings, samples)
    photographs = bench.photographs
    found: list[priors.diffusability.Diffusability] = []

    def announce(seconds: float) -> None:
        what = f"{counted(len(loaded), 'VAE')} x {counted(seeds, 'seed')} x {counted(steps, 'step')}"
        typer.echo(f"{what} on {len(train)} images: about {_minutes(seconds)}", err=True)

    try:
        for each in bench_of.compare(bench, loaded, seeds, announce):
            found.append(each)
        stopped = False
    except KeyboardInterrupt:
        stopped = True
    notes = [f"Distances were not measured: {reason}"] if reason else []
    if stopped:
        notes.append(f"Stopped: {len(found)} of {counted(len(loaded), 'VAE')} done.")
    protocol = {"train": len(train), "val": len(val), "size": size, "samples": samples, **asdict(settings)}
    result: dict[str, Any] = {"protocol": protocol, "photographs_frechet": photographs, "notes": notes}
    result |= {"vaes": [_as_dict(each) for each in found], **session.passed_over}
    tell(result, [bench_of.table(photographs, found), "", _foot(seeds), *notes], session.json)
    if stopped:
        raise typer.Exit(EXIT_INTERRUPTED)
    session.finish(len(train) + len(val))


def _load(session: Session, names: list[str]) -> dict[str, AutoencoderKL]:
    """The models by name; all take the same images.

    Raises:
        LatentVAEError: a name twice, other channels, or other intensity ranges.
    """
    if len(set(names)) < len(names):
        raise LatentVAEError(
            f"{', '.join(names)}: a VAE is named twice. Name each once, and the photos last."
        )
    loaded = {name: runtime.devices.load_model(name, session.device, "fp32") for name in names}
    kinds = {(vae.config["in_channels"], models.loading.window_of(vae)) for vae in loaded.values()}
    if len(kinds) > 1:
        raise LatentVAEError("the VAEs take images of other channels or ranges; compare those of one kind.")
    session.vae = next(iter(loaded.values()))
    return loaded


def _read(session: Session, files: list[Path], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images to train on and every tenth apart, (N, C, size, size) each.

    Raises:
        LatentVAEError: too few, as large as `size`.
    """
    import torch  # a verb's module is imported before its arguments are read

    squares = []
    for path, image in session.read_centres(files, session.vae, size):
        if image.shape[-2:] == (size, size):
            squares.append(image)
        else:
            height, width = image.shape[-2:]
            session.skip(path, ImageError(f"{path} is smaller than --size {size} ({width}x{height} px)"))
    if len(squares) < LEAST:
        raise LatentVAEError(
            f"{counted(len(squares), 'image')} of {size}x{size} px or more came; wanted {LEAST} or more: "
            "give a larger folder, or a smaller --size."
        )
    held_out = range(0, len(squares), TENTH)
    rest = [image for number, image in enumerate(squares) if number % TENTH]
    return torch.cat(rest), torch.cat([squares[number] for number in held_out])


def _as_dict(each: priors.diffusability.Diffusability) -> dict[str, Any]:
    """The figures, the means over seeds among them."""
    means: dict[str, float | None] = {}
    for figure in ("loss", "frechet"):
        mean = each.mean(figure)
        means |= {figure: mean and mean[0], f"{figure}_noise": mean and mean[1]}
    return {**asdict(each), **means}


def _foot(seeds: int) -> str:
    # of one seed ± is 0, which looks like certainty
    spread = "One seed has no spread: how much of a difference is chance, --seeds 2 or more would say."
    if seeds > 1:
        spread = (
            f"± is half of the distance between the largest and the smallest of {seeds} seeds: a smaller "
            "difference of two VAEs says nothing."
        )
    return (
        f"{spread}\n"
        "Denoising loss: of v, normalised latents, on images not trained on; lower is easier. Losses compare "
        "between latents of one shape.\n"
        "Distance: Frechet, of LPIPS's features to those of the training images; not FID, compare within "
        "this table only."
    )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
