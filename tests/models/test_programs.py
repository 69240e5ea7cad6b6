"""Other programs do with a file what is said of them, and what is written for them they read right."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from diffusers import AutoencoderKL
from ldm import LDM, Tensors
from safetensors.torch import load_file
from typer.testing import CliRunner

import latentvae
from latentvae.base.errors import LatentVAEError, ModelError
from latentvae.cli import options
from latentvae.cli.convert import convert
from latentvae.cli.export import export
from latentvae.models.formats import programs, writing
from latentvae.models.formats.adapting import adapt
from latentvae.models.formats.layout import ldm_shapes
from latentvae.models.formats.programs import PROGRAMS, READERS, Reader, judge, mended, program_notes
from latentvae.models.formats.writing import save
from latentvae.models.presets import PRESETS, block_types, preset_config

SMALL = (64, 64)  # in place of 128-256-512-512: nothing that readers do depends on it
NONE = {"use_quant_conv": False, "use_post_quant_conv": False}


# --- the programs' loaders, written once more, small -----------------------------------------------------


def fill(model: LDM, file: Tensors, *, missing: bool = False, extra: bool = False) -> LDM:
    """Fill a model from a file, as load_state_dict does: what is missing stays random, or is an error."""
    common = model.weights.keys() & file.keys()
    misshaped = [name for name in common if model.weights[name].shape != file[name].shape]
    if misshaped or (missing and model.weights.keys() - common) or (extra and file.keys() - common):
        raise RuntimeError("Error(s) in loading state_dict")
    model.weights |= {name: file[name] for name in common}
    return model


def comfyui(file: Tensors, *others: int) -> LDM:
    channels = file["decoder.conv_in.weight"].shape[1]
    if channels in others:
        raise RuntimeError("size mismatch: a Hunyuan VAE was built")
    deep = {"encoder.down.0.downsample.conv.weight", "decoder.up.1.upsample.conv.weight"} & file.keys()
    quant = "post_quant_conv.weight" in file
    return fill(LDM(SMALL if deep else SMALL[:1], 2, True, quant, channels), file)


def sd_strict(file: Tensors) -> LDM:
    return fill(LDM(SMALL, 2), file, missing=True, extra=True)


def sd3_strict(file: Tensors) -> LDM:
    return fill(LDM(SMALL, 2, quant=False, z=16), file, missing=True, extra=True)


def flux_on_meta(file: Tensors) -> LDM:
    return fill(LDM(SMALL, 2, quant=False, z=16), file, missing=True)


LOADERS: dict[tuple[str, str], Callable[[Tensors], LDM]] = {
    ("comfyui", "0.3.64"): lambda file: comfyui(file, 32, 64),
    ("comfyui", "033046c"): lambda file: comfyui(file, 64),
    ("a1111", "SD 1.x, 2.x, SDXL"): sd_strict,
    ("a1111", "SD 3"): sd3_strict,
    ("forge", "SD 1.x, 2.x, SDXL"): lambda file: fill(LDM(SMALL, 2), file),
    ("forge", "SD 3"): lambda file: fill(LDM(SMALL, 2, quant=False, z=16), file),
    ("forge", "FLUX.1"): lambda file: fill(LDM(SMALL, 2, quant=False, z=16), file),
    ("flux", "802fb47"): flux_on_meta,
    ("sd-scripts", "SD 1.x, 2.x, SDXL"): sd_strict,
    ("sd-scripts", "SD 3"): sd3_strict,
    ("sd-scripts", "FLUX.1"): flux_on_meta,
}


def loader(reader: Reader) -> Callable[[Tensors], LDM]:
    return LOADERS[reader.program, reader.used_with or reader.version]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[Reader, ...]:
    """The readers, of small models."""
    readers = tuple(replace(reader, widths=SMALL) for reader in READERS)
    monkeypatch.setattr(programs, "READERS", readers)
    return readers


def small_config(**changes: Any) -> dict[str, Any]:
    inside = changes.pop("inside", ())
    config = preset_config("f8c4", **{"block_out_channels": SMALL, **changes})
    widths = config["block_out_channels"]
    return {**config, **block_types(widths, inside, [len(widths) - 1 - level for level in inside])}


@cache
def stored(**changes: Any) -> tuple[LDM, torch.Tensor, torch.Tensor]:
    """A random model with these changes, a picture, and the model's moments of it."""
    config = small_config(**changes)
    keys = ("block_out_channels", "layers_per_block", "mid_block_add_attention", "use_post_quant_conv")
    ldm = LDM(
        *(config[key] for key in keys),
        z=config["latent_channels"],
        inside=changes.get("inside", ()),
        groups=config["norm_num_groups"],
    )
    if config["use_post_quant_conv"] != config["use_quant_conv"]:
        for kind in ("weight", "bias"):
            del ldm.weights[f"quant_conv.{kind}"]
    picture = torch.rand(1, 3, 8, 8) * 2 - 1
    return ldm, picture, ldm.encode(picture)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-4)


