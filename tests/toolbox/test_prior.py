"""Priors over latents: what the fits recover, and folders that stock diffusers reads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import RATIO, moments_of, write_store
from typer.testing import CliRunner

import latentvae
from latentvae.base.errors import LatentVAEError, StoreError
from latentvae.cli.prior import prior as verb
from latentvae.models.exporting import export
from latentvae.store import format as shard
from latentvae.toolbox.priors import diffusion
from latentvae.toolbox.priors.diffusion import DiffusionSettings, build_unet, fit_diffusion
from latentvae.toolbox.priors.latent_set import LatentSet
from latentvae.toolbox.priors.loading import load_prior
from latentvae.toolbox.priors.mixture import MixturePrior, fit_mixture

SMALL = DiffusionSettings(steps=3, batch_size=4, width=16, warmup_steps=1, sampling_steps=2)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """24 images of two classes with latents of 4x2x2."""
    labels = {n: {"label": 3 if n % 3 else 7} for n in range(24)}
    return write_store(tmp_path / "store", [[(2, 2)] * 24], captions=labels)


class Points:
    """Stands for a LatentSet: vectors (N, D) that are known, as latents of D channels that are all alike."""

    def __init__(self, values: torch.Tensor, side: int = 1) -> None:
        self.values, self.shape = values, (values.shape[1], side, side)
        self.mean, self.std = torch.zeros(values.shape[1]), torch.ones(values.shape[1])
        self.total, self.labels = len(values), torch.zeros(len(values), dtype=torch.int64)
        self.manifest: Any = type("Manifest", (), {"weights_sha256": "0", "scaling_factor": 1.0})()
        self.manifest.shift_factor = None

    def __len__(self) -> int:
        return len(self.values)

    def draw(self, numbers: Any, noise: torch.Tensor) -> torch.Tensor:
        return self.values[torch.as_tensor(np.asarray(numbers))][:, :, None, None].expand(-1, *self.shape)


def correlated(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws of a Gaussian in 5 dimensions, its mean and its covariance."""
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    mean = torch.tensor([3.0, -1.0, 0.0, 2.0, 5.0])
    draws = torch.randn(count, 5, generator=torch.Generator().manual_seed(2)) @ root.T + mean
    return draws, mean, root @ root.T


def test_latents_are_scaled_and_normalised_per_channel(store: Path) -> None:
    latents = LatentSet(store)
    assert latents.shape == (4, 2, 2)
    moments = torch.stack([moments_of(n, (2, 2)) for n in range(24)]).double()
    mean, std = (moments[:, :4] - 0.25) * 0.5, moments[:, 4:].div(2).exp() * 0.5
    assert torch.allclose(latents.mean.double(), mean.mean((0, 2, 3)), atol=1e-6)
    variance = mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))
    assert torch.allclose(latents.std.double(), variance.sqrt(), atol=1e-6)
    noise = torch.full((1, 4, 2, 2), 0.7)
    wanted = (mean[5] + 0.7 * std[5] - latents.mean.double()[:, None, None]) / variance.sqrt()[:, None, None]
    assert torch.allclose(latents.draw([5], noise)[0].double(), wanted, atol=1e-5)


def test_a_gaussian_recovers_a_known_mean_and_covariance() -> None:
    draws, mean, covariance = correlated(20_000)
    fitted = fit_mixture(Points(draws))  # type: ignore[arg-type]
    assert fitted.card.kind == "gaussian"
    parts = fitted.tensors
    found = parts["basis"].T @ (parts["factors"][0] @ parts["factors"][0].T) @ parts["basis"]
    assert torch.allclose(found, torch.cov(draws.T, correction=0), atol=1e-3)
    assert torch.allclose(found, covariance, atol=0.4)  # four standard errors of a variance of 10
    again = fitted.latents(range(5000), seed=0).flatten(1)
    assert torch.allclose(again.mean(0), mean, atol=0.15)
    assert torch.allclose(torch.cov(again.T), covariance, atol=0.8)


def test_fewer_components_keep_the_large_variances_and_the_sum_of_the_rest() -> None:
    draws, _, _ = correlated(4000)
    fitted = fit_mixture(Points(draws), rank=2)  # type: ignore[arg-type]
    again = fitted.latents(range(4000), seed=0).flatten(1)
    assert again.var(0).sum().item() == pytest.approx(draws.var(0).sum().item(), rel=0.05)
    for direction in fitted.tensors["basis"]:
        assert (again @ direction).var().item() == pytest.approx((draws @ direction).var().item(), rel=0.1)
    off = again - again.mean(0)
    off = off - off @ fitted.tensors["basis"].T @ fitted.tensors["basis"]
    assert off.square().sum(1).mean().item() == pytest.approx(
        3 * float(fitted.tensors["residual"]) ** 2, rel=0.1
    )
    assert float(fitted.tensors["residual"]) > 0.1


