"""`latentvae decode`: a store's latents as pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from latentvae import images, models, runtime, store
from latentvae.base.errors import LatentVAEError, StoreError
from latentvae.base.files import make_folder
from latentvae.cli.options import Sample, Seed, StoreArgument, tell
from latentvae.cli.places import with_ending
from latentvae.cli.session import IMAGE_OPTIONS, Session, takes
from latentvae.cli.stores import load_same_model, skip_shard, whole_shards

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

BATCH_PIXELS = 1 << 20  # more in one batch is no faster


@takes("model", ..., *IMAGE_OPTIONS)
def decode(
    session: Session,
    source: StoreArgument,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the pictures.", show_default=False)
    ],
    sample: Sample = False,
    seed: Seed = 0,
) -> None:
    """Decode a store to pictures: KEY.png for each image, of the size that was encoded, without padding.

    Of scans, whose model has an intensity range, KEY.tif: their samples as 32-bit floats.
    """
    dataset = store.dataset.LatentDataset(
        source, mode="sample" if sample else "mode", seed=seed, scaled=False
    )
    # before the folder is made: another model leaves nothing behind
    load_same_model(session, dataset)
    make_folder(output)
    written: list[dict[str, Any]] = []
    with tqdm(total=len(dataset), unit="image", disable=len(dataset) < 2) as progress:
        for numbers in _batches(dataset, session):
            written += _decode_batch(dataset, session, numbers, output)
            progress.update(len(numbers))
    if written:
        result = {"store": str(source), "files": written, "skipped": session.skipped}
        tell(result, [f"{len(written)} pictures in {output}"], session.json)
    session.finish(len(written))


def _batches(dataset: store.dataset.LatentDataset, session: Session) -> Iterator[list[int]]:
    """Image numbers shard by shard, of one latent size each, one by one where they are decoded in tiles.

    Images of a damaged shard are skipped.
    """
    vae = session.vae
    for shard, shard_numbers in whole_shards(dataset, session):
        of_size: dict[str, list[int]] = {}
        try:
            for number, tensor in zip(shard_numbers, dataset.reader.tensor_names(shard), strict=True):
                of_size.setdefault(tensor, []).append(number)
        except StoreError as error:
            skip_shard(shard, error, session)
            continue
        # one size, one batch: the images of a shard have several where they were not cropped
        for tensor, numbers in of_size.items():
            height, width = _pixels(vae, store.format.latent_size(tensor))
            free = runtime.memory.SHARE * runtime.memory.free_memory(vae.device)
            # rounded down to no image at all, one is still tried: it may be tiled
            fitting = free // runtime.memory.ordinary_peak(vae, height, width)
            size = int(max(1, min(BATCH_PIXELS // (height * width), fitting)))
            # tiles are of one image at a time
            if session.tile_size:
                size = 1
            yield from (numbers[at : at + size] for at in range(0, len(numbers), size))


def _pixels(vae: AutoencoderKL, latents: Sequence[int]) -> tuple[int, int]:
    """Height and width of the images of latents of this height and width."""
    ratio = models.loading.spatial_compression_ratio(vae)
    height, width = (ratio * side for side in latents)
    return height, width


def _decode_batch(
    dataset: store.dataset.LatentDataset, session: Session, numbers: list[int], output: Path
) -> list[dict[str, Any]]:
    """Write the pictures of some images of one latent size; returns what a report says of them."""
    try:
        entries = [dataset.entry(number) for number in numbers]
        latents = [dataset[number]["latents"] for number in numbers]  # (C, h, w) each
        # all of the batch have one size
        session.fit(Path(entries[0].key), *_pixels(session.vae, latents[0].shape[-2:]))
    except LatentVAEError as error:
        session.skip_all([str(number) for number in numbers], error)
        return []
    written = []
    decoded = store.dataset.decoded_images(session.vae, entries, latents)
    for entry, image in zip(entries, decoded, strict=True):
        try:
            written.append(_write_picture(image, entry.key, output, dataset.manifest.window))
        except LatentVAEError as error:
            session.skip(entry.key, error)
    return written


def _write_picture(
    image: torch.Tensor, key: str, output: Path, window: images.scans.Window | None
) -> dict[str, Any]:
    """Save one picture (C, H, W) under the name its key gives it; of a scan its samples, as floats."""
    place = output / picture_name(key, images.scans.ending(window))
    make_folder(place.parent)
    images.scans.save(image, place, window)
    return {"key": key, "picture": str(place), "width": image.shape[-1], "height": image.shape[-2]}


def picture_name(key: str, ending: str = ".png") -> Path:
    """Where below the output folder the picture of a key goes: its path with an ending added.

    A name that is too long for that is cut, and ends in a hash of the key.

    Raises:
        StoreError: a key that leads out of the folder; a store may come from anywhere.
    """
    path = PurePosixPath(key)
    # a drive and a zero byte mean nothing on this system, perhaps, but on another
    if path.is_absolute() or ".." in path.parts or not path.name or "\0" in key or Path(key).drive:
        raise StoreError(f"the key {key!r} is no path below a folder: this store was not made by `encode`.")
    return Path(*path.parent.parts, with_ending(path.name, ending, key))