# --- what is said of them --------------------------------------------------------------------------------

CHANGES: list[dict[str, Any]] = [
    {},
    NONE,
    {"use_quant_conv": False},
    {"layers_per_block": 1},
    {"layers_per_block": 3},
    {"norm_num_groups": 16},
    {"mid_block_add_attention": False},
    {"inside": (1,)},
    {"block_out_channels": (64,)},
    {"block_out_channels": (64, 64, 64)},
    {"block_out_channels": (64, 96)},
]


@pytest.mark.parametrize("reader", READERS, ids=lambda r: f"{r.program} {r.used_with or r.version}")
def test_what_is_said_of_a_reader_is_what_it_does(reader):
    reader = replace(reader, widths=SMALL)
    channels = [4, 32] if reader.channels is None else [reader.channels]
    if reader.quant is False:
        changes = [{**NONE, **change} for change in CHANGES] + [{}, {"use_quant_conv": False}]
    else:
        changes = CHANGES
    for change in [{**change, "latent_channels": z} for z in channels for change in changes] + [
        {"latent_channels": 8}
    ]:
        ldm, picture, moments = stored(**change)
        try:
            there = loader(reader)(ldm.weights)
            latents = moments.chunk(2, dim=1)[0]
            right = same(there.encode(picture), moments) and same(there.decode(latents), ldm.decode(latents))
            done = "right" if right else "wrong"
        except RuntimeError:
            done = "refused"
        assert judge(small_config(**change), reader)[0] == done, change


@pytest.mark.parametrize("change", [*CHANGES, {"latent_channels": 16, "in_channels": 1, "out_channels": 1}])
def test_the_shapes_of_a_config_are_those_of_the_model(change):
    config = small_config(**change)
    shapes = ldm_shapes(config)
    if config["in_channels"] == 3 and change.get("use_quant_conv") == change.get("use_post_quant_conv"):
        assert shapes == {name: tuple(tensor.shape) for name, tensor in stored(**change)[0].weights.items()}
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AutoencoderKL(**config).parameters())
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count


