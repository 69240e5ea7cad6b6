"""`latentvae reconstruct`: through the model and back, as pictures and figures."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from latentvae.base.errors import LatentVAEError
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
from latentvae.cli.session import (
    find_lpips,
    finish,
    load_model,
    make_folder,
    print_json,
    read_images,
    short_names,
    skip,
    with_ending,
)
from latentvae.images.drawing import comparison
from latentvae.images.reading import find_images
from latentvae.images.saving import save_image
from latentvae.measure.metrics import Metrics
from latentvae.models.latents import reconstruct as run
from latentvae.models.loading import SAMPLE_PICTURE


def reconstruct(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Images or folders. Default: a sample picture.")
    ] = None,
    model: Model = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path(
        "latentvae-output"
    ),
    sample: Sample = False,
    seed: Seed = 0,
    lpips_net: LPIPSNet = "alex",
    lpips_weights: LPIPSWeights = None,
    device: Device = None,
    precision: Precision = "fp32",
    tile_size: TileSize = None,
    store: Store = None,
    json: Json = False,
) -> None:
    """Reconstruct images: writes NAME.reconstruction.png and NAME.comparison.png, and prints a table."""

    sources = paths or [SAMPLE_PICTURE]
    files = find_images(sources)
    names = short_names(files, sources)
    vae = load_model(model, device, precision)
    make_folder(output)
    lpips, reason = find_lpips(lpips_net, lpips_weights, vae.device)
    metrics = Metrics(lpips=lpips, lpips_missing_reason=reason, latents="sample" if sample else "mode")
    generator = torch.Generator().manual_seed(seed)
    skipped: list[dict[str, str]] = []
    written: list[dict[str, Any]] = []
    for path, image, info in read_images(files, vae, skipped, tile_size, store):
        name, original = names[path], image[None].to(vae.device)
        result = run(vae, original, sample=sample, generator=generator)
        try:
            (row,) = metrics.add(name.as_posix(), original, result.reconstructions, result.posterior.kl())
        except LatentVAEError as error:  # NaN: half precision overflows in many VAEs
            skip(path, LatentVAEError(f"{path}: {error}"), skipped)
            continue
        written.append(write_pictures(output / name, image, result.reconstructions[0].cpu(), row, info.notes))
    if written:
        report(metrics.summary(), written, skipped, as_json=json)
    finish(skipped, len(written))


def write_pictures(
    place: Path, image: Any, reconstruction: Any, row: Any, notes: list[str]
) -> dict[str, Any]:
    """Save the reconstruction and the comparison; return their paths for the report."""

    make_folder(place.parent)
    plain = place.with_name(with_ending(place.name, ".reconstruction.png"))
    compared = place.with_name(with_ending(place.name, ".comparison.png"))
    save_image(reconstruction, plain)
    figures = {"PSNR": f"{row.psnr:.2f} dB", "SSIM": f"{row.ssim:.4f}"}
    if row.lpips is not None:
        figures["LPIPS"] = f"{row.lpips:.4f}"
    comparison(image, reconstruction, figures, place.name).save(compared)
    return {"reconstruction": str(plain), "comparison": str(compared), "notes": notes}


def report(summary: Any, written: list[dict[str, Any]], skipped: list[dict[str, str]], as_json: bool) -> None:
    """Print the table, or the same as JSON."""
    if as_json:
        print_json({**summary.as_dict(), "files": written, "skipped": skipped})
        return
    typer.echo(summary.table())
    for entry in written:
        for note in entry["notes"]:
            typer.echo(f"{Path(entry['comparison']).name.removesuffix('.comparison.png')}: {note}")
    typer.echo(
        f"\nLook at {written[0]['comparison']}" + (f" and {len(written) - 1} more." if written[1:] else ".")
    )
