"""A contact sheet of a store: images beside what the model makes of their latents."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open

from latentvae.base.errors import ImageError, StoreError
from latentvae.images.drawing import grid
from latentvae.images.reading import PathLike, load_image
from latentvae.images.resizing import Geometry
from latentvae.models.latents import Posterior, decode
from latentvae.store.format import Entry, Manifest, read_entries, read_manifest, tensors_path

PREVIEW = "preview.png"
LARGEST = 1024 * 1024  # pixels of an image that is shown


def preview(store: PathLike, vae: AutoencoderKL, count: int = 8) -> Image.Image:
    """Draw up to `count` images of a store, evenly spaced, each beside its decoded latents.

    Images whose files are gone, and those above 1024 x 1024 pixels, are left out.

    Args:
        store: the folder.
        vae: the model that it was encoded with.

    Raises:
        StoreError: no image can be shown.
    """
    folder = Path(store)
    manifest = read_manifest(folder)
    rows: list[list[torch.Tensor]] = []
    shards = [shard for shard in manifest.shards if shard.count]
    each = -(-count // max(1, min(count, len(shards))))
    for shard in shards[:: max(1, -(-len(shards) // count))]:
        entries = read_entries(folder, shard.name)
        with safe_open(tensors_path(folder, shard.name), framework="pt") as tensors:
            for entry in entries[:: max(1, -(-len(entries) // each))]:
                original = original_image(entry, manifest, LARGEST)
                if original is not None and len(rows) < count:
                    moments = tensors.get_slice(entry.tensor)[entry.offset : entry.offset + 1]
                    rows.append([original, _decoded(vae, moments, entry)])
    if not rows:
        raise StoreError(f"no image of {store} can be shown: their files are gone, or all are large.")
    return grid(rows, ["Image", "Decoded from the store"])


def original_image(entry: Entry, manifest: Manifest, largest: int | None = None) -> torch.Tensor | None:
    """The image (C, H, W) as it was encoded, from its file; None where that is gone or above `largest` px."""
    if largest is not None and entry.encoded_width * entry.encoded_height > largest:
        return None
    try:
        image = load_image(entry.source, channels=manifest.preprocessing.channels)
    except ImageError:  # gone, or no image any more
        return None
    return Geometry(entry.resized, entry.cropped).apply(image)


@torch.inference_mode()
def _decoded(vae: AutoencoderKL, moments: torch.Tensor, entry: Entry) -> torch.Tensor:
    return decode(vae, Posterior(moments).mode(), entry.image_padding)[0].clamp(-1, 1).cpu()
