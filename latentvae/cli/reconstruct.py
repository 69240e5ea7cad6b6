"""`latentvae reconstruct`: through the model and back, as pictures and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentvae import images, measure, models
from latentvae.base.errors import LatentVAEError
from latentvae.base.files import make_folder
from latentvae.cli.options import CLOSEST_MODEL, OUTPUT, Sample, Seed, output_folder, tell
from latentvae.cli.places import short_names, with_ending
from latentvae.cli.session import IMAGE_OPTIONS, LPIPS_OPTIONS, Session, takes

if TYPE_CHECKING:
    import torch


@takes("model", ..., *LPIPS_OPTIONS, "device", "precision", *IMAGE_OPTIONS[2:], bundled=CLOSEST_MODEL)
def reconstruct(
    session: Session,
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Images or folders. Default: a sample picture.")
    ] = None,
    output: Annotated[Path, output_folder("Folder for the pictures.")] = OUTPUT,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        typer.Option(
            help="Arithmetic of the model. auto: fp32; above 4 megapixels bf16 where the CPU computes in it."
        ),
    ] = "auto",
    size: Annotated[
        int | None,
        typer.Option(min=16, help="Shrink larger images to this longer side first, in pixels. Default: not."),
    ] = None,
    sample: Sample = False,
    seed: Seed = 0,
) -> None:
    """Reconstruct images: writes NAME.reconstruction.png and NAME.comparison.png, and prints a table.

    Of scans, whose model has an intensity range, NAME.reconstruction.tif: their samples as 32-bit floats.
    """
    sources = paths or [models.shipped.SAMPLE_PICTURE]
    files = session.find_images(sources)
    names = short_names(files, sources)
    if precision == "auto":
        session.by_size = True
    else:
        session.precision = precision
    vae = session.load()
    make_folder(output)
    lpips, reason = session.find_lpips()
    window = models.loading.window_of(vae)
    evaluator = measure.evaluate.Evaluator(vae, lpips, reason, "sample" if sample else "mode", seed)
    written: list[dict[str, Any]] = []
    for path, image, info in session.read_images(files, size):
        name = names[path]
        evaluator.vae = session.vae  # in the precision that this image is computed in
        try:
            rebuilt, row = evaluator.add(name.as_posix(), image)
        except LatentVAEError as error:  # NaN: half precision overflows in many VAEs
            session.skip(path, error)
            continue
        place = output / name
        make_folder(place.parent)
        written.append(_write_pictures(place, image, rebuilt[0].cpu(), row, info.notes, window))
    if written:  # a table of nothing would hide why; `finish` says it
        summary = evaluator.metrics.summary()
        figures = {**summary.as_dict(), "files": written, **session.passed_over}
        tell(figures, [summary.table(), *_hints(written)], session.json)
    session.finish(len(written))


def _write_pictures(
    place: Path,
    image: torch.Tensor,
    reconstruction: torch.Tensor,
    row: Any,
    notes: list[str],
    window: images.scans.Window | None,
) -> dict[str, Any]:
    """Save the reconstruction (of a scan its samples, as floats) and the comparison; return their paths."""
    plain = place.with_name(with_ending(place.name, f".reconstruction{images.scans.ending(window)}"))
    compared = place.with_name(with_ending(place.name, ".comparison.png"))
    images.scans.save(reconstruction, plain, window)
    figures = {"PSNR": f"{row.psnr:.2f} dB", "SSIM": f"{row.ssim:.4f}"}
    # no column where the network is missing: the picture has no place for the reason
    if row.lpips is not None:
        figures["LPIPS"] = f"{row.lpips:.4f}"
    picture = images.drawing.comparison(image, reconstruction, figures, place.name)
    images.saving.save_picture(picture, compared)
    return {"reconstruction": str(plain), "comparison": str(compared), "notes": notes}


def _hints(written: list[dict[str, Any]]) -> list[str]:
    """What was done to the images when they were read, and where to look."""
    notes = [
        f"{Path(entry['comparison']).name.removesuffix('.comparison.png')}: {note}"
        for entry in written
        for note in entry["notes"]
    ]
    more = f" and {len(written) - 1} more." if written[1:] else "."
    return [*notes, f"\nLook at {written[0]['comparison']}{more}"]
