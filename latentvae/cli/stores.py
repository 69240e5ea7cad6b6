"""Stores of latents, as verbs read them: by the model that made them, and only what is whole."""

from collections.abc import Iterator
from pathlib import Path

from diffusers import AutoencoderKL

from latentvae.base.errors import StoreError
from latentvae.cli.session import DTYPES, Session, image_channels, load_model
from latentvae.models.fingerprint import weight_hash
from latentvae.runtime.optimize import optimize
from latentvae.store import format
from latentvae.store.dataset import LatentDataset


def load_same_model(session: Session, dataset: LatentDataset) -> AutoencoderKL:
    """Load the model that made the store.

    Raises:
        StoreError: it is another one, by its weights.
    """
    vae = load_model(session.model, session.device, "fp32")  # rounded weights have another hash
    found, wanted = weight_hash(vae), dataset.manifest.weights_sha256
    if found != wanted:
        raise StoreError(
            f"the model {session.model or 'by default'} has weights {found[:12]}..., but the latents in "
            f"{dataset.reader.store} were made with weights {wanted[:12]}...: another decoder would show "
            "something else. Name the model that encoded them with --model."
        )
    # pictures are what the store is read for
    image_channels(vae)
    # only now rounded
    session.vae = vae if session.precision == "fp32" else optimize(vae, dtype=DTYPES[session.precision])
    return session.vae


def whole_shards(dataset: LatentDataset, session: Session) -> Iterator[tuple[format.ShardRecord, range]]:
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


def skip_shard(shard: format.ShardRecord, error: StoreError, session: Session) -> None:
    """Leave all images of a shard out; their names are in what cannot be trusted, so lines stand for them."""
    session.skip_all([f"{shard.name}:{line}" for line in range(shard.count)], error)


def _check_hashes(store: Path, shard: format.ShardRecord) -> None:
    # reading all of it costs little beside decoding
    problem = format.damage(store, shard)
    if problem:
        raise StoreError(
            f"{shard.name} of {store} is damaged: {problem}. `latentvae encode` with the same images mends "
            "it."
        )
