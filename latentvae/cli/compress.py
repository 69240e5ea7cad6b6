"""`latentvae compress` and `latentvae decompress`: a photograph as one small file, and back."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from latentvae.base.errors import CodecError
from latentvae.cli.options import Device, Json, LPIPSNet, LPIPSWeights, Model, Store, TileSize
from latentvae.cli.session import find_lpips, finish, image_channels, load_model, print_json, read_images
from latentvae.codec.compression import check_model, decode_payload, read, unpack
from latentvae.codec.compression import compress as run
from latentvae.images.reading import find_images
from latentvae.images.saving import SAVE_OPTIONS, save_image
from latentvae.measure.metrics import Metrics
from latentvae.runtime.tiling.fitting import tile_to_fit

SUFFIX = ".lvae"
Quality = Annotated[int, typer.Option("--quality", "-q", min=1, max=100, help="14 more: steps half as long.")]


def compress(
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="An image.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.lvae", help="The file to write.")],
    model: Model = None,
    quality: Quality = 50,
    lpips_net: LPIPSNet = "alex",
    lpips_weights: LPIPSWeights = None,
    device: Device = None,
    tile_size: TileSize = None,
    store: Store = None,
    json: Json = False,
) -> None:
    """Compress an image; prints the bits per pixel of the whole file, and what decoding it gives."""

    (path,) = find_images([photo]) if what_is(photo) != "folder" else (_no_folder(photo),)
    check_output(output)
    vae = load_model(model, device, "fp32")  # the hash in the file is that of the exact weights
    lpips, reason = find_lpips(lpips_net, lpips_weights, vae.device)
    metrics = Metrics(lpips=lpips, lpips_missing_reason=reason)
    skipped: list[dict[str, str]] = []
    for _, image, info in read_images([path], vae, skipped, tile_size, store):
        original = image[None].to(vae.device)
        data = run(vae, original, quality=quality)
        write(output, data)
        metrics.add(path.name, original, decode_payload(vae, *unpack(data)))
        report(metrics.summary(), output, len(data), quality, info, json)
    finish(skipped, 1 - len(skipped))


def _no_folder(path: Path) -> Path:
    raise CodecError(f"{path} is a folder; wanted one image: call `latentvae compress` once for each.")


def what_is(path: Path) -> str:
    """ "folder", "file", or nothing.

    Raises:
        CodecError: one may not look there, or the name is too long.
    """
    try:
        return "folder" if path.is_dir() else "file" if path.exists() else ""
    except OSError as error:
        raise CodecError(f"{path} cannot be used ({error.strerror or error}): choose another.") from error


def check_output(path: Path) -> None:
    """Refuse to write over what may be a photograph.

    Raises:
        CodecError: a name that does not end in .lvae, or a folder.
    """
    if path.suffix.lower() != SUFFIX or what_is(path) == "folder":
        raise CodecError(f"{path} came as the file to write; wanted a name that ends in {SUFFIX}.")


def check_picture(path: Path, overwrite: bool) -> None:
    """Refuse, before anything is decoded, a picture that could not be written or would cost another.

    Raises:
        CodecError: a name that ends in no format there is, a folder that is not there, or a file that is.
    """

    if path.suffix.lower() not in SAVE_OPTIONS:
        raise CodecError(
            f"{path} came as the picture to write; wanted a name that ends in {', '.join(SAVE_OPTIONS)}."
        )
    there = what_is(path)
    if what_is(path.parent) != "folder" or there == "folder":
        raise CodecError(f"{path} cannot be written: use a folder that exists, and a new name in it.")
    if there and not overwrite:
        raise CodecError(f"{path} is already there: name another file, or pass --overwrite.")


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        CodecError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise CodecError(
            f"{path} cannot be written ({error.strerror or error}): use a folder that exists, yours."
        ) from error


def report(summary: Any, output: Path, size: int, quality: int, info: Any, as_json: bool) -> None:
    """Print the figures of one compressed image."""
    bpp = 8 * size / (info.width * info.height)
    (row,) = summary.as_dict()["images"]
    figures = {"psnr": row["psnr"], "ssim": row["ssim"], "lpips": row["lpips"]}
    if as_json:
        notes = [*info.notes, *summary.notes]
        sizes = {"width": info.width, "height": info.height, "bytes": size, "bpp": bpp, "quality": quality}
        figures["lpips_net"] = summary.protocol.lpips_net
        print_json({"file": str(output), **sizes, **figures, "notes": notes})
        return
    shown = [f"{size:,} bytes", f"{bpp:.4f} bpp (whole file)"]
    shown += [f"{name.upper()} {value:.4g}" for name, value in figures.items() if value is not None]
    typer.echo(f"{output}: {', '.join(shown)}")
    for note in (*info.notes, *summary.notes):
        typer.echo(f"note: {note}")


def decompress(
    source: Annotated[Path, typer.Argument(metavar="IN.lvae", help="A compressed image.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT.png", help="The image to write; .png, .jpg or .webp.")
    ],
    model: Model = None,
    device: Device = None,
    tile_size: TileSize = None,
    store: Store = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    json: Json = False,
) -> None:
    """Decompress an image that `latentvae compress` wrote, with the same model."""

    check_picture(output, overwrite)
    header, payload = read(source)
    vae = load_model(model, device, "fp32")
    check_model(vae, header)
    image_channels(vae)
    tile_to_fit(vae, source, *header.padded, tile_size, store)
    images = decode_payload(vae, header, payload)
    save_image(images, output)
    if json:
        print_json({"file": str(output), "width": header.width, "height": header.height})
        return
    typer.echo(f"{output}: {header.width}x{header.height} px")
