"""Whatever can be wrong with a run and needs no weights to be seen, in one place: before anything loads.

`check_values` looks at the settings alone, when they are read. `check_start` looks at them once more, as code
may have changed them, and at this machine; `find_start` at the folder that the first process writes to. What
only weights can tell is refused where they load (module.py).
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from latentvae.base.errors import ConfigError, ModelError
from latentvae.base.files import check_folder, check_local
from latentvae.images.sources import parts
from latentvae.measure.lpips import smallest_side
from latentvae.models.loading import SIDECAR
from latentvae.models.presets import nearest, preset_config
from latentvae.training import checkpoint
from latentvae.training.adversary import GROUPS, find_weights, smallest_input
from latentvae.training.config import Config, DataConfig, DistilConfig, ModelConfig, OptimConfig


def check_start(config: Config) -> None:
    """Refuse a run that could not start well on this machine; nothing is made or written here.

    Raises:
        ConfigError: settings that do not fit together; an unknown tracker; an output among the images; a
            checkpoint where a model was wanted.
    """
    check_values(config)  # `model_copy` checks nothing
    _check_tracker(config.train.tracker)
    _check_apart(Path(config.output), config.data)
    for setting, source in (("init", config.model.init), ("teacher", config.model.teacher)):
        check_exported(setting, source)
    if config.adversarial.init is not None:
        find_weights(config.adversarial.init)


def find_start(config: Config, resume: str | None) -> Path | None:
    """The checkpoint to continue from, if any; asked by the process that writes.

    Nothing is made or written here, so a run that is refused leaves nothing behind.

    Raises:
        ConfigError: nothing to resume; an output that is another run's, not writable, or in the way.
    """
    folder = Path(config.output)
    start = _starting_point(folder, resume)
    check_writable(folder)
    if start is not None:
        _check_same_space(config.model, start)
    return start


# --- the settings alone ------------------------------------------------------------------------------------


def check_values(config: Config) -> None:
    """Refuse settings that do not fit together.

    Raises:
        ConfigError: names both settings, and values that would do.
    """
    if config.stages:
        _check_stages(config)
        return
    check_local(config.output, ConfigError)
    _check_sizes(config.data)
    _check_range(config.data)
    _check_model(config.model)
    _check_ratio(config)
    _check_adversary(config)
    _check_perceptual(config)
    _check_steps(config.optim, config.train.max_steps)
    _check_distil(config)
    if config.loss.free_bits and config.train.accumulation > 1:
        raise ConfigError(
            f"loss.free_bits={config.loss.free_bits} counts a channel's nats over one forward pass, and "
            f"train.accumulation={config.train.accumulation} has several in a step; use one larger batch"
        )
    _check_align(config)
    scales = config.regularise.equivariance
    if scales.min_scale > scales.max_scale:
        raise ConfigError(
            f"regularise.equivariance.min_scale={scales.min_scale} is above "
            f"max_scale={scales.max_scale}; both are in 32nds of the full size"
        )


def _check_stages(config: Config) -> None:
    names = [stage.name for stage in config.stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"stages: {', '.join(names)}; give each a name of its own")
    for number, stage in enumerate(config.stages):
        own: list[str] = [name for name in ("output", "stages") if name in stage.overrides]
        # a stage's length is its own, and it begins with what the one before has learned
        train, model = (_section(stage.overrides, name) for name in ("train", "model"))
        own += ["train.max_steps"] if "max_steps" in train else []
        own += [f"model.{name}" for name in ("init", "overrides") if number and name in model]
        if own:
            raise ConfigError(f"stages, {stage.name}: {own[0]} is the run's; leave it out there")
        each = config.stage(number)
        if each.train.precision != config.train.precision:
            raise ConfigError(f"stages, {stage.name}: train.precision is the same in all; set it for the run")
        try:
            check_values(each)
        except ConfigError as error:
            raise ConfigError(f"stages, {stage.name}: {error}") from error


def _section(overrides: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a stage's overrides; what is none is refused with the stage's other types."""
    found = overrides.get(name)
    return found if isinstance(found, dict) else {}


