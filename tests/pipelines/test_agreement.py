"""Whether two VAEs speak the same latent space: figures, threshold, command line."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from diffusers import AutoencoderTiny
from PIL import Image
from typer.testing import CliRunner

import latentvae
from latentvae.base.errors import LatentVAEError, ModelError
from latentvae.cli.agree import PICTURE
from latentvae.cli.agree import agree as verb
from latentvae.models.exporting import export, fold_latent_mean
from latentvae.pipelines.agree import MAX_LOSS, MIN_SCORE, agree, plain_copy, probe_images

app = typer.Typer()
app.command()(verb)


@pytest.fixture(scope="module")
def trained() -> Any:
    """The bundled model: figures of random weights say little about decoding."""
    return latentvae.load()


@pytest.fixture(scope="module")
def probes() -> list[torch.Tensor]:
    return probe_images(3, 48)


def tuned(vae: Any, part: str, amount: float) -> Any:
    """A copy with some of its weights moved, as fine-tuning does."""
    copied = copy.deepcopy(vae)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in getattr(copied, part).parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.add_(amount * parameter.abs().mean() * noise)
    return copied


def test_same_vae_agrees_exactly(trained: Any, probes: list[torch.Tensor]) -> None:
    found = agree(trained, copy.deepcopy(trained), probes)
    assert found.score == found.scale_ratio == 1
    assert found.correlation == pytest.approx(1, abs=1e-12)
    assert found.loss == 0
    assert found.same
    assert found.psnr_a == found.psnr_b == found.psnr_b_decodes_a
    assert found.image_count == 5


def test_decoder_only_fine_tuning_keeps_the_latents(trained: Any, probes: list[torch.Tensor]) -> None:
    found = agree(trained, tuned(trained, "decoder", 0.02), probes)
    assert found.score == 1
    assert found.loss == 0
    assert found.psnr_b == found.psnr_b_decodes_a
    assert found.psnr_a != found.psnr_b
    assert found.same


def test_half_precision_copy_agrees(trained: Any, probes: list[torch.Tensor]) -> None:
    found = agree(trained, copy.deepcopy(trained).bfloat16(), probes)  # the weights are fp16's already
    assert 0.99 < found.score < 1
    assert found.loss < 0.05
    assert agree(trained, copy.deepcopy(trained).half(), probes).score == 1
    assert found.same


def test_other_weights_do_not_agree(trained: Any, probes: list[torch.Tensor]) -> None:
    torch.manual_seed(1)
    other = latentvae.build("f8c4-small", scaling_factor=trained.config.scaling_factor)
    found = agree(trained, other, probes)
    assert abs(found.correlation) < 0.5
    assert found.score < 0.5
    assert not found.same


def test_channels_in_another_order_do_not_agree(trained: Any, probes: list[torch.Tensor]) -> None:
    other = copy.deepcopy(trained)
    order = [1, 2, 3, 0]
    with torch.no_grad():  # the same model but for the order: its own pictures are the same
        both = order + [4 + i for i in order]
        other.quant_conv.weight.copy_(trained.quant_conv.weight[both])
        other.quant_conv.bias.copy_(trained.quant_conv.bias[both])
        other.post_quant_conv.weight.copy_(trained.post_quant_conv.weight[:, order])
    found = agree(trained, other, probes)
    assert found.psnr_b == pytest.approx(found.psnr_a, abs=1e-3)
    assert found.score < MIN_SCORE
    assert found.loss > MAX_LOSS
    assert not found.same


@pytest.mark.parametrize(("factor", "same"), [(1.01, True), (1.1, False), (0.5, False)])
def test_rescaled_latents(factor: float, same: bool, trained: Any, probes: list[torch.Tensor]) -> None:
    other = copy.deepcopy(trained)
    other.register_to_config(scaling_factor=factor * trained.config.scaling_factor)
    found = agree(trained, other, probes)
    assert found.correlation == pytest.approx(1, abs=1e-6)
    assert found.scale_ratio == pytest.approx(factor, rel=1e-5)
    assert found.same == same


def test_folded_shift_is_the_same_latent_space(tiny_vae: Any, probes: list[torch.Tensor]) -> None:
    tiny_vae.register_to_config(shift_factor=0.3, scaling_factor=2.0)
    folded = fold_latent_mean(tiny_vae, [0.3] * 4)
    folded.register_to_config(shift_factor=0.0)
    assert agree(tiny_vae, folded, probes).score == pytest.approx(1, abs=1e-6)
    without = copy.deepcopy(tiny_vae)
    without.register_to_config(shift_factor=None)
    assert agree(tiny_vae, without, probes).score < 1 - 1e-3


def test_direction_matters(trained: Any, probes: list[torch.Tensor]) -> None:
    other = tuned(trained, "encoder", 0.2)
    there, back = agree(trained, other, probes), agree(other, trained, probes)
    assert there.correlation == pytest.approx(back.correlation, abs=1e-9)
    assert there.psnr_b_decodes_a == pytest.approx(back.psnr_a_decodes_b, abs=1e-9)
    assert there.scale_ratio == pytest.approx(1 / back.scale_ratio, rel=1e-9)
    assert there.score != back.score


def test_models_stay_as_they_are(tiny_vae: Any, probes: list[torch.Tensor]) -> None:
    state = {key: value.clone() for key, value in tiny_vae.state_dict().items()}
    latentvae.optimize(tiny_vae).train()
    agree(tiny_vae, copy.deepcopy(tiny_vae), probes[0])
    assert tiny_vae.training
    assert all(torch.equal(value, state[key]) for key, value in tiny_vae.state_dict().items())


def test_images_of_any_size_and_batch(tiny_vae: Any) -> None:
    torch.manual_seed(0)
    found = agree(tiny_vae, copy.deepcopy(tiny_vae), [torch.rand(2, 3, 37, 50), torch.rand(1, 3, 16, 8)])
    assert found.image_count == 3
    assert found.same


def test_default_probes_are_crops_of_a_photo() -> None:
    photos = probe_images(3)
    assert len(photos) == 5
    for photo in photos:
        assert photo.shape == (1, 3, 96, 96)
        assert 0.05 < photo.std() < 0.6
    assert len(probe_images(1)) == 5
    assert [probe.shape[1] for probe in probe_images(2)] == [2, 2, 2, 2]


def test_each_direction_is_told_apart(trained: Any, probes: list[torch.Tensor]) -> None:
    draws = agree(trained, tuned(trained, "encoder", 0.6), probes)  # its decoder is the same
    assert draws.decode_score == pytest.approx(1, abs=1e-6)
    assert draws.fits("decode") and not draws.fits("both")  # noqa: PT018
    reads = agree(trained, tuned(trained, "decoder", 0.6), probes)  # its encoder is
    assert reads.encode_score == pytest.approx(1, abs=1e-6)
    assert reads.encodes and not reads.fits("decode")  # noqa: PT018


def test_an_autoencoder_tiny_may_be_on_either_side(tiny_vae: Any, probes: list[torch.Tensor]) -> None:
    torch.manual_seed(3)
    taesd = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, scaling_factor=1.0
    ).eval()
    assert agree(taesd, copy.deepcopy(taesd), probes).same
    for pair in ((taesd, tiny_vae), (tiny_vae, taesd)):
        found = agree(*pair, probes)
        assert not found.same and math.isfinite(found.decode_score)  # noqa: PT018


def test_refuses_what_cannot_be_compared(tiny_vae: Any) -> None:
    with pytest.raises(LatentVAEError, match=r"4 channels at 1/8 .*; 16 channels at 1/8"):
        agree(tiny_vae, latentvae.build("tiny", latent_channels=16))
    with pytest.raises(LatentVAEError, match=r"1/8 .*1/4 "):
        agree(tiny_vae, latentvae.build("tiny", block_out_channels=(16, 16, 32)))
    with pytest.raises(LatentVAEError, match="no images"):
        agree(tiny_vae, tiny_vae, [])
    with pytest.raises(ModelError, match="Linear came"):
        agree(tiny_vae, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(LatentVAEError, match="offloaded"):
        plain_copy(copy.deepcopy(tiny_vae).to("meta"))


def test_constant_latents_agree_with_nothing(tiny_vae: Any, probes: list[torch.Tensor]) -> None:
    constant = copy.deepcopy(tiny_vae)
    torch.nn.init.zeros_(constant.quant_conv.weight)
    for pair in ((tiny_vae, constant), (constant, tiny_vae)):
        found = agree(*pair, probes)
        assert not found.same
        assert math.isfinite(found.score)
        assert found.correlation == pytest.approx(0, abs=1e-6)


def test_figures_as_json_and_words(tiny_vae: Any, probes: list[torch.Tensor]) -> None:
    found = agree(tiny_vae, copy.deepcopy(tiny_vae), probes)
    loaded = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert loaded["same"] is True
    assert loaded["score"] == 1
    assert loaded["min_score"] == MIN_SCORE
    assert "agreement 1.000 of 1 (wanted: 0.95 or more)" in str(found)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_command_prints_figures_and_draws(tmp_path: Path, tiny_vae: Any, photo_folder: Path) -> None:
    folder = export(tiny_vae, tmp_path / "vae")
    result = run(str(folder), str(folder), str(photo_folder), "--size", "48", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "agreement of latents         1.0000 (1: the same; wanted: 0.95 or more)" in result.output
    assert "The same latent space" in result.output
    picture = Image.open(tmp_path / "out" / PICTURE)
    assert picture.width > 5 * 48
    assert picture.height > 6 * 48


def test_command_says_no(tmp_path: Path, tiny_vae: Any) -> None:
    torch.manual_seed(5)
    export(tiny_vae, tmp_path / "a")
    export(latentvae.build("tiny"), tmp_path / "b")
    result = run(str(tmp_path / "a"), str(tmp_path / "b"), "--json", "-o", str(tmp_path))
    found = json.loads(result.stdout)
    assert found["same"] is False
    assert found["image_count"] == 5
    assert found["spaces"] == ["no known space (4 channels, scaling_factor 1, shift_factor 0)"] * 2
    assert Path(found["picture"]).is_file()
    assert found["skipped"] == []


def test_command_names_what_it_skips(tmp_path: Path, tiny_vae: Any, photo_folder: Path) -> None:
    export(tiny_vae, tmp_path / "vae")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    photo = sorted(photo_folder.iterdir())[0]
    model = str(tmp_path / "vae")
    result = run(model, model, str(broken), str(photo), "-o", str(tmp_path), "--json")
    assert result.exit_code == 3
    assert [Path(entry["path"]).name for entry in json.loads(result.stdout)["skipped"]] == ["broken.png"]
    with pytest.raises(LatentVAEError, match="the only image could not"):
        run(model, model, str(broken), "-o", str(tmp_path))
