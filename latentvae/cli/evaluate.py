"""`latentvae evaluate`: PSNR, SSIM, LPIPS, rate and rFID over a folder."""

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from latentvae.base.errors import LatentVAEError, MissingWeightsError
from latentvae.cli.options import (
    Device,
    Json,
    LPIPSNet,
    LPIPSWeights,
    Model,
    Precision,
    Sample,
    Seed,
    Store,
    TileSize,
)
from latentvae.cli.session import find_lpips, finish, load_model, print_json, read_images, short_names
from latentvae.images.reading import find_images
from latentvae.measure.evaluate import evaluate as run
from latentvae.measure.rfid import Inception, load_inception

WantRFID = Annotated[
    bool,
    typer.Option(
        "--rfid",
        help="Also measure rFID, the Fréchet Inception distance of all reconstructions to their originals "
        "(torch-fidelity's network; needs the extra 'fid' and weights, never downloads them). From fewer "
        "than 2,048 images it is biased; published figures use 50,000 of 256x256.",
    ),
]
InceptionWeights = Annotated[
    Path | None,
    typer.Option(
        help="For --rfid: torch-fidelity's InceptionV3 weights, a .pth file. Default: torch.hub's cache."
    ),
]


def evaluate(
    paths: Annotated[list[Path], typer.Argument(help="Images or folders.")],
    model: Model = None,
    sample: Sample = False,
    seed: Seed = 0,
    lpips_net: LPIPSNet = "alex",
    lpips_weights: LPIPSWeights = None,
    rfid: WantRFID = False,
    inception_weights: InceptionWeights = None,
    device: Device = None,
    precision: Precision = "fp32",
    tile_size: TileSize = None,
    store: Store = None,
    json: Json = False,
) -> None:
    """Measure reconstructions of images, each at its own size, and print a table."""

    if inception_weights is not None and not rfid:
        raise LatentVAEError("--inception-weights was given without --rfid, which uses them: add --rfid.")
    files = find_images(paths)
    names = short_names(files, paths)
    vae = load_model(model, device, precision)
    lpips, reason = find_lpips(lpips_net, lpips_weights, vae.device)
    inception, rfid_reason = find_inception(inception_weights, vae.device) if rfid else (None, None)
    skipped: list[dict[str, str]] = []
    read = read_images(files, vae, skipped, tile_size, store)
    images = ((names[path].as_posix(), image) for path, image, _ in read)
    latents: Literal["mode", "sample"] = "sample" if sample else "mode"
    try:
        summary = run(vae, images, lpips, reason, latents, seed, inception, rfid_reason)
    except LatentVAEError:
        if len(skipped) == len(files):
            finish(skipped, 0)  # says that no image could be read at all
        raise
    if json:
        print_json({**summary.as_dict(), "skipped": skipped})
    else:
        typer.echo(summary.table())
    finish(skipped, len(summary.images))


def find_inception(weights: Path | None, device: torch.device) -> tuple[Inception | None, str | None]:
    """rFID's network, or None and the reason. Weights that were named and cannot be used are an error."""

    try:
        return load_inception(weights).to(device), None
    except MissingWeightsError as error:
        if weights is not None:
            raise
        return None, str(error)
