"""Half precision: what overflows is named, what can be rescaled is, and what cannot be says so."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import nn

import latentvae
from latentvae.base.errors import ImageError, LatentVAEError, ModelError
from latentvae.cli.doctor import verdict
from latentvae.cli.main import main
from latentvae.measure import diagnosis as doctor
from latentvae.measure.activations import Watch, run_watched, stock_copy
from latentvae.measure.diagnosis import FP16_MAX, DtypeReport, diagnose, synthetic_probes, wants_upcast
from latentvae.models.exporting import export
from latentvae.models.shipped import WEIGHTS_DIR
from latentvae.pipelines.doctor import rescaling
from latentvae.pipelines.doctor.halves import compare_halves
from latentvae.pipelines.doctor.rescaling import TOLERANCE, UnfixableError, find_knobs

SIZE = 32
ALL_PROBES = synthetic_probes(3, SIZE)
PROBES = {name: ALL_PROBES[name] for name in ("noise", "black")}


def tiny(**settings: object) -> AutoencoderKL:
    """Two levels, with a change of width between them."""
    torch.manual_seed(0)
    return (
        latentvae.build("tiny", **{"block_out_channels": (16, 32), **settings}).eval().requires_grad_(False)
    )


def enlarge(vae: AutoencoderKL, layer: str, factor: float, *undone: str) -> AutoencoderKL:
    """Scale a layer's weight and bias in place, and the weights of those that undo it the other way."""
    for tensor in vae.get_submodule(layer).parameters():
        tensor.mul_(factor)
    for name in undone:
        vae.get_submodule(name).weight.div_(factor)
    return vae


def leaves(vae: AutoencoderKL) -> set[str]:
    """Names of the modules that compute."""
    parts = vae.named_modules()
    return {name for name, part in parts if not list(part.children()) and not isinstance(part, nn.ModuleList)}


def broken_norm() -> AutoencoderKL:
    """Overflows between a norm and its SiLU, where no scale is undone."""
    return enlarge(tiny(), "decoder.mid_block.resnets.0.norm2", 2.0**15, "decoder.mid_block.resnets.0.conv2")


def run(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in ("doctor", *arguments, "--size", SIZE)])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> Callable[..., tuple]:
    """Run `latentvae doctor ...` with small probes, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run(list(arguments), capsys)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tiny models: one fine, one to be fixed, one that cannot be, and one that is NaN in fp32."""
    folder = tmp_path_factory.mktemp("models")
    export(tiny(), folder / "fine")
    export(enlarge(tiny(), "decoder.up_blocks.1.resnets.0.conv1", 2.0**18), folder / "overflowing")
    export(broken_norm(), folder / "unfixable")
    vae = tiny()
    vae.decoder.conv_in.weight[0] = math.nan
    vae.save_pretrained(folder / "nan")
    return folder


# --- naming what overflows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "undone"),
    [
        ("encoder.down_blocks.1.resnets.0.conv1", []),
        ("decoder.up_blocks.1.resnets.1.conv1", []),
        ("decoder.mid_block.attentions.0.to_v", ["decoder.mid_block.attentions.0.to_out.0"]),
        (
            "encoder.mid_block.attentions.0.group_norm",
            [f"encoder.mid_block.attentions.0.to_{name}" for name in "qkv"],
        ),
        ("encoder.conv_out", ["quant_conv"]),
        ("post_quant_conv", ["decoder.conv_in"]),
    ],
)
def test_the_layer_that_overflows_is_named_first_and_fixed(layer, undone):
    vae = enlarge(tiny(mid_block_add_attention=True), layer, 2.0**18, *undone)
    diagnosis = diagnose(vae, PROBES)
    overflow = diagnosis.dtypes["fp16"].first_overflow
    assert overflow.layer == layer
    assert overflow.kind == type(vae.get_submodule(layer)).__name__
    assert not diagnosis.fp16_works
    assert diagnosis.wanted_force_upcast is True
    assert diagnosis.dtypes["bf16"].first_overflow is None

    fixed = rescaling.rescale(vae, PROBES)
    assert fixed.headroom == 8
    assert list(fixed.scales) == [layer]
    assert fixed.after.hottest(1)[0].largest <= FP16_MAX / 8
    assert fixed.vae.config["force_upcast"] is False
    half = stock_copy(fixed.vae, torch.float16)
    for images in PROBES.values():
        before, after = (latentvae.reconstruct(model, images).reconstructions for model in (vae, fixed.vae))
        assert (before - after).abs().max() <= TOLERANCE * (before.max() - before.min())
    noise = PROBES["noise"]  # once in torch's own fp16, which is slow
    assert latentvae.reconstruct(half, noise).reconstructions.isfinite().all()


