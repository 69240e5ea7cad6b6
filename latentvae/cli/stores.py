"""Stores of latents, as verbs read them: by the model that made them, and only what is whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from latentvae import models, runtime, store
from latentvae.base.addresses import Place
from latentvae.base.errors import StoreError
from latentvae.cli.session import Session, image_channels

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def load_same_model(session: Session, dataset: store.dataset.LatentDataset) -> AutoencoderKL:
    """Load the model that made the store: the named one, or whichever bundled one did.

    Raises:
        StoreError: it is another one, by its weights.
    """
    wanted, candidates = dataset.manifest.weights_sha256, [session.chosen]
    if session.model is None:
        candidates += [name for name in models.shipped.bundled() if name != session.chosen]
    for name in candidates:
        # rounded weights have another hash
        vae = runtime.devices.load_model(name, session.device, "fp32")
        if (found := models.fingerprint.weight_hash(vae)) == wanted:
            break
    else:
        tried = f"{session.model} has {found[:12]}..." if session.model else "no bundled model has these"
        raise StoreError(
            f"the latents in {dataset.reader.store} were made with weights {wanted[:12]}..., and {tried}: "
            "another decoder would show something else. Name the model that encoded them with --model."
        )
    # pictures are what the store is read for
    image_channels(vae)
    # only now rounded
    if session.precision != "fp32":
        vae = runtime.optimize.optimize(vae, dtype=runtime.devices.DTYPES[session.precision])
    session.vae = vae
    return vae


def whole_shards(
    dataset: store.dataset.LatentDataset, session: Session
) -> Iterator[tuple[store.format.ShardRecord, range]]:
    """Each shard and the numbers of its images; those of damaged shards are skipped.

    The hash of every file is checked: files with other bytes open as well, and would be shown.
    """
    first = 0
    for shard in dataset.manifest.shards:
        numbers = range(first, first + shard.count)
        first += shard.count
        try:
            _check_hashes(dataset.reader.store, shard)
        except StoreError as error:
            skip_shard(shard, error, session)
            continue
        yield shard, numbers


def skip_shard(shard: store.format.ShardRecord, error: StoreError, session: Session) -> None:
    """Leave all images of a shard out; their names are in what cannot be trusted, so lines stand for them."""
    session.skip_all([f"{shard.name}:{line}" for line in range(shard.count)], error)


def _check_hashes(folder: Place, shard: store.format.ShardRecord) -> None:
    # reading all of it costs little beside decoding
    with store.verification.here(folder, shard) as local:
        problem = store.format.damage(local, shard)
    if problem:
        raise StoreError(
            f"{shard.name} of {folder} is damaged: {problem}. `latentvae encode` with the same images mends "
            "it."
        )
