"""Every format loads and saves without a bit lost; what does not fit is named as its file names it."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import typer
import vaes
import yaml
from diffusers import AutoencoderKL
from ldm import LDM
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import latentvae
from latentvae.base.errors import LatentVAEError, ModelError
from latentvae.cli.convert import convert
from latentvae.cli.export import export as export_command
from latentvae.models.formats import stored, writing
from latentvae.models.formats.deriving import derive_config
from latentvae.models.formats.layout import is_attention_weight, ldm_name
from latentvae.models.formats.stored import StoredVAE
from latentvae.models.formats.writing import save
from latentvae.models.latents import compute_latent_statistics
from latentvae.models.presets import PRESETS, preset_config

UNET = "model.diffusion_model.input_blocks.0.0.weight"

# levels, layers, attention, both quant convs
STRUCTURES = [
    (1, 1, True, True),
    (2, 2, False, True),
    (3, 1, True, False),
    (4, 2, True, True),
    (5, 1, False, False),
]


@torch.no_grad()
def assert_computes_like(vae: AutoencoderKL, ldm: LDM) -> None:
    images, latents = torch.randn(1, 3, 32, 48), torch.randn(1, 4, 3, 2)
    torch.testing.assert_close(vae.encode(images).latent_dist.parameters, ldm.encode(images))
    torch.testing.assert_close(vae.decode(latents).sample, ldm.decode(latents))


def assert_same(one: AutoencoderKL, other: AutoencoderKL) -> None:
    """Bit for bit the same weights, and the same config."""
    state, wanted = one.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys()
    for key in wanted:
        assert state[key].dtype == wanted[key].dtype, key
        assert torch.equal(state[key], wanted[key]), key
    assert comparable(one) == comparable(other)


def comparable(vae: AutoencoderKL) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vae.config.items()
        if not key.startswith("_")
    }


def rewrite(file: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a file; its metadata goes."""
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()} | change
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)


@pytest.fixture
def attentive() -> AutoencoderKL:
    """A tiny model with attention."""
    return latentvae.build("tiny", mid_block_add_attention=True, scaling_factor=0.37, shift_factor=0.1).eval()


# --- loading LDM's files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "layers", "attention", "quant"), STRUCTURES)
def test_a_file_in_ldms_names_computes_what_ldm_does(tmp_path, caplog, levels, layers, attention, quant):
    ldm = LDM((64, 64, 96, 64, 128)[:levels], layers, attention, quant)
    save_file(ldm.weights, tmp_path / "vae.safetensors")
    vae = latentvae.load(tmp_path / "vae.safetensors")
    assert_computes_like(vae, ldm)
    assert vae.config.block_out_channels == ldm.widths
    assert vae.config.layers_per_block == layers
    assert (vae.config.use_quant_conv, vae.config.use_post_quant_conv) == (quant, quant)
    assert vae.config.mid_block_add_attention is attention
    (note,) = caplog.messages
    assert "scaling_factor=1, shift_factor=0; norm_num_groups=32 is LDM's" in note


# where kl-f16 and kl-f32 have it, and where no model has
@pytest.mark.parametrize(("levels", "layers", "inside"), [(3, 1, [2]), (2, 2, [1]), (2, 1, [0])])
def test_attention_within_the_levels_is_read_and_written_as_ldm_has_it(tmp_path, levels, layers, inside):
    ldm = LDM((64, 64, 96, 64, 128)[:levels], layers, inside=inside)
    save_file({**ldm.weights, "loss.logvar": torch.zeros(1)}, tmp_path / "kl.safetensors")
    vae = latentvae.load(tmp_path / "kl.safetensors")
    assert_computes_like(vae, ldm)
    assert [i for i, name in enumerate(vae.config.down_block_types) if "Attn" in name] == inside
    for to, name in (("diffusers", "a"), ("single-file", "b.safetensors"), ("ldm", "c.safetensors")):
        save(vae, tmp_path / name, to)
        assert_same(latentvae.load(tmp_path / name), vae)
    # without its metadata, so that no config helps
    for name, wanted in (("c.safetensors", ldm.weights), ("b.safetensors", vae.state_dict())):
        rewrite(tmp_path / name, {})
        written = load_file(tmp_path / name)
        assert written.keys() == wanted.keys()
        assert all(torch.equal(written[key], wanted[key]) for key in wanted)
        assert_computes_like(latentvae.load(tmp_path / name), ldm)