def test_a_config_should_upcast_where_the_diagnosis_says_so():
    assert wants_upcast(tiny()) is False
    overflowing = enlarge(tiny(), "encoder.conv_out", 2.0**18, "quant_conv")
    assert wants_upcast(overflowing) is diagnose(overflowing, PROBES).wanted_force_upcast is True


def test_a_sum_that_overflows_is_named_though_no_layer_in_it_does():
    vae, block = tiny(), "decoder.up_blocks.1.resnets.1"
    before = diagnose(vae, PROBES)
    largest = {layer.name: layer.largest for layer in before.layers}
    stream = next(knob for knob in find_knobs(vae, before) if block in knob.outputs)
    parts = max(largest[name] for name in stream.outputs if name != block)
    assert largest[block] > 1.1 * parts
    for name in stream.scaled:  # the parts stay below the limit
        enlarge(vae, name, 0.95 * FP16_MAX / parts)
    assert stream.undone == []
    overflow = diagnose(vae, PROBES).dtypes["fp16"].first_overflow
    assert (overflow.layer, overflow.kind) == (block, "ResnetBlock2D")
    assert rescaling.rescale(vae, PROBES).after.fp16_works


def test_weights_that_do_not_fit_into_fp16_are_told_from_activations():
    vae = enlarge(tiny(), "decoder.up_blocks.0.resnets.0.conv1", 2.0**24)
    overflow = diagnose(vae, PROBES).dtypes["fp16"].decode_overflow
    assert (overflow.layer, overflow.in_weights) == ("decoder.up_blocks.0.resnets.0.conv1", True)
    assert rescaling.rescale(vae, PROBES).after.fp16_works
    vae = enlarge(tiny(), "decoder.up_blocks.0.resnets.0.conv1", 2.0**17)
    assert diagnose(vae, PROBES).dtypes["fp16"].decode_overflow.in_weights is False


def test_an_encoder_that_overflows_does_not_hide_the_decoder():
    vae = enlarge(tiny(), "encoder.mid_block.resnets.0.conv1", 2.0**18)
    report = diagnose(vae, PROBES).dtypes["fp16"]
    assert report.encode_overflow.layer == "encoder.mid_block.resnets.0.conv1"
    assert report.decode_overflow is None
    assert report.worst_psnr > 50
    assert report.worst_latents_error is None


def test_the_earliest_layer_is_named_whichever_probe_overflows_there():
    vae = enlarge(tiny(), "encoder.mid_block.resnets.0.conv1", 2.0**18)
    vae.encoder.conv_in.weight.zero_()
    vae.encoder.conv_in.weight[:, :, 1, 1] = 1.5e4
    vae.encoder.conv_in.bias.fill_(2.5e4)  # white, of three channels, makes 7e4 of it; the checkerboard 4e4
    for names in (("white", "checkerboard"), ("checkerboard", "white")):
        alone = diagnose(vae, {"checkerboard": ALL_PROBES["checkerboard"]}).dtypes["fp16"].encode_overflow
        assert alone.layer == "encoder.mid_block.resnets.0.conv1"
        both = diagnose(vae, {name: ALL_PROBES[name] for name in names}).dtypes["fp16"].encode_overflow
        assert (both.layer, both.probe) == ("encoder.conv_in", "white")


