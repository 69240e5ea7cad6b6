"""Reading the VAE out of a safetensors file, without the rest of what is in it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from latentvae.base.errors import ModelError
from latentvae.models.formats.layout import Layout, find_layout, find_prefix
from latentvae.models.presets import nearest

# What `AutoencoderKL.save_pretrained` calls one of the two files of a folder, beside shipped.WEIGHTS_NAME
CONFIG_NAME = "config.json"
# What LDM's training leaves in its files beside the model
LDM_LEFTOVERS = ("loss.", "model_ema.")
WELL_KNOWN = ("encoder.conv_in.weight", "first_stage_model.encoder.conv_in.weight")
KEPT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class StoredVAE:
    """A VAE as a file has it: tensors under the file's own keys."""

    path: Path
    tensors: dict[str, torch.Tensor]
    layout: Layout = "diffusers"
    prefix: str = ""
    others: list[str] = field(default_factory=list)  # keys of the file that are not the VAE's
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """That of all tensors; float32 where they differ or are of fewer than 16 bits."""
        # float8 files are for other programs' kernels: convolutions here do not compute in it
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(KEPT_DTYPES) else torch.float32


def read_stored(path: Path) -> StoredVAE:
    """Read the VAE that a safetensors file holds, alone or within a whole checkpoint.

    Raises:
        ModelError: not a safetensors file, or no VAE in it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
            prefix = find_prefix(keys)
            if prefix is None:
                raise ModelError(_no_vae(path, keys))
            layout = find_layout(keys, prefix)
            # these alone: a whole checkpoint is gigabytes, of which the VAE is a small part
            own = [key for key in keys if _is_own(key, prefix, layout)]
            tensors = {key: file.get_tensor(key) for key in own}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is not a readable safetensors file: {error}. Download or export it again."
        ) from error
    return StoredVAE(path, tensors, layout, prefix, sorted(set(keys) - set(own)), metadata)


def read_shards(files: list[Path], path: Path) -> StoredVAE:
    """Read a VAE whose tensors are spread over several files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= _read_all(file)
    return StoredVAE(path, tensors, find_layout(tensors, ""))


def _read_all(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is not a readable safetensors file: {error}. Download or export it again."
        ) from error


def config_in_metadata(stored: StoredVAE) -> Any:
    """The config that a file carries with it, whatever class it describes; None where it has none.

    Raises:
        ModelError: it is not JSON.
    """
    text = stored.metadata.get("config")
    if text is None:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(
            f"the config in the metadata of {stored.path} is not valid JSON: {error}."
        ) from error


def _is_own(key: str, prefix: str, layout: Layout) -> bool:
    if not key.startswith(prefix):
        return False
    # LDM's training writes its loss network and its averages under the same prefix
    return layout == "diffusers" or not key.removeprefix(prefix).startswith(LDM_LEFTOVERS)


def _no_vae(path: Path, keys: list[str]) -> str:
    first = f"its first key is {min(keys)!r}" if keys else "it is empty"
    return (
        f"{path} holds no AutoencoderKL: {first}.{nearest(WELL_KNOWN[0], keys)} Wanted keys such as "
        f"{WELL_KNOWN[0]!r}, or {WELL_KNOWN[1]!r} in a whole checkpoint."
    )