def test_a_mixture_finds_its_parts_and_their_shares() -> None:
    random = torch.Generator().manual_seed(0)
    near, far = torch.randn(300, 3, generator=random) * 0.3, torch.randn(900, 3, generator=random) * 0.3 + 4
    fitted = fit_mixture(Points(torch.cat([near, far])), components=2)  # type: ignore[arg-type]
    assert fitted.card.kind == "mixture"
    assert sorted(fitted.tensors["weights"].tolist()) == pytest.approx([0.25, 0.75], abs=0.01)
    drawn = fitted.latents(range(1000), seed=0).flatten(1).mean(1)
    assert float((drawn > 2).float().mean()) == pytest.approx(0.75, abs=0.05)
    assert float(((drawn > 1.2) & (drawn < 2.8)).float().mean()) == 0  # one Gaussian would put many there


def test_parts_of_a_mixture_share_what_the_images_do_not_tell_apart(store: Path) -> None:
    fitted = fit_mixture(LatentSet(store), components=4, rank=8)  # 24 images: 24 / (2 * 4) = 3
    factors, means = fitted.tensors["factors"], fitted.tensors["means"]
    assert fitted.card.fit["mixed_rank"] == 3
    assert (means[:, 3:] == 0).all()
    assert torch.equal(factors[0, 3:], factors[3, 3:])
    assert torch.count_nonzero(factors[0, 3:]) == 5
    assert not torch.allclose(factors[0, :3], factors[3, :3], atol=1e-2)


@pytest.mark.parametrize(("components", "rank"), [(0, None), (25, None), (1, 17), (1, 0)])
def test_a_fit_out_of_range_is_refused(store: Path, components: int, rank: int | None) -> None:
    with pytest.raises(LatentVAEError, match="; wanted 1 to") as refused:
        fit_mixture(LatentSet(store), components=components, rank=rank)
    if rank is None:  # the images are named, and the way on: the command's 10 components nobody has given
        assert f"{components} components needs as many images, and these are 24;" in str(refused.value)
        assert "--kind gaussian" in str(refused.value)


def test_without_scikit_learn_the_extra_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(LatentVAEError, match=r"pip install -e \".*\[explore\]\""):
        fit_mixture(LatentSet(store))


def test_a_mixture_comes_back_the_same(store: Path, tmp_path: Path) -> None:
    made = fit_mixture(LatentSet(store), components=2, rank=3)
    again = load_prior(made.save(tmp_path / "prior"))
    assert isinstance(again, MixturePrior)
    assert again.card == made.card
    assert torch.equal(again.latents(range(4), seed=5), made.latents(range(4), seed=5))


def test_latents_of_a_prior_are_unscaled(store: Path) -> None:
    made = fit_mixture(LatentSet(store))
    drawn = made.draw([0, 1], seed=0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (made.card.mean, made.card.std))
    assert torch.allclose(made.latents([0, 1], seed=0), (drawn * std + mean) / 0.5 + 0.25)


@pytest.mark.slow
def test_diffusion_learns_where_the_latents_are() -> None:
    """Two points 4 apart: what is drawn ends near one of them, where an untrained network ends anywhere."""
    values = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).repeat(8, 1)
    settings = DiffusionSettings(steps=150, batch_size=32, width=16, warmup_steps=5, ema_decay=0.9, lr=3e-3)
    fitted = fit_diffusion(Points(values, side=2), settings)  # type: ignore[arg-type]
    drawn = fitted.latents(range(64), seed=0).mean((2, 3))
    assert float((drawn.abs() - 1).abs().mean()) < 0.25
    assert 0.2 < float((drawn[:, 0] > 0).float().mean()) < 0.8
    assert float((drawn[:, 0] * drawn[:, 1] > 0).float().mean()) > 0.9


def test_diffusion_depends_on_its_seed_alone(store: Path) -> None:
    latents = LatentSet(store)
    torch.manual_seed(1)
    first = fit_diffusion(latents, SMALL)
    torch.manual_seed(2)
    second = fit_diffusion(latents, SMALL)
    assert torch.equal(first.draw([0, 1], 0), second.draw([0, 1], 0))
    assert not torch.equal(first.draw([0], 0), first.draw([0], 1))


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (2, 6), (5, 7), (32, 16)])
def test_networks_fit_every_size(size: tuple[int, int]) -> None:
    unet = build_unet((3, *size), SMALL)
    assert unet(torch.randn(1, 3, *size), 1).sample.shape == (1, 3, *size)


