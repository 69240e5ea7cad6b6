"""What a store is to be like: what options mean, and whether the store that is there agrees."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from diffusers import AutoencoderKL

from latentvae.base.errors import StoreError
from latentvae.images.resizing import Preprocessing
from latentvae.models.loading import window_of
from latentvae.store import format as layout
from latentvae.store.format import DTYPES, DtypeName, Manifest

BATCH_SIZE = 8
SHARD_SIZE = 1024  # images
MAX_SIZE = 8192  # pixels


def rows_at_once(vae: AutoencoderKL, old: Manifest | None, asked: int | None = None) -> int:
    """Images up to 512 x 512 that make a batch: as asked for, or as the store has it.

    In a new store one on a CPU, whose cores each work on a batch of their own: more gain nothing there from
    128 px on, and batches are filled up, which costs where sizes are many. Elsewhere 8.
    """
    return asked or (old.batch_size if old else 1 if vae.device.type == "cpu" else BATCH_SIZE)


def preprocessing(
    vae: AutoencoderKL, size: int | None, crop: bool, no_upscale: bool = False
) -> Preprocessing:
    """The policy that `size`, `crop` and `no_upscale` mean for a model.

    What is not enlarged is cropped to multiples of 64 px (of a model of 8 px to a latent).

    Raises:
        StoreError: a crop without a size, or with `no_upscale`; a size out of range; or a model that takes no
            images from files.
    """
    channels = vae.config["in_channels"]
    if channels not in (1, 3):
        raise StoreError(f"this model takes {channels} channels; image files have 1 or 3.")
    window = window_of(vae)
    limits = None if window is None else (window.low, window.high)
    if size is None:
        if crop:
            raise StoreError("crop came without a size: give the side of the squares to crop, --size.")
        if no_upscale:
            raise StoreError("no_upscale came without a size: without --size nothing is enlarged.")
        return Preprocessing(channels=channels, range=limits)
    if crop and no_upscale:
        raise StoreError("crop came with no_upscale: squares of one size, or images of their own, not both.")
    least = 2 ** (len(vae.config["block_out_channels"]) - 1)  # the spatial_compression_ratio
    if not least <= size <= MAX_SIZE:
        raise StoreError(f"size={size} came; wanted {least} to {MAX_SIZE} pixels.")
    policy: Literal["centre-crop", "size-no-upscale", "size"]
    policy = "centre-crop" if crop else "size-no-upscale" if no_upscale else "size"
    return Preprocessing(policy=policy, size=size, channels=channels, range=limits)


def settle(
    vae: AutoencoderKL,
    store: Path,
    old: Manifest | None,
    dtype: DtypeName,
    policy: Preprocessing,
    flips: bool,
    batch_size: int | None,
    shard_size: int | None,
    weights_sha256: str,
) -> Manifest:
    """What a store is to be like: its manifest without shards.

    Args:
        old: the manifest of the store as it is; None: a new one.
        batch_size, shard_size: None: as the store has them.

    Raises:
        StoreError: the store is made otherwise, a dtype that no store has, or sizes below 1.
    """
    shard_size = shard_size or (old.shard_size if old else SHARD_SIZE)
    names = {value: name for name, value in DTYPES.items()}  # float64 has none
    if dtype not in DTYPES or vae.dtype not in names:
        raise StoreError(
            f"dtype {dtype} and a model in {vae.dtype} came; wanted one of {', '.join(DTYPES)} each."
        )
    batch_size = rows_at_once(vae, old, batch_size)
    if min(batch_size, shard_size) < 1:
        raise StoreError(f"batch_size={batch_size}, shard_size={shard_size} came; wanted 1 or more.")
    settings = Manifest(
        weights_sha256=weights_sha256,
        config=layout.model_config(vae),
        scaling_factor=vae.config["scaling_factor"],
        shift_factor=vae.config["shift_factor"],
        preprocessing=policy,
        dtype=dtype,
        precision=names[vae.dtype],
        flips=flips,
        batch_size=batch_size,
        shard_size=shard_size,
    )
    if old is not None:
        _check_same(store, old, settings)
    return settings


def _check_same(store: Path, old: Manifest, new: Manifest) -> None:
    """Refuse to add to a store what is made otherwise.

    Raises:
        StoreError: says what differs.
    """
    names = [name for name in Manifest.model_fields if name not in ("shards", "statistics")]
    differing = [name for name in names if getattr(old, name) != getattr(new, name)]
    if "weights_sha256" in differing or {"config", "scaling_factor", "shift_factor"} & set(differing):
        raise StoreError(
            f"{store} was encoded with another VAE (weights {old.weights_sha256[:12]}, scaling_factor "
            f"{old.scaling_factor:g}; this one has {new.weights_sha256[:12]}, {new.scaling_factor:g}). Name "
            "that VAE with --model, or another folder."
        )
    versions = old.preprocessing.version, new.preprocessing.version
    if differing == ["preprocessing"] and versions[0] != versions[1]:
        raise StoreError(
            f"{store} was made by another version of latentvae, which reads some image files to other pixels "
            f"(preprocessing {versions[0]}; this is {versions[1]}). It is read and verified as ever; to add "
            "to it or repair it, encode into another folder."
        )
    if differing:
        was, came = (_listed(differing, manifest) for manifest in (old, new))
        raise StoreError(
            f"{store} was encoded with {was}; {came} came. Give the same options, or another folder."
        )


def _listed(names: Iterable[str], manifest: Manifest) -> str:
    parts = []
    for name in names:
        value = getattr(manifest, name)
        if isinstance(value, Preprocessing):
            samples = f", samples {value.range[0]:g} to {value.range[1]:g}" if value.range else ""
            kind = f"version {value.version}, {value.channels} channels{samples}"
            size = f" {value.size}" if value.size else ""
            value = f"{value.policy}{size} ({kind})"
        parts.append(f"{name} {value}")
    return ", ".join(parts)