def test_a_file_that_stock_diffusers_does_not_read_is_read_back_before_it_is_kept(
    tmp_path, attentive, monkeypatch
):
    save_file(LDM((64, 64), inside=[1]).weights, tmp_path / "kl.safetensors")
    vae = latentvae.load(tmp_path / "kl.safetensors")
    other = {"quant_conv.bias": torch.ones(8)}
    monkeypatch.setattr(writing, "load_file", lambda file: load_file(file) | other)
    with pytest.raises(LatentVAEError, match="reads otherwise than it was written"):
        save(vae, tmp_path / "out.safetensors", "ldm")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_the_vae_of_a_whole_checkpoint_is_read_and_nothing_else(tmp_path, monkeypatch, prefix):
    ldm = LDM((64, 128))
    others = {UNET: torch.zeros(8), "cond_stage_model.encoder.weight": torch.zeros(3), "step": torch.zeros(1)}
    leftovers = {f"{prefix}loss.logvar": torch.zeros(1), f"{prefix}model_ema.decay": torch.zeros(1)}
    own = {prefix + name: tensor for name, tensor in ldm.weights.items()}
    save_file({**own, **others, **leftovers}, tmp_path / "sd.safetensors")
    taken = spy(monkeypatch)
    assert_computes_like(latentvae.load(tmp_path / "sd.safetensors"), ldm)
    assert sorted(taken) == sorted(own)


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are read from now on."""
    taken: list[str] = []

    class Spy:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.file = safe_open(*arguments, **options)

        def __enter__(self) -> "Spy":
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

        def get_tensor(self, key: str) -> torch.Tensor:
            taken.append(key)
            return self.opened.get_tensor(key)

    monkeypatch.setattr(stored, "safe_open", Spy)
    return taken


@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_attention_loads_as_matrices_and_kernels_of_one_or_two_dimensions(tmp_path, dimensions):
    ldm = LDM((64, 64))
    weights = dict(ldm.weights)
    for name, tensor in weights.items():
        if ".attn_1." in name and tensor.ndim == 4:
            weights[name] = tensor.reshape(tensor.shape[:2] + (1,) * (dimensions - 2))
    save_file(weights, tmp_path / "vae.safetensors")
    assert_computes_like(latentvae.load(tmp_path / "vae.safetensors"), ldm)


def test_diffusers_names_without_a_config_are_derived_too(tmp_path, caplog):
    vae = latentvae.build("tiny", block_out_channels=(64, 128), norm_num_groups=32, latent_channels=6)
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    loaded = latentvae.load(tmp_path / "vae.safetensors")
    assert all(torch.equal(value, vae.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert loaded.config.latent_channels == 6
    assert "has no config" in caplog.text


def test_a_config_beside_an_ldm_file_says_what_its_tensors_do_not(tmp_path, attentive, caplog):
    save(attentive, tmp_path / "vae.safetensors", "ldm")
    rewrite(tmp_path / "vae.safetensors", {})
    attentive.save_config(tmp_path)
    assert_same(latentvae.load(tmp_path / "vae.safetensors"), attentive)
    assert "has no config" not in caplog.text


def test_a_config_of_another_model_beside_an_ldm_file_is_not_its_own(tmp_path):
    ldm = LDM((64, 64))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    save_file(ldm.weights, tmp_path / "vae.safetensors", metadata={"config": '{"vae": {}}'})
    assert_computes_like(latentvae.load(tmp_path / "vae.safetensors"), ldm)


@pytest.mark.parametrize("widths", [(32, 64), (64, 80)])
def test_widths_that_had_other_groups_are_not_guessed(tmp_path, widths):
    vae = latentvae.build("tiny", block_out_channels=widths)
    save(vae, tmp_path / "vae.safetensors", "ldm")
    rewrite(tmp_path / "vae.safetensors", {})
    with pytest.raises(
        ModelError, match=r"how many norm groups.*do not suit a width of (32|80)\..*config\.json"
    ):
        latentvae.load(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    ("other", "z", "quant", "scaling", "shift", "word"),
    [
        (None, 4, True, 0.18215, 0.0, "SDXL's VAE has the same shape and 0.13025"),
        ("cond_stage_model.a", 4, True, 0.18215, 0.0, "those of Stable Diffusion,"),
        ("conditioner.embedders.0.a", 4, True, 0.13025, 0.0, "those of Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.a", 16, False, 1.5305, 0.0609, "those of Stable Diffusion 3"),
        ("model.diffusion_model.double_blocks.0.a", 16, False, 0.3611, 0.1159, "those of Flux"),
        ("conditioner.embedders.0.a", 8, True, 1.0, 0.0, "unknown: scaling_factor=1"),
        (None, 16, False, 1.0, 0.0, "unknown: scaling_factor=1"),
    ],
)
def test_the_factors_of_a_file_without_config_are_those_of_the_checkpoint_it_is_in(
    other, z, quant, scaling, shift, word
):
    with torch.device("meta"):
        weights = LDM((128, 256, 512, 512), 2, True, quant, z).weights
    config, note = derive_config(StoredVAE(Path("x"), weights, "ldm", others=[other] if other else []))
    assert (config["scaling_factor"], config["shift_factor"]) == (scaling, shift)
    assert word in note
    wanted = preset_config("f8c4", latent_channels=z, use_quant_conv=quant, use_post_quant_conv=quant)
    differing = {key for key in wanted if config[key] != wanted[key]}
    assert differing <= {"scaling_factor", "shift_factor", "sample_size"}


# --- there and back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_ldms_names_of_a_preset_are_those_of_the_rules(preset):
    with torch.device("meta"):
        config = PRESETS[preset]
        vae = latentvae.build(preset, use_quant_conv=True, use_post_quant_conv=True)
        rules = LDM(
            config["block_out_channels"],
            config["layers_per_block"],
            config["mid_block_add_attention"],
            z=config["latent_channels"],
        )
    levels = len(config["block_out_channels"])
    names = {ldm_name(key, levels): (key, tensor.shape) for key, tensor in vae.state_dict().items()}
    assert names.keys() == rules.weights.keys()
    for name, (key, shape) in names.items():
        assert rules.weights[name].shape == ((*shape, 1, 1) if is_attention_weight(key) else shape), name


def assert_round_trip(vae: AutoencoderKL, folder: Path) -> None:
    """diffusers -> LDM -> one file -> diffusers, each read from the last."""
    save(vae, folder / "a")
    save(latentvae.load(folder / "a", dtype=None), folder / "b.safetensors", "ldm")
    save(latentvae.load(folder / "b.safetensors", dtype=None), folder / "c.safetensors", "single-file")
    save(latentvae.load(folder / "c.safetensors", dtype=None), folder / "d")
    assert_same(AutoencoderKL.from_pretrained(folder / "d", torch_dtype=vae.dtype), vae)
    first, last = (folder / name / "config.json" for name in "ad")
    assert first.read_bytes() == last.read_bytes()


@pytest.mark.parametrize(
    "preset",
    [pytest.param(name, marks=[] if name == "tiny" else pytest.mark.slow) for name in PRESETS],
)
def test_a_preset_comes_back_bit_for_bit(preset, tmp_path):
    assert_round_trip(latentvae.build(preset, scaling_factor=0.7, shift_factor=0.2).eval(), tmp_path)


@pytest.mark.parametrize(("levels", "layers", "attention", "quant"), STRUCTURES)
def test_every_structure_comes_back_bit_for_bit(tmp_path, levels, layers, attention, quant):
    assert_round_trip(vaes.build(levels, layers, attention, quant).float(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_bit_for_bit(tmp_path, dtype):
    assert_round_trip(latentvae.build("tiny").eval().to(dtype), tmp_path)


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_a_prefix_comes_back_bit_for_bit(tmp_path, attentive, prefix):
    save(attentive, tmp_path / "vae.safetensors", "ldm", prefix=prefix)
    assert all(key.startswith(prefix) for key in load_file(tmp_path / "vae.safetensors"))
    assert_same(latentvae.load(tmp_path / "vae.safetensors"), attentive)


def test_an_optimized_model_is_saved_as_it_was(tmp_path, attentive):
    latentvae.optimize(attentive)
    save(attentive, tmp_path / "vae.safetensors", "ldm")
    assert_same(latentvae.load(tmp_path / "vae.safetensors"), latentvae.restore(attentive) or attentive)


# --- stock diffusers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_stock_diffusers_loads_an_ldm_file_with_a_folder_for_config(tmp_path, attentive, prefix):
    save(attentive, tmp_path / "vae.safetensors", "ldm", prefix=prefix)
    attentive.save_config(tmp_path / "folder")
    stock = AutoencoderKL.from_single_file(str(tmp_path / "vae.safetensors"), config=str(tmp_path / "folder"))
    assert_same(stock, attentive)


def test_stock_diffusers_loads_a_single_file_with_the_config_beside_it(tmp_path, attentive):
    save(attentive, tmp_path / "vae.safetensors", "single-file")
    stock = AutoencoderKL.from_single_file(
        str(tmp_path / "vae.safetensors"), config=str(tmp_path / "vae.json")
    )
    assert_same(stock, attentive)
    assert_same(latentvae.load(tmp_path / "vae.safetensors"), attentive)


def test_stock_diffusers_without_a_config_asks_the_hub_for_stable_diffusions(
    tmp_path, attentive, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    save(attentive, tmp_path / "vae.safetensors", "ldm")
    with pytest.raises(OSError, match="stable-diffusion-v1-5"):
        AutoencoderKL.from_single_file(str(tmp_path / "vae.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["ldm", "single-file"])
def test_stock_diffusers_loads_the_shape_of_sd_without_a_config_where_sds_is_cached(
    tmp_path, monkeypatch, to
):
    repository = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    vae = latentvae.build("f8c4", scaling_factor=0.18215, shift_factor=0.0).eval()
    vae.save_config(repository / "snapshots" / ("a" * 40) / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    save(vae, tmp_path / "vae.safetensors", to)
    assert_same(AutoencoderKL.from_single_file(str(tmp_path / "vae.safetensors")), vae)


# --- files that do not fit -------------------------------------------------------------------------------

BIAS = "first_stage_model.decoder.up.1.block.0.conv1.bias"
QUERY = "first_stage_model.encoder.mid.attn_1.q.weight"
BAD_FILES = {
    "missing": ({BIAS: None}, f"lacks '{BIAS}'"),
    "extra": (
        {"first_stage_model.decoder.up.9.block.0.conv1.bias": torch.zeros(1)},
        "has 'first_stage_model.decoder.up.9.block.0.conv1.bias', which the model has not",
    ),
    "misshaped": ({BIAS: torch.zeros(7)}, f"has '{BIAS}' of shape (7,); the model's is (64,)"),
    "matrix": (
        {QUERY: torch.zeros(64, 32)},
        f"has '{QUERY}' of shape (64, 32, 1, 1); the model's is (64, 64, 1, 1)",
    ),
    "renamed": (
        {BIAS: None, BIAS.replace("bias", "bais"): torch.zeros(64)},
        f"has '{BIAS.replace('bias', 'bais')}', which the model has not. Did you mean '{BIAS}'?",
    ),
    "shape's own": (
        {"first_stage_model.encoder.conv_in.weight": None},
        "lacks 'first_stage_model.encoder.conv_in.weight'",
    ),
    "flat": (
        {"first_stage_model.decoder.conv_out.weight": torch.zeros(3)},
        "'first_stage_model.decoder.conv_out.weight' of shape (3,); wanted a convolution",
    ),
    "levels": (
        {"first_stage_model.encoder.down.99999999.block.0.conv1.weight": torch.zeros(1)},
        "lacks 'first_stage_model.encoder.down.2.block.0.conv1.weight'",
    ),
}


@pytest.mark.parametrize("damage", BAD_FILES)
@pytest.mark.parametrize("configured", [False, True])
def test_a_key_that_does_not_fit_is_named_as_the_file_names_it(tmp_path, damage, configured):
    change, message = BAD_FILES[damage]
    if configured and damage in ("flat", "levels"):
        pytest.skip("only shapes that are derived from")
    ldm = LDM((64, 64))
    file = tmp_path / "sd.safetensors"
    save_file({f"first_stage_model.{name}": tensor for name, tensor in ldm.weights.items()}, file)
    if configured:
        latentvae.load(file).save_config(tmp_path)
    rewrite(file, {**change, UNET: torch.zeros(2)})
    with pytest.raises(ModelError) as caught:
        latentvae.load(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    if "does not fit" in str(caught.value):
        assert ("belongs to these weights" if configured else "download it again") in str(caught.value)


def test_a_file_without_a_vae_is_named(tmp_path):
    save_file({UNET: torch.zeros(2)}, tmp_path / "unet.safetensors")
    with pytest.raises(ModelError, match=rf"holds no AutoencoderKL: its first key is '{UNET}'.*Wanted keys"):
        latentvae.load(tmp_path / "unet.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ModelError, match="holds no AutoencoderKL: it is empty"):
        latentvae.load(tmp_path / "empty.safetensors")


def test_a_pickled_checkpoint_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "sd.ckpt").write_bytes(b"not even a pickle")
    with pytest.raises(ModelError, match=r"pickled weights.*safetensors\.torch\.save_file") as caught:
        latentvae.load(tmp_path / "sd.ckpt")
    assert 'torch.load(path, weights_only=True)["state_dict"], out)' in str(caught.value)


# --- writing ---------------------------------------------------------------------------------------------


def test_a_config_with_a_path_is_published_without_it(tmp_path, attentive):
    attentive.save_pretrained(tmp_path / "secret place")
    vae = AutoencoderKL.from_pretrained(tmp_path / "secret place")
    for to, name in (("diffusers", "a"), ("ldm", "b.safetensors"), ("single-file", "c.safetensors")):
        save(vae, tmp_path / "out" / name, to)
    for file in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        assert b"secret place" not in file.read_bytes(), file


def test_what_is_there_is_replaced_only_when_asked(tmp_path, attentive):
    other = latentvae.build("tiny").eval()
    for to, name in (("diffusers", "a"), ("ldm", "b.safetensors"), ("single-file", "c.safetensors")):
        save(attentive, tmp_path / name, to)
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(LatentVAEError, match="--overwrite"):
            save(other, tmp_path / name, to)
        assert_same(latentvae.load(tmp_path / name), attentive)
        save(other, tmp_path / name, to, overwrite=True)
        assert_same(latentvae.load(tmp_path / name), other)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_other_things_are_never_replaced(tmp_path, attentive):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "folder.safetensors").mkdir()
    for name, to, message in (
        ("", "diffusers", "holds other things, such as folder.safetensors"),
        ("thesis.txt", "diffusers", "is a file; wanted a folder"),
        ("thesis.txt", "ldm", "wanted one that ends in .safetensors"),
        ("folder.safetensors", "ldm", "is a folder; wanted the name of a file"),
        ("new.safetensors", "diffusers", "is a file's name; wanted a folder's"),
    ):
        with pytest.raises(LatentVAEError, match=message):
            save(attentive, tmp_path / name, to, overwrite=True)
    (tmp_path / "c.json").write_text("mine")
    with pytest.raises(LatentVAEError, match=r"c\.json is already there"):
        save(attentive, tmp_path / "c.safetensors", "single-file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "folder.safetensors", "thesis.txt"]


@pytest.mark.parametrize("to", ["diffusers", "ldm", "single-file"])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, attentive, monkeypatch, to):
    path = tmp_path / ("vae" if to == "diffusers" else "vae.safetensors")
    save(attentive, path, to)
    names = sorted(file.name for file in tmp_path.iterdir())

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", fail)
    with pytest.raises(LatentVAEError, match=r"cannot write .*No space left"):
        save(latentvae.build("tiny"), path, to, overwrite=True)
    assert_same(latentvae.load(path), attentive)
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_a_file_that_stock_diffusers_reads_otherwise_is_not_kept(tmp_path, attentive, monkeypatch):
    rename = writing.ldm_name
    swap = {"quant_conv.bias": "quant_conv.bais"}
    monkeypatch.setattr(writing, "ldm_name", lambda key, levels: rename(swap.get(key, key), levels))
    with pytest.raises(LatentVAEError, match=r"another 'quant_conv\.bias'"):
        save(attentive, tmp_path / "vae.safetensors", "ldm")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_the_dtype_cannot_hold_is_named(tmp_path, attentive):
    with torch.no_grad():
        attentive.decoder.conv_out.bias[0] = 1e5
    with pytest.raises(LatentVAEError, match=r"'decoder\.conv_out\.bias' overflows in .*float16.*bf16"):
        save(attentive, tmp_path / "vae.safetensors", "ldm", dtype=torch.float16)
    save(attentive, tmp_path / "vae.safetensors", "ldm", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "vae.safetensors").values()} == {torch.bfloat16}
    assert attentive.dtype == torch.float32


def test_a_prefix_is_for_ldms_names_only(tmp_path, attentive):
    with pytest.raises(LatentVAEError, match="goes with LDM's names only"):
        save(attentive, tmp_path / "x.safetensors", "single-file", prefix="vae.")


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def run(caplog: pytest.LogCaptureFixture) -> Callable[..., Any]:
    """`latentvae convert ...`, alone."""
    app = typer.Typer()
    app.command()(convert)
    caplog.set_level(logging.WARNING)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_convert_goes_from_any_format_to_any_other(run, tmp_path, attentive):
    attentive.save_pretrained(tmp_path / "in")
    steps = [("in", "a.safetensors", "ldm"), ("a.safetensors", "b.safetensors", "single-file")]
    for source, output, to in [*steps, ("b.safetensors", "out", "diffusers")]:
        result = run(tmp_path / source, tmp_path / output, "--to", to)
        assert result.exit_code == 0, result.output
        assert "without a difference" in result.output
        assert ("Refused by ComfyUI" in result.output) == (to != "diffusers")
    assert_same(AutoencoderKL.from_pretrained(tmp_path / "out"), attentive)


def test_convert_keeps_the_dtype_unless_asked_and_prints_json(run, tmp_path, attentive):
    attentive.half().save_pretrained(tmp_path / "in")
    result = run(tmp_path / "in", tmp_path / "a.safetensors", "--to", "ldm", "--json")
    assert json.loads(result.stdout)["dtype"] == "float16"
    assert_same(latentvae.load(tmp_path / "a.safetensors", dtype=None), attentive)
    result = run(tmp_path / "in", tmp_path / "b.safetensors", "--to", "ldm", "--dtype", "bf16", "--json")
    assert json.loads(result.stdout)["dtype"] == "bfloat16"
    assert latentvae.load(tmp_path / "b.safetensors", dtype=None).dtype == torch.bfloat16


def test_convert_refuses_its_target_before_it_reads_anything(run, tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"")
    result = run(tmp_path / "nothing", tmp_path / "there.safetensors", "--to", "ldm")
    assert isinstance(result.exception, LatentVAEError)
    assert "already there" in str(result.exception)


# --- the hub ---------------------------------------------------------------------------------------------


def test_an_export_in_shards_loads_in_stock_diffusers_with_its_variant(tmp_path, attentive):
    folder = latentvae.export(attentive, tmp_path / "repository" / "vae", max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        stock = AutoencoderKL.from_pretrained(
            tmp_path / "repository", subfolder="vae", variant=variant, torch_dtype=dtype
        )
        wanted = attentive.state_dict()
        assert all(torch.equal(value, wanted[key].to(dtype)) for key, value in stock.state_dict().items())
    assert_same(latentvae.load(tmp_path / "repository"), AutoencoderKL.from_pretrained(folder))
    with pytest.raises(LatentVAEError, match="'many' is no size"):
        latentvae.export(attentive, tmp_path / "b", max_shard_size="many")


class Hub:
    """Keeps what would be uploaded."""

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.repositories[repo_id] = private
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, path_in_repo: str | None, ignore_patterns):
        for path in folder_path.iterdir():
            if path.name not in ignore_patterns:
                self.files[f"{repo_id}/{path_in_repo or ''}/{path.name}"] = path.read_bytes()

    def upload_file(self, *, repo_id: str, path_or_fileobj: bytes, path_in_repo: str) -> None:
        self.files[f"{repo_id}/{path_in_repo}"] = path_or_fileobj


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """In place of the real one."""
    kept = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: kept)
    return kept


@pytest.fixture
def run_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """`latentvae export ...`, alone."""
    app = typer.Typer()
    app.command()(export_command)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_export_uploads_only_when_asked_and_the_card_says_from_where(run_export, hub, tmp_path, attentive):
    attentive.save_pretrained(tmp_path / "in")
    assert run_export(tmp_path / "in", "-o", "a").exit_code == 0
    assert hub.files == {}
    result = run_export(
        *(tmp_path / "in", "-o", "b", "--push-to-hub", "me/my-vae", "--subfolder", "vae"),
        *("--private", "--base-model", "them/their-vae", "--licence", "mit", "--json"),
    )
    assert json.loads(result.stdout)["hub"] == "https://hub.example/me/my-vae"
    assert hub.repositories == {"me/my-vae": True}
    exported = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    card = hub.files.pop("me/my-vae/README.md").decode()
    assert hub.files == {f"me/my-vae/vae/{n}": data for n, data in exported.items() if n != "README.md"}
    assert 'AutoencoderKL.from_pretrained("me/my-vae", subfolder="vae")' in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "diffusers"
    assert front["base_model"] == "them/their-vae"
    assert front["license"] == "mit"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--push-to-hub", "my-vae"), "'my-vae' is no hub id"),
        (("--subfolder", "vae"), "--subfolder is of the hub's repository"),
        (("--private",), "--private is of the hub's repository"),
        (("--push-to-hub", "me/my-vae", "--base-model", "parent"), "base model 'parent' is no hub id"),
        (("--licence", "apache 2"), "'apache 2' is no licence identifier"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_anything_is_written(
    run_export, hub, tmp_path, attentive, arguments, message
):
    attentive.save_pretrained(tmp_path / "in")
    result = run_export(tmp_path / "in", "-o", "out", *arguments)
    assert isinstance(result.exception, LatentVAEError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
    assert hub.repositories == {}


def test_a_hub_that_cannot_be_reached_leaves_the_export(run_export, hub, tmp_path, attentive, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(hub, "upload_folder", fail)
    attentive.save_pretrained(tmp_path / "in")
    result = run_export(tmp_path / "in", "-o", "out", "--push-to-hub", "me/my-vae")
    assert "out is exported, but the hub did not take it as me/my-vae (RuntimeError: no route" in str(
        result.exception
    )
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_card_has_each_latent_channels_figures_and_what_other_programs_take(tmp_path, attentive):
    statistics = compute_latent_statistics(attentive, [torch.rand(1, 3, 32, 32) * 2 - 1])
    folder = latentvae.export(attentive, tmp_path / "vae", statistics=statistics)
    card = (folder / "README.md").read_text()
    for number, std in enumerate(statistics.latents_std):
        assert f"| {number} | 0 | {std:.4g} |" in card
    assert "- Refused by ComfyUI" in card
    assert ": widths 16-16-32-32 (wanted 128-256-512-512)" in card


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("to", ["diffusers", "single-file"])
def test_others_may_read_what_they_may_read_of_any_new_file(tmp_path, attentive, to):
    usual = os.umask(0o027)
    try:
        path = save(attentive, tmp_path / ("vae" if to == "diffusers" else "vae.safetensors"), to)
    finally:
        os.umask(usual)
    file = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    assert file.stat().st_mode & 0o777 == 0o640
