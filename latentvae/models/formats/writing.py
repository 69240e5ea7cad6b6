"""Writing a VAE in any of the formats, all or nothing, and read back by stock diffusers before it counts."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import save_file

from latentvae.base.errors import LatentVAEError
from latentvae.models.formats.layout import is_attention_weight, ldm_name, to_convolution

Format = Literal["diffusers", "ldm", "single-file"]
Prefix = Literal["", "first_stage_model.", "vae."]

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CONFIG_NAME = "config.json"


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
    plain = plain_copy(vae, dtype)
    final = path.resolve()  # "." and links have no name to put another in place of
    partial = final.parent / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        plain.save_config(partial)
        file = partial / WEIGHTS_NAME
        save_file(_tensors(plain, to, prefix), file, metadata=_metadata(partial))
        _flush(file)
        verify_file(plain, file)
        if to == "diffusers":
            put_in_place(partial, final)
        else:
            let_others_read(partial)
            for name, target in zip((CONFIG_NAME, WEIGHTS_NAME)[-len(targets) :], targets, strict=True):
                (partial / name).replace(target)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        raise LatentVAEError(f"cannot write {path}: {error}. Choose another path.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def plain_copy(vae: AutoencoderKL, dtype: torch.dtype | None) -> AutoencoderKL:
    """A stock copy on the CPU, whatever has been patched into `vae`, in eval mode and without a path in it.

    Raises:
        LatentVAEError: a weight overflows in that dtype.
    """
    config = {key: value for key, value in vae.config.items() if key != "_name_or_path"}
    with torch.device("meta"):
        plain = AutoencoderKL.from_config(config)
    state = {}
    for key, tensor in vae.state_dict().items():
        state[key] = tensor.detach().to("cpu", dtype or vae.dtype, copy=True).contiguous()
        if tensor.isfinite().all() and not state[key].isfinite().all():
            raise LatentVAEError(f"{key!r} overflows in {dtype}. Choose --dtype bf16 or fp32.")
    plain.load_state_dict(state, assign=True)
    return plain.eval().requires_grad_(False)


def _tensors(vae: AutoencoderKL, to: Format, prefix: str) -> dict[str, torch.Tensor]:
    state = vae.state_dict()
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


def _flush(file: Path) -> None:
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


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
        _check_folder(path, overwrite)
        return [path]
    if path.suffix != ".safetensors":
        raise LatentVAEError(f"{path} has no name for {to}; wanted one that ends in .safetensors.")
    targets = [path.resolve()]
    if to == "single-file":
        targets = [path.resolve().with_suffix(".json"), *targets]
    for target in targets:
        if target.is_dir():
            raise LatentVAEError(f"{target} is a folder; wanted the name of a file to write.")
        if target.exists() and not overwrite:
            raise LatentVAEError(f"{target} is already there. Choose another, or pass --overwrite.")
    return targets


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.suffix == ".safetensors":
        raise LatentVAEError(f"{folder} is a file's name; wanted a folder's for diffusers.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise LatentVAEError(f"{folder} is a file; wanted a folder to write the model to.")
    other = sorted({path.name for path in folder.iterdir()} - {CONFIG_NAME, WEIGHTS_NAME})
    if other:
        raise LatentVAEError(f"{folder} holds other things, such as {other[0]}. Choose another folder.")
    if any(folder.iterdir()) and not overwrite:
        raise LatentVAEError(f"{folder} holds a model. Choose another folder, or pass --overwrite.")


def put_in_place(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`; what was there is deleted only after that, or comes back."""
    let_others_read(partial)
    old = final.parent / f".{final.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    try:
        partial.rename(final)
    except BaseException:
        if old.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def let_others_read(folder: Path) -> None:
    """Give a folder's tensors the permissions of any new file: safetensors 0.8 lets only the owner read."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)