def test_every_layer_is_measured_at_its_largest():
    vae = tiny(mid_block_add_attention=True)
    diagnosis = diagnose(vae, PROBES)
    measured = {layer.name: layer for layer in diagnosis.layers}
    assert leaves(vae) <= measured.keys()
    seen: dict[str, float] = {}
    for part, module in vae.named_modules():
        if part in leaves(vae) or part == "decoder.up_blocks.1.resnets.0":
            module.register_forward_hook(
                lambda module, inputs, output, part=part: seen.update(
                    {part: max(seen.get(part, 0), float(output.abs().max()))}
                )
            )
    for images in PROBES.values():
        latentvae.reconstruct(vae, images)
    for part, largest in seen.items():
        assert measured[part].largest == pytest.approx(largest, rel=1e-6)
        assert measured[part].headroom == pytest.approx(65504 / largest, rel=1e-6)
    assert diagnosis.hottest(3)[0].largest == max(layer.largest for layer in diagnosis.layers)


def test_attention_logits_are_measured_in_blocks():
    query, key = torch.randn(1, 2, 1500, 16), torch.randn(1, 2, 1500, 16)
    model = nn.ModuleDict({"attention": nn.ModuleDict({"to_v": nn.Linear(4, 4)})})
    with torch.no_grad(), Watch(model) as watch:
        model["attention"]["to_v"](torch.randn(1, 4))
        nn.functional.scaled_dot_product_attention(query, key, key)
    exact = (query @ key.transpose(-1, -2) / 4).abs().max()
    assert watch.largest["attention.logits"] == pytest.approx(float(exact), rel=1e-5)
    layers = {layer.name for layer in diagnose(tiny(mid_block_add_attention=True), PROBES).layers}
    assert "decoder.mid_block.attentions.0.logits" in layers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_emulated_arithmetic_rounds_as_the_dtype_does(dtype):
    vae = tiny(mid_block_add_attention=True)
    half, images = stock_copy(vae, dtype), {"noise": PROBES["noise"]}
    exact = run_watched(vae, images)["noise"].images
    assert not any(module._forward_hooks for module in vae.modules())
    emulated = run_watched(half, images)["noise"].images
    native = latentvae.reconstruct(half, images["noise"]).reconstructions
    error, wanted = (float((result - exact).square().mean().sqrt()) for result in (emulated, native))
    assert wanted / 1.5 < error < wanted * 1.5
    assert emulated.to(dtype).float().equal(emulated)


def test_the_error_is_in_decibels_of_the_range_of_two():
    vae = tiny()
    report = diagnose(vae, PROBES).dtypes["bf16"]
    latents = latentvae.encode(vae, PROBES["noise"])[0].mode()
    exact = latentvae.decode(vae, latents).clamp(-1, 1)
    bf16 = run_watched(stock_copy(vae, torch.bfloat16), PROBES, dict.fromkeys(PROBES, latents))
    error = (bf16["noise"].images.clamp(-1, 1) - exact).square().mean()
    assert report.psnr["noise"] == pytest.approx(10 * math.log10(4 / float(error)), abs=1e-3)
    assert report.worst_psnr == min(report.psnr.values())
    relative = (bf16["noise"].posterior.mode() - latents).norm() / latents.norm()
    assert report.latents_error["noise"] == pytest.approx(float(relative), rel=1e-4)


def test_fp16_that_is_finite_and_inexact_does_not_work():
    vae = tiny()
    for resnet in (block for part in vae.decoder.up_blocks for block in part.resnets):
        resnet.conv1.bias.add_(8192)  # the norm takes it off again, fp16 has rounded to 8 by then
    diagnosis = diagnose(vae, PROBES)
    assert diagnosis.dtypes["fp16"].first_overflow is None
    assert diagnosis.dtypes["fp16"].worst_psnr < doctor.MIN_PSNR
    assert diagnosis.wanted_force_upcast is True
    with pytest.raises(UnfixableError, match="dB from fp32"):
        rescaling.rescale(vae, PROBES)


