"""New images: seeds, counts, labels, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from stores import write_store
from typer.testing import CliRunner

import latentvae
from latentvae.base.errors import LatentVAEError
from latentvae.cli.sample import sample as verb
from latentvae.models.exporting import export
from latentvae.models.fingerprint import weight_hash
from latentvae.toolbox.priors.diffusion import DiffusionSettings, fit_diffusion
from latentvae.toolbox.priors.latent_set import LatentSet
from latentvae.toolbox.priors.mixture import fit_mixture
from latentvae.toolbox.priors.prior import Prior, StandardNormal
from latentvae.toolbox.priors.sampling import batch_size, sample, sample_labels

SIDE = 4  # latents


@pytest.fixture
def latents(tiny_vae: Any, tmp_path: Path) -> LatentSet:
    """Twelve images of two classes in a store of the tiny VAE's."""
    labels = {n: {"label": n % 3} for n in range(12)}
    folder = write_store(
        tmp_path / "store", [[(SIDE, SIDE)] * 12], captions=labels, weights_sha256=weight_hash(tiny_vae)
    )
    return LatentSet(folder)


def a_prior(latents: LatentSet, kind: str) -> Prior:
    if kind == "mixture":
        return fit_mixture(latents, components=2)
    settings = DiffusionSettings(
        steps=2, batch_size=4, width=16, sampling_steps=2, by_class=kind == "by class", warmup_steps=1
    )
    return fit_diffusion(latents, settings)


