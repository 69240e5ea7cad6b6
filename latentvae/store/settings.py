"""What a store is made with, and whether a run fits to what is there."""

from collections.abc import Iterable
from pathlib import Path

from diffusers import AutoencoderKL

from latentvae.errors import StoreError
from latentvae.store.journal import DONE, FOLDER
from latentvae.store.locking import LOCK, OTHERS
from latentvae.store.manifest import DTYPES, MANIFEST, DtypeName, Manifest, Preprocessing, model_config

BATCH_SIZE = 8
SHARD_SIZE = 1024
MAX_SIZE = 8192  # pixels


def preprocessing(vae: AutoencoderKL, size: int | None, crop: bool) -> Preprocessing:
    """The policy that `size` and `crop` mean for a model.

    Raises:
        StoreError: a crop without a size, a size out of range, or a model that takes no images from files.
    """
    channels = vae.config["in_channels"]
    if channels not in (1, 3):
        raise StoreError(f"this model takes {channels} channels; image files have 1 or 3.")
    if size is None:
        if crop:
            raise StoreError("crop came without a size: give the side of the squares to crop, --size.")
        return Preprocessing(channels=channels)
    least = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if not least <= size <= MAX_SIZE:
        raise StoreError(f"size={size} came; wanted {least} to {MAX_SIZE} pixels.")
    return Preprocessing(policy="centre-crop" if crop else "size", size=size, channels=channels)


def new_settings(
    vae: AutoencoderKL,
    dtype: DtypeName,
    policy: Preprocessing,
    flips: bool,
    batch_size: int,
    shard_size: int,
    weights_sha256: str,
) -> Manifest:
    """The manifest of a new store, without shards.

    Raises:
        StoreError: a dtype that no store has, or sizes below 1.
    """
    names = {value: name for name, value in DTYPES.items()}
    if dtype not in DTYPES or vae.dtype not in names:
        raise StoreError(
            f"dtype {dtype} and a model in {vae.dtype} came; wanted one of {', '.join(DTYPES)} each."
        )
    if min(batch_size, shard_size) < 1:
        raise StoreError(f"batch_size={batch_size}, shard_size={shard_size} came; wanted 1 or more.")
    return Manifest(
        weights_sha256=weights_sha256,
        config=model_config(vae),
        scaling_factor=vae.config["scaling_factor"],
        shift_factor=vae.config["shift_factor"],
        preprocessing=policy,
        dtype=dtype,
        precision=names[vae.dtype],
        flips=flips,
        batch_size=batch_size,
        shard_size=shard_size,
    )


def check_same(store: Path, old: Manifest, new: Manifest) -> None:
    """Refuse to add to a store what is made otherwise.

    Raises:
        StoreError: says what differs.
    """
    names = [name for name in Manifest.model_fields if name != "shards"]
    differing = [name for name in names if getattr(old, name) != getattr(new, name)]
    if "weights_sha256" in differing or {"config", "scaling_factor", "shift_factor"} & set(differing):
        raise StoreError(
            f"{store} was encoded with another VAE (weights {old.weights_sha256[:12]}, scaling_factor "
            f"{old.scaling_factor:g}; this one has {new.weights_sha256[:12]}, {new.scaling_factor:g}). Name "
            "that VAE with --model, or another folder."
        )
    if differing:
        was, came = (_listed(differing, manifest) for manifest in (old, new))
        raise StoreError(
            f"{store} was encoded with {was}; {came} came. Give the same options, or another folder."
        )


def check_folder(store: Path) -> None:
    """Create a store's folder where it is missing.

    Raises:
        StoreError: something else is there, or it cannot be made.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in store.iterdir()}
    except OSError as error:
        raise StoreError(f"{store} cannot be made ({error.strerror}): choose another folder.") from error
    if found - {LOCK, OTHERS, DONE} and not found & {MANIFEST, FOLDER}:
        raise StoreError(
            f"{store} is a folder of other files ({sorted(found)[0]} and so on), no store. The last argument "
            "names the store: give a new or an empty folder."
        )


def _listed(names: Iterable[str], manifest: Manifest) -> str:
    parts = []
    for name in names:
        value = getattr(manifest, name)
        if isinstance(value, Preprocessing):
            value = f"{value.policy} {value.size or ''} (version {value.version}, {value.channels} channels)"
        parts.append(f"{name} {value}")
    return ", ".join(parts)
