"""Other programs' limits, as data: who reads a VAE in LDM's names right, who refuses it, who reads it wrong.

These programs build the model themselves, read no config, and fill what they built from the file. So what
they do with a file follows from the weights that they have a place for, and from what they do with the rest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from latentvae.models.formats.deriving import LDM_GROUPS, SD_WIDTHS, has_level_attention
from latentvae.models.formats.layout import ldm_shapes
from latentvae.models.presets import SPACES, block_types

Program = Literal["comfyui", "a1111", "forge", "flux", "sd-scripts"]
PROGRAMS: tuple[Program, ...] = get_args(Program)
Kind = Literal["right", "refused", "wrong"]


@dataclass(frozen=True)
class Reader:
    """One way in which one version of a program takes a VAE."""

    program: Program
    name: str
    version: str
    source: str  # where in its code
    used_with: str = ""  # the diffusion models, where the program has another reader for others
    channels: int | None = None  # of latents; None: read off the file
    quant: bool | None = None  # both quant convolutions or none; None: as the file's post_quant_conv
    missing_is_error: bool = False  # else what the file lacks is whatever was in memory
    extra_is_error: bool = False  # else what it has no place for is dropped
    spaces: tuple[str, ...] = tuple(SPACES)  # by whose factors latents are scaled
    other_kinds: tuple[int, ...] = ()  # latent channels by which a file is taken for another kind of VAE
    widths: tuple[int, ...] = SD_WIDTHS
    three_levels: bool = False  # whether it also builds the x4 upscaler's, without the last level

    def expects(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of the model that it builds for a file of a VAE of that config."""
        short = self.three_levels and len(config["block_out_channels"]) < len(self.widths)
        widths = self.widths[:-1] if short else self.widths
        quant = config["use_post_quant_conv"] if self.quant is None else self.quant
        return {
            **block_types(widths),
            "block_out_channels": widths,
            "latent_channels": self.channels or config["latent_channels"],
            "use_quant_conv": quant,
            "use_post_quant_conv": quant,
            "layers_per_block": 2,
            "norm_num_groups": LDM_GROUPS,
            "mid_block_add_attention": True,
            "act_fn": "silu",
            "in_channels": 3,
            "out_channels": 3,
        }


_SD: dict[str, Any] = {
    "used_with": "SD 1.x, 2.x, SDXL",
    "channels": 4,
    "quant": True,
    "spaces": ("sd", "sdxl"),
}
_SD3: dict[str, Any] = {"used_with": "SD 3", "channels": 16, "quant": False, "spaces": ("sd3",)}
_FLUX: dict[str, Any] = {"channels": 16, "quant": False, "spaces": ("flux",)}
_STRICT: dict[str, Any] = {"missing_is_error": True, "extra_is_error": True}
# into a model without memory: what is missing fails when it is used, and what is left over is only printed
_META: dict[str, Any] = {"missing_is_error": True}
_COMFYUI: dict[str, Any] = {"three_levels": True}
READERS = (
    # 32 latent channels are another kind's from 0.3.60 on, and no longer at 033046c
    Reader("comfyui", "ComfyUI", "0.3.64", "comfy/sd.py", other_kinds=(32, 64), **_COMFYUI),
    Reader("comfyui", "ComfyUI", "033046c", "comfy/sd.py", other_kinds=(64,), **_COMFYUI),
    Reader("a1111", "A1111", "1.10.1", "modules/sd_vae.py", **_SD, **_STRICT),
    Reader("a1111", "A1111", "1.10.1", "modules/models/sd3/sd3_impls.py", **_SD3, **_STRICT),
    Reader("forge", "Forge", "dfdcbab", "backend/loader.py", **_SD),
    Reader("forge", "Forge", "dfdcbab", "backend/loader.py", **_SD3),
    Reader("forge", "Forge", "dfdcbab", "backend/loader.py", "FLUX.1", **_FLUX),
    Reader("flux", "flux", "802fb47", "src/flux/util.py", **_FLUX, **_META),
    Reader("sd-scripts", "sd-scripts", "0.10.1", "library/model_util.py", **_SD, **_STRICT),
    Reader("sd-scripts", "sd-scripts", "0.10.1", "library/sd3_utils.py", **_SD3, **_STRICT),
    Reader("sd-scripts", "sd-scripts", "0.10.1", "library/flux_utils.py", "FLUX.1", **_FLUX, **_META),
)


def judge(config: dict[str, Any], reader: Reader) -> tuple[Kind, str]:
    """What a reader does with such a VAE in LDM's names, and the first reason unless that is right."""
    if config["latent_channels"] in reader.other_kinds:
        return (
            "refused",
            f"{config['latent_channels']} latent channels, which another kind of VAE has",
        )
    wanted = reader.expects(config)
    reason = next(_differences(config, wanted, reader), None)
    if reason is None:
        return "right", ""
    found, places = ldm_shapes(config), ldm_shapes(wanted)
    misshaped = any(found[name] != places[name] for name in found.keys() & places.keys())
    lacking = reader.missing_is_error and not places.keys() <= found.keys()
    left = reader.extra_is_error and not found.keys() <= places.keys()
    return ("refused" if misshaped or lacking or left else "wrong"), reason