STOCK = """
import sys
sys.modules["latentvae"] = None
import torch
from diffusers import DiffusionPipeline, DDIMScheduler, UNet2DModel
folder = sys.argv[1]
unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
pipeline = DiffusionPipeline.from_pretrained(folder)
assert type(pipeline.scheduler) is DDIMScheduler and type(pipeline.unet) is UNet2DModel
assert pipeline.scheduler.config.prediction_type == "v_prediction"
x = torch.linspace(-1, 1, 16).reshape(1, 4, 2, 2)
pipeline.scheduler.set_timesteps(2)
for t in pipeline.scheduler.timesteps:
    x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
print(x.flatten().tolist())
"""


@pytest.mark.slow
def test_stock_diffusers_loads_the_folder_and_draws_the_same(store: Path, tmp_path: Path) -> None:
    made = fit_diffusion(LatentSet(store), SMALL)
    folder = made.save(tmp_path / "prior")
    sidecar = json.loads((folder / "prior.json").read_text())
    assert sidecar["latent_shape"] == [4, 2, 2]
    assert sidecar["weights_sha256"] == "0" * 64
    result = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    loaded: Any = load_prior(folder)
    loaded.noise = lambda numbers, seed: torch.linspace(-1, 1, 16).reshape(1, 4, 2, 2)
    assert json.loads(result.stdout) == pytest.approx(loaded.draw([0], 0).flatten().tolist(), abs=1e-5)


@pytest.mark.slow
def test_a_prior_by_class_draws_the_class_asked_for(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "s", [[(2, 2)] * 12], captions={n: {"label": n % 2} for n in range(12)})
    latents = LatentSet(folder)
    signs = torch.where(latents.labels == 1, 1.0, -1.0)
    latents.draw = lambda numbers, noise: (  # type: ignore[method-assign]
        signs[torch.as_tensor(np.asarray(numbers))][:, None, None, None].expand(-1, 4, 2, 2)
    )
    settings = DiffusionSettings(
        steps=120, batch_size=16, width=16, warmup_steps=5, ema_decay=0.9, lr=3e-3, by_class=True
    )
    made = fit_diffusion(latents, settings)
    assert made.card.label_counts == [6, 6]
    assert float(made.draw(range(8), 0, [1] * 8).mean()) > 0.5
    assert float(made.draw(range(8), 0, [0] * 8).mean()) < -0.5
    own = made.labels_of(range(400), 0)
    assert np.mean(own) == pytest.approx(0.5, abs=0.1)
    loaded = load_prior(made.save(tmp_path / "prior"))
    assert torch.equal(loaded.draw(range(3), 0, [1, 0, 1]), made.draw(range(3), 0, [1, 0, 1]))


def test_labels_are_needed_for_classes(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "s", [[(2, 2)] * 3], captions={0: {"label": 1}})
    with pytest.raises(StoreError, match="2 of 3 images have no label"):
        LatentSet(folder).classes()


def test_stores_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    mixed = write_store(tmp_path / "mixed", [[(2, 2), (2, 3), (2, 2)]])
    with pytest.raises(StoreError, match=r"2 sizes \(2 of 2x2, 1 of 2x3\).*--size 256 --crop"):
        LatentSet(mixed)
    with pytest.raises(StoreError, match="holds no image"):
        LatentSet(write_store(tmp_path / "empty", [[]]))
    with pytest.raises(StoreError, match="learns from 2 or more"):
        LatentSet(write_store(tmp_path / "one", [[(2, 2)]]))
    with pytest.raises(StoreError, match="no complete store"):
        LatentSet(tmp_path)


