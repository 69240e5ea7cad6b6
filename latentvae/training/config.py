"""What a training run is told: recipes, YAML files and `--set`. Every default carries its reason."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentvae.base.errors import ConfigError, ModelError
from latentvae.models.presets import nearest, preset_config

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which VAE, where its first weights come from, and what of it is trained."""

    preset: str = "f8c4-small"
    overrides: dict[str, Any] = {}  # AutoencoderKL arguments, e.g. latent_channels: 8
    # start from these weights (folder, file, bundled name, hub id); None: from scratch
    init: str | None = None
    # full; decoder_only: latents stay as they are, bit for bit; distil: into the teacher's latent space
    mode: Literal["full", "decoder_only", "distil"] = "full"
    teacher: str | None = None  # of distil: any AutoencoderKL with latents of the same shape
    freeze: list[str] = []  # patterns of parameter names that stay as they are, e.g. "*.norm*"


class DataConfig(Section):
    """Images, and the crops drawn from them."""

    # A folder of images, .tar shards or .parquet files, one such file, a dataset saved with save_to_disk,
    # or a pattern such as shards/{000..011}.tar. The only setting without a default that works.
    train: str | None = None
    # Of a dataset: the column with the images; of .tar shards: the members' extension. None: found by type.
    column: str | None = None
    val: str | None = None  # None: hold out `val_images` of the training folder
    val_images: int = Field(24, ge=1)  # enough for a mean that moves by less than 0.1 dB between runs
    val_size: int = Field(256, ge=16)  # centre crops of this size, so that they batch
    # px; a VAE is local, so many small crops teach more per second than few large ones
    crop: int = Field(64, ge=16)
    short_side: int | None = Field(None, ge=16)  # resize images to this short side first; None: as they are
    horizontal_flip: bool = True  # free data: photographs have no handedness
    in_memory: bool = False  # decode everything once; for sets that fit in RAM
    workers: int = Field(1, ge=0)  # processes that decode; 0 is enough with in_memory


class LossConfig(Section):
    """Weights of the terms; their reductions are stated in latentvae/training/losses.py."""

    pixel: Literal["l1", "l2", "charbonnier"] = "l1"  # L1: less blur than L2 at the same PSNR
    kl_weight: float = Field(1e-6, ge=0)  # LDM's: keeps latents near unit scale and costs no detail
    perceptual_weight: float = Field(1.0, ge=0)  # LDM's; 0 leaves LPIPS out
    perceptual_net: Literal["vgg", "squeeze", "alex"] = "vgg"  # LDM's; squeeze is several times faster
    perceptual_weights: str | None = None  # backbone file or folder; None: torchvision's cache
    kl_warmup_steps: int = Field(
        0, ge=0
    )  # at 1e-6 the KL term cannot collapse anything; raise with kl_weight
    free_bits: float = Field(
        0.0, ge=0
    )  # nats per latent pixel that a channel may cost before the KL term acts
    distil_weight: float = Field(1.0, ge=0)  # latents have unit variance when scaled, images half of that


class AdversarialConfig(Section):
    """The discriminator and its part in the loss; off unless disc_weight is set."""

    disc_weight: float = Field(0.0, ge=0)  # LDM: 0.5; 0 leaves the discriminator out
    disc_start: int = Field(0, ge=0)  # optimizer step; a generator that still blurs teaches it nothing
    disc_ramp: int = Field(500, ge=0)  # steps from 0 to disc_weight: a sudden start ruins reconstructions
    lr: float = Field(2e-4, gt=0)  # below the VAE's, or it wins
    width: int = Field(64, ge=8)  # LDM's
    layers: int = Field(3, ge=1, le=5)  # patches of 70 px


class EquivarianceConfig(Section):
    """The same scaling and rotation of latents and target: makes latents easier to diffuse (EQ-VAE)."""

    probability: float = Field(0.0, ge=0, le=1)  # EQ-VAE: 0.5; 0 is off
    min_scale: int = Field(8, ge=1)  # in 32nds: EQ-VAE's quarter
    max_scale: int = Field(31, ge=1)  # in 32nds: just below full size


class MaskConfig(Section):
    """Hidden parts of the input, with the loss on all pixels, so that the model learns to fill them in."""

    probability: float = Field(0.0, ge=0, le=1)  # share of images; 0 is off
    max_share: float = Field(0.5, gt=0, le=1)  # of the pixels of one image


class RegulariseConfig(Section):
    """Regularisers of the latent space, all off by default: each costs some PSNR."""

    latent_noise: float = Field(
        0.0, ge=0
    )  # std in latent units, for decoders that must bear diffusion's errors
    equivariance: EquivarianceConfig = EquivarianceConfig()
    mask: MaskConfig = MaskConfig()


class OptimConfig(Section):
    """Optimizer and schedule."""

    name: Literal["muon", "adamw"] = "muon"  # Muon on kernels: clearly ahead of AdamW at equal steps
    lr: float = Field(1e-3, gt=0)  # Muon's updates are scaled to AdamW's size, so one rate serves both
    betas: tuple[Beta, Beta] = (0.9, 0.99)  # 0.99: short runs cannot wait for an average over 1000 steps
    weight_decay: float = Field(0.01, ge=0)  # kernels only: norms undo their scale, but the step size sees it
    warmup_steps: int = Field(100, ge=0)  # Adam's second moments are noise before
    schedule: Literal["cosine", "constant"] = "cosine"  # the decay is worth half a dB at the end
    decay_steps: int | None = Field(None, ge=1)  # cosine over the last so many steps; None: after the warm-up
    final_lr: float = Field(0.01, ge=0, le=1)  # share of lr left at the end
    # from scratch the norm falls from 3 to 1: shortens the first steps, and later only what stands out
    max_grad_norm: float = Field(1.0, gt=0)


