"""`latentvae evaluate`: PSNR, SSIM, LPIPS, rate and rFID over a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentvae import measure
from latentvae.base.errors import LatentVAEError, MissingWeightsError
from latentvae.cli.options import Photos, Sample, Seed, tell
from latentvae.cli.places import short_names
from latentvae.cli.session import IMAGE_OPTIONS, LPIPS_OPTIONS, Session, takes


@takes("model", "sample", "seed", *LPIPS_OPTIONS, ..., *IMAGE_OPTIONS)
def evaluate(
    session: Session,
    paths: Photos,
    sample: Sample = False,
    seed: Seed = 0,
    rfid: Annotated[
        bool,
        typer.Option(
            "--rfid",
            help="Also measure rFID, the Fréchet Inception distance of all reconstructions to their "
            "originals (torch-fidelity's network; needs the extra 'fid' and weights, never downloads them). "
            "From fewer than 2,048 images it is biased; published figures use 50,000 of 256x256.",
        ),
    ] = False,
    inception_weights: Annotated[
        Path | None,
        typer.Option(
            help="For --rfid: torch-fidelity's InceptionV3 weights, a .pth file. Default: torch.hub's cache."
        ),
    ] = None,
) -> None:
    """Measure reconstructions of images, each at its own size, and print a table."""
    if inception_weights is not None and not rfid:
        raise LatentVAEError("--inception-weights was given without --rfid, which uses them: add --rfid.")
    files = session.find_images(paths)
    names = short_names(files, paths)
    # first: without it, or its weights, what was asked for is not measured
    inception, rfid_reason = _find_inception(inception_weights) if rfid else (None, None)
    vae = session.load()
    lpips, reason = session.find_lpips()
    if inception is not None:
        inception.to(vae.device)
    # a generator: one image is in memory at a time
    read = ((names[path].as_posix(), image) for path, image, _ in session.read_images(files))
    try:
        summary = measure.evaluate.evaluate(
            vae, read, lpips, reason, "sample" if sample else "mode", seed, inception, rfid_reason
        )
    except LatentVAEError:
        if len(session.skipped) == len(files):
            session.finish(0)  # says that no image could be read at all
        raise
    tell({**summary.as_dict(), **session.passed_over}, [summary.table()], session.json)
    session.finish(len(summary.images))


def _find_inception(weights: Path | None) -> tuple[measure.rfid.Inception | None, str | None]:
    """rFID's network, or None and the reason, which is said. Named weights must be usable."""
    try:
        return measure.rfid.load_inception(weights), None
    except MissingWeightsError as error:
        # what was asked for by name must not be left out silently
        if weights is not None:
            raise
        typer.echo(f"rFID will not be measured, the rest will: {error}", err=True)
        return None, str(error)
