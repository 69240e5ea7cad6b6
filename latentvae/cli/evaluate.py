"""`latentvae evaluate`: PSNR, SSIM, LPIPS, rate and rFID over a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentvae import measure, models, runtime
from latentvae.base.errors import LatentVAEError, MissingWeightsError
from latentvae.cli.options import CLOSEST_MODEL, Photos, Sample, Seed, is_first_process, tell
from latentvae.cli.places import short_names
from latentvae.cli.session import IMAGE_OPTIONS, LPIPS_OPTIONS, Session, takes

if TYPE_CHECKING:
    import torch


@takes("model", "sample", "seed", *LPIPS_OPTIONS, ..., *IMAGE_OPTIONS, bundled=CLOSEST_MODEL)
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
    """Measure reconstructions of images, each at its own size, and print a table.

    Several processes share the work: torchrun --nproc-per-node 8 -m latentvae evaluate PHOTOS...
    """
    if inception_weights is not None and not rfid:
        raise LatentVAEError("--inception-weights was given without --rfid, which uses them: add --rfid.")
    files = session.find_images(paths)
    # first: without it, or its weights, what was asked for is not measured
    inception, rfid_reason = _find_inception(inception_weights) if rfid else (None, None)
    with runtime.processes.Processes() as processes:
        summary = _measured(
            session, files, short_names(files, paths), sample, seed, inception, rfid_reason, processes
        )
    if processes.is_main:
        tell({**summary.as_dict(), **session.passed_over}, [summary.table()], session.json)
    session.finish(len(summary.images))


def _measured(
    session: Session,
    files: list[Path],
    names: dict[Path, Path],
    sample: bool,
    seed: int,
    inception: measure.rfid.Inception | None,
    rfid_reason: str | None,
    processes: runtime.processes.Processes,
) -> measure.evaluate.Evaluation:
    """The figures of all images; of several processes each measures a share, and all end alike."""
    vae = session.load()
    lpips, reason = session.find_lpips()
    if inception is not None:
        inception.to(vae.device)
    order = [names[path].as_posix() for path in files]
    several = processes.world > 1
    if several:
        weights = models.fingerprint.weight_hash(vae)
        processes.share_same("images, weights or networks", (order, weights, reason, rfid_reason))

    def read() -> Iterator[tuple[str, torch.Tensor]]:  # one image is in memory at a time
        for path, image, _ in session.read_images(files[processes.rank :: processes.world]):
            yield names[path].as_posix(), image
        # what any process has skipped ends all of them alike
        found = [each for part in processes.share(session.skipped) for each in part]
        place = {str(path): number for number, path in enumerate(files)}
        session.skipped = sorted(found, key=lambda each: place[each["path"]])

    try:
        return measure.evaluate.evaluate(
            *(vae, read(), lpips, reason, "sample" if sample else "mode", seed, inception, rfid_reason),
            group=processes if several else None,
            order=order,
        )
    except LatentVAEError:
        if len(session.skipped) == len(files):
            session.finish(0)  # says that no image could be read at all
        raise


def _find_inception(weights: Path | None) -> tuple[measure.rfid.Inception | None, str | None]:
    """rFID's network, or None and the reason, which is said. Named weights must be usable."""
    try:
        return measure.rfid.load_inception(weights), None
    except MissingWeightsError as error:
        # what was asked for by name must not be left out silently
        if weights is not None:
            raise
        if is_first_process():
            typer.echo(f"rFID will not be measured, the rest will: {error}", err=True)
        return None, str(error)