class TrainConfig(Section):
    """The loop."""

    max_steps: int = Field(10_000, ge=1)  # optimizer steps
    # of the clock, from the start: then save and stop with exit code 4, to be resumed; for borrowed time
    max_minutes: float | None = Field(None, gt=0)
    batch_size: int = Field(32, ge=1)  # images per process and forward pass
    accumulation: int = Field(1, ge=1)  # forward passes per optimizer step
    # bf16: of autocast, with fp32 master weights; fp64: to prove what rounding would hide; auto: bf16 where
    # the hardware computes it, else fp32, as emulated bf16 is four times slower than fp32
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    channels_last: bool = True  # several times faster convolutions on CPU and tensor cores
    gradient_checkpointing: bool = False  # a third slower, far less memory
    compile: bool = False  # pays on GPUs; minutes of compiling on a CPU gain a few per cent
    ema_decay: float = Field(0.999, ge=0, lt=1)  # averages the last thousand steps; warms up in shorter runs
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(500, ge=1)
    save_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)  # two: if the newest is damaged there is another
    max_bad_steps: int = Field(10, ge=1)  # NaN or inf so many times in a row is no accident
    tracker: str = "tensorboard"  # or another of Accelerate's: wandb, mlflow, comet_ml, ...; none: only files

    @property
    def dtype(self) -> torch.dtype:
        """Of master weights and images."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def memory_format(self) -> torch.memory_format:
        """Of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


class Config(Section):
    """A whole training run."""

    output: str = "runs/latentvae"
    seed: int = Field(0, ge=0, lt=2**63)  # what both torch's and numpy's generators take
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    regularise: RegulariseConfig = RegulariseConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        _check_sizes(self)
        _check_steps(self)
        _check_mode(self.model)
        if self.loss.free_bits and self.train.accumulation > 1:
            raise ValueError(
                f"loss.free_bits={self.loss.free_bits} counts a channel's nats over one forward pass, and "
                f"train.accumulation={self.train.accumulation} has several in a step; use one larger batch"
            )
        scales = self.regularise.equivariance
        if scales.min_scale > scales.max_scale:
            raise ValueError(
                f"regularise.equivariance.min_scale={scales.min_scale} is above "
                f"max_scale={scales.max_scale}; both are in 32nds of the full size"
            )
        return self


def _check_sizes(config: Config) -> None:
    if config.data.short_side is not None and config.data.short_side < config.data.crop:
        raise ValueError(
            f"data.short_side={config.data.short_side} is below data.crop={config.data.crop}: no image would "
            "be large enough; raise one or lower the other"
        )
    if config.model.init is not None and config.model.overrides:
        raise ValueError(
            f"model.overrides={config.model.overrides} with model.init={config.model.init}, whose shape is "
            "its own; leave one out, or add --set model.overrides={} where a recipe has them"
        )
    try:
        shape = preset_config(config.model.preset, **config.model.overrides)
    except ModelError as error:
        raise ValueError(str(error)) from error
    _check_channels(shape)
    factor = 2 ** (len(shape["block_out_channels"]) - 1)
    for name in () if config.model.init is not None else ("crop", "val_size"):  # `check_crop` knows its ratio
        size = getattr(config.data, name)
        if size % factor:
            raise ValueError(
                f"data.{name}={size} is not a multiple of the model's compression ratio {factor}; "
                f"use {size // factor * factor or factor} or {(size // factor + 1) * factor}"
            )
    if config.adversarial.disc_weight and config.data.crop < (least := 3 * 2**config.adversarial.layers):
        raise ValueError(
            f"data.crop={config.data.crop} leaves a discriminator of {config.adversarial.layers} layers no "
            f"patch; use {least} or more, or fewer adversarial.layers"
        )


def _check_channels(shape: dict[str, Any]) -> None:
    channels = shape["in_channels"], shape["out_channels"]
    if channels[0] != channels[1] or channels[0] not in (1, 3):
        raise ValueError(
            f"in_channels={channels[0]} and out_channels={channels[1]}; images have 1 or 3 channels, and a "
            "reconstruction as many. Set both in model.overrides"
        )


def _check_steps(config: Config) -> None:
    last = config.train.max_steps
    decay = 0 if config.optim.schedule == "constant" else config.optim.decay_steps or 0
    if config.optim.warmup_steps + decay > last:
        raise ValueError(
            f"optim.warmup_steps={config.optim.warmup_steps} and "
            f"optim.decay_steps={config.optim.decay_steps} do not fit into train.max_steps={last}; lower them"
        )
    if config.adversarial.disc_weight and config.adversarial.disc_start >= last:
        raise ValueError(
            f"adversarial.disc_start={config.adversarial.disc_start} is not before train.max_steps={last}; "
            "lower it, or set adversarial.disc_weight=0"
        )


def _check_mode(model: ModelConfig) -> None:
    if model.mode == "decoder_only" and model.init is None:
        raise ValueError("model.mode=decoder_only keeps a model's latents; name it in model.init")
    if (model.mode == "distil") != (model.teacher is not None):
        raise ValueError(
            f"model.mode={model.mode} with model.teacher={model.teacher}; "
            "distil needs a teacher, and only distil has one"
        )


# An editable checkout keeps the recipes where people edit them; a wheel carries them inside the package.
_RECIPE_DIRS = (
    Path(__file__).parents[2] / "train" / "configs",
    Path(__file__).parents[1] / "recipes",
)


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
    sections = [name for name, field in Config.model_fields.items() if isinstance(field.default, Section)]
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
