"""Loading an `AutoencoderKL` from wherever it is, every weight accounted for."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from latentvae.errors import ModelError
from latentvae.presets import PRESETS, nearest

logger = logging.getLogger(__name__)

WEIGHTS_DIR = Path(__file__).parent / "weights"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
DEFAULT_MODEL = "f8c4-small"

PICKLED_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
OLD_ATTENTION_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def bundled() -> list[str]:
    """Names of the models whose trained weights are installed with this package."""
    return sorted(path.parent.name for path in WEIGHTS_DIR.glob(f"*/{WEIGHTS_NAME}"))


def load(
    source: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> AutoencoderKL:
    """Load an `AutoencoderKL` in eval mode, every weight accounted for.

    Args:
        source: None for the bundled default; the name of a bundled model; a diffusers folder (of the VAE
            itself, or of a pipeline with a `vae/` in it); one `*.safetensors` file; or a hub id.
        dtype: the weights' dtype, whatever the file holds.
        device: where to put it.

    Raises:
        ModelError: nothing there, not an AutoencoderKL, pickled weights, or missing, extra or misshaped keys.
    """
    vae = _load(DEFAULT_MODEL if source is None else source, dtype)
    return vae.to(device).eval()


def _load(source: str | Path, dtype: torch.dtype) -> AutoencoderKL:
    name, path = str(source), Path(source)
    if name in bundled():
        return _load_folder(WEIGHTS_DIR / name, dtype)
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.suffix in PICKLED_SUFFIXES:
        raise ModelError(_refuse_pickle(path))
    if path.suffix == ".safetensors":
        return _load_file(path, dtype)
    if path.is_file():
        raise ModelError(f"{path} is no model: wanted a *.safetensors file or a folder with a config.json.")
    if name in PRESETS:
        raise ModelError(
            f"the preset {name!r} comes without trained weights. Bundled models: "
            f"{', '.join(bundled()) or 'none'}. Train it (`latentvae train`), or call "
            f"latentvae.build({name!r}) for random weights."
        )
    return _load_hub(name, dtype)


def _load_folder(folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    config = _read_config(folder)
    files = _weight_files(folder)
    if not files:
        pickled = [path for path in sorted(folder.iterdir()) if path.suffix in PICKLED_SUFFIXES]
        if pickled:
            raise ModelError(_refuse_pickle(pickled[0]))
        raise ModelError(f"{folder} has a config.json and no weights. Wanted {WEIGHTS_NAME} beside it.")
    tensors = {key: tensor for path in files for key, tensor in _read_tensors(path).items()}
    return _assemble(config, tensors, dtype, files[0] if len(files) == 1 else folder)


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or the shards of an index, or else a variant (fp16)."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    indexes = sorted(folder.glob(f"{WEIGHTS_NAME}.index*.json"), key=lambda path: len(path.name))
    if indexes:
        try:
            shards = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{indexes[0]} is no index of shards: {error!r}. Download it again.") from error
        return [folder / Path(name).name for name in sorted(shards)]
    return sorted(folder.glob(f"{WEIGHTS_NAME.removesuffix('.safetensors')}.*.safetensors"))[:1]


def _load_file(path: Path, dtype: torch.dtype) -> AutoencoderKL:
    if not path.is_file():
        raise ModelError(f"no such file: {path}.")
    tensors = _read_tensors(path)
    config = _config_in_metadata(path)
    if config is None and (path.parent / "config.json").is_file():
        config = _read_config(path.parent)
    if config is None:
        raise ModelError(
            f"{path} does not say what model it holds: no config in its metadata, and no "
            "config.json beside it. Put the model's config.json beside it."
        )
    return _assemble(config, tensors, dtype, path)


def _load_hub(name: str, dtype: torch.dtype) -> AutoencoderKL:
    if name.count("/") != 1 or name.startswith((".", "/")):
        known = [*bundled(), *PRESETS]
        raise ModelError(
            f"no model {name!r}: no such file or folder, no bundled model of that name."
            f"{nearest(name, known)} Wanted {', '.join([*bundled(), ''])}a diffusers folder, a "
            "*.safetensors file or a hub id (owner/name)."
        )
    try:
        subfolder = _hub_subfolder(name)
        _check_class(AutoencoderKL.load_config(name, subfolder=subfolder), Path(name))
        return _from_pretrained(name, dtype, subfolder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model {name!r}: no such folder here, and the hub did not give it ({error}). "
            "Check the name and the connection, or download it and pass the folder."
        ) from error


def _hub_subfolder(name: str) -> str:
    """Where in a hub repository, or in the cache's copy of it, the VAE's config is: "" or "vae".

    Asked before anything is downloaded, because downloads without a connection retry for minutes.
    """
    from huggingface_hub import file_exists, try_to_load_from_cache

    files = {"": "config.json", "vae": "vae/config.json"}
    for subfolder, file in files.items():
        if isinstance(try_to_load_from_cache(name, file), str):
            return subfolder
    for subfolder, file in files.items():
        try:
            if file_exists(name, file):
                return subfolder
        except Exception as error:  # what is raised without a connection depends on the hub's HTTP library
            raise OSError(f"{type(error).__name__}: {error}") from error
    raise OSError("there is no such repository, or no config.json in it or in its vae/")


def _from_pretrained(name: str, dtype: torch.dtype, subfolder: str) -> AutoencoderKL:
    options: dict[str, Any] = {"subfolder": subfolder, "torch_dtype": dtype, "use_safetensors": True}
    options["output_loading_info"] = True
    try:
        vae, report = AutoencoderKL.from_pretrained(name, **options)
    except OSError as error:
        try:  # some repositories have no other than half-precision weights
            vae, report = AutoencoderKL.from_pretrained(name, variant="fp16", **options)
        except OSError:
            raise error from None
    broken = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
    if broken:
        raise ModelError(
            f"{name} is no complete AutoencoderKL: {len(broken)} keys do not fit, first {broken[0]!r}."
        )
    return vae


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} is no model folder: it has no config.json. Wanted a folder written by "
            "`latentvae export` or by diffusers' save_pretrained, or one with a vae/ folder in it."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    _check_class(config, path)
    return config


def _check_class(config: dict[str, Any], path: Path) -> None:
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != "AutoencoderKL":
        raise ModelError(f"{path} describes {name or 'no model class'}; wanted an AutoencoderKL.")


def _config_in_metadata(path: Path) -> dict[str, Any] | None:
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("config")
    if text is None:
        return None
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"the config in the metadata of {path} is not valid JSON: {error}.") from error
    _check_class(config, path)
    return config


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is not a readable safetensors file: {error}. Download or export it again."
        ) from error


def _assemble(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], dtype: torch.dtype, path: Path
) -> AutoencoderKL:
    """Put tensors into the model that `config` describes, refusing anything left over or left out."""
    try:
        vae = AutoencoderKL.from_config(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"the config of {path} makes no AutoencoderKL: {error}.") from error
    tensors = {_current_name(key): tensor for key, tensor in tensors.items()}
    check_keys(tensors, vae.state_dict(), path)
    vae.load_state_dict({key: tensor.to(dtype) for key, tensor in tensors.items()}, assign=True)
    return vae.requires_grad_(True)


def _current_name(key: str) -> str:
    """What diffusers calls a weight today: files from before 2023, such as SD's, name attention otherwise."""
    block, dot, rest = key.partition(".attentions.")
    for old, new in OLD_ATTENTION_NAMES.items():
        rest = rest.replace(old, new)
    return block + dot + rest


