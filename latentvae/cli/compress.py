"""`latentvae compress` and `latentvae decompress`: a photograph as one small file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from latentvae import codec, images, measure
from latentvae.base.errors import CodecError
from latentvae.base.files import check_file, whole_file
from latentvae.cli.options import tell
from latentvae.cli.session import Session, image_channels, takes

SUFFIX = ".lvae"
CANNOT_WRITE = "{path} cannot be written ({reason}): use a folder that exists, yours."


@takes("model", ..., "lpips_net", "lpips_weights", "device", "tile_size", "store", "json")
def compress(
    session: Session,
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="An image.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.lvae", help="The file to write.")],
    quality: Annotated[
        int,
        typer.Option(
            "--quality",
            "-q",
            min=1,
            max=100,
            help="1: smallest file, 100: best picture; 14 more halve the steps of the latents' rounding.",
        ),
    ] = 50,
) -> None:
    """Compress an image; prints the bits per pixel of the whole file, and what decoding it gives."""
    # one file in, one file out: OUT could not name those of a folder
    if _kind_of(photo) == "folder":
        raise CodecError(f"{photo} is a folder; wanted one image: call `latentvae compress` once for each.")
    files = session.find_images([photo])
    # before the model is loaded: arguments in the wrong order would cost the photograph
    _check_file(output)
    vae = session.load()  # in fp32: the hash in the file is that of the exact weights
    lpips, reason = session.find_lpips()
    metrics = measure.metrics.Metrics(lpips=lpips, lpips_missing_reason=reason)
    for path, image, info in session.read_images(files):
        original = image[None].to(vae.device)  # (1, C, H, W)
        data = codec.compression.compress(vae, original, quality=quality)
        # durable: the photograph may be deleted once this is there
        with whole_file(output, CodecError, CANNOT_WRITE, durable=True) as partial:
            partial.write_bytes(data)
        # measured on what the file gives, and not on what the encoder has in hand
        decoded = codec.compression.decode_payload(vae, *codec.compression.unpack(data))
        metrics.add(path.name, original, decoded)
        _report(metrics.summary(), output, len(data), quality, info, session.json)
    session.finish(1 - len(session.skipped))


@takes("model", "device", "tile_size", "store", ..., "json")
def decompress(
    session: Session,
    source: Annotated[Path, typer.Argument(metavar="IN.lvae", help="A compressed image.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT.png", help="The image to write; .png, .jpg or .webp.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
) -> None:
    """Decompress an image that `latentvae compress` wrote, with the same model."""
    _check_picture(output, overwrite)
    # before the model: a damaged file is refused at once
    header, payload = codec.compression.read_lvae(source)
    vae = session.load()
    # other weights would decode something, and nobody could tell
    codec.compression.check_model(vae, header)
    image_channels(vae)
    session.fit(source, *header.padded)  # height and width with the padding, which is decoded too
    images.saving.save_image(codec.compression.decode_payload(vae, header, payload), output)
    result = {"file": str(output), "width": header.width, "height": header.height}
    tell(result, [f"{output}: {header.width}x{header.height} px"], session.json)


def _kind_of(path: Path) -> str:
    """ "folder", "file", or nothing.

    Raises:
        CodecError: one may not look there, or the name is too long.
    """
    try:
        # exists() and is_dir() raise where a name is too long or a folder is closed
        return "folder" if path.is_dir() else "file" if path.exists() else ""
    except OSError as error:
        raise CodecError(f"{path} cannot be used ({error.strerror or error}): choose another.") from error


def _check_file(path: Path) -> None:
    """Refuse to write over what may be a photograph.

    Raises:
        CodecError: a name that does not end in .lvae, or a folder.
    """
    if path.suffix.lower() != SUFFIX or _kind_of(path) == "folder":
        raise CodecError(f"{path} came as the file to write; wanted a name that ends in {SUFFIX}.")


def _check_picture(path: Path, overwrite: bool) -> None:
    """Refuse, before anything is decoded, a picture that could not be written or would cost another.

    Raises:
        CodecError: a name that ends in no format there is, a folder that is not there, or a file that is.
    """
    if path.suffix.lower() not in images.saving.SAVE_OPTIONS:
        known = ", ".join(images.saving.SAVE_OPTIONS)
        raise CodecError(f"{path} came as the picture to write; wanted a name that ends in {known}.")
    if _kind_of(path.parent) != "folder" or _kind_of(path) == "folder":
        raise CodecError(f"{path} cannot be written: use a folder that exists, and a new name in it.")
    check_file(path, overwrite=overwrite, error=CodecError)


def _report(
    summary: Any, output: Path, size: int, quality: int, info: images.reading.ImageInfo, as_json: bool
) -> None:
    """Print the figures of one compressed image of `size` bytes."""
    bpp = 8 * size / (info.width * info.height)  # of the whole file: header and padding count
    (row,) = summary.as_dict()["images"]
    figures = {"psnr": row["psnr"], "ssim": row["ssim"], "lpips": row["lpips"]}
    notes = [*info.notes, *summary.notes]
    shown = [f"{size:,} bytes", f"{bpp:.4f} bpp (whole file)"]
    shown += [f"{name.upper()} {value:.4g}" for name, value in figures.items() if value is not None]
    sizes = {"width": info.width, "height": info.height, "bytes": size, "bpp": bpp, "quality": quality}
    net = {"lpips_net": summary.protocol.lpips_net}
    result = {"file": str(output), **sizes, **figures, **net, "notes": notes}
    tell(result, [f"{output}: {', '.join(shown)}", *(f"note: {note}" for note in notes)], as_json)