def test_the_diagnosed_model_is_left_alone_and_its_tiling_does_not_count():
    vae = tiny()
    before, config = {key: tensor.clone() for key, tensor in vae.state_dict().items()}, dict(vae.config)
    diagnosis = diagnose(vae, PROBES)
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 2
    assert diagnose(vae, PROBES) == diagnosis
    rescaling.rescale(vae, PROBES)
    assert all(before[key].equal(tensor) for key, tensor in vae.state_dict().items())
    assert dict(vae.config) == config
    assert not any(module._forward_hooks for module in vae.modules())


# --- rescaling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mid_block_add_attention": True},
        {"block_out_channels": (16,), "layers_per_block": 2},
        {"block_out_channels": (8, 16, 8), "layers_per_block": 3, "use_quant_conv": False},
        {"block_out_channels": (16, 32), "use_post_quant_conv": False, "mid_block_add_attention": True},
    ],
)
def test_every_scale_is_undone_where_eps_is_nothing(settings):
    vae = tiny(**settings)
    diagnosis = diagnose(vae, PROBES)
    knobs = find_knobs(vae, diagnosis)
    exponents = [int(e) for e in torch.randint(1, 7, (len(knobs),)) * torch.randn(len(knobs)).sign()]
    assert len(set(exponents)) > 1
    turned = rescaling._turned(vae, knobs, exponents)
    images = {"noise": PROBES["noise"].double()}
    for model in (vae, turned):
        model.double()
        for norm in (module for module in model.modules() if isinstance(module, nn.GroupNorm)):
            norm.eps = 0.0
    before, after = (run_watched(model, images)["noise"] for model in (vae, turned))
    assert (before.images - after.images).abs().max() < 1e-9
    assert (before.posterior.mean - after.posterior.mean).abs().max() < 1e-9
    assert (before.posterior.logvar - after.posterior.logvar).abs().max() < 1e-9
    for knob, exponent in zip(knobs, exponents, strict=True):
        for name in knob.outputs:
            assert after.largest[name] == pytest.approx(before.largest[name] * 2.0**exponent, rel=1e-9)
    turnable = {name for knob in knobs for name in knob.outputs}
    fixed = {"quant_conv", "decoder.conv_out"} | ({"encoder.conv_out"} if vae.quant_conv is None else set())
    linear = {name for name, part in vae.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)}
    assert {name for name in linear - turnable - fixed if not name.endswith(("to_q", "to_k"))} == set()


def test_a_model_that_needs_nothing_is_only_set_to_fp16():
    vae = tiny()
    fixed = rescaling.rescale(vae, PROBES)
    assert fixed.scales == {}
    assert (fixed.images_error, fixed.moments_error) == (0, 0)
    assert fixed.vae.config["force_upcast"] is False
    assert all(tensor.equal(vae.state_dict()[key]) for key, tensor in fixed.vae.state_dict().items())


def test_a_thin_headroom_is_widened():
    vae, layer = tiny(), "encoder.down_blocks.0.resnets.0.conv1"
    largest = {one.name: one.largest for one in diagnose(vae, PROBES).layers}[layer]
    enlarge(vae, layer, 40_000 / largest)
    diagnosis = diagnose(vae, PROBES)
    assert diagnosis.fp16_works
    assert "barely" in verdict(diagnosis)
    assert rescaling.rescale(vae, PROBES).scales == {layer: 1 / 8}


