"""What a training run is told, checked before any weight is loaded. Every default carries its reason."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentvae.errors import ConfigError, ModelError
from latentvae.presets import nearest, preset_config

# An editable checkout keeps the recipes where people edit them; a wheel carries them inside the package.
_RECIPE_DIRS = (
    Path(__file__).parents[2] / "train" / "configs",
    Path(__file__).parents[1] / "recipes",
)


Beta = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Which VAE, and where its first weights come from."""

    preset: str = "f8c4-small"
    overrides: dict[str, Any] = Field(
        default_factory=dict
    )  # AutoencoderKL arguments, e.g. latent_channels: 8
    init: str | None = (
        None  # fine-tune: start from these weights (folder, file, bundled name); None: from scratch
    )


class DataConfig(_Section):
    """Images, and the crops drawn from them."""

    # A folder of images, .tar shards or .parquet files, one such file, a dataset saved with save_to_disk,
    # or a pattern such as shards/{000..011}.tar. The only setting without a default that works.
    train: str | None = None
    # Of a dataset: the column with the images; of .tar shards: the members' extension. None: found by type.
    column: str | None = None
    val: str | None = None  # None: hold out `val_images` of the training folder
    val_images: int = Field(24, ge=1)  # enough for a mean that moves by less than 0.1 dB between runs
    val_size: int = Field(256, ge=16)  # centre crops of this size, so that they batch
    crop: int = Field(
        64, ge=16
    )  # px; a VAE is local, so many small crops teach more per second than few large
    short_side: int | None = Field(None, ge=16)  # resize images to this short side first; None: as they are
    horizontal_flip: bool = True  # free data: photographs have no handedness
    in_memory: bool = False  # decode everything once; for sets that fit in RAM
    workers: int = Field(1, ge=0)  # processes that decode; 0 is enough with in_memory


class LossConfig(_Section):
    """Weights of the terms; their reductions are stated in latentvae/losses.py."""

    pixel: Literal["l1", "l2", "charbonnier"] = "l1"  # L1: less blur than L2 at the same PSNR
    kl_weight: float = Field(1e-6, ge=0)  # LDM's: keeps latents near unit scale and costs no detail
    perceptual_weight: float = Field(1.0, ge=0)  # LDM's; 0 leaves LPIPS out
    perceptual_net: Literal["vgg", "squeeze", "alex"] = "vgg"  # LDM's; squeeze is several times faster
    perceptual_weights: str | None = None  # backbone file or folder; None: torchvision's cache


class OptimConfig(_Section):
    """Optimizer and schedule."""

    name: Literal["muon", "adamw"] = "muon"  # Muon on kernels: clearly ahead of AdamW at equal steps
    lr: float = Field(1e-3, gt=0)  # Muon's updates are scaled to AdamW's size, so one rate serves both
    betas: tuple[Beta, Beta] = (0.9, 0.99)  # 0.99: short runs cannot wait for an average over 1000 steps
    weight_decay: float = Field(0.01, ge=0)  # kernels only: norms undo their scale, but the step size sees it
    warmup_steps: int = Field(100, ge=0)  # Adam's second moments are noise before
    schedule: Literal["cosine", "constant"] = "cosine"  # the decay is worth half a dB at the end
    decay_steps: int | None = Field(None, ge=1)  # cosine over the last so many steps; None: after the warm-up
    final_lr: float = Field(0.01, ge=0, le=1)  # share of lr left at the end
    max_grad_norm: float = Field(1.0, gt=0)  # gradients are far below but for outliers


class TrainConfig(_Section):
    """The loop."""

    max_steps: int = Field(10_000, ge=1)  # optimizer steps
    batch_size: int = Field(32, ge=1)  # images per process and forward pass
    accumulation: int = Field(1, ge=1)  # forward passes per optimizer step
    precision: Literal["fp32", "bf16"] = "bf16"  # of autocast; weights are fp32 always
    channels_last: bool = True  # several times faster convolutions on CPU and tensor cores
    gradient_checkpointing: bool = False  # a third slower, far less memory
    compile: bool = False  # pays on GPUs; minutes of compiling on a CPU gain a few per cent
    ema_decay: float = Field(0.999, ge=0, lt=1)  # averages the last thousand steps; warms up in shorter runs
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(500, ge=1)
    save_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)  # two: if the newest is damaged there is another
    tracker: Literal["tensorboard", "none"] = "tensorboard"


class Config(_Section):
    """A whole training run."""

    output: str = "runs/latentvae"
    seed: int = Field(0, ge=0, lt=2**63)  # what both torch's and numpy's generators take
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        try:
            shape = preset_config(self.model.preset, **self.model.overrides)
        except ModelError as error:
            raise ValueError(str(error)) from error
        factor = 2 ** (len(shape["block_out_channels"]) - 1)
        for name in ("crop", "val_size"):
            size = getattr(self.data, name)
            if size % factor:
                raise ValueError(
                    f"data.{name}={size} is not a multiple of the model's compression ratio {factor}; "
                    f"use {size // factor * factor or factor} or {(size // factor + 1) * factor}"
                )
        if self.optim.warmup_steps + (self.optim.decay_steps or 0) > self.train.max_steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} and "
                f"optim.decay_steps={self.optim.decay_steps} do not fit into "
                f"train.max_steps={self.train.max_steps}; lower them"
            )
        return self


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = next((folder for folder in _RECIPE_DIRS if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def load_config(source: str | Path | None, settings: list[str] | None = None) -> Config:
    """Read a recipe by name or a YAML file by path, apply `a.b=c` settings in order, and check the result.

    Raises:
        ConfigError: no such recipe or file, bad YAML, unknown keys (with the nearest), wrong types, or values
            that do not fit together.
    """
    tree = _read(source) if source is not None else {}
    for setting in settings or []:
        _apply(tree, setting)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from error


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        known = recipes()
        if str(source) not in known:
            raise ConfigError(
                f"no config {str(source)!r}: no such file, and the recipes are {', '.join(known)}."
                + nearest(str(source), known)
            )
        path = known[str(source)]
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} could not be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds {type(tree).__name__}; wanted sections such as `data:` and `train:`."
        )
    sections = [name for name, field in Config.model_fields.items() if isinstance(field.default, _Section)]
    # a section whose lines are all commented out reads as None
    return {key: {} if value is None and key in sections else value for key, value in tree.items()}


def _apply(tree: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"--set {setting!r} is not of the form section.key=value, e.g. train.max_steps=200."
        )
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {setting!r}: {section!r} is a value, not a section.")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting!r}: {text!r} is not a YAML value ({error}).") from error


def _explain(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        came = "" if isinstance(problem["input"], dict) else f" (came: {problem['input']!r})"
        return f"{place or 'config'}: {problem['msg'].removeprefix('Value error, ')}{came}"
    section: Any = Config
    for part in problem["loc"][:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    hint = nearest(str(problem["loc"][-1]), known) or f" Known: {', '.join(known)}."
    return f"unknown setting {place!r}.{hint}"
