"""What helps a discriminator with few images: augmentation, LeCam, and weights of an earlier run."""

from pathlib import Path

import pytest
import torch
from test_training_step import GAN, changed, photos, snapshot, start

from latentvae.base.errors import ConfigError
from latentvae.training import checkpoint
from latentvae.training.adversary import WEIGHTS
from latentvae.training.augmenting import Augmentation
from latentvae.training.draws import draw_augmentation
from latentvae.training.loop import save_checkpoint
from latentvae.training.losses import lecam_loss
from latentvae.training.recipes import load_config
from latentvae.training.step import optimizer_step

__all__ = ["photos"]  # a fixture
ALL = ("colour", "translation", "cutout")


def test_an_augmentation_is_one_function_of_each_image_and_passes_gradients() -> None:
    images = torch.rand(4, 3, 32, 40) * 2 - 1
    augment = draw_augmentation(ALL, 0, torch.tensor([5, 6, 7, 8]))
    changed = augment(images)
    assert changed.shape == images.shape
    assert torch.equal(augment(images), changed)
    images.requires_grad_()
    augment(images).square().sum().backward()
    assert all(each.abs().sum() > 0 for each in images.grad)


def test_draws_depend_on_the_seed_and_the_position_alone() -> None:
    many = draw_augmentation(ALL, 3, torch.tensor([10, 11, 12])).draws
    assert torch.equal(draw_augmentation(ALL, 3, torch.tensor([11])).draws[0], many[1])
    assert not torch.equal(draw_augmentation(ALL, 4, torch.tensor([11])).draws[0], many[1])
    assert len(many.unique()) == many.numel()


def test_without_kinds_nothing_is_changed_or_drawn() -> None:
    images = torch.rand(2, 3, 8, 8)
    augment = draw_augmentation((), 0, torch.tensor([0, 1]))
    assert augment(images) is images
    assert not augment.draws.numel()


def test_translation_moves_and_cutout_makes_a_hole_of_a_quarter() -> None:
    images = torch.rand(1, 3, 32, 32) + 0.5
    draws = torch.full((1, 7), 0.5)
    assert torch.equal(Augmentation(("translation",), draws)(images), images), "0.5 is no shift"
    draws[:, 3], draws[:, 4] = 0.0, 0.999  # four up, four to the right
    moved = Augmentation(("translation",), draws)(images)
    assert torch.equal(moved[..., :28, 4:], images[..., 4:, :28])
    assert not moved[..., 28:, :].any()
    assert not moved[..., :4].any()
    cut = Augmentation(("cutout",), draws)(images)
    assert (cut == 0).float().mean() == 0.25
    assert torch.equal(cut[cut != 0], images[cut != 0])


def test_colour_by_hand() -> None:
    images = torch.rand(1, 3, 4, 4)
    assert torch.allclose(Augmentation(("colour",), torch.full((1, 7), 0.5))(images), images, atol=1e-6)
    draws = torch.tensor([[0.75, 0.0, 0.5, 0, 0, 0, 0]])  # brighter by 0.25, grey, contrast as it was
    wanted = images.mean(1, keepdim=True).expand(-1, 3, -1, -1) + 0.25
    assert torch.allclose(Augmentation(("colour",), draws)(images), wanted, atol=1e-6)


def test_lecam_by_hand() -> None:
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 1.0])
    # beyond the average of fake logits, 0: 2; below that of real ones, 0.5: 3.5
    wanted = 2.0**2 / 2 + 3.5**2 / 2
    assert lecam_loss(real, fake, torch.tensor(0.5), torch.tensor(0.0)).item() == pytest.approx(wanted)


def test_lecams_averages_follow_the_logits_and_are_kept_in_checkpoints(photos: Path) -> None:
    run, batches = start(photos, *GAN, "adversarial.lecam_weight=0.1", "train.accumulation=2")
    adversary = run.state.adversary
    assert adversary is not None
    first = optimizer_step(run, batches)
    assert first["lecam_loss"] == 0, "there is nothing to be tied to yet"
    means = torch.stack([first["logits_real"], first["logits_fake"]])
    assert torch.allclose(adversary.averages[:2], means)
    second = optimizer_step(run, batches)
    assert second["lecam_loss"] > 0
    means = (means + torch.stack([second["logits_real"], second["logits_fake"]])) / 2
    assert torch.allclose(adversary.averages[:2], means)
    kept, saved = adversary.averages.clone(), save_checkpoint(run)
    optimizer_step(run, batches)
    assert not torch.equal(adversary.averages, kept)
    checkpoint.restore(run.state, saved)
    assert torch.equal(adversary.averages, kept)


def test_a_step_that_is_not_finite_leaves_lecams_averages(photos: Path) -> None:
    run, batches = start(photos, *GAN, "adversarial.lecam_weight=0.1")
    adversary = run.state.adversary
    assert adversary is not None
    with torch.no_grad():
        adversary.discriminator.stages[0].weight[0, 0, 0, 0] = float("nan")
    optimizer_step(run, batches)
    assert run.state.bad_steps == 1
    assert not adversary.averages.any()


def test_a_run_with_all_of_it_trains_both_networks(photos: Path) -> None:
    run, batches = start(photos, *GAN, "adversarial.lecam_weight=0.1", f"adversarial.augment={[*ALL]}")
    adversary = run.state.adversary
    assert adversary is not None
    before = snapshot(adversary.discriminator)
    terms = optimizer_step(run, batches)
    assert run.state.bad_steps == 0
    assert changed(before, adversary.discriminator)
    plain, batches = start(photos, *GAN)
    assert optimizer_step(plain, batches)["d_loss"] != terms["d_loss"], "it sees augmented images"
    assert terms["g_loss"] == -terms["logits_fake"], "the generator's pass sees the same ones"


def test_a_discriminator_begins_as_that_of_another_run(photos: Path, tmp_path: Path) -> None:
    run, batches = start(photos, *GAN)
    optimizer_step(run, batches)
    assert run.state.adversary is not None
    run.state.adversary.save(tmp_path / "earlier" / "discriminator")
    saved = save_checkpoint(run)
    taught = snapshot(run.state.adversary.discriminator)
    (tmp_path / "run").rename(tmp_path / "before")
    saved = tmp_path / "before" / saved.relative_to(tmp_path / "run")
    for place in (tmp_path / "earlier", tmp_path / "earlier/discriminator", saved):
        other, _ = start(photos, *GAN, f"adversarial.init={place}", "seed=1")
        assert other.state.adversary is not None
        assert not changed(taught, other.state.adversary.discriminator)


def test_a_discriminator_that_does_not_fit_is_refused(photos: Path, tmp_path: Path) -> None:
    run, _ = start(photos, *GAN)
    assert run.state.adversary is not None
    run.state.adversary.save(tmp_path / "earlier")
    init = f"adversarial.init={tmp_path / 'earlier'}"
    with pytest.raises(ConfigError, match=r"Set adversarial\.width"):
        start(photos, *GAN, init, "adversarial.width=32")
    with pytest.raises(ConfigError, match=f"no {WEIGHTS} there"):
        start(photos, *GAN, f"adversarial.init={tmp_path}")
    with pytest.raises(ConfigError, match=r"adversarial\.disc_weight=0 has none"):
        load_config("tiny", [init])