def test_less_is_scaled_where_the_norms_eps_counts():
    """The stream's last writer is made so large that all of it must shrink, small values as well."""
    headrooms, probes = [], {"noise": PROBES["noise"]}
    for exponent in range(15, 19):  # each quadruples what eps changes
        vae = enlarge(tiny(), "decoder.up_blocks.1.resnets.1.conv2", 2.0**exponent)
        try:
            fixed = rescaling.rescale(vae, probes)
        except UnfixableError:
            headrooms.append(0.0)
            continue
        assert max(fixed.images_error, fixed.moments_error) <= TOLERANCE
        assert fixed.after.fp16_works
        headrooms.append(fixed.headroom)
    assert headrooms == sorted(headrooms, reverse=True)
    assert set(headrooms) == {8.0, 4.0, 2.0, 0.0}
    with pytest.raises(UnfixableError, match="GroupNorm's eps changes the fp32 outputs by"):
        rescaling.rescale(vae, probes)


def test_a_model_that_cannot_be_rescaled_says_which_layer_is_in_the_way():
    with pytest.raises(
        UnfixableError, match=r"decoder\.mid_block\.resnets\.0\.norm2 \(GroupNorm\)"
    ) as caught:
        rescaling.rescale(broken_norm(), PROBES)
    assert caught.value.diagnosis.wanted_force_upcast is True