SIXTEEN = {"latent_channels": 16}


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        (
            {},
            [
                "Read right, as `latentvae convert --for` writes it, by ComfyUI, A1111 (SD 1.x, 2.x, SDXL), ",
                "Refused by flux: 4 latent channels (wanted 16).",
            ],
        ),
        (
            SIXTEEN,
            [
                "Read right, as `latentvae convert --for` writes it, by ComfyUI.",
                "Read WRONG, without an error, by Forge (SD 3), Forge (FLUX.1), flux and sd-scripts (FLUX.1)",
                "Refused by A1111 (SD 3) and sd-scripts (SD 3): quant convolutions (wanted none). `late",
            ],
        ),
        (
            {**SIXTEEN, **NONE},
            ["Read right, as `latentvae convert --for` writes it, by ComfyUI, A1111 (SD 3), "],
        ),
        (
            {"latent_channels": 32},
            [
                "Read right, as `latentvae convert --for` writes it, by ComfyUI (033046c).",
                "Refused by ComfyUI (0.3.64): 32 latent channels, which another kind of VAE has.",
                "Refused by A1111, Forge and sd-scripts: 32 latent channels (wanted 4 or 16).",
            ],
        ),
        ({"norm_num_groups": 16}, ["Read WRONG, without an error, by ComfyUI, A1111 (SD 1.x, 2.x, SDXL), "]),
        ({"in_channels": 1, "out_channels": 1}, ["Refused by ComfyUI, A1111 (SD 1.x, 2.x, SDXL), "]),
        (
            {"block_out_channels": (128, 256, 512)},
            ["Read right, as `latentvae convert --for` writes it, by Comf"],
        ),
        ({"act_fn": "relu"}, ["Read WRONG, without an error, by ComfyUI, A1111 (SD 1.x, 2.x, SDXL), "]),
    ],
)
def test_a_model_is_told_who_reads_it_right_wrong_or_not(changes, sentences):
    notes = program_notes(preset_config("f8c4", scaling_factor=0.18215, **changes))
    for sentence in sentences:
        assert any(note.startswith(sentence) for note in notes), notes


def test_a_scaling_that_other_programs_do_not_read_is_said():
    assert "scaling_factor=0.9" in program_notes(preset_config("f8c4", scaling_factor=0.9))[-1]
    assert program_notes(preset_config("f8c16"))[-1].startswith("In ComfyUI latents are scaled by")
    assert not any(
        "latents are scaled" in note for note in program_notes(preset_config("f8c4", scaling_factor=0.13025))
    )


def test_the_options_of_the_verbs_are_those_of_the_formats():
    assert get_args(options.Program) == PROGRAMS
    assert get_args(options.Format) == get_args(writing.Format)


def test_every_preset_is_judged_by_every_program():
    for preset in PRESETS:
        notes = " ".join(program_notes(preset_config(preset)))
        assert all(reader.name in notes for reader in READERS)


# --- what is written for them ----------------------------------------------------------------------------


def build(**changes: Any) -> AutoencoderKL:
    """A small random model whose quant convolutions matter."""
    vae = latentvae.build("f8c4", **{"block_out_channels": SMALL, **changes}).eval().requires_grad_(False)
    for conv in filter(None, (vae.quant_conv, vae.post_quant_conv)):
        torch.nn.init.normal_(conv.weight, std=0.5)
        torch.nn.init.normal_(conv.bias, std=0.5)
    return vae


def assert_read_right(vae: AutoencoderKL, file: Path, reader: Reader) -> None:
    there, picture = loader(reader)(load_file(file)), torch.rand(1, 3, 16, 8) * 2 - 1
    moments = vae.encode(picture).latent_dist.parameters
    assert same(there.encode(picture), moments)
    latents = moments.chunk(2, dim=1)[0]
    assert same(there.decode(latents), vae.decode(latents).sample)


@pytest.mark.parametrize(
    ("program", "changes", "done"),
    [
        ("comfyui", {}, ""),
        ("comfyui", {"use_post_quant_conv": False}, "added quant convolutions"),
        ("comfyui", {"mid_block_add_attention": False, "layers_per_block": 1}, "added attention, resnets"),
        ("a1111", NONE, "added quant convolutions"),
        ("forge", {"use_quant_conv": False}, "added quant convolutions"),
        ("sd-scripts", {**NONE, "mid_block_add_attention": False}, "added quant convolutions, attention"),
        *(
            (program, SIXTEEN, "folded quant_conv into encoder.conv_out; folded post_")
            for program in PROGRAMS[1:]
        ),
        ("flux", {**SIXTEEN, "use_post_quant_conv": False}, "folded quant_conv into encoder.conv_out"),
    ],
)
def test_what_is_written_for_a_program_is_read_right_there(tmp_path, small, program, changes, done):
    vae = build(**changes)
    if vae.post_quant_conv is not None and vae.config["latent_channels"] == 16:
        torch.nn.init.zeros_(vae.post_quant_conv.bias)
    adapted, notes = adapt(vae, program)
    assert "; ".join(notes).startswith(done)
    assert bool(notes) == bool(done)
    save(adapted, tmp_path / "vae.safetensors", "ldm")
    readers = [
        each for each in small if each.program == program and judge(adapted.config, each)[0] == "right"
    ]
    assert readers
    for reader in readers:
        assert_read_right(vae, tmp_path / "vae.safetensors", reader)


