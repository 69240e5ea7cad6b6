"""Loading an `AutoencoderKL` from wherever it is, every weight accounted for."""

import json
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import ModelError
from latentvae.base.files import check_local
from latentvae.images.scans import Window
from latentvae.models import shipped
from latentvae.models.formats.deriving import derive_config
from latentvae.models.formats.layout import file_names, is_attention_weight, to_convolution
from latentvae.models.formats.stored import (
    CONFIG_NAME,
    StoredVAE,
    config_in_metadata,
    read_shards,
    read_stored,
)
from latentvae.models.presets import PRESETS, nearest
from latentvae.models.shipped import DEFAULT_MODEL, WEIGHTS_NAME, bundled

logger = logging.getLogger(__name__)


# unpickling runs whatever code the file names, so these are refused with the way out, never read
PICKLED_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
SUBFOLDERS = ("", "vae")  # of a repository: of a VAE, or of a whole pipeline
# classes that people try, and what they can do instead; docs/formats.md has them as a table
OTHERS = {
    "AutoencoderTiny": " One of these is a teacher (model.teacher) or a side of `latentvae agree`; in place "
    "of TAESD, `sd-small` is an AutoencoderKL of the same latent space.",
    "AutoencoderKLFlux2": " FLUX.2's latents are patched and normalised outside of its VAE: use diffusers "
    "for it. For FLUX.1's space there is `flux-small`.",
    "AutoencoderKLQwenImage": " This one is made for video, with 3-D convolutions: use diffusers for it.",
    "AutoencoderKLWan": " This one is made for video, with 3-D convolutions: use diffusers for it.",
    "AutoencoderDC": " Its latents have no distribution, and its blocks are others: use diffusers for it. "
    "For fewer latents than 8 x 8 pixels give, train a model of more levels.",
    "AsymmetricAutoencoderKL": " Its decoder takes a mask, which ours have no place for: use diffusers.",
}
SIDECAR = "latentvae.json"  # beside an export's config: what diffusers has no place for
WINDOW = "_latentvae_window"  # attribute of a loaded model: of what its images' samples are
BELONGS = "Use the config.json that belongs to these weights."
DAMAGED = "Its config was derived from the other tensors' shapes, so the file is damaged: download it again."