def check_keys(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], path: Path) -> None:
    """Compare a file's keys and shapes with a model's state dict.

    Raises:
        ModelError: names the first key that is missing, extra or misshaped, its nearest match, and the count.
    """
    missing, extra = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    problems = [f"lacks {key!r}.{nearest(key, extra)}" for key in missing]
    problems += [f"has {key!r}, which the model has not.{nearest(key, missing)}" for key in extra]
    problems += [
        f"has {key!r} of shape {tuple(tensors[key].shape)}; the model's is {tuple(wanted[key].shape)}."
        for key in tensors.keys() & wanted.keys()
        if tensors[key].shape != wanted[key].shape
    ]
    if problems:
        raise ModelError(
            f"{path} does not fit its config: it {min(problems)} ({len(problems)} of {len(wanted)} keys). "
            "Use the config.json that belongs to these weights."
        )


def spatial_compression_ratio(vae: AutoencoderKL) -> int:
    """How many image pixels one latent pixel spans along each side."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def describe(vae: AutoencoderKL) -> dict[str, Any]:
    """What a model is, as JSON values: config, parameter counts, compression."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in vae.named_children()}
    ratio = spatial_compression_ratio(vae)
    return {
        "parameters": sum(counts.values()),
        "encoder_parameters": counts["encoder"] + counts.get("quant_conv", 0),
        "decoder_parameters": counts["decoder"] + counts.get("post_quant_conv", 0),
        "spatial_compression_ratio": ratio,
        "values_ratio": ratio**2 * vae.config["in_channels"] / vae.config["latent_channels"],
        "config": dict(vae.config),
    }


def _refuse_pickle(path: Path) -> str:
    return (
        f"{path} holds pickled weights, which can run code when loaded. Wanted safetensors: convert it once, "
        "in a place you trust, with `safetensors.torch.save_file(torch.load(path, weights_only=True), out)`."
    )
