"""Writing a VAE in any of the formats, all or nothing, and read back by stock diffusers before it counts."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from latentvae.base import files
from latentvae.base.errors import LatentVAEError
from latentvae.models.formats.deriving import has_level_attention
from latentvae.models.formats.layout import is_attention_weight, ldm_name, to_convolution
from latentvae.models.formats.stored import CONFIG_NAME
from latentvae.models.shipped import WEIGHTS_NAME

Format = Literal["diffusers", "ldm", "single-file"]
Prefix = Literal["", "first_stage_model.", "vae."]


def save(
    vae: AutoencoderKL,
    path: str | Path,
    to: Format = "diffusers",
    *,
    dtype: torch.dtype | None = None,
    prefix: Prefix = "",
    overwrite: bool = False,
) -> Path:
    """Write a VAE as it is, and read it back with stock diffusers before anything is replaced.

    LDM's names with attention in the levels are read back bit by bit instead: stock diffusers drops that.

    Args:
        vae: any AutoencoderKL; not changed.
        path: of a folder for `diffusers`, else of a *.safetensors file.
        to: `diffusers`: a folder with config.json. `ldm`: one file in LDM's names, as ComfyUI and A1111 take
            it. `single-file`: one file in diffusers' names, and beside it the config as *.json, which stock
            `AutoencoderKL.from_single_file(file, config=json)` wants. Files carry the config too, in their
            metadata, where `latentvae.load` finds it.
        dtype: of the weights; None keeps the model's.
        prefix: before every name, as in whole checkpoints; only for `ldm`.
        overwrite: replace what was written there before.

    Returns:
        The path.

    Raises:
        LatentVAEError: the path holds something, or cannot be written, or a weight does not fit the dtype.
    """
    path = Path(path)
    if prefix and to != "ldm":
        raise LatentVAEError(f"a prefix {prefix!r} goes with LDM's names only, not with {to}. Leave it out.")
    targets = check_targets(path, to, overwrite)
    plain = cast_copy(vae, dtype)
    # read back while it is still a temporary folder: what stock diffusers reads otherwise never gets the name
    message = "cannot write {path}: {reason}. Choose another path."
    if to == "diffusers":
        with files.whole_folder(path, message=message) as partial:
            _write_verified(plain, partial, to, prefix)
        return path
    with files.explained(path, message=message), files.partial_folder(path.resolve()) as partial:
        _write_verified(plain, partial, to, prefix)
        files.let_others_read(partial)
        # the config first: without weights it is no model, so a kill between the two leaves none
        for name, target in zip((CONFIG_NAME, WEIGHTS_NAME)[-len(targets) :], targets, strict=True):
            (partial / name).replace(target)
    return path


def _write_verified(plain: AutoencoderKL, folder: Path, to: Format, prefix: str) -> None:
    plain.save_config(folder)
    file = folder / WEIGHTS_NAME
    tensors = _tensors(plain, to, prefix)
    save_file(tensors, file, metadata=_metadata(folder))
    files.fsync(file)
    if stock_reads(plain.config, to):
        verify_file(plain, file)
        return
    found = load_file(file)
    if found.keys() != tensors.keys() or any(not torch.equal(found[key], tensors[key]) for key in tensors):
        raise LatentVAEError(f"{file.name} reads otherwise than it was written. Is the disk sound?")


def stock_reads(config: dict[str, Any], to: Format) -> bool:
    """Whether stock diffusers reads what is written: LDM's names with attention in the levels it does not."""
    return to != "ldm" or not has_level_attention(config)


def cast_copy(vae: AutoencoderKL, dtype: torch.dtype | None) -> AutoencoderKL:
    """A stock copy on the CPU, whatever has been patched into `vae`, in eval mode and without a path in it.

    Raises:
        LatentVAEError: a weight overflows in that dtype.
    """
    # built anew: hooks, folded weights and patched methods stay with `vae`
    config = {key: value for key, value in vae.config.items() if key != "_name_or_path"}
    with torch.device("meta"):  # no random initialisation of weights that are replaced at once
        plain = AutoencoderKL.from_config(config)
    state = {}
    for key, tensor in vae.state_dict().items():
        state[key] = tensor.detach().to("cpu", dtype or vae.dtype, copy=True).contiguous()
        if tensor.isfinite().all() and not state[key].isfinite().all():
            raise LatentVAEError(f"{key!r} overflows in {dtype}. Choose --dtype bf16 or fp32.")
    plain.load_state_dict(state, assign=True)
    return plain.eval().requires_grad_(False)


def _tensors(vae: AutoencoderKL, to: Format, prefix: str) -> dict[str, torch.Tensor]:
    state = vae.state_dict()  # under diffusers' names, which both its own formats have
    if to != "ldm":
        return state
    levels = len(vae.config["block_out_channels"])
    return {
        prefix + ldm_name(key, levels): to_convolution(tensor) if is_attention_weight(key) else tensor
        for key, tensor in state.items()
    }


def _metadata(folder: Path) -> dict[str, str]:
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return {"format": "pt", "config": json.dumps(config)}


def verify_file(vae: AutoencoderKL, file: Path) -> None:
    """Load a file, its config.json beside it, with stock diffusers, and compare every weight, in float32.

    Raises:
        LatentVAEError: a weight is missing or differs.
    """
    # so diffusers casts what is narrower to float32, which is exact, and a missing weight stays a random one
    loaded = AutoencoderKL.from_single_file(
        str(file), config=str(file.parent / CONFIG_NAME), low_cpu_mem_usage=False
    )
    found: dict[str, Any] = loaded.state_dict()
    for key, tensor in vae.state_dict().items():
        if not torch.equal(found[key], tensor.to(found[key].dtype)):
            raise LatentVAEError(f"stock diffusers reads another {key!r} from {file.name} than was written.")


def check_targets(path: Path, to: Format, overwrite: bool) -> list[Path]:
    """The files that writing to `path` replaces, or the one folder.

    Raises:
        LatentVAEError: the name does not suit the format, or something is there.
    """
    if to == "diffusers":
        if path.suffix == ".safetensors":
            raise LatentVAEError(f"{path} is a file's name; wanted a folder's for diffusers.")
        files.check_folder(path, "model", only=(CONFIG_NAME, WEIGHTS_NAME), overwrite=overwrite)
        return [path]
    if path.suffix != ".safetensors":
        raise LatentVAEError(f"{path} has no name for {to}; wanted one that ends in .safetensors.")
    targets = [path.resolve()]
    if to == "single-file":
        targets = [path.resolve().with_suffix(".json"), *targets]
    for target in targets:
        files.check_file(target, overwrite=overwrite)
    return targets