def load(
    source: str | Path | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> AutoencoderKL:
    """Load an `AutoencoderKL` in eval mode, every weight accounted for.

    A file may have diffusers' names or LDM's, bare or behind `first_stage_model.` or `vae.`, and be a whole
    checkpoint, of which only the VAE is read. Its config is that in its metadata, or else the config.json
    beside it, or else derived from its shapes; then a warning says what is not in them.

    Args:
        source: None for the bundled default; the name of a bundled model; a diffusers folder (of the VAE
            itself, or of a pipeline with a `vae/` in it); one `*.safetensors` file; or a hub id, of which a
            copy that is cached goes before the hub's.
        dtype: the weights' dtype, whatever the file holds; None keeps the file's (a hub id's: float32).
        device: where to put it.

    Raises:
        ModelError: nothing there, not an AutoencoderKL, pickled weights, or missing, extra or misshaped keys.
    """
    vae = _load(DEFAULT_MODEL if source is None else source, dtype)
    return vae.to(device).eval()


def _load(source: str | Path, dtype: torch.dtype | None) -> AutoencoderKL:
    name, path = str(source), Path(source)
    if name in bundled():
        return _load_folder(shipped.WEIGHTS_DIR / name, dtype)
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


def _load_folder(folder: Path, dtype: torch.dtype | None) -> AutoencoderKL:
    if not (folder / CONFIG_NAME).is_file() and (folder / "vae" / CONFIG_NAME).is_file():
        folder = folder / "vae"  # of a whole pipeline
    config = _read_config(folder)
    files = _weight_files(folder)
    if not files:
        pickled = [path for path in sorted(folder.iterdir()) if path.suffix in PICKLED_SUFFIXES]
        if pickled:
            raise ModelError(_refuse_pickle(pickled[0]))
        raise ModelError(f"{folder} has a config.json and no weights. Wanted {WEIGHTS_NAME} beside it.")
    vae = _assemble(config, read_shards(files, files[0] if len(files) == 1 else folder), dtype)
    return set_window(vae, _stated_window(folder))


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or the shards of an index, or else a variant (fp16)."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    indexes = sorted(folder.glob(f"{WEIGHTS_NAME}.index*.json"), key=lambda path: len(path.name))
    if indexes:  # the shortest name is that of the full weights: variants add theirs to it
        try:
            shards = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{indexes[0]} is no index of shards: {error!r}. Download it again.") from error
        # names alone: an index from elsewhere must not lead out of its folder
        return [folder / Path(name).name for name in sorted(shards)]
    return sorted(folder.glob(f"{WEIGHTS_NAME.removesuffix('.safetensors')}.*.safetensors"))[:1]


def _load_file(path: Path, dtype: torch.dtype | None) -> AutoencoderKL:
    if not path.is_file():
        check_local(path, ModelError)
        raise ModelError(f"no such file: {path}.")
    stored = read_stored(path)
    config = _own_config(stored)
    if config is not None:
        return _assemble(config, stored, dtype)
    config, note = derive_config(stored)
    logger.warning(note)
    return _assemble(config, stored, dtype, DAMAGED)


def _own_config(stored: StoredVAE) -> dict[str, Any] | None:
    """The config in a file's metadata, or else beside it; None where neither is.

    Beside LDM's files, and inside them, configs of other models are common: those are not the VAE's.
    """
    beside = stored.path.parent / CONFIG_NAME
    config, place = config_in_metadata(stored), stored.path
    if stored.layout == "ldm" and _class_name(config) != "AutoencoderKL":
        config = None
    if config is None and beside.is_file():
        config, place = _read_json(beside), beside
    if stored.layout == "ldm" and _class_name(config) != "AutoencoderKL":
        return None
    if config is not None:
        _check_class(config, place)
    return config


def _load_hub(name: str, dtype: torch.dtype | None) -> AutoencoderKL:
    check_local(name, ModelError)
    if not _may_be_on_hub(name):
        known = [*bundled(), *PRESETS]
        raise ModelError(
            f"no model {name!r}: no such file or folder, no bundled model of that name."
            f"{nearest(name, known)} Wanted {', '.join([*bundled(), ''])}a diffusers folder, a "
            "*.safetensors file or a hub id (owner/name)."
        )
    # by its config, so that another class is refused before its weights are downloaded
    subfolder, config = hub_config(name)
    _check_class(config, Path(name))
    return from_pretrained(AutoencoderKL, name, dtype, subfolder)


def _may_be_on_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/"))


def is_hub_id(name: str) -> bool:
    """Whether `load` asks the hub for a name: owner/name, and nothing here that is called so."""
    files = {".safetensors", *PICKLED_SUFFIXES}
    return _may_be_on_hub(name) and not Path(name).exists() and Path(name).suffix not in files


def hub_config(name: str) -> tuple[str, dict[str, Any]]:
    """Where in a hub repository the VAE is ("" or "vae"), and its config; a cached copy is not asked about.

    Raises:
        ModelError: no such repository, or no connection and nothing cached.
    """
    try:
        subfolder = _hub_subfolder(name)
        cached = _is_cached(name, subfolder)
        return subfolder, AutoencoderKL.load_config(name, subfolder=subfolder, local_files_only=cached)
    except (OSError, ValueError) as error:
        raise ModelError(_not_given(name, error)) from error


def _not_given(name: str, error: Exception) -> str:
    return (
        f"no model {name!r}: no such folder here, and the hub did not give it ({error}). "
        "Check the name and the connection, or download it and pass the folder."
    )


def _is_cached(name: str, subfolder: str) -> bool:
    file = f"{subfolder}/{CONFIG_NAME}".lstrip("/")
    return isinstance(huggingface_hub.try_to_load_from_cache(name, file), str)


def _hub_subfolder(name: str) -> str:
    """Where in a hub repository, or in the cache's copy of it, the VAE's config is: "" or "vae".

    Asked before anything is downloaded, because downloads without a connection retry for minutes.
    """
    for subfolder in SUBFOLDERS:
        if _is_cached(name, subfolder):
            return subfolder
    for subfolder in SUBFOLDERS:
        try:
            if huggingface_hub.file_exists(name, f"{subfolder}/{CONFIG_NAME}".lstrip("/")):
                return subfolder
        except Exception as error:  # what is raised without a connection depends on the hub's HTTP library
            raise OSError(f"{type(error).__name__}: {error}") from error
    raise OSError("there is no such repository, or no config.json in it or in its vae/")


def from_pretrained(kind: Any, name: str, dtype: torch.dtype | None, subfolder: str = "") -> Any:
    """A model of a diffusers class from a folder or a hub id, complete; a cached copy goes before the hub.

    Raises:
        ModelError: weights that are missing, or do not fit.
    """
    options: dict[str, Any] = {"subfolder": subfolder, "use_safetensors": True}
    options["output_loading_info"] = True
    # what is cached first, or each file would be asked about; a variant last: full precision where there is
    # both, but some repositories have no other than half-precision weights
    tries: list[dict[str, Any]] = [{"local_files_only": True}, {}, {"variant": "fp16"}]
    if not is_hub_id(name):
        tries.pop(1)
    vae, report = _first_that_loads(kind, name, [options | each for each in tries])
    broken = [key for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[what]]
    if broken:  # diffusers fills what is missing with random weights, and only logs it
        raise ModelError(
            f"{name} is no complete {kind.__name__}: {len(broken)} keys do not fit, first {broken[0]!r}."
        )
    return vae if dtype is None else cast(vae, dtype)


def _first_that_loads(kind: Any, name: str, tries: list[dict[str, Any]]) -> Any:
    """What the first of several ways to load gives; the error of a full-precision one where none does."""
    errors: list[Exception] = []
    for options in tries:
        try:
            return kind.from_pretrained(name, **options)
        except OSError as error:  # not there; the next may be
            errors.append(error)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ModelError(f"{name} could not be loaded as an {kind.__name__}: {error}") from error
    full = errors[-2]
    if Path(name).exists():
        raise ModelError(f"{name} could not be loaded as an {kind.__name__}: {full}") from full
    raise ModelError(_not_given(name, full)) from full


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ModelError(
            f"{folder} is no model folder: it has no config.json. Wanted a folder written by "
            "`latentvae export` or by diffusers' save_pretrained, or one with a vae/ folder in it."
        )
    config = _read_json(path)
    _check_class(config, path)
    return config


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error


def window_of(vae: AutoencoderKL) -> Window | None:
    """The intensity range of the samples that a model was trained on; None of photographs, as nearly all."""
    return getattr(vae, WINDOW, None)


def set_window(vae: AutoencoderKL, window: Window | None) -> AutoencoderKL:
    """Note a model's intensity range on the object: its config, diffusers' own, has no place for it."""
    setattr(vae, WINDOW, window)
    return vae


def _stated_window(folder: Path) -> Window | None:
    """What an export's sidecar says of intensities."""
    try:
        stated = json.loads((folder / SIDECAR).read_text(encoding="utf-8")).get("intensity_range")
    except (OSError, ValueError, AttributeError):  # none, or somebody else's: it is about other things
        return None
    return Window(*map(float, stated)) if stated else None


def _class_name(config: Any) -> str | None:
    return config.get("_class_name") if isinstance(config, dict) else None


def _check_class(config: Any, path: Path) -> None:
    name = _class_name(config)
    if name != "AutoencoderKL":
        raise ModelError(
            f"{path} describes {name or 'no model class'}; wanted an AutoencoderKL, which is what Stable "
            f"Diffusion 1 to 3.5, SDXL, FLUX.1 and our own models have.{OTHERS.get(str(name), '')}"
        )


def _assemble(
    config: dict[str, Any], stored: StoredVAE, dtype: torch.dtype | None, hint: str = BELONGS
) -> AutoencoderKL:
    """Put tensors into the model that `config` describes, refusing anything left over or left out."""
    try:
        vae = AutoencoderKL.from_config(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"the config of {stored.path} makes no AutoencoderKL: {error}.") from error
    state, tensors = vae.state_dict(), dict(stored.tensors)
    levels = len(vae.config["block_out_channels"])
    # compared under the file's names, so that messages name what a person finds in the file
    names = file_names(state, stored.layout, stored.prefix, levels, tensors)
    wanted = {names[key]: tensor for key, tensor in state.items()}
    if stored.layout == "ldm":
        # LDM keeps the matrices of attention as 1x1 convolutions, some files as kernels of one dimension
        for key in filter(is_attention_weight, names):
            wanted[names[key]] = to_convolution(state[key])
            if names[key] in tensors:
                tensors[names[key]] = to_convolution(tensors[names[key]])
    check_keys(tensors, wanted, stored.path, hint)
    dtype = dtype or stored.dtype
    weights = {key: tensors[name].reshape(state[key].shape).to(dtype) for key, name in names.items()}
    vae.load_state_dict(weights, assign=True)  # the tensors themselves: copied, there would be two of each
    return vae.requires_grad_(True)


def check_keys(
    tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], path: Path, hint: str = BELONGS
) -> None:
    """Compare a file's keys and shapes with a model's state dict, under the names that the file has.

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
    if problems:  # the least, not the first: sets have another order in every process
        raise ModelError(
            f"{path} does not fit its config: it {min(problems)} ({len(problems)} of {len(wanted)} keys). "
            f"{hint}"
        )


def cast(vae: AutoencoderKL, dtype: torch.dtype) -> AutoencoderKL:
    """Convert the weights as `vae.to(dtype)` does, without diffusers' warning where nothing has to stay."""
    if getattr(vae, "_keep_in_fp32_modules", None) or getattr(vae, "is_quantized", False):
        return vae.to(dtype)  # then diffusers has something to say
    return torch.nn.Module.to(vae, dtype)


def spatial_compression_ratio(vae: AutoencoderKL) -> int:
    """How many image pixels one latent pixel spans along each side."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)  # every level but the last halves the sides


def describe(vae: AutoencoderKL) -> dict[str, Any]:
    """What a model is, as JSON values: config, parameter counts, compression."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in vae.named_children()}
    ratio = spatial_compression_ratio(vae)
    return {
        "parameters": sum(counts.values()),
        "encoder_parameters": counts["encoder"] + counts.get("quant_conv", 0),
        "decoder_parameters": counts["decoder"] + counts.get("post_quant_conv", 0),
        "spatial_compression_ratio": ratio,
        # numbers of an image to one number of its latents
        "values_ratio": ratio**2 * vae.config["in_channels"] / vae.config["latent_channels"],
        "config": dict(vae.config),
    }


def _refuse_pickle(path: Path) -> str:
    # training's checkpoints, such as LDM's, keep the weights beside other things
    part = '["state_dict"]' if path.suffix == ".ckpt" else ""
    return (
        f"{path} holds pickled weights, which can run code when loaded. Wanted safetensors: convert it once, "
        "in a place you trust, with "
        f"`safetensors.torch.save_file(torch.load(path, weights_only=True){part}, out)`."
    )