def _check_sizes(data: DataConfig) -> None:
    if data.short_side is not None and data.short_side < data.crop:
        raise ConfigError(
            f"data.short_side={data.short_side} is below data.crop={data.crop}: no image would "
            "be large enough; raise one or lower the other"
        )

    if data.zoom is not None and data.zoom[0] > data.zoom[1]:
        raise ConfigError(
            f"data.zoom={list(data.zoom)} begins above its end; use [{data.zoom[1]}, {data.zoom[0]}]"
        )


def _least_crop(data: DataConfig, side: int) -> int:
    """The data.crop of which no shape has a side below `side` pixels."""
    # down to 1:2, in steps as coarse as a large compression ratio makes them
    return math.ceil(1.5 * side) if data.max_aspect > 1 else side


def _crops(data: DataConfig) -> str:
    """The settings that decide the sides of crops, for messages."""
    return f"data.crop={data.crop}" + (
        f" with data.max_aspect={data.max_aspect:g}" if data.max_aspect > 1 else ""
    )


def _check_range(data: DataConfig) -> None:
    if data.range is not None and data.percentiles is not None:
        raise ConfigError(
            f"data.range={list(data.range)} and data.percentiles={list(data.percentiles)} both say what is "
            "black and white; leave one out"
        )
    for name in ("range", "percentiles"):
        limits = getattr(data, name)
        if limits is not None and limits[0] >= limits[1]:
            raise ConfigError(f"data.{name}={list(limits)} is empty; give the lower number first")


def _check_model(model: ModelConfig) -> None:
    if model.init is not None and model.overrides:
        raise ConfigError(
            f"model.overrides={model.overrides} with model.init={model.init}, whose shape is "
            "its own; leave one out, or add --set model.overrides={} where a recipe has them"
        )
    if model.mode == "decoder_only" and model.init is None:
        raise ConfigError("model.mode=decoder_only keeps a model's latents; name it in model.init")
    if model.space is not None and model.mode != "distil":
        raise ConfigError(f"model.space={model.space} is of a teacher, and model.mode={model.mode} has none")
    if (model.mode == "distil") != (model.teacher is not None):
        raise ConfigError(
            f"model.mode={model.mode} with model.teacher={model.teacher}; "
            "distil needs a teacher, and only distil has one"
        )


def _check_ratio(config: Config) -> None:
    """The preset's shape; that of `model.init` is its own, so its ratio is checked once it is loaded."""
    try:
        shape = preset_config(config.model.preset, **config.model.overrides)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    channels = shape["in_channels"], shape["out_channels"]
    if (config.data.range or config.data.percentiles) and channels[0] != 1 and config.model.init is None:
        raise ConfigError(
            f"data.range and data.percentiles are of one channel, and the model has {channels[0]}. Leave "
            "them out, or set model.overrides='{in_channels: 1, out_channels: 1}'"
        )
    if channels[0] != channels[1] or channels[0] not in (1, 3):
        raise ConfigError(
            f"in_channels={channels[0]} and out_channels={channels[1]}; images have 1 or 3 channels, and a "
            "reconstruction as many. Set both in model.overrides"
        )
    if config.model.init is not None:
        return
    factor = 2 ** (len(shape["block_out_channels"]) - 1)
    for name in ("crop", "val_size"):
        size = getattr(config.data, name)
        if size % factor:
            raise ConfigError(
                f"data.{name}={size} is not a multiple of the model's compression ratio {factor}; "
                f"use {size // factor * factor or factor} or {(size // factor + 1) * factor}"
            )


