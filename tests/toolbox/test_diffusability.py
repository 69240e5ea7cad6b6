"""A small diffusion model on a VAE's latents, as a figure of the VAE."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import textured
from diffusers import AutoencoderKL
from PIL import Image

import latentvae
from latentvae.cli.diffusability import _foot
from latentvae.cli.main import main
from latentvae.measure.rfid import FeatureStatistics
from latentvae.models.exporting import export
from latentvae.toolbox.priors import diffusability, diffusion
from latentvae.toolbox.priors.diffusability import SETTINGS, Bench, Diffusability, Run, compare, table
from latentvae.toolbox.priors.latent_set import LatentSet

FEW = replace(SETTINGS, steps=3, batch_size=4, width=16, warmup_steps=0, sampling_steps=2)


class Pixels(torch.nn.Module):
    """In the place of LPIPS: the images themselves are their features."""

    net, min_size = "pixels", 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(1))

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images, images.square()]

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return (images - others).abs().mean((1, 2, 3))


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_latents_are_normalised_by_the_training_set(tiny_vae: AutoencoderKL) -> None:
    bench = Bench(images(6), images(6)[:2], settings=FEW)
    train, val = bench.latents(tiny_vae)
    assert train.shape == (4, 4, 4)
    noise = torch.randn(6, 4, 4, 4)
    torch.testing.assert_close(train.draw(range(6), noise).mean(), torch.tensor(0.0), atol=0.15, rtol=0)
    torch.testing.assert_close(val.modes(), train.modes()[:2], atol=1e-4, rtol=1e-4)


def test_a_diffusion_model_learns_a_constant_and_its_loss_is_repeatable(
    tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents that are all alike can be denoised; a network that learnt nothing has a loss of about 1."""
    constant = torch.ones(2, 4, 4) * torch.tensor([1.0, -1.0])[:, None, None]
    latents = LatentSet.of(tiny_vae, [images(4)])
    latents.shape = (2, 4, 4)
    monkeypatch.setattr(latents, "draw", lambda numbers, noise: constant.expand(len(numbers), -1, -1, -1))
    monkeypatch.setattr(latents, "modes", lambda: constant.expand(4, -1, -1, -1))
    settings = replace(FEW, steps=40, batch_size=16)
    model = diffusion.fit_diffusion(latents, settings, progress=False)
    loss = diffusability.validation_loss(model, latents)
    assert loss < 0.5
    assert diffusability.validation_loss(model, latents) == loss
    monkeypatch.setattr(latents, "modes", lambda: torch.randn(4, 2, 4, 4))
    assert diffusability.validation_loss(model, latents) > 2 * loss


def test_every_vae_has_its_figures_and_the_time_is_said_before(tiny_vae: AutoencoderKL) -> None:
    bench = Bench(images(8), images(3, 1), Pixels(), FEW, samples=5)  # type: ignore[arg-type]
    told: list[float] = []
    found = []
    for each in compare(bench, {"a": tiny_vae, "b": tiny_vae}, 2, told.append):
        assert len(told) == 1
        found.append(each)
    assert [each.model for each in found] == ["a", "b"]
    assert found[0] == replace(found[1], model="a"), "one VAE under two names has the same figures"
    assert [run.seed for run in found[0].runs] == [0, 1]
    assert found[0].runs[0].loss != found[0].runs[1].loss
    assert bench.photographs is not None
    assert found[0].rebuilt_frechet > bench.photographs, "an untrained VAE's pictures are further away"
    assert all(run.frechet > 0 for run in found[0].runs)


def test_without_lpips_there_are_losses_alone(tiny_vae: AutoencoderKL) -> None:
    bench = Bench(images(8), images(2, 1), None, FEW, samples=2)
    (found,) = compare(bench, {"a": tiny_vae}, 1)
    assert (bench.photographs, found.rebuilt_frechet, found.mean("frechet")) == (None, None, None)
    assert found.mean("loss") == (found.runs[0].loss, 0.0)


def test_ctrl_c_in_training_ends_it_all(tiny_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prior keeps what was learned by then; of a comparison half a model says nothing."""
    bench = Bench(images(8), images(2, 1), None, FEW, samples=2)
    train, val = bench.latents(tiny_vae)
    real, steps = diffusion._loss, []

    def interrupted(*arguments: object) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(diffusion, "_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run(tiny_vae, train, val, 0)


def test_statistics_are_of_pooled_features() -> None:
    found = diffusability.statistics(Pixels(), [images(3), images(2, 1)])  # type: ignore[arg-type]
    wanted = FeatureStatistics(6)
    both = torch.cat([images(3), images(2, 1)])
    wanted.add(torch.cat([both.mean((2, 3)), both.square().mean((2, 3))], dim=1))
    torch.testing.assert_close(found.covariance, wanted.covariance)


def test_the_table_has_means_with_half_the_distance_of_seeds() -> None:
    runs = (Run(0, 0.5, 0.2), Run(1, 0.6, 0.2))
    printed = table(0.03, [Diffusability("mine", (4, 16, 16), 20.0, None, 0.1, 1000, runs)])
    assert "| photographs not trained on | | | | 0.0300 | | |" in printed
    assert "| mine | 4x16x16 | 20.00 | - | 0.1000 | 0.5500 ± 0.0500 | 0.2000 ± 0.0000 |" in printed


def test_one_seed_is_said_to_tell_no_spread() -> None:
    assert "One seed has no spread" in _foot(1)
    assert "smallest of 3 seeds: a smaller difference" in _foot(3)


@pytest.mark.slow
def test_the_verb_prints_a_table_and_ends_with_130_on_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(21):
        Image.fromarray(textured(40, 36, number)).save(tmp_path / f"{number:02d}.png")
    torch.manual_seed(0)
    model = export(latentvae.build("tiny", scaling_factor=0.5), tmp_path / "models" / "tiny")
    monkeypatch.setenv("LATENTVAE_LPIPS", "")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(photos / path.name)
    options = ["--steps", "3", "--size", "32", "--samples", "4", "--sampling-steps", "2", "--seeds", "1"]

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["diffusability", str(model), "f8c4-small", str(photos), *options, *more])
        return int(stop.value.code or 0)

    assert run("--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert [each["model"] for each in report["vaes"]] == [str(model), "f8c4-small"]
    assert (report["protocol"]["train"], report["protocol"]["val"]) == (18, 3)
    assert "2 VAEs x 1 seed x 3 steps on 18 images: about" in printed.err
    real = Bench.run

    def interrupted(bench: Bench, vae: AutoencoderKL, *arguments: object) -> object:
        if vae.config["block_out_channels"][-1] > 100:  # the second
            raise KeyboardInterrupt
        return real(bench, vae, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Bench, "run", interrupted)
    assert run() == 130
    printed = capsys.readouterr()
    assert "Stopped: 1 of 2 VAEs done." in printed.out
    assert f"| {model} | 4x4x4 |" in printed.out
