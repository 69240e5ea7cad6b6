"""A run in stages: several runs one after the other, each from the averaged weights of the one before.

A stage is a run in a folder of its own, so it is killed and resumed as one. What begins a stage is read from
disk, whether its process has trained the stage before or not, so stops at any moment change no bit.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentvae.base.errors import ConfigError
from latentvae.base.files import whole_file, whole_folder
from latentvae.training import checkpoint
from latentvae.training.adversary import WEIGHTS
from latentvae.training.checks import check_values, check_writable
from latentvae.training.config import Config
from latentvae.training.machine import is_first_process
from latentvae.training.record import draw_curves, read_records
from latentvae.training.validation import Lineage

logger = logging.getLogger(__name__)


def train_stages(config: Config, resume: str | None, train: Callable[[Config, Lineage], Path]) -> Path:
    """Train all stages that are not done; return the folder of the one export at the end.

    Args:
        config: with stages.
        resume: None to start, "latest" to continue, "auto" to do whichever fits.
        train: trains one stage, or continues it; what it raises ends the run.

    Raises:
        ConfigError: what would mix two runs.
    """
    check_values(config)
    folder = Path(config.output)
    _check_start(config, resume)
    earlier, exported = list[str](), folder / "vae"
    for number, stage in enumerate(config.stages):
        own = stage_config(config, number)
        mark = Path(own.output) / Lineage.MARK
        if not mark.is_file():
            logger.info(
                "stage %d of %d, %s: %d steps", number + 1, len(config.stages), stage.name, stage.steps
            )
            try:
                train(own, Lineage(config, number, tuple(earlier)))
            finally:
                if is_first_process():
                    summarise(config)
        # only the first process, which has written it, speaks of it on the card
        earlier.append(json.loads(mark.read_text(encoding="utf-8"))["training"] if mark.is_file() else "")
    if is_first_process():
        _put_together(config, exported)
    return exported


def stage_config(config: Config, number: int) -> Config:
    """A stage's settings; its discriminator begins as that of the stage before, where both have one."""
    own = config.stage(number)
    if number and own.adversarial.disc_weight and own.adversarial.init is None:
        before = Path(config.stage_folder(number - 1)) / "discriminator"
        if (before / WEIGHTS).is_file():
            own.adversarial.init = str(before)
    return own


def _check_start(config: Config, resume: str | None) -> None:
    """Refuse what would mix two runs.

    Raises:
        ConfigError: says how to continue, or to choose another output.
    """
    folder = Path(config.output)
    check_writable(folder)
    wanted = [Path(config.stage_folder(number)).name for number in range(len(config.stages))]
    there = sorted(path.name for path in (folder / "stages").glob("*"))
    if resume not in (None, "latest", "auto"):
        raise ConfigError(f"--resume {resume}: a run in stages goes on where it was; use latest or auto.")
    if checkpoint.listing(folder / "checkpoints"):
        raise ConfigError(f"{folder} holds a run's checkpoints, and not in stages. Choose another output.")
    if there and resume is None:
        raise ConfigError(f"{folder} holds a run's stages. Add --resume latest, or choose another output.")
    if not there and resume == "latest":
        raise ConfigError(f"--resume latest: no stage has begun in {folder}. Start without --resume.")
    if there != wanted[: len(there)]:
        raise ConfigError(
            f"{folder} holds the stages {', '.join(there)}; the configuration has {', '.join(wanted)}. Keep "
            "their names and order, or choose another output."
        )


def summarise(config: Config) -> None:
    """Write metrics.jsonl, curves.png and status.json of all stages so far into the run's folder."""
    folder, lines, before = Path(config.output), list[dict[str, Any]](), 0
    status: dict[str, Any] | None = None
    for number, stage in enumerate(config.stages):
        place = Path(config.stage_folder(number))
        if not (place / "metrics.jsonl").is_file():
            break
        records = read_records(place / "metrics.jsonl")
        lines += [{**record, "step": before + record["step"], "stage": stage.name} for record in records]
        before += max((record["step"] for record in records), default=0)
        if (place / "status.json").is_file():
            own = json.loads((place / "status.json").read_text(encoding="utf-8"))
            status = {**own, "stage": stage.name}
            if own["state"] == "finished" and number < len(config.stages) - 1:
                status["state"] = "running"
    if status is None:
        return
    with whole_file(folder / "metrics.jsonl") as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with whole_file(folder / "status.json") as partial:
        partial.write_text(json.dumps(status), encoding="utf-8")
    if lines:
        draw_curves(folder / "metrics.jsonl", folder / "curves.png")


def _put_together(config: Config, exported: Path) -> None:
    """The last stage's export, and discriminator if it has one, as the run's."""
    last = Path(config.stage_folder(len(config.stages) - 1))
    summarise(config)
    for name in ("vae", "discriminator"):
        if (last / name).is_dir():
            with whole_folder(exported.with_name(name)) as partial:
                shutil.copytree(last / name, partial, dirs_exist_ok=True)
