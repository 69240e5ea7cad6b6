"""`latentvae decode`: a store's latents as pictures."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL
from tqdm import tqdm

from latentvae.base.errors import LatentVAEError, StoreError
from latentvae.cli.options import Device, Json, Model, Precision, Sample, Seed, Store, TileSize
from latentvae.cli.session import (
    finish,
    image_channels,
    load_model,
    make_folder,
    print_json,
    skip,
    with_ending,
)
from latentvae.images.saving import save_image
from latentvae.models.fingerprint import weight_hash
from latentvae.models.latents import decode as run
from latentvae.models.loading import spatial_compression_ratio
from latentvae.runtime.memory import SHARE, free_memory, ordinary_peak
from latentvae.runtime.optimize import optimize
from latentvae.runtime.tiling.fitting import tile_to_fit
from latentvae.store.dataset import LatentDataset
from latentvae.store.format import DTYPES, ShardRecord, damage, latent_size

BATCH_PIXELS = 1 << 20  # more in one batch is no faster

Skipped = list[dict[str, str]]


def decode(
    source: Annotated[
        Path,
        typer.Argument(metavar="STORE", help="A folder that `latentvae encode` wrote.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the pictures.", show_default=False)
    ],
    model: Model = None,
    sample: Sample = False,
    seed: Seed = 0,
    device: Device = None,
    precision: Precision = "fp32",
    tile_size: TileSize = None,
    store: Store = None,
    json: Json = False,
) -> None:
    """Decode a store to pictures: KEY.png for each image, of the size that was encoded, without padding."""
    dataset = LatentDataset(source, mode="sample" if sample else "mode", seed=seed, scaled=False)
    vae = load_same_model(dataset, model, device, precision)
    make_folder(output)
    skipped: Skipped = []
    written: list[dict[str, Any]] = []
    with tqdm(total=len(dataset), unit="image", disable=len(dataset) < 2) as progress:
        for numbers in batches(dataset, vae, skipped, tile_size):
            written += decode_batch(dataset, vae, numbers, output, skipped, (tile_size, store))
            progress.update(len(numbers))
    if json and written:
        print_json({"store": str(source), "files": written, "skipped": skipped})
    elif written:
        typer.echo(f"{len(written)} pictures in {output}")
    finish(skipped, len(written))


def load_same_model(
    dataset: LatentDataset, model: str | None, device: str | None, precision: str
) -> AutoencoderKL:
    """The model that made the store, optimized, at this precision.

    Raises:
        StoreError: it is another one, by its weights.
    """
    vae = load_model(model, device, "fp32")  # rounded weights have another hash
    found, wanted = weight_hash(vae), dataset.manifest.weights_sha256
    if found != wanted:
        raise StoreError(
            f"the model {model or 'by default'} has weights {found[:12]}..., but the latents in "
            f"{dataset.reader.store} were made with weights {wanted[:12]}...: another decoder would show "
            "something else. Name the model that encoded them with --model."
        )
    image_channels(vae)
    return vae if precision == "fp32" else optimize(vae, dtype=DTYPES[precision])


def batches(
    dataset: LatentDataset, vae: AutoencoderKL, skipped: Skipped, tile_size: int | None
) -> Iterator[list[int]]:
    """Image numbers shard by shard, of one latent size each, one by one where they are decoded in tiles.

    Images of a damaged shard are skipped.
    """
    ratio, first = spatial_compression_ratio(vae), 0
    for shard in dataset.manifest.shards:
        numbers: dict[str, list[int]] = {}
        try:
            check_hashes(dataset.reader.store, shard)
            for number, tensor in enumerate(dataset.reader.tensor_names(shard), first):
                numbers.setdefault(tensor, []).append(number)
        except StoreError as error:
            skip_all([f"{shard.name}:{line}" for line in range(shard.count)], error, skipped)
        first += shard.count
        for tensor, members in numbers.items():
            height, width = (ratio * side for side in latent_size(tensor))
            fitting = SHARE * free_memory(vae.device) // ordinary_peak(vae, height, width)
            size = 1 if tile_size else int(max(1, min(BATCH_PIXELS // (height * width), fitting)))
            yield from (members[at : at + size] for at in range(0, len(members), size))


def check_hashes(store: Path, shard: ShardRecord) -> None:
    """Refuse to show what is not what was written: files with other bytes open as well.

    Raises:
        StoreError: names the file.
    """
    problem = damage(store, shard)
    if problem:
        raise StoreError(
            f"{shard.name} of {store} is damaged: {problem}. `latentvae encode` with the same images mends "
            "it."
        )


def decode_batch(
    dataset: LatentDataset,
    vae: AutoencoderKL,
    numbers: list[int],
    output: Path,
    skipped: Skipped,
    tiling: tuple[int | None, Path | None],
) -> list[dict[str, Any]]:
    """Write the pictures of some images of one latent size; returns what a report says of them."""
    try:
        entries = [dataset.entry(number) for number in numbers]
        latents = torch.stack([dataset[number]["latents"] for number in numbers])
        height, width = (spatial_compression_ratio(vae) * side for side in latents.shape[-2:])
        tile_to_fit(vae, Path(entries[0].key), height, width, *tiling)
    except LatentVAEError as error:
        skip_all([str(number) for number in numbers], error, skipped)
        return []
    with torch.no_grad():
        images = run(vae, latents).cpu()
    written = []
    for entry, image in zip(entries, images, strict=True):
        try:
            written.append(write_picture(entry.image_padding.crop(image), entry.key, output))
        except LatentVAEError as error:
            skip(Path(entry.key), error, skipped)
    return written


def write_picture(image: torch.Tensor, key: str, output: Path) -> dict[str, Any]:
    """Save one picture under the name its key gives it."""
    place = output / picture_name(key)
    make_folder(place.parent)
    save_image(image, place)
    return {"key": key, "picture": str(place), "width": image.shape[-1], "height": image.shape[-2]}


def picture_name(key: str) -> Path:
    """Where below the output folder the picture of a key goes: its path with ".png" added.

    A name that is too long for that is cut, and ends in a hash of the key.

    Raises:
        StoreError: a key that leads out of the folder; a store may come from anywhere.
    """
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts or not path.name or "\0" in key or Path(key).drive:
        raise StoreError(f"the key {key!r} is no path below a folder: this store was not made by `encode`.")
    return Path(*path.parent.parts, with_ending(path.name, ".png", key))


def skip_all(paths: list[str], error: LatentVAEError, skipped: Skipped) -> None:
    """Leave several images out for one reason, which is said once."""
    skip(Path(paths[0]), error, skipped)
    skipped.extend({"path": path, "reason": str(error)} for path in paths[1:])
