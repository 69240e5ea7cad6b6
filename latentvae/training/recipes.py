"""How a run is told what to do: a recipe by its name or a YAML file, with `--set a.b=c` on top.

On the command line the setting's type says how its value is read: see `_parse`.
"""

import logging
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from latentvae.base.errors import ConfigError
from latentvae.models.presets import nearest
from latentvae.training.checks import check_values
from latentvae.training.config import Config, Section, TrainConfig

logger = logging.getLogger(__name__)

# An editable checkout keeps the recipes where people edit them; a wheel carries them inside the package.
_RECIPE_DIRS = (
    Path(__file__).parents[2] / "train" / "configs",
    Path(__file__).parents[1] / "recipes",
)


class _Loader(yaml.SafeLoader):
    """YAML as it is defined: a key stands once. PyYAML takes the last, and what came before would be lost."""

    # where a mapping is composed, because << has not put other mappings' keys among its own yet
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as PyYAML composes it, of which no key is there again."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        marks = dict[tuple[str, str], yaml.Mark]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if (name := (key.tag, key.value)) in marks:
                raise yaml.MarkedYAMLError(
                    f"there is {key.value!r} already", marks[name], "and once more; join them", key.start_mark
                )
            marks[name] = key.start_mark
        return node


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
    # what a schedule was chosen for, before settings say otherwise
    section = tree.get("train")
    length = section.get("max_steps") if isinstance(section, dict) else None
    for setting in settings or []:
        _apply(tree, setting)
    try:
        config = Config.model_validate(tree)  # first, for all wrong types and unknown keys at once
        given = {setting.partition("=")[0].strip() for setting in settings or []}
        if "train.max_steps" in given:
            # what is no number of steps is said of the file, and not here
            chosen = length if isinstance(length, int) and length > 0 else TrainConfig().max_steps
            _follow_length(config, chosen, given)
        check_values(config)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from error
    except ConfigError as error:
        raise ConfigError(f"config: {error}") from error
    return config


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
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
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
        tree[last] = _parse(_kinds([*sections, last]), text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting!r}: {text!r} is not a YAML value ({error}).") from error


def _follow_length(config: Config, length: int, given: set[str]) -> None:
    """Shorten warm-up and decay, which were chosen for another length, in proportion where they do not fit.

    Args:
        config: with the settings; changed in place.
        length: steps that warm-up and decay were chosen for.
        given: names of the settings; what is among them stays.
    """
    optim, last = config.optim, config.train.max_steps
    decay = 0 if optim.schedule == "constant" else optim.decay_steps or 0
    share = last / length
    if optim.warmup_steps + decay <= last or share >= 1:
        return
    # what a warm-up that was set leaves, which may be less than its share
    room = last - optim.warmup_steps if "optim.warmup_steps" in given else last
    changes = []
    for name in ("warmup_steps", "decay_steps"):
        value = getattr(optim, name)
        if value and f"optim.{name}" not in given:
            # down: together they still fit; a decay takes a step at least
            shorter = max(min(int(value * share), room), 1) if name == "decay_steps" else int(value * share)
            setattr(optim, name, shorter)
            changes.append(f"optim.{name}={shorter} (was {value})")
    if changes:
        logger.info(
            "train.max_steps=%d is shorter than the %d steps of the recipe, so %s; set them to have others",
            *(last, length, " and ".join(changes)),
        )


def _kinds(key: list[str]) -> tuple[Any, ...]:
    """The types that a setting may have; none where there is no such setting, or it may have any."""
    kind: Any = Config
    for name in key:
        fields = kind.model_fields if _is_section(kind) else {}
        if name not in fields:
            return ()
        kind = fields[name].annotation
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _parse(kinds: tuple[Any, ...], text: str) -> Any:
    """A value from the command line, where a folder may be called `2024`, `no` or `set #2`.

    Text is taken as it stands, nothing at all means None. Of lists the brackets are YAML's, their elements
    text; dictionaries and whole sections are written as in a file. Pydantic reads the rest.
    """
    if str in kinds:
        return text or None
    if not kinds or any(kind is dict or get_origin(kind) is dict or _is_section(kind) for kind in kinds):
        return yaml.load(text, _Loader)
    text = text.strip()
    if text in ("", "null"):
        return None
    if any(get_origin(kind) in (list, tuple) for kind in kinds):
        return yaml.load(text, yaml.BaseLoader)
    with suppress(ValueError):  # pydantic reads no 0x10; YAML reads 010 as 8 and 1:30 as 90
        return int(text, 0) if int in kinds else text
    return text


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _explain(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        came = "" if isinstance(problem["input"], dict) else f" (came: {problem['input']!r})"
        return f"{place or 'config'}: {problem['msg'].removeprefix('Value error, ')}{came}"
    section: Any = Config
    for part in problem["loc"][:-1]:
        # of a list, as stages are one, the part is a number
        section = get_args(section)[0] if isinstance(part, int) else section.model_fields[part].annotation
    known = list(section.model_fields)
    hint = nearest(str(problem["loc"][-1]), known) or f" Known: {', '.join(known)}."
    return f"unknown setting {place!r}.{hint}"
