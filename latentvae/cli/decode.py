"""`latentvae decode`: a store's latents as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from latentvae import images, models, runtime, store
from latentvae.base.errors import LatentVAEError, StoreError
from latentvae.base.files import local, make_folder
from latentvae.cli.options import Sample, Seed, StoreArgument, counted, tell
from latentvae.cli.places import with_ending
from latentvae.cli.session import IMAGE_OPTIONS, Session, takes
from latentvae.cli.stores import load_same_model, skip_shard, whole_shards

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

BATCH_PIXELS = 1 << 20  # more in one batch is no faster


@takes("model", ..., *(option for option in IMAGE_OPTIONS if option != "max_pixels"))
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
        for count, pictures in _decoded(dataset, session, output):
            written += pictures
            progress.update(count)
    if written:
        result = {"store": str(source), "files": written, "skipped": session.skipped}
        tell(result, [f"{counted(len(written), 'picture')} in {output}"], session.json)
    session.finish(len(written))


def _decoded(
    dataset: store.dataset.LatentDataset, session: Session, output: Path
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Write the pictures; of each batch how many it had, and what a report says of those that it gave."""
    for cores, batches in groupby(_batches(dataset, session), lambda each: each[1]):
        runtime.patches.restore(session.vae, "tiling")  # what the image before needed
        # latents are read here and not in the threads; so is the model set to tile, while no thread runs it
        jobs = (_job(dataset, session, numbers, output, fit=cores == 1) for numbers, _ in batches)
        yield from runtime.side_by_side.run(jobs, cores) if cores > 1 else (job() for job in jobs)


def _batches(dataset: store.dataset.LatentDataset, session: Session) -> Iterator[tuple[list[int], int]]:
    """Image numbers shard by shard, of one latent size each, and how many batches are decoded side by side.

    One by one where they are decoded so, or in tiles. Images of a damaged shard are skipped.
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
            cores = 1 if session.tile_size else runtime.side_by_side.cores_for(vae, height, width)
            if cores > 1 or session.tile_size:
                size = 1
            yield from ((numbers[at : at + size], cores) for at in range(0, len(numbers), size))


def _pixels(vae: AutoencoderKL, latents: Sequence[int]) -> tuple[int, int]:
    """Height and width of the images of latents of this height and width."""
    ratio = models.loading.spatial_compression_ratio(vae)
    height, width = (ratio * side for side in latents)
    return height, width


def _job(
    dataset: store.dataset.LatentDataset, session: Session, numbers: list[int], output: Path, *, fit: bool
) -> Callable[[], tuple[int, list[dict[str, Any]]]]:
    """What is left to do for images of one size once their latents are read.

    Args:
        fit: have the model tile if it must.
    """
    try:
        entries = [dataset.entry(number) for number in numbers]
        latents = [dataset[number]["latents"] for number in numbers]  # (C, h, w) each
        if fit:
            session.fit(Path(entries[0].key), *_pixels(session.vae, latents[0].shape[-2:]))
    except LatentVAEError as error:
        session.skip_all([str(number) for number in numbers], error)
        return lambda: (len(numbers), [])
    window = dataset.manifest.window
    return lambda: (len(numbers), _write_batch(session, entries, latents, output, window))


def _write_batch(
    session: Session,
    entries: list[store.format.Entry],
    latents: list[torch.Tensor],
    output: Path,
    window: images.scans.Window | None,
) -> list[dict[str, Any]]:
    """Write the pictures of some images of one latent size; returns what a report says of them."""
    written = []
    decoded = store.dataset.decoded_images(session.vae, entries, latents)
    for entry, image in zip(entries, decoded, strict=True):
        try:
            written.append(_write_picture(image, entry.key, output, window))
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
    if path.is_absolute() or ".." in path.parts or not path.name or "\0" in key or Path(local(key)).drive:
        raise StoreError(f"the key {key!r} is no path below a folder: this store was not made by `encode`.")
    return Path(local(str(path.parent)), with_ending(local(path.name), ending, local(key)))