# --- the command -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bundled_model_passes_and_its_copy_is_not_upcast(command):
    code, out, _ = command("f8c4-small", "--fix", "out", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["force_upcast"]["wanted"] is False
    assert report["dtypes"]["fp16"]["first_overflow"] is None
    assert report["dtypes"]["fp16"]["worst_psnr"] > 60
    assert report["probes"] == ["chelsea.png", *ALL_PROBES]
    assert json.loads(Path("out/config.json").read_text())["force_upcast"] is False

    before = json.loads((WEIGHTS_DIR / "f8c4-small" / "latentvae.json").read_text())
    after = json.loads(Path("out/latentvae.json").read_text())
    assert after["training"].startswith(before["training"])
    assert "nothing had to be rescaled, force_upcast False" in after["training"]
    assert {**after, "training": None} == {**before, "training": None, "intensity_range": None}


def test_the_report_names_what_overflows_and_ends_with_code_5(command, models):
    code, out, _ = command(models / "overflowing")
    assert code == 5
    layer = "decoder.up_blocks.1.resnets.0.conv1"
    assert f"verdict: fp16 overflows at {layer}" in out
    assert f"fp16, decoding: {layer} (Conv2d) overflows first, for the probe" in out
    table = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert table[layer][1] == "Conv2d"
    assert float(table[layer][2]) > 65504
    assert table["fp16"][1] == "no"
    assert table["bf16"][1] == "yes"
    assert "force_upcast: True, as it should be" in out
    assert "emulated" in out


def test_fix_writes_what_plain_diffusers_loads_and_gives_the_same(command, models):
    code, out, _ = command(models / "overflowing", "--fix", "out")
    assert code == 0
    assert "wrote out, force_upcast False; 1 scales changed" in out
    original = AutoencoderKL.from_pretrained(str(models / "overflowing")).eval()
    fixed = AutoencoderKL.from_pretrained("out").eval()
    half = AutoencoderKL.from_pretrained("out", variant="fp16", torch_dtype=torch.float16).eval()
    assert original.config["force_upcast"] is True
    assert fixed.config["force_upcast"] is half.config["force_upcast"] is False
    with torch.no_grad():
        for images in ALL_PROBES.values():
            before, after = (model(images).sample for model in (original, fixed))
            assert (before - after).abs().max() <= TOLERANCE * (before.max() - before.min())
        in_half = half(images.half()).sample.float()
        assert (in_half - before).abs().max() < 0.02 * (before.max() - before.min())
    assert command("out")[0] == 0


def test_what_cannot_be_fixed_ends_with_code_5_and_writes_nothing(command, models, tmp_path):
    code, out, err = command(models / "unfixable", "--fix", "out")
    assert code == 5
    assert "--fix: no rescaling makes fp16 work" in out
    assert "decoder.mid_block.resnets.0.norm2" in out
    assert "Nothing was written" in out
    assert "Traceback" not in err
    code, out, _ = command(models / "unfixable", "--fix", "out", "--json")
    assert code == 5
    assert json.loads(out)["fix"]["output"] is None
    assert "norm2" in json.loads(out)["fix"]["problem"]
    assert list(tmp_path.iterdir()) == []


def test_json_holds_everything(command, models):
    code, out, _ = command(models / "overflowing", "--json", "--fix", "out")
    assert code == 0
    assert out.count("\n") == 1
    report = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report.keys() == {
        "model", "probes", "layers", "dtypes", "fp16_works", "force_upcast", "fix", "skipped", "left_out"
    }  # fmt: skip
    vae = latentvae.load(models / "overflowing")
    assert leaves(vae) <= {layer["name"] for layer in report["layers"]}
    assert all(layer.keys() == {"name", "kind", "largest", "headroom"} for layer in report["layers"])
    assert report["dtypes"].keys() == {"bf16", "fp16"}
    fp16 = report["dtypes"]["fp16"]
    assert fp16["decode_overflow"] == fp16["first_overflow"]
    assert fp16["first_overflow"].keys() == {"layer", "kind", "probe", "in_weights"}
    assert fp16["psnr"].keys() == fp16["latents_error"].keys() == set(report["probes"])
    assert None in fp16["psnr"].values()
    assert report["fp16_works"] is False
    assert report["force_upcast"] == {"current": True, "wanted": True}
    assert report["fix"]["output"] == "out"
    assert report["fix"]["scales"].keys() == {"decoder.up_blocks.1.resnets.0.conv1"}
    assert report["fix"]["after"]["force_upcast"] == {"current": False, "wanted": False}
    assert report["fix"]["images_error"] <= TOLERANCE


def test_figures_without_end_are_null_in_json():
    report = DtypeReport("fp16", "native", None, None, {"a": 0.0}, {"a": math.inf})
    assert report.worst_psnr == math.inf
    assert report.as_dict()["psnr"] == {"a": None}
    layers = (doctor.Layer("a", "Conv2d", 0.0),)
    diagnosis = dataclasses.replace(diagnose(tiny(), {"a": PROBES["noise"]}), layers=layers)
    assert diagnosis.as_dict()["layers"][0]["headroom"] is None
    json.dumps(diagnosis.as_dict(), allow_nan=False)


def test_own_images_replace_the_sample_and_bad_ones_are_skipped(command, models, tmp_path):
    Image.new("RGB", (100, 20), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "bad.png").write_bytes(b"broken")
    code, out, err = command(
        models / "fine", "--images", "red.png", "--images", tmp_path / "bad.png", "--json"
    )
    assert code == 3
    assert json.loads(out)["probes"] == ["red.png", *ALL_PROBES]
    assert [entry["path"] for entry in json.loads(out)["skipped"]] == [str(tmp_path / "bad.png")]
    assert "bad.png" in err
    code, out, err = command(models / "fine", "--images", "bad.png")
    assert (code, out) == (2, "")
    assert "the only image could not be read" in err


def test_models_of_other_channels_are_probed_without_pictures(command, tmp_path):
    export(tiny(in_channels=2, out_channels=2), "two")
    code, out, _ = command("two", "--json")
    assert code == 0
    assert json.loads(out)["probes"] == list(ALL_PROBES)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    code, _, err = command("two", "--images", "a.png")
    assert code == 2
    assert "2 channels" in err


def test_bad_input_ends_with_code_2(command, models, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    cases = {
        ("f8c4-smal",): "Did you mean 'f8c4-small'?",
        (models / "nan",): "in fp32 already, decoder.conv_in gives infinite or NaN values",
        (models / "fine", "--images", "nowhere.png"): "nowhere.png does not exist",
        (models / "fine", "--fix", "mine"): "--fix mine is there already",
        (models / "fine", "--fix", "mine", "--overwrite"): "no earlier export",
        (models / "fine", "--fix", "file"): "--fix file is there already",
        (models / "fine", "--device", "nothing"): "wanted cpu",
    }
    for arguments, words in cases.items():
        code, out, err = command(*arguments)
        assert (code, out) == (2, ""), arguments
        assert words in err
        assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_fix_does_not_spend_minutes_before_it_looks_at_the_folder(command, models, monkeypatch):
    for name in ("out/latentvae.json", "mine/thesis.txt"):
        Path(name).parent.mkdir()
        Path(name).write_text("{}")
    monkeypatch.setattr(
        "latentvae.pipelines.doctor.rescaling.rescale", lambda *_: pytest.fail("measured first")
    )
    assert command(models / "fine", "--fix", "out")[0] == 2
    code, _, err = command(models / "fine", "--fix", "mine", "--overwrite")
    assert code == 2
    assert "mine is not empty and no earlier export. Choose another --fix." in err


def test_fix_replaces_an_earlier_export_when_told(command, models):
    shutil.copytree(models / "overflowing", "out")
    assert command(models / "fine", "--fix", "out", "--overwrite")[0] == 0
    assert json.loads(Path("out/config.json").read_text())["force_upcast"] is False


@pytest.mark.parametrize(
    ("probes", "words"),
    [
        ({}, "no probe images came"),
        ({"a": torch.full((1, 3, 32, 32), 255.0)}, r"'a' has values outside \[-1, 1\]"),
        ({"a": torch.full((1, 3, 32, 32), math.nan)}, "'a' has values outside"),
        ({"a": torch.zeros(1, 4, 32, 32)}, "takes \\(B, 3, H, W\\)"),
    ],
)
def test_probes_that_are_no_images_are_refused(probes, words):
    with pytest.raises(ImageError, match=words):
        diagnose(tiny(), probes)


def test_other_models_are_refused():
    with pytest.raises(ModelError, match="AutoencoderTiny came; wanted a diffusers AutoencoderKL"):
        diagnose(AutoencoderTiny(), PROBES)
    assert issubclass(UnfixableError, LatentVAEError)


# --- the same picture --------------------------------------------------------------------------------------


def test_halves_are_compared_from_pixels_to_pixels():
    image = PROBES["noise"]
    found = compare_halves(tiny(), {"noise": image, "black": PROBES["black"]})
    assert list(found) == ["bf16", "fp16"]
    by_hand = [run_watched(stock_copy(tiny(), dtype), PROBES) for dtype in (torch.float32, torch.bfloat16)]
    pictures = [
        torch.cat([((one.images.float() * 127.5 + 127.5).round().clamp(0, 255)) for one in each.values()])
        for each in by_hand
    ]
    difference = (pictures[0] - pictures[1]).abs()
    assert found["bf16"].largest == difference.max() > 0
    assert found["bf16"].changed == pytest.approx((difference > 0).float().mean())
    assert found["fp16"].psnr > found["bf16"].psnr > 20
    assert found["fp16"].changed < found["bf16"].changed


def test_a_precision_that_overflows_gives_no_picture():
    with pytest.raises(LatentVAEError, match=r"'black' is not finite in torch.float16.*overflows first"):
        compare_halves(broken_norm(), {"black": PROBES["black"]})
    with pytest.raises(LatentVAEError, match="no images came"):
        compare_halves(tiny(), {})


@pytest.mark.slow
@pytest.mark.parametrize("name", latentvae.bundled())
def test_a_bundled_model_gives_the_same_picture_in_every_precision(name, shared):
    """Of one Kodak image: fp16 within what is seen, bf16 within its 8 bits of mantissa; no overflow."""
    image = latentvae.load_image(shared / "photos" / "kodak" / "23.png")[None]
    vae = latentvae.load(name)
    found = compare_halves(vae, {"23": image})
    assert found["fp16"].psnr > 50
    assert found["fp16"].off < 1e-4  # single values: a maximum would be of the one pixel of a million
    assert found["bf16"].psnr > 35
    assert diagnose(vae, {"23": image[..., :256, :256]}).fp16_works