def test_a_store_too_large_for_memory_is_thinned_evenly(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentvae.toolbox.priors.latent_set.MEMORY", 6 * 12 * 16)
    latents = LatentSet(store)
    assert (len(latents), latents.total) == (6, 24)
    assert latents.labels.tolist() == [7, 3, 3, 7, 3, 3] or len(set(latents.labels.tolist())) == 2


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"batch_size": 0}, {"width": 20}, {"lr": 0.0}, {"sampling_steps": 1001}, {"layers": 0}],
)
def test_settings_out_of_range_are_named(store: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(LatentVAEError, match=f"{next(iter(settings))}="):
        fit_diffusion(LatentSet(store), DiffusionSettings(**settings))


def test_a_loss_that_is_not_finite_is_an_error(store: Path) -> None:
    latents = LatentSet(store)
    latents.draw = lambda numbers, noise: noise * float("nan")  # type: ignore[method-assign]
    with pytest.raises(LatentVAEError, match="loss is nan at step 0"):
        fit_diffusion(latents, SMALL)


def test_ctrl_c_keeps_what_was_learned(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = diffusion._batch

    def interrupt(after: int) -> None:
        def stopping(latents: Any, step: int, *arguments: Any) -> Any:
            if step == after:
                raise KeyboardInterrupt
            return batch(latents, step, *arguments)

        monkeypatch.setattr(diffusion, "_batch", stopping)

    options = ("-k", "diffusion", "--steps", 5, "--width", 16, "--batch-size", 4)
    interrupt(after=2)
    result = run(store, tmp_path / "part", *options)
    assert result.exit_code == 130
    assert "2 of 5 steps" in result.stdout
    fit = load_prior(tmp_path / "part").card.fit
    assert (fit["steps"], fit["steps_done"]) == (5, 2)
    before = (tmp_path / "part" / "prior.json").read_bytes()
    interrupt(after=1)
    result = run(store, tmp_path / "part", *options)  # which must not replace what may have taken hours
    assert (tmp_path / "part" / "prior.json").read_bytes() == before
    assert load_prior(tmp_path / "part.stopped").card.fit["steps_done"] == 1
    assert "part.stopped" in result.stdout
    interrupt(after=0)
    assert run(store, tmp_path / "none", *options).exit_code == 130
    assert not (tmp_path / "none").exists()


def test_folders_that_are_no_prior(store: Path, tmp_path: Path) -> None:
    with pytest.raises(LatentVAEError, match=r"is no prior \(no prior.json"):
        load_prior(tmp_path / "none")
    made = fit_mixture(LatentSet(store))
    folder = made.save(tmp_path / "prior")
    good = json.loads((folder / "prior.json").read_text())
    for change in ({"format": 2}, {"kind": "other"}, {"mean": [0.0]}, {"extra": 1}, {"latent_shape": None}):
        (folder / "prior.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(LatentVAEError, match="damaged or no prior's"):
            load_prior(folder)
    (folder / "prior.json").write_text(json.dumps(good))
    (folder / "mixture.safetensors").write_bytes(b"damaged")
    with pytest.raises(LatentVAEError, match=r"mixture.safetensors cannot be used"):
        load_prior(folder)


def test_damaged_networks_are_named(store: Path, tmp_path: Path) -> None:
    folder = fit_diffusion(LatentSet(store), SMALL).save(tmp_path / "prior")
    good = json.loads((folder / "prior.json").read_text())
    one_channel = {"latent_shape": [1, 2, 2], "mean": [0.0], "std": [1.0]}
    for change in (one_channel, {"labels": [1, 2], "label_counts": [3, 3]}, {"fit": {}}):
        (folder / "prior.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(LatentVAEError, match="cannot be loaded"):
            load_prior(folder)
    (folder / "prior.json").write_text(json.dumps(good))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(LatentVAEError, match="cannot be loaded"):
        load_prior(folder)


def test_a_folder_of_other_things_is_not_overwritten(store: Path, tmp_path: Path) -> None:
    made = fit_mixture(LatentSet(store))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(LatentVAEError, match="no earlier prior"):
        made.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    made.save(tmp_path / "prior")
    made.save(tmp_path / "prior")  # its own is replaced
    assert sorted(path.name for path in (tmp_path / "prior").iterdir()) == [
        "mixture.safetensors",
        "prior.json",
    ]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(verb, ["fit", *(str(argument) for argument in arguments)])


def test_verb_fits_each_kind(store: Path, tmp_path: Path) -> None:
    result = run(store, tmp_path / "g", "--kind", "gaussian", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["fit"]["rank"] == 16
    assert (
        "2 of 16 principal components, 10 parts that differ in 1;"
        in run(store, tmp_path / "m", "-k", "mixture", "--rank", 2).output
    )
    options = ("-k", "diffusion", "--steps", 2, "--width", 16, "--batch-size", 4, "--by-class", "--json")
    result = run(store, tmp_path / "d", *options)
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)
    assert (card["labels"], card["label_counts"]) == ([3, 7], [16, 8])
    assert load_prior(tmp_path / "d").card.kind == "diffusion"


def test_verb_refuses_what_does_not_go_together(store: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((store, tmp_path / "p", "-k", "gaussian", "--by-class"), "--by-class is of"),
        ((tmp_path / "none", tmp_path / "p"), "does not exist"),
        ((store, store), "no earlier prior"),
    ):
        error = run(*arguments).exception
        assert isinstance(error, LatentVAEError)
        assert words in str(error)
    assert not (tmp_path / "p").exists()


def test_a_folder_of_images_is_encoded_first(photo_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = export(latentvae.build("tiny"), tmp_path / "tiny")
    arguments = (photo_folder, tmp_path / "p", "-k", "gaussian", "-m", model, "--device", "cpu")
    assert "--size" in str(run(*arguments).exception)
    result = run(*arguments, "--size", 8 * RATIO)
    assert result.exit_code == 0, result.output
    made = load_prior(tmp_path / "p")
    assert (made.card.images, made.card.latent_shape) == (6, (4, 8, 8))
    made.check(latentvae.load(model))
    assert shard.tensor_name(8, 8) == "moments.8x8"
