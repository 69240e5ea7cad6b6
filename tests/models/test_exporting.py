"""An export is stock diffusers', gives one picture in every pipeline, and replaces nothing until proven."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import latentvae
from latentvae.base.errors import LatentVAEError, ModelError
from latentvae.cli.main import main
from latentvae.images.reading import load_image
from latentvae.models import exporting as export_module
from latentvae.models.card import Provenance
from latentvae.models.exporting import SIDECAR, export, fold_latent_mean, join_halves, prepare_export
from latentvae.models.latents import compute_latent_statistics, encode, reconstruct, scale
from latentvae.models.licences import LICENCES, check_licence
from latentvae.models.loading import WEIGHTS_NAME

MEAN = [2.0, -1.5, 0.25, 4.0]


def trained_like(**overrides: object) -> AutoencoderKL:
    """A tiny model whose latents have, as trained ones, channel means far from zero and small variances."""
    torch.manual_seed(0)
    vae = latentvae.build("tiny", **overrides).eval()
    last = vae.quant_conv if vae.quant_conv is not None else vae.encoder.conv_out
    channels = vae.config.latent_channels
    with torch.no_grad():
        last.weight[:channels] *= 3
        last.bias[:channels] += torch.tensor(MEAN)[:channels] if channels <= 4 else 1.0
        last.bias[channels:] -= 4
    return vae


def picture(height: int = 40, width: int = 56) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def photos(photo_folder: Path) -> list[torch.Tensor]:
    return [load_image(path)[None] for path in sorted(photo_folder.iterdir())]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, photos: list[torch.Tensor]) -> Path:
    """An export with statistics. Do not write here."""
    vae = trained_like()
    folder = tmp_path_factory.mktemp("export") / "vae"
    return export(vae, folder, statistics=compute_latent_statistics(vae, photos))


@pytest.fixture(scope="module")
def stock(exported: Path) -> AutoencoderKL:
    """The export as diffusers loads it."""
    return AutoencoderKL.from_pretrained(str(exported)).eval()


def test_halves_that_learned_apart_are_joined_and_the_two_left_alone(tmp_path):
    folders = tmp_path / "encoder", tmp_path / "decoder"
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        export(latentvae.build("tiny"), folder)
    first, second = (latentvae.load(folder) for folder in folders)
    before = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    joined = join_halves(first, second)
    with torch.no_grad():
        moments = [vae.encode(picture()).latent_dist.parameters for vae in (joined, first)]
        assert torch.equal(*moments)
        latents = torch.randn(1, 4, 5, 7)
        assert torch.equal(joined.decode(latents).sample, second.decode(latents).sample)
    assert all(torch.equal(tensor, before[key]) for key, tensor in first.state_dict().items())

    with pytest.raises(SystemExit) as end:
        main(["export", str(folders[0]), "--decoder", str(folders[1]), "-o", str(tmp_path / "out")])
    assert not end.value.code
    written = latentvae.load(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, written[key]) for key, tensor in joined.state_dict().items())


@pytest.mark.parametrize("other", [{"block_out_channels": (16, 16, 32, 64)}, {"scaling_factor": 0.5}])
def test_halves_of_two_shapes_or_spaces_are_not_joined(tiny_vae, other):
    with pytest.raises(ModelError, match=next(iter(other))):
        join_halves(tiny_vae, latentvae.build("tiny", **other))


# --- folding the mean ------------------------------------------------------------------------------------


def test_folding_the_mean_shifts_the_latents_by_it_and_changes_no_reconstruction():
    vae = trained_like().double()
    images = picture().double()
    folded = fold_latent_mean(vae, MEAN)
    before, after = reconstruct(vae, images), reconstruct(folded, images)
    shift = torch.tensor(MEAN, dtype=torch.float64).view(1, 4, 1, 1)
    torch.testing.assert_close(after.posterior.mean, before.posterior.mean - shift, rtol=0, atol=1e-12)
    assert torch.equal(after.posterior.logvar, before.posterior.logvar)
    torch.testing.assert_close(after.reconstructions, before.reconstructions, rtol=0, atol=1e-12)


def test_folding_leaves_the_model_it_was_given_alone():
    vae = trained_like()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    fold_latent_mean(vae, MEAN)
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())


@pytest.mark.parametrize("lacking", ["use_quant_conv", "use_post_quant_conv"])
def test_a_mean_cannot_be_folded_without_both_convolutions(lacking):
    with pytest.raises(ModelError, match="without quant_conv and post_quant_conv"):
        fold_latent_mean(trained_like(**{lacking: False}), MEAN)


def test_a_half_precision_model_is_folded_in_full_precision(photos):
    vae = trained_like().bfloat16()
    statistics = compute_latent_statistics(vae, photos)
    plain, folded = prepare_export(vae, None), prepare_export(vae, statistics)
    difference = (
        reconstruct(plain, picture()).reconstructions - reconstruct(folded, picture()).reconstructions
    )
    assert difference.abs().max() < 1e-4  # biases rounded to bfloat16 would not cancel: 1e-2


# --- what stock diffusers sees ---------------------------------------------------------------------------


def test_stock_diffusers_loads_the_export_and_reconstructs_as_the_model_did(stock):
    assert type(stock) is AutoencoderKL
    expected = reconstruct(trained_like(), picture()).reconstructions
    torch.testing.assert_close(reconstruct(stock, picture()).reconstructions, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_export_reconstructs_without_this_package_to_the_last_bit(exported, stock, tmp_path):
    torch.save(picture(40, 56), tmp_path / "images.pt")
    code = (
        "import sys\n"
        "sys.modules['latentvae'] = None\n"
        "import torch\n"
        "from diffusers import AutoencoderKL\n"
        "torch.set_num_threads(1)\n"
        "vae = AutoencoderKL.from_pretrained(sys.argv[1])\n"
        "images = torch.load('images.pt')\n"
        "with torch.no_grad():\n"
        "    torch.save(vae.decode(vae.encode(images).latent_dist.mode()).sample, 'out.pt')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", code, str(exported)], cwd=tmp_path, env=environment, check=True, timeout=120
    )
    there = torch.load(tmp_path / "out.pt")
    here = reconstruct(stock, picture(40, 56)).reconstructions
    assert there.shape == here.shape
    assert (there - here).abs().max() == 0


def test_the_half_precision_variant_is_the_same_weights_rounded(exported, stock):
    half = AutoencoderKL.from_pretrained(str(exported), variant="fp16", torch_dtype=torch.float16)
    wanted = stock.state_dict()
    for key, tensor in half.state_dict().items():
        assert torch.equal(tensor, wanted[key].half()), key
    dtypes = {
        path.name: {t.dtype for t in load_file(path).values()} for path in exported.glob("*.safetensors")
    }
    assert dtypes == {
        WEIGHTS_NAME: {torch.float32},
        "diffusion_pytorch_model.fp16.safetensors": {torch.float16},
    }


def test_the_config_is_safe_for_every_pipeline(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL"
    assert config["shift_factor"] == 0.0  # SD3 adds it: None would be a TypeError
    assert isinstance(config["shift_factor"], float)
    assert config["latents_mean"] is None  # SDXL would scale twice
    assert config["latents_std"] is None
    assert config["sample_size"] >= 256


def test_our_own_loader_takes_the_export(exported, stock):
    loaded = latentvae.load(exported)
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_scaled_latents_have_zero_mean_per_channel_and_unit_deviation(stock, photos):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        posteriors = [encode(stock, image)[0] for image in photos]
        draws = [p.sample(generator) for p in posteriors for _ in range(20)]
    scaled = torch.cat([scale(stock, draw).double().movedim(1, 0).flatten(1) for draw in draws], 1)
    assert scaled.std().item() == pytest.approx(1, abs=0.02)
    assert scaled.mean(1).abs().max() < 0.02
    assert scaled.shape[1] > 20_000  # so the draws' own error is a third of the tolerance at most


@pytest.mark.parametrize(("given", "written"), [(32, 256), (512, 512), ((512, 384), 384), (301, 304)])
def test_a_small_sample_size_is_raised_and_a_large_one_kept(given, written):
    vae = trained_like()
    vae.register_to_config(sample_size=given)
    assert prepare_export(vae, None).config["sample_size"] == written
    assert vae.config["sample_size"] == given


def test_a_models_own_factors_are_kept_without_statistics(tmp_path):
    vae = trained_like()
    vae.register_to_config(scaling_factor=0.18215, shift_factor=None)
    folder = export(vae.half(), tmp_path / "fine-tuned")
    loaded = AutoencoderKL.from_pretrained(str(folder))
    assert loaded.config.scaling_factor == 0.18215
    assert loaded.config.shift_factor == 0.0
    assert loaded.dtype == torch.float32
    assert all(
        torch.equal(value, vae.state_dict()[key].float()) for key, value in loaded.state_dict().items()
    )
    assert vae.dtype == torch.float16  # what was given stays as it was
    assert vae.config.shift_factor is None


# --- the formulas of the pipelines -----------------------------------------------------------------------


def sd_decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """StableDiffusionPipeline: shift_factor is ignored."""
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def sdxl_decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """StableDiffusionXLPipeline: latents_mean and latents_std where both are there."""
    if vae.config.latents_mean is not None and vae.config.latents_std is not None:
        mean, std = (
            torch.tensor(v).view(1, 4, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode(latents * std / vae.config.scaling_factor + mean, return_dict=False)[0]
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def sd3_decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """StableDiffusion3Pipeline, and Flux: shift_factor is added."""
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]


@torch.no_grad()
def test_every_pipelines_formula_gives_the_same_picture(stock):
    original = reconstruct(trained_like(), picture()).reconstructions
    latents = scale(stock, encode(stock, picture())[0].mode())
    assert latents.abs().mean() < 3  # of unit scale, as a diffusion model expects
    for decode in (sd_decode, sdxl_decode, sd3_decode):
        torch.testing.assert_close(decode(stock, latents), original, rtol=0, atol=1e-5)


@torch.no_grad()
def test_encoding_as_sd_does_makes_the_same_latents_as_ours(stock):
    mode = stock.encode(picture()).latent_dist.mode()
    torch.testing.assert_close(scale(stock, mode), mode * stock.config.scaling_factor, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("lacking", ["use_quant_conv", "use_post_quant_conv"])
def test_without_quant_convs_the_shift_is_exported_and_sd3_is_right(photos, tmp_path, lacking):
    vae = trained_like(**{lacking: False})
    statistics = compute_latent_statistics(vae, photos)
    loaded = AutoencoderKL.from_pretrained(export(vae, tmp_path / "vae", statistics=statistics))
    assert loaded.config.shift_factor == pytest.approx(statistics.shift_factor)
    assert loaded.config.latents_mean is None
    original = reconstruct(vae, picture()).reconstructions
    latents = (loaded.encode(picture()).latent_dist.mode() - loaded.config.shift_factor) * (
        loaded.config.scaling_factor
    )
    torch.testing.assert_close(sd3_decode(loaded, latents), original, rtol=0, atol=1e-5)
    assert (sd_decode(loaded, latents) - original).abs().max() > 0.01  # the check can tell them apart
    draws = torch.cat([scale(loaded, encode(loaded, image)[0].sample()).flatten() for image in photos])
    assert draws.mean().abs() < 0.05
    assert draws.std().item() == pytest.approx(1, abs=0.05)


# --- what is on disk -------------------------------------------------------------------------------------


def test_the_export_holds_weights_config_card_and_sidecar_and_no_path(tmp_path, photos):
    source = tmp_path / "secret place" / "model"
    trained_like().save_pretrained(source)
    vae = AutoencoderKL.from_pretrained(str(source))  # remembers where it came from
    provenance = Provenance(
        name="a model",
        licence="cc0-1.0",
        base_model=str(source),
        trained_on="6 pictures",
        training="10 steps, 1/2 of an epoch, see https://example.org/a/b",
        config={"data": {"train": str(tmp_path / "secret place"), "list": ["/home/alice/val", 3, None]}},
        metrics={"protocol": {"lpips_missing_reason": f"no weights in {tmp_path}/cache/vgg.pth, sorry"}},
    )
    folder = export(
        vae,
        tmp_path / "out",
        statistics=compute_latent_statistics(vae, photos),
        provenance=provenance,
    )
    assert set(contents(folder)) == {
        "config.json",
        WEIGHTS_NAME,
        "diffusion_pytorch_model.fp16.safetensors",
        "README.md",
        SIDECAR,
    }
    for name, data in contents(folder).items():
        assert b"/tmp" not in data, name
        assert str(tmp_path).encode() not in data, name
        assert b"alice" not in data, name
        assert b"secret place/" not in data, name
    sidecar = json.loads((folder / SIDECAR).read_text())
    assert sidecar["config"]["data"] == {"train": "secret place", "list": ["val", 3, None]}
    assert sidecar["training"] == "10 steps, 1/2 of an epoch, see https://example.org/a/b"
    assert sidecar["metrics"]["protocol"]["lpips_missing_reason"] == "no weights in vgg.pth, sorry"
    assert provenance.base_model == str(source)  # the caller's own is left as it was


def test_the_sidecar_has_the_per_channel_figures_of_the_exported_latents(exported, photos):
    sidecar = json.loads((exported / SIDECAR).read_text())
    before = compute_latent_statistics(trained_like(), photos)
    after = compute_latent_statistics(AutoencoderKL.from_pretrained(exported), photos)
    found = sidecar["latent_statistics"]
    assert found["folded_mean"] == pytest.approx(before.latents_mean, rel=1e-5)
    assert found["latents_mean"] == pytest.approx(after.latents_mean, abs=1e-4)
    assert found["latents_std"] == pytest.approx(after.latents_std, rel=1e-4)
    assert found["scaling_factor"] == pytest.approx(after.scaling_factor, rel=1e-4)
    assert found["shift_factor"] == 0.0
    assert len(sidecar["latent_statistics"]["latents_mean"]) == 4
    assert sidecar["parameters"] == sum(p.numel() for p in trained_like().parameters())
    assert sidecar["spatial_compression_ratio"] == 8


def test_the_model_card_has_front_matter_that_parses_and_states_the_figures(tmp_path):
    provenance = Provenance(
        name="my model",
        licence="apache-2.0",
        base_model="stabilityai/sd-vae-ft-mse",
        trained_on="PHOTOS",
        metrics={"mean": {"psnr": 31.4159, "lpips": None}, "protocol": {"image_count": 24}},
    )
    card = (export(trained_like(), tmp_path / "vae", provenance=provenance) / "README.md").read_text()
    front = re.match(r"---\n(.*?)\n---\n\n# my model\n", card, re.DOTALL)
    assert front is not None
    assert yaml.safe_load(front[1]) == {
        "library_name": "diffusers",
        "license": "apache-2.0",
        "pipeline_tag": "image-to-image",
        "base_model": "stabilityai/sd-vae-ft-mse",
    }
    assert "| PSNR, dB | 31.42 |" in card
    assert "image_count" in card
    assert "PHOTOS" in card


def test_front_matter_parses_whatever_a_person_typed():
    provenance = Provenance(licence="own terms: see #3", base_model="Bjørn's [best]")
    card = export_module.model_card(trained_like(), provenance)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "own terms: see #3"
    assert "base_model" not in front
    assert "Parent: Bjørn's [best]" in card


@pytest.mark.parametrize("parent", ["{here}/runs/parent", "runs/parent", "./parent", "parent", "f8c4-small"])
def test_a_parent_that_is_no_hub_id_is_not_written_as_one(tmp_path, monkeypatch, parent):
    monkeypatch.chdir(tmp_path)
    Path("runs/parent").mkdir(parents=True)
    provenance = Provenance(base_model=parent.format(here=tmp_path))
    card = (export(trained_like(), "out", provenance=provenance) / "README.md").read_text()
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert "parent" in card or parent in card
    assert str(tmp_path) not in card


def test_a_licence_is_one_of_the_hubs():
    assert {"mit", "cc-by-4.0", "openrail++", "unknown", "other"} <= LICENCES
    assert len(LICENCES) == len({licence.lower() for licence in LICENCES}) == 82
    for licence in LICENCES:
        check_licence(licence)
    for wrong, near in (("Apache 2.0", "'apache-2.0'"), ("CC BY 4.0", "'cc-by-4.0'"), ("MIT", "'mit'")):
        with pytest.raises(LatentVAEError, match=rf"{wrong!r} is no licence .* Did you mean {near}"):
            check_licence(wrong)
    with pytest.raises(LatentVAEError, match=r"hub\. Wanted one of https://"):
        check_licence("§§§")


def test_an_export_without_figures_says_so(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "Not measured." in card


# --- what is there already -------------------------------------------------------------------------------


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(LatentVAEError, match="no earlier export"):
            export(trained_like(), tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_file_is_never_replaced(tmp_path):
    (tmp_path / "model").write_text("a file")
    for overwrite in (False, True):
        with pytest.raises(LatentVAEError, match="is a file; wanted a folder"):
            export(trained_like(), tmp_path / "model", overwrite=overwrite)
    assert (tmp_path / "model").read_text() == "a file"


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert export(trained_like(), folder) == folder
        assert (folder / "config.json").is_file()
        assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_an_earlier_export_is_replaced_only_when_asked(tmp_path):
    folder = export(trained_like(), tmp_path / "vae")
    before = contents(folder)
    other = latentvae.build("tiny", latent_channels=6)
    with pytest.raises(LatentVAEError, match=r"earlier export.*--overwrite"):
        export(other, folder)
    assert contents(folder) == before
    export(other, folder, overwrite=True)
    assert latentvae.load(folder).config.latent_channels == 6
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def fail_to_write(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def fail_to_verify(*_: object) -> None:
    raise LatentVAEError("reloads differently")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("what", "failure", "raised"),
    [
        ("_write", fail_to_write, LatentVAEError),
        ("verify_export", fail_to_verify, LatentVAEError),
        ("verify_export", interrupt, KeyboardInterrupt),
    ],
)
def test_a_failed_export_leaves_the_earlier_one_whole_and_nothing_beside_it(
    tmp_path, monkeypatch, what, failure, raised
):
    folder = export(trained_like(), tmp_path / "vae")
    before = contents(folder)
    monkeypatch.setattr(export_module, what, failure)
    with pytest.raises(raised):
        export(latentvae.build("tiny"), folder, overwrite=True)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_a_failure_at_the_last_rename_brings_the_earlier_export_back(tmp_path, monkeypatch):
    folder = export(trained_like(), tmp_path / "vae")
    before = contents(folder)
    rename = Path.rename

    def fail_once_written(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once_written)
    with pytest.raises(LatentVAEError, match=r"cannot write .*Input/output error"):
        export(latentvae.build("tiny"), folder, overwrite=True)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_a_link_and_the_current_folder_are_replaced_by_what_they_name(tmp_path, monkeypatch):
    folder = export(trained_like(), tmp_path / "vae")
    (tmp_path / "link").symlink_to(folder)
    export(latentvae.build("tiny", latent_channels=6), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert latentvae.load(folder).config.latent_channels == 6
    monkeypatch.chdir(folder)
    export(latentvae.build("tiny", latent_channels=5), ".", overwrite=True)
    assert latentvae.load(folder).config.latent_channels == 5


# --- the check that an export passes ---------------------------------------------------------------------


def test_an_export_that_reloads_with_another_weight_is_refused(tmp_path):
    vae = trained_like()
    prepare_export(vae, None).save_pretrained(tmp_path)
    with torch.no_grad():
        vae.decoder.conv_out.bias[1] += 1e-7
    with pytest.raises(LatentVAEError, match=r"another 'decoder\.conv_out\.bias'"):
        export_module.verify_export(vae, tmp_path)


def test_a_weight_that_half_precision_cannot_hold_is_named_and_nothing_written(tmp_path):
    vae = trained_like()
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = 1e5
    with pytest.raises(LatentVAEError, match=r"'decoder\.conv_out\.bias' overflows in the fp16 weights"):
        export(vae, tmp_path / "vae")
    assert list(tmp_path.iterdir()) == []


# --- in a pipeline ---------------------------------------------------------------------------------------


def tiny_pipeline(vae: AutoencoderKL, folder: Path) -> Any:
    """A StableDiffusionPipeline of random weights around `vae`; its tokenizer knows single letters."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokens = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ends = {"bos_token_id": len(tokens), "eos_token_id": len(tokens) + 1, "pad_token_id": len(tokens) + 1}
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        **ends,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(str(folder), model_max_length=77),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_an_export_gives_pictures_in_a_stable_diffusion_pipeline_and_saves_with_it(exported, stock, tmp_path):
    def ask(output_type: str) -> np.ndarray | torch.Tensor:
        return pipeline(
            "a cat",
            num_inference_steps=2,
            height=64,
            width=72,
            output_type=output_type,
            generator=torch.Generator().manual_seed(0),
        ).images

    pipeline = tiny_pipeline(AutoencoderKL.from_pretrained(str(exported)), tmp_path / "tokenizer")
    images = ask("np")
    assert images.shape == (1, 64, 72, 3)
    assert images.std() > 0.01
    with torch.no_grad():
        expected = sd3_decode(stock, ask("latent"))  # the formula that reads the shift
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(images, expected.numpy(), rtol=0, atol=1e-5)
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    reloaded = latentvae.load(tmp_path / "pipeline")
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in reloaded.state_dict().items())


def test_half_writes_one_fp16_file_that_loads_as_it_is_verified(tiny_vae, tmp_path):
    folder = export(tiny_vae, tmp_path / "half", half=True)
    (weights,) = folder.glob("*.safetensors")
    assert weights.name == "diffusion_pytorch_model.safetensors"
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    loaded = AutoencoderKL.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    for key, tensor in tiny_vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.half().float()), key