@pytest.mark.parametrize("kind", ["standard", "mixture", "diffusion", "by class"])
def test_more_images_do_not_change_the_first_ones(
    tiny_vae: Any, latents: LatentSet, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentvae.toolbox.priors.sampling.BATCH", 4)
    prior = StandardNormal(tiny_vae, 32, 32) if kind == "standard" else a_prior(latents, kind)
    many = sample(tiny_vae, prior, 6, seed=3)
    assert many.shape == (6, 3, 32, 32)
    assert many.abs().max() <= 1
    assert torch.equal(sample(tiny_vae, prior, 3, seed=3), many[:3])
    assert torch.equal(sample(tiny_vae, prior, 2, seed=3, first=3), many[3:5])
    assert not torch.allclose(sample(tiny_vae, prior, 1, seed=4), many[:1], atol=1e-3)
    assert len({tuple(image.flatten()[:50].tolist()) for image in many}) == 6


def test_images_are_the_decoded_latents_of_the_prior(tiny_vae: Any, latents: LatentSet) -> None:
    prior = a_prior(latents, "mixture")
    with torch.no_grad():
        wanted = tiny_vae.decode(prior.latents([0, 1], seed=0)).sample.clamp(-1, 1)
    assert torch.allclose(sample(tiny_vae, prior, 2, seed=0), wanted, atol=1e-5)


def test_standard_normal_draws_scaled_latents(tiny_vae: Any) -> None:
    tiny_vae.register_to_config(scaling_factor=0.2, shift_factor=3.0)
    prior = StandardNormal(tiny_vae, 200, 130)
    assert prior.card.latent_shape == (4, 25, 16)
    drawn = prior.latents(range(16), seed=0)
    assert drawn.mean().item() == pytest.approx(3, abs=0.1)
    assert drawn.std().item() == pytest.approx(5, rel=0.02)


def test_labels_are_drawn_or_asked_for(tiny_vae: Any, latents: LatentSet) -> None:
    prior = a_prior(latents, "by class")
    drawn = sample_labels(prior, 5, seed=1)
    assert drawn is not None
    own, asked = sample(tiny_vae, prior, 5, 1), sample(tiny_vae, prior, 5, 1, labels=drawn)
    assert torch.allclose(own, asked, atol=1e-5)
    others = sample(tiny_vae, prior, 5, 1, labels=[(label + 1) % 3 for label in drawn])
    assert not torch.allclose(own, others, atol=1e-3)
    assert sample_labels(a_prior(latents, "mixture"), 5, 0) is None


def test_requests_that_cannot_be_met_are_refused(tiny_vae: Any, latents: LatentSet) -> None:
    plain, by_class = a_prior(latents, "mixture"), a_prior(latents, "by class")
    for prior, options, words in (
        (plain, {"count": 0}, "count=0"),
        (plain, {"count": 1, "seed": -1}, "seed=-1"),
        (plain, {"count": 1, "first": -1}, "first=-1"),
        (plain, {"count": 1, "labels": [1]}, "--by-class"),
        (by_class, {"count": 1, "labels": [9]}, r"unknown: \[9\]; wanted one each of \[0, 1, 2\]"),
        (by_class, {"count": 2, "labels": [1]}, "1 labels came for 2 images"),
    ):
        with pytest.raises(LatentVAEError, match=words):
            sample(tiny_vae, prior, **options)
    with pytest.raises(LatentVAEError, match="a latent of this model is 8 px wide"):
        StandardNormal(tiny_vae, 7, 64)


def test_another_vae_is_refused(tiny_vae: Any, latents: LatentSet) -> None:
    prior = a_prior(latents, "mixture")
    with torch.no_grad():
        tiny_vae.decoder.conv_out.bias[0] += 1e-3
    with pytest.raises(LatentVAEError, match=r"was learned from latents of the VAE .* name the model"):
        sample(tiny_vae, prior, 1)


def test_nan_is_an_error_and_no_image(tiny_vae: Any, latents: LatentSet) -> None:
    prior = a_prior(latents, "mixture")
    assert hasattr(prior, "tensors")
    prior.tensors["centre"][0] = float("nan")
    with pytest.raises(LatentVAEError, match="not finite"):
        sample(tiny_vae, prior, 1)


def test_batches_depend_on_the_latents_size_alone() -> None:
    assert batch_size((4, 4, 4)) == 32
    assert batch_size((16, 32, 32)) == 2
    assert batch_size((4, 128, 128)) == 1


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_verb_writes_images_grid_and_figures(tiny_vae: Any, latents: LatentSet, tmp_path: Path) -> None:
    model = export(tiny_vae, tmp_path / "tiny")
    folder = a_prior(latents, "by class").save(tmp_path / "prior")
    common = ("--model", model, "--device", "cpu", "-o", tmp_path / "out")
    result = run(folder, *common, "--count", 3, "--seed", 7, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (found["kind"], found["seed"], found["size"], found["note"]) == ("diffusion", 7, [32, 32], None)
    assert [Image.open(each["path"]).size for each in found["images"]] == [(32, 32)] * 3
    assert all(each["label"] in (0, 1, 2) for each in found["images"])
    assert Image.open(tmp_path / "out" / "samples.png").width > 256
    only = run(folder, *common, "--label", 2, "--count", 1, "--json")
    assert json.loads(only.stdout)["images"][0]["label"] == 2
    assert isinstance(run(folder, *common, "--label", 8).exception, LatentVAEError)
    assert isinstance(run(folder, *common, "--size", 64).exception, LatentVAEError)
    assert run(folder, *common, "--count", 0).exit_code == 2


def test_verb_is_honest_without_a_prior(tiny_vae: Any, tmp_path: Path) -> None:
    model = export(tiny_vae, tmp_path / "tiny")
    result = run("--model", model, "-o", tmp_path / "out", "--count", 2, "--size", 40, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "expect textures and no objects" in result.output
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 2


def test_verb_refuses_another_model_before_it_draws(
    tiny_vae: Any, latents: LatentSet, tmp_path: Path
) -> None:
    folder = a_prior(latents, "mixture").save(tmp_path / "prior")
    torch.manual_seed(1)
    other = export(latentvae.build("tiny"), tmp_path / "other")
    error = run(folder, "--model", other, "-o", tmp_path / "out").exception
    assert isinstance(error, LatentVAEError)
    assert "learned from latents of the VAE" in str(error)
    assert not (tmp_path / "out").exists()


def test_images_are_written_as_they_are_drawn(
    tiny_vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentvae.toolbox.priors.sampling.BATCH", 4)
    draw = StandardNormal.latents

    def stop_in_the_third(self: Any, numbers: Any, *others: Any) -> torch.Tensor:
        if 8 in numbers:
            raise KeyboardInterrupt
        return draw(self, numbers, *others)

    monkeypatch.setattr(StandardNormal, "latents", stop_in_the_third)
    export(tiny_vae, tmp_path / "vae")
    with pytest.raises(KeyboardInterrupt):
        verb(None, str(tmp_path / "vae"), output=tmp_path / "out", count=12, size=32)
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 8


def test_an_output_whose_name_is_not_utf_8(tiny_vae: Any, tmp_path: Path) -> None:
    output = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    verb(None, str(export(tiny_vae, tmp_path / "vae")), output=output, count=1, size=32)
    (image,) = json.loads((output / "samples.json").read_text())["images"]
    assert Path(image["path"]).is_file()


def test_a_refused_request_leaves_no_folder(tiny_vae: Any, tmp_path: Path) -> None:
    export(tiny_vae, tmp_path / "vae")
    with pytest.raises(LatentVAEError, match="--by-class"):
        verb(None, str(tmp_path / "vae"), output=tmp_path / "out", count=1, label=1)
    assert not (tmp_path / "out").exists()
