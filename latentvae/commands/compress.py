"""`latentvae compress` and `latentvae decompress`: a photograph as one small file, and back."""

from pathlib import Path
from typing import Annotated, Any

import typer

from latentvae.commands.common import (
    Device,
    Json,
    LPIPSNet,
    LPIPSWeights,
    Model,
    Store,
    TileSize,
    find_lpips,
    finish,
    image_channels,
    load_model,
    print_json,
    read_images,
)
from latentvae.commands.memory import fit
from latentvae.errors import CodecError

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
    from latentvae.codec import compress as run
    from latentvae.codec import decompress as restore
    from latentvae.images import find_images
    from latentvae.metrics import Metrics

    (path,) = find_images([photo]) if not photo.is_dir() else (_no_folder(photo),)
    check_output(output)
    vae = load_model(model, device, "fp32")  # the hash in the file is that of the exact weights
    lpips, reason = find_lpips(lpips_net, lpips_weights, vae.device)
    metrics = Metrics(lpips=lpips, lpips_missing_reason=reason)
    skipped: list[dict[str, str]] = []
    for _, image, info in read_images([path], vae, skipped, tile_size, store):
        original = image[None].to(vae.device)
        data = run(vae, original, quality=quality)
        write(output, data)
        metrics.add(path.name, original, restore(vae, data))
        report(metrics.summary(), output, len(data), quality, info, json)
    finish(skipped, 1 - len(skipped))


def _no_folder(path: Path) -> Path:
    raise CodecError(f"{path} is a folder; wanted one image: call `latentvae compress` once for each.")


def check_output(path: Path) -> None:
    """Refuse to write over what may be a photograph.

    Raises:
        CodecError: a name that does not end in .lvae, or a folder.
    """
    if path.suffix.lower() != SUFFIX or path.is_dir():
        raise CodecError(f"{path} came as the file to write; wanted a name that ends in {SUFFIX}.")


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
        partial.unlink(missing_ok=True)
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
    json: Json = False,
) -> None:
    """Decompress an image that `latentvae compress` wrote, with the same model."""
    from latentvae.codec import check_model, decode_payload, read
    from latentvae.images import save_image

    header, payload = read(source)
    if output.exists() and output.samefile(source):
        raise CodecError(f"{output} is the file that is read: name another one for the picture.")
    vae = load_model(model, device, "fp32")
    check_model(vae, header)
    image_channels(vae)
    fit(vae, source, *header.padded, tile_size, store)
    images = decode_payload(vae, header, payload)
    save_image(images, output)
    if json:
        print_json({"file": str(output), "width": header.width, "height": header.height})
        return
    typer.echo(f"{output}: {header.width}x{header.height} px")