def _check_distil(config: Config) -> None:
    if config.model.teacher is None and config.distil != DistilConfig():
        raise ConfigError(
            "settings of distil.* say how to learn from a teacher, and there is none; set model.mode=distil "
            "and model.teacher, or leave them out"
        )
    if config.model.teacher is not None and config.regularise.mask.probability:
        raise ConfigError(
            "regularise.mask hides parts of what the encoder sees, and the teacher would be shown them "
            "hidden too; leave the mask or the teacher out"
        )
    if config.distil.turn_step is not None and config.distil.target == "original":
        raise ConfigError(
            f"distil.turn_step={config.distil.turn_step} turns the target to the original, which "
            "distil.target=original begins with; leave one out"
        )
    if config.distil.transplant and config.model.init is not None:
        raise ConfigError(
            f"distil.transplant begins as the teacher, and model.init={config.model.init} as another model; "
            "leave one out"
        )
    if config.distil.learn != "both" and config.model.init is None and not config.distil.transplant:
        raise ConfigError(
            f"distil.learn={config.distil.learn} leaves the other half as it is; name the model in model.init"
        )
    if config.distil.cache is not None and (config.data.range or config.data.percentiles):
        raise ConfigError(
            "distil.cache keeps pictures of 8 bits, and data.range is for more; leave one of them out"
        )
    if config.distil.cache is not None and config.data.horizontal_flip:
        raise ConfigError(
            "distil.cache keeps latents of images as they are, and those of a mirror image are others; set "
            "data.horizontal_flip=false, or leave the cache out"
        )
    if config.distil.cache is not None and (config.data.zoom is not None or config.data.max_aspect > 1):
        raise ConfigError(
            "distil.cache keeps latents of images at their own scale for square crops; leave data.zoom and "
            "data.max_aspect out, or the cache"
        )
    if config.distil.cache is not None and config.regularise.equivariance.probability:
        raise ConfigError(
            "distil.cache keeps the teacher's pictures, and regularise.equivariance asks it for pictures of "
            "changed latents; leave one out"
        )
    if config.distil.learn == "encoder" and config.adversarial.disc_weight:
        raise ConfigError(
            f"adversarial.disc_weight={config.adversarial.disc_weight} judges pictures, and "
            "distil.learn=encoder makes none; set it to 0, or learn the decoder too"
        )


def _check_align(config: Config) -> None:
    if not config.regularise.align.weight:
        return
    if config.model.mode != "full":
        raise ConfigError(
            f"regularise.align moves the latents, and model.mode={config.model.mode} says what they are; "
            "leave one out"
        )
    if config.train.accumulation > 1:
        raise ConfigError(
            f"regularise.align.weight={config.regularise.align.weight} is of the gradients of one forward "
            f"pass, and train.accumulation={config.train.accumulation} has several in a step; use one larger "
            "batch"
        )


def _check_adversary(config: Config) -> None:
    adversarial, last = config.adversarial, config.train.max_steps
    if not adversarial.disc_weight:
        if adversarial.init is not None:
            raise ConfigError(
                f"adversarial.init={adversarial.init} names a discriminator, and adversarial.disc_weight=0 "
                "has none; set it, e.g. to 0.5, or leave adversarial.init out"
            )
        return
    least = _least_crop(config.data, smallest_input(adversarial.layers))
    if adversarial.features is None and config.data.crop < least:
        raise ConfigError(
            f"{_crops(config.data)} leaves a discriminator of {adversarial.layers} layers no patch; use "
            f"{least} or more, or fewer adversarial.layers"
        )
    if adversarial.width % GROUPS:
        raise ConfigError(
            f"a discriminator of width {adversarial.width} cannot be divided into {GROUPS} groups."
        )
    if adversarial.disc_start >= last:
        raise ConfigError(
            f"adversarial.disc_start={adversarial.disc_start} is not before train.max_steps={last}; "
            "lower it, or set adversarial.disc_weight=0"
        )


def _check_perceptual(config: Config) -> None:
    net = config.loss.perceptual_net
    least = _least_crop(config.data, smallest_side(net))
    if config.loss.perceptual_weight and config.data.crop < least:
        raise ConfigError(
            f"{_crops(config.data)} is too small for loss.perceptual_net={net}, which needs {least}. Use "
            "larger crops, or another network."
        )


