"""`latentvae evaluate`: PSNR, SSIM, LPIPS and rate over a folder."""

from pathlib import Path
from typing import Annotated

import typer

from latentvae.commands.common import (
    Device,
    Json,
    LPIPSNet,
    LPIPSWeights,
    Model,
    Precision,
    Sample,
    Seed,
    find_lpips,
    finish,
    image_channels,
    load_model,
    print_json,
    read_images,
)
from latentvae.errors import LatentVAEError


def evaluate(
    paths: Annotated[list[Path], typer.Argument(help="Images or folders.")],
    model: Model = None,
    sample: Sample = False,
    seed: Seed = 0,
    lpips_net: LPIPSNet = "alex",
    lpips_weights: LPIPSWeights = None,
    device: Device = None,
    precision: Precision = "fp32",
    json: Json = False,
) -> None:
    """Measure reconstructions of images, each at its own size, and print a table."""
    from latentvae.evaluation import evaluate as run
    from latentvae.images import find_images

    files = find_images(paths)
    vae = load_model(model, device, precision)
    lpips, reason = find_lpips(lpips_net, lpips_weights, vae.device)
    skipped: list[dict[str, str]] = []
    images = ((path.name, image) for path, image, _ in read_images(files, image_channels(vae), skipped))
    try:
        summary = run(vae, images, lpips, reason, latents="sample" if sample else "mode", seed=seed)
    except LatentVAEError:
        finish(skipped, 0)  # says so where no image could be read at all
        raise
    if json:
        print_json({**summary.as_dict(), "skipped": skipped})
    else:
        typer.echo(summary.table())
    finish(skipped, len(summary.images))