def _differences(config: dict[str, Any], wanted: dict[str, Any], reader: Reader) -> Iterator[str]:
    """What of a model is other than what a reader builds, in words."""
    if config["latent_channels"] != wanted["latent_channels"]:
        yield f"{config['latent_channels']} latent channels (wanted {wanted['latent_channels']})"
    first, second = config["use_quant_conv"], config["use_post_quant_conv"]
    if (first, second) != (wanted["use_quant_conv"], wanted["use_post_quant_conv"]):
        has = "quant convolutions" if first and second else "no quant convolutions"
        has = has if first == second else "one of the two quant convolutions alone"
        needs = {True: "both", False: "none", None: "both or neither"}[reader.quant]
        yield f"{has} (wanted {needs})"
    widths = "-".join(map(str, config["block_out_channels"]))
    if tuple(config["block_out_channels"]) != wanted["block_out_channels"]:
        yield f"widths {widths} (wanted {'-'.join(map(str, reader.widths))})"
    for key in ("layers_per_block", "norm_num_groups"):
        if config[key] != wanted[key]:
            yield f"{key}={config[key]} (wanted {wanted[key]})"
    if not config["mid_block_add_attention"]:
        yield "no attention in the middle"
    if has_level_attention(config):
        yield "attention within the levels"
    if config["act_fn"] not in ("silu", "swish"):
        yield f"act_fn={config['act_fn']} (wanted silu)"
    channels = {config["in_channels"], config["out_channels"]} - {3}
    if channels:
        yield f"images of {max(channels)} channels (wanted 3)"


def readers_of(program: Program) -> list[Reader]:
    """The readers of one program."""
    return [reader for reader in READERS if reader.program == program]


def mended(config: dict[str, Any], program: Program) -> dict[str, Any] | None:
    """The config under which `program` can read such a VAE right, folded or with neutral layers; or None."""
    readers = readers_of(program)
    if any(judge(config, reader)[0] == "right" for reader in readers):
        return config
    any_quant = config["use_quant_conv"] or config["use_post_quant_conv"]
    for reader in readers:
        wanted = reader.expects({**config, "use_post_quant_conv": any_quant})
        changes = {key: wanted[key] for key in ("use_quant_conv", "use_post_quant_conv")}
        changes["mid_block_add_attention"] = True
        changes["layers_per_block"] = max(config["layers_per_block"], wanted["layers_per_block"])
        if judge({**config, **changes}, reader)[0] == "right":
            return {**config, **changes}
    return None


def program_notes(config: dict[str, Any]) -> list[str]:
    """What to tell a person who takes this VAE to other programs, in LDM's names: a sentence a verdict."""
    groups: dict[tuple[Kind, str, bool], list[str]] = {}
    strange: list[str] = []  # who would scale its latents by other factors
    factors = (config["scaling_factor"], config["shift_factor"] or 0.0)
    for program in PROGRAMS:
        mendable = mended(config, program) not in (None, config)
        for name, kind, reason, spaces in _verdicts(config, program):
            groups.setdefault((kind, reason, mendable), []).append(name)
            known = [(SPACES[space].scaling_factor, SPACES[space].shift_factor) for space in spaces]
            strange += [name] if kind == "right" and factors not in known else []
    notes = [_sentence(group, names) for group, names in sorted(groups.items(), key=_order)]
    if has_level_attention(config):
        notes.append("Stock diffusers drops attention within the levels when it reads LDM's names.")
    if strange:
        notes.append(
            f"In {_listed(strange)} latents are scaled by the diffusion model's factors, not by this model's "
            f"scaling_factor={factors[0]:g}, shift_factor={factors[1]:g}: right only with one of the same."
        )
    return notes


def _verdicts(config: dict[str, Any], program: Program) -> list[tuple[str, Kind, str, tuple[str, ...]]]:
    """Of a program's readers: name, kind, reason, spaces."""
    readers = readers_of(program)
    # a reader for other latents than these says nothing, unless there is no other
    suited = [reader for reader in readers if reader.channels in (None, config["latent_channels"])]
    if not suited:
        wanted = " or ".join(map(str, sorted({reader.channels or 0 for reader in readers})))
        reason = f"{config['latent_channels']} latent channels (wanted {wanted})"
        return [(readers[0].name, "refused", reason, ())]
    found = [(reader, judge(config, reader)) for reader in suited]
    if len({verdict for _, verdict in found}) == 1 and not suited[0].used_with:
        return [(suited[0].name, *found[0][1], suited[0].spaces)]  # all its versions agree
    return [(_full_name(reader), *verdict, reader.spaces) for reader, verdict in found]


def _full_name(reader: Reader) -> str:
    return f"{reader.name} ({reader.used_with or reader.version})"


def _order(item: tuple[tuple[Kind, str, bool], list[str]]) -> int:
    return ("right", "wrong", "refused").index(item[0][0])


def _sentence(group: tuple[Kind, str, bool], names: list[str]) -> str:
    kind, reason, mendable = group
    way = " `latentvae convert --for` mends that, or says why it cannot." if mendable else ""
    if kind == "right":
        return f"Read right, as `latentvae convert --for` writes it, by {_listed(names)}."
    start = "Refused by" if kind == "refused" else "Read WRONG, without an error, by"
    return f"{start} {_listed(names)}: {reason}.{way}"


def _listed(names: list[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
