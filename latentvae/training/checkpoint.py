"""Checkpoints that are whole or not there: temporary folder, hashes last, rename, and only then prune."""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from latentvae.base.errors import ConfigError, LatentVAEError
from latentvae.base.files import file_sha256, partial_path, put_in_place
from latentvae.models.loading import check_keys
from latentvae.training.adversary import WEIGHTS, Adversary
from latentvae.training.alignment import Alignment
from latentvae.training.config import Config
from latentvae.training.optim import EMA, build_optimizer

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PREFIX = "step-"
PROJECTION = "projection.safetensors"  # of latents to a vision model's features, likewise
LECAM = "lecam.safetensors"  # averages of logits, of runs that have them
# fields of TrainingState in state.json; one that an older checkpoint lacks counts from 0
COUNTERS = ("step", "skipped_images", "skipped_steps", "bad_steps", "realigned")
# a manifest that lists less is not of a checkpoint
REQUIRED = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "config.json"}


@dataclass
class TrainingState:
    """Everything that a run continues from."""

    vae: AutoencoderKL
    ema: EMA
    optimizer: Optimizer
    adversary: Adversary | None = None
    alignment: Alignment | None = None
    step: int = 0  # optimizer steps done, bad ones included
    skipped_images: int = 0
    skipped_steps: int = 0  # whose loss or gradient was not finite
    bad_steps: int = 0  # of those, how many in a row just now
    realigned: int = 0  # times that processes on different hardware had drifted apart
    scaler: torch.amp.GradScaler | None = None  # Accelerate's, of losses in fp16

    @classmethod
    def build(
        cls,
        config: Config,
        vae: AutoencoderKL,
        start: Path | None,
        device: torch.device,
        alignment: Alignment | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> "TrainingState":
        """What training changes: fresh, or as the checkpoint `start` has it."""
        state = cls(
            vae=vae,
            ema=EMA(vae, config.train.ema_decay),
            optimizer=build_optimizer(vae, config.optim, config.distil),
            adversary=Adversary.build(
                config, vae.config["in_channels"], device, alignment.vision if alignment else None
            ),
            alignment=alignment,
            scaler=scaler,
        )
        if start is not None:
            restore(state, start)
        return state

    @property
    def networks(self) -> list[nn.Module]:
        """What steps change, the same in every process."""
        others: list[nn.Module] = [self.adversary.discriminator] if self.adversary is not None else []
        others += [self.alignment.projection] if self.alignment is not None else []
        return [self.vae, *others]

    @property
    def optimizers(self) -> list[Optimizer]:
        """Of these networks, in their order."""
        return [self.optimizer, *(each.optimizer for each in (self.adversary, self.alignment) if each)]

    def count_step(self, finite: bool) -> None:
        """Count a step that was done, or one that was skipped; as bad while no scale can be to blame."""
        self.step += 1
        self.skipped_steps += not finite
        if finite:
            self.bad_steps = 0
        elif self.scaler is None or self.scaler.get_scale() <= 1:
            self.bad_steps += 1


def write_whole(
    state: TrainingState, folder: Path, config: dict[str, Any], keep: int, accelerator: Accelerator
) -> Path:
    """Write a checkpoint into `folder`, by the main process for all; keep the newest `keep`.

    Processes have the same state but for random generators, from which training draws nothing.

    Raises:
        LatentVAEError: no room; earlier checkpoints stay.

    Args:
        state: of this process.
        folder: holds `step-00000500` and so on; the other processes need not see it.
        config: the run's resolved configuration, saved along.
        keep: how many checkpoints remain.
        accelerator: names the process, and makes all wait for the one that writes.
    """
    final = folder / f"{PREFIX}{state.step:08d}"
    partial = partial_path(final)
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write_state(state, partial, config)
            _seal(partial, final)
            prune(folder, keep, final)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        shutil.rmtree(partial, ignore_errors=True)
        last = listing(folder)
        kept = f"{last[-1]} is intact" if last else "there is none before it"
        onward = "add --resume latest" if last else "start again"
        raise LatentVAEError(
            f"the checkpoint of step {state.step} could not be written ({error}); {kept}. Make room, then "
            f"{onward}."
        ) from error
    accelerator.wait_for_everyone()
    return final


def restore(state: TrainingState, checkpoint: Path) -> None:
    """Restore a process's state in place from a checkpoint that `newest` or `resolve` returned."""
    saved = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    before, now = saved.get("trainable"), trainable(state.vae)
    if before is not None and before != now:
        first = next(iter(sorted(set(before) ^ set(now))), "their order")
        raise ConfigError(
            f"{checkpoint} was written with other parameters to train ({first}, for one). Keep model.freeze, "
            "model.mode and the model's shape (model.preset, model.overrides), or "
            f"`latentvae export {checkpoint} -o FOLDER` and start with model.init=FOLDER."
        )
    for module, name in ((state.vae, "model.safetensors"), (state.ema.model, "ema.safetensors")):
        _load_module(module, checkpoint / name, "model.preset, model.overrides and model.init")
    _load_optimizer(state.optimizer, checkpoint / "optimizer.safetensors")
    if state.adversary is not None and (checkpoint / WEIGHTS).is_file():
        shape = "adversarial.features, .width and .layers"
        _load_module(state.adversary.discriminator, checkpoint / WEIGHTS, shape)
        _load_optimizer(state.adversary.optimizer, checkpoint / "disc_optimizer.safetensors")
        if (checkpoint / LECAM).is_file():
            state.adversary.averages.copy_(load_file(checkpoint / LECAM)["averages"])
    if state.alignment is not None and (checkpoint / PROJECTION).is_file():
        _load_module(state.alignment.projection, checkpoint / PROJECTION, "regularise.align.model")
        _load_optimizer(state.alignment.optimizer, checkpoint / "align_optimizer.safetensors")
    if state.scaler is not None and "scaler" in saved:
        state.scaler.load_state_dict(saved["scaler"])
    for counter in COUNTERS:
        setattr(state, counter, saved.get(counter, 0))


def resolve(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume` names: "latest", a path, or "auto", which is None where none is yet.

    Raises:
        ConfigError: there is none, or the one named does not verify. Nor does "auto" begin anew where there
            are checkpoints and none is whole: they would be pruned.
    """
    if resume == "auto" and not listing(folder):
        return None
    if resume in ("latest", "auto"):
        found = newest(folder)
        if found is None:
            # a start would be refused beside damaged ones
            way = "Move those away to start anew." if listing(folder) else "Start without --resume."
            raise ConfigError(f"--resume {resume}: no complete checkpoint in {folder}. {way}")
        return found
    problem = damage(Path(resume))
    if problem:
        raise ConfigError(
            f"--resume {resume}: {problem}. Use `--resume latest` for the newest that is whole."
        )
    return Path(resume)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose hashes verify; damaged ones are named in a warning."""
    for checkpoint in reversed(listing(folder)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("checkpoint %s is passed over: %s", checkpoint.name, problem)
    return None


def listing(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first, verified or not."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{checkpoint} has no {MANIFEST}"
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    if not isinstance(manifest, dict) or not manifest.keys() >= REQUIRED:
        return f"its {MANIFEST} does not list a checkpoint's files"
    for name, digest in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != digest:
            return f"{name} does not match its sha256"
    return None


def prune(folder: Path, keep: int, last: Path) -> None:
    """Delete all but `keep` checkpoints up to `last`, and what interrupted saves left.

    Those after `last` go too: the run went back to before them, and `latest` must not mean them.
    """
    upto = [path for path in listing(folder) if path.name <= last.name]
    later = [path for path in listing(folder) if path.name > last.name]
    for path in [*upto[:-keep], *later, *folder.glob(f".{PREFIX}*")]:
        shutil.rmtree(path, ignore_errors=True)


def _write_state(state: TrainingState, folder: Path, config: dict[str, Any]) -> None:
    save_file(_contiguous(state.vae.state_dict()), folder / "model.safetensors")
    save_file(_contiguous(state.ema.model.state_dict()), folder / "ema.safetensors")
    save_file(_slots(state.optimizer), folder / "optimizer.safetensors")
    if state.adversary is not None:
        discriminator = state.adversary.discriminator.state_dict()
        save_file(_contiguous(discriminator), folder / WEIGHTS)
        save_file(_slots(state.adversary.optimizer), folder / "disc_optimizer.safetensors")
        if state.adversary.config.lecam_weight:
            save_file({"averages": state.adversary.averages}, folder / LECAM)
    if state.alignment is not None:
        save_file(_contiguous(state.alignment.projection.state_dict()), folder / PROJECTION)
        save_file(_slots(state.alignment.optimizer), folder / "align_optimizer.safetensors")
    state.vae.save_config(folder)  # config.json, so that the folder alone can be exported
    scalars = {
        **{counter: getattr(state, counter) for counter in COUNTERS},
        "trainable": trainable(state.vae),
        "config": config,
    }
    if state.scaler is not None:
        scalars["scaler"] = state.scaler.state_dict()  # numbers, all of them
    (folder / "state.json").write_text(json.dumps(scalars), encoding="utf-8")


def _slots(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """What an optimizer has accumulated, as "parameter index.name"."""
    slots = optimizer.state_dict()["state"].items()
    return _contiguous({f"{index}.{key}": value for index, slot in slots for key, value in slot.items()})


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _seal(partial: Path, final: Path) -> None:
    """Make a complete folder durable and give it its name in one step."""
    manifest = {path.name: file_sha256(path) for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    # the same step may be there: it is saved again after a resume from an older one
    put_in_place(partial, final, durable=True)


def _load_module(module: nn.Module, path: Path, settings: str) -> None:
    """Load what a checkpoint holds of a module whose shape follows from `settings`, as messages name them."""
    tensors = load_file(path)
    check_keys(tensors, module.state_dict(), path, f"Keep {settings} as the run began (its config.yaml).")
    module.load_state_dict(tensors)


def trainable(vae: AutoencoderKL) -> list[str]:
    """The names of what is trained, in the model's order, on which the numbers of optimizer slots depend."""
    return [name for name, parameter in vae.named_parameters() if parameter.requires_grad]


def _load_optimizer(optimizer: Optimizer, path: Path) -> None:
    """Restore what the optimizer has accumulated; its rates and decays are the configuration's."""
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path).items():
        index, key = name.split(".", 1)
        slots.setdefault(int(index), {})[key] = tensor
    # those of now, so that a changed learning rate or decay counts after a resume
    groups = optimizer.state_dict()["param_groups"]
    for group in groups:
        if any(
            ("momentum" in slots[index]) != group.get("muon", False)
            for index in group["params"]
            if index in slots
        ):
            raise ConfigError(
                f"{path.parent} was written with another optim.name. Keep that one, or start a new run from "
                f"its weights: `latentvae export {path.parent} -o FOLDER`, then model.init=FOLDER."
            )
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