def _check_steps(optim: OptimConfig, last: int) -> None:
    decay = 0 if optim.schedule == "constant" else optim.decay_steps or 0
    if optim.warmup_steps + decay > last:
        room = last - optim.warmup_steps
        # a decay that leaves no step for the warm-up is refused, as to train without one would cost more
        advice = (
            f"set optim.decay_steps={room} or less, or to nothing (--set optim.decay_steps=) for all steps "
            "after the warm-up"
            if room > 0
            else "lower optim.warmup_steps"
        )
        raise ConfigError(
            f"optim.warmup_steps={optim.warmup_steps} and "
            f"optim.decay_steps={optim.decay_steps} do not fit into train.max_steps={last}; {advice}"
        )


# --- this machine ------------------------------------------------------------------------------------------


def _check_tracker(name: str) -> None:
    if name != "none" and name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(["none", *map(str, LOGGER_TYPE_TO_CLASS)])
        hint = nearest(name, known.split(", "))
        raise ConfigError(f"train.tracker={name!r} is no tracker of Accelerate's.{hint} Known: {known}.")


def _check_apart(folder: Path, data: DataConfig) -> None:
    """Pictures that a run writes among its images would be some of them when it is resumed."""
    for setting, spec in (("data.train", data.train), ("data.val", data.val)):
        named = [] if spec is None else parts(spec)
        places = [part.resolve() for part in named if isinstance(part, Path)]
        for place in (place for place in places if folder.resolve().is_relative_to(place)):
            raise ConfigError(
                f"output={folder} lies in {place}, the folder of {setting}: the pictures of a run would be "
                "taken for images when it is resumed. Choose an output elsewhere, such as "
                f"--set output={place.parent / 'runs'}."
            )


def _starting_point(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to continue from; a new run never goes on in another's folder."""
    own = folder / "checkpoints"
    start = checkpoint.resolve(resume, own) if resume else None
    # a checkpoint of elsewhere may begin a new folder, but what is in this one would be pruned for it
    if checkpoint.listing(own) and (start is None or start.resolve().parent != own.resolve()):
        raise ConfigError(
            f"{folder} holds a run's checkpoints. Add --resume latest, or choose another output."
        )
    return start


def check_writable(folder: Path) -> None:
    """Refuse an output that cannot be written to, or where something else is exported already.

    The nearest folder that exists is looked at, so that nothing is made for a run that is refused later.

    Raises:
        ConfigError: says to choose another.
    """
    try:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        usable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    except OSError:  # a folder on the way that may not be entered
        usable = False
    if not usable:
        raise ConfigError(f"output={folder} cannot be written to. Choose another output.")
    # an export of this run's may be replaced; anything else is somebody's
    check_folder(folder / "vae", "export", SIDECAR, instead="Choose another output", error=ConfigError)


def _check_same_space(model: ModelConfig, start: Path) -> None:
    """Under another teacher a run would export the latents of one with the factors of the other."""
    saved = json.loads((start / "state.json").read_text(encoding="utf-8")).get("config", {}).get("model", {})
    for name in ("teacher", "space"):
        before, now = saved.get(name), getattr(model, name)
        if before != now and "teacher" in saved:
            raise ConfigError(
                f"{start} was trained with model.{name}={before}, and now it is {now}. Keep it, or export "
                "the checkpoint and start a new run with model.init."
            )


def check_exported(name: str, path: str | None) -> None:
    """Refuse a checkpoint in place of a model: the scale of its latents has not been measured.

    Raises:
        ConfigError: with the way to export it.
    """
    if path is None or not Path(path).exists():  # a bundled name or one of a hub
        return
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / checkpoint.MANIFEST).is_file() and (folder / "state.json").is_file():
        raise ConfigError(
            f"model.{name}={path} is of a checkpoint, whose config has no scale of its latents yet. Export "
            f"it first, by `latentvae export {folder} -o FOLDER`, and name that folder."
        )


def check_compiler(device: torch.device) -> None:
    """Compile something tiny on the process's device.

    Raises:
        ConfigError: this machine cannot compile.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # a missing compiler shows in many ways
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"train.compile=true, but this machine cannot compile ({reason}). Install a C++ compiler (and, "
            "for a GPU, triton), or set train.compile=false."
        ) from error