def test_a_bias_that_does_not_fold_at_the_edges_is_refused_with_the_error_or_stated(small):
    vae = build(**SIXTEEN)
    with pytest.raises(
        ModelError, match=r"for flux, post_quant_conv .* off by up to [\d.]+ of 255 .*--for comfyui"
    ):
        adapt(vae, "flux")
    vae.post_quant_conv.bias.mul_(1e-4)
    notes = adapt(vae, "flux")[1]
    assert "post_quant_conv's bias is not exact at the edges: up to 0." in notes[-1]


@pytest.mark.parametrize(
    ("program", "changes", "message"),
    [
        ("flux", {}, "flux cannot be made to read this model right: 4 latent channels"),
        ("a1111", {"norm_num_groups": 16}, r"A1111 cannot .* right: norm_num_groups=16 \(wanted 32\)"),
        ("forge", {"layers_per_block": 3}, "Forge cannot .* right: layers_per_block=3"),
        ("comfyui", {"latent_channels": 64}, "ComfyUI cannot .* right: 64 latent channels"),
        ("sd-scripts", {"block_out_channels": (64, 96)}, "sd-scripts cannot .* right: widths 64-96"),
    ],
)
def test_what_no_fold_makes_right_is_refused_with_the_reason(small, program, changes, message):
    assert mended(small_config(**changes), program) is None
    with pytest.raises(ModelError, match=message):
        adapt(build(**changes), program)


def test_convert_for_a_program(tmp_path, small, caplog):
    app = typer.Typer()
    app.command()(convert)
    vae = build(**NONE)
    vae.save_pretrained(tmp_path / "in")
    result = CliRunner().invoke(
        app, [str(tmp_path / "in"), str(tmp_path / "a.safetensors"), "--for", "a1111"]
    )
    assert result.exit_code == 0, result.output
    assert "For a1111: added quant convolutions" in result.output
    assert "Read right, as `latentvae convert --for` writes it, by ComfyUI, A1111" in result.output
    assert_read_right(vae, tmp_path / "a.safetensors", next(r for r in small if r.program == "a1111"))
    for arguments, message in (
        (["--for", "flux", "--to", "diffusers"], "writes bare LDM names"),
        (["--for", "flux", "--prefix", "vae."], "writes bare LDM names"),
        ([], "which format"),
    ):
        result = CliRunner().invoke(app, [str(tmp_path / "in"), str(tmp_path / "b.safetensors"), *arguments])
        assert isinstance(result.exception, LatentVAEError)
        assert message in str(result.exception)


def test_an_export_has_a_file_for_a_program(tmp_path, small, monkeypatch):
    app = typer.Typer()
    app.command()(export)
    monkeypatch.chdir(tmp_path)
    vae = build(**NONE)
    vae.save_pretrained("in")
    result = CliRunner().invoke(
        app, ["in", "-o", "out", "--for", "a1111", "--base-model", str(tmp_path / "in")]
    )
    assert result.exit_code == 0, result.output
    assert "names 'in' as the parent, but links to none" in result.output
    assert_read_right(vae, Path("out/a1111.safetensors"), next(r for r in small if r.program == "a1111"))
    result = CliRunner().invoke(app, ["in", "-o", "b", "--for", "flux", "--images", "no such folder"])
    assert "flux cannot be made to read" in str(result.exception)
    assert all(torch.equal(t, vae.state_dict()[k]) for k, t in latentvae.load("out").state_dict().items())
