"""Latents that are tied to the features of a frozen vision model, here a tiny random one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training_step import GAN, changed, photos, snapshot, start
from training_runs import command, finish, launch, tensors

from latentvae.base.errors import ConfigError
from latentvae.training import checkpoint
from latentvae.training.adversary import WEIGHTS, FeatureGAN
from latentvae.training.alignment import Balance, VisionModel, marginal_cosine, marginal_distance
from latentvae.training.draws import draw_inputs
from latentvae.training.loop import save_checkpoint
from latentvae.training.module import TrainableVAE
from latentvae.training.recipes import load_config
from latentvae.training.step import latent_terms, optimizer_step

__all__ = ["photos"]  # a fixture
transformers = pytest.importorskip("transformers")


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    """A folder with a ViT of one layer, 8 px patches and 16 features."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    folder = tmp_path / "vision"
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def settings(vision: Path) -> tuple[str, ...]:
    return (f"regularise.align.model={vision}", "regularise.align.weight=0.5")


def test_both_losses_by_hand() -> None:
    one = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).T.reshape(
        1, 2, 1, 2
    )  # (B, D, h, w): two places, at 90 degrees
    other = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).T.reshape(1, 2, 1, 2)  # two that are alike
    # cosines at the places: 1 and 0
    assert marginal_cosine(one, other, 0.25).item() == pytest.approx((0 + 0.75) / 2)
    # cosines between places: (1, 0; 0, 1) against all ones
    assert marginal_distance(one, other, 0.25).item() == pytest.approx((0 + 0.75 + 0.75 + 0) / 4)
    assert marginal_distance(one, 3 * one, 0.0).item() == pytest.approx(0, abs=1e-6)


def test_gradients_are_balanced_at_the_latents() -> None:
    latents = torch.randn(3, 4, 2, 2, requires_grad=True)
    pulls = [torch.randn_like(latents), 100 * torch.randn_like(latents)]
    decoded, aligned = Balance.apply(latents, 0.1)
    ((decoded * pulls[0]).sum() + (aligned * pulls[1]).sum()).backward()
    assert latents.grad is not None
    wanted = pulls[0] + 0.1 * pulls[0].norm() / pulls[1].norm() * pulls[1]
    assert torch.allclose(latents.grad, wanted, rtol=1e-4)
    assert (latents.grad - pulls[0]).norm() == pytest.approx(0.1 * pulls[0].norm().item(), rel=1e-4)


def test_features_have_the_latents_size_and_place(vision: Path) -> None:
    model = VisionModel.load(str(vision), torch.device("cpu"), torch.float32)
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    features = model(images, (6, 6))
    assert features.shape == (2, 16, 6, 6)
    assert not features.requires_grad
    other = images.clone()
    other[..., :8] *= -1  # the left edge
    difference = (model(other, (6, 6)) - features).abs().sum(1).mean((0, 1))  # by column
    assert difference[0] > 3 * difference[-1]
    assert model(images[:, :1], (6, 6)).shape == (2, 16, 6, 6), "one channel is seen three times"
    assert model(images[..., :32], (6, 4)).shape == (2, 16, 6, 4)


def test_the_gradient_reaches_the_encoder_and_the_projection_and_never_the_vision_model(
    photos: Path, vision: Path
) -> None:
    run, batches = start(photos, *settings(vision), "loss.kl_weight=0")
    alignment = run.state.alignment
    assert alignment is not None
    inputs = draw_inputs(run, batches[0])
    outputs = run.model(*inputs.arguments)
    rest, terms = latent_terms(run, outputs, inputs.target[0].numel(), inputs.images)
    assert terms["align_cosine"] > 0
    (rest + outputs.reconstructions.square().mean()).backward()
    assert run.state.vae.encoder.conv_in.weight.grad.abs().sum() > 0
    assert alignment.projection.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in alignment.vision.network.parameters())
    # the same without it pulls elsewhere
    with_it = run.state.vae.encoder.conv_in.weight.grad.clone()
    run.state.vae.zero_grad()
    run.model(*inputs.arguments).reconstructions.square().mean().backward()
    assert not torch.allclose(run.state.vae.encoder.conv_in.weight.grad, with_it, rtol=1e-3)


@pytest.mark.parametrize("more", [(), tuple(GAN)])
def test_a_step_moves_the_projection_and_leaves_the_vision_model(
    photos: Path, vision: Path, more: tuple[str, ...]
) -> None:
    run, batches = start(photos, *settings(vision), *more)
    alignment = run.state.alignment
    assert alignment is not None
    before, frozen = snapshot(alignment.projection), snapshot(alignment.vision.network)
    terms = optimizer_step(run, batches)
    assert {"align_cosine", "align_distance"} <= terms.keys()
    assert changed(before, alignment.projection) == {"weight", "bias"}
    assert not changed(frozen, alignment.vision.network)
    assert isinstance(run.model, TrainableVAE)
    assert not any("vision" in name for name, _ in run.model.named_parameters())


def test_a_projection_whose_gradient_overflows_alone_stays_as_it_is(photos: Path, vision: Path) -> None:
    run, batches = start(photos, *settings(vision))
    assert run.state.alignment is not None
    before, weights = snapshot(run.state.alignment.projection), snapshot(run.state.vae)
    run.state.alignment.projection.weight.register_hook(lambda gradient: gradient * torch.inf)
    terms = optimizer_step(run, batches)
    assert terms["grad_norm"].isfinite()
    assert run.state.bad_steps == 1
    assert not changed(before, run.state.alignment.projection)
    assert not changed(weights, run.state.vae)


def test_the_projection_comes_back_from_a_checkpoint(photos: Path, vision: Path) -> None:
    run, batches = start(photos, *settings(vision))
    assert run.state.alignment is not None
    optimizer_step(run, batches)
    saved, before = save_checkpoint(run), snapshot(run.state.alignment.projection)
    assert load_file(saved / "model.safetensors").keys() == run.state.vae.state_dict().keys()
    slots = run.state.alignment.optimizer.state_dict()["state"]
    first = {key: value.clone() for key, value in slots[0].items()}
    optimizer_step(run, batches)
    assert changed(before, run.state.alignment.projection)
    checkpoint.restore(run.state, saved)
    assert not changed(before, run.state.alignment.projection)
    restored = run.state.alignment.optimizer.state_dict()["state"][0]
    assert all(torch.equal(restored[key], first[key]) for key in first)


def judged_by(vision: Path, *more: str) -> tuple[str, ...]:
    return (*GAN, f"adversarial.features={vision}", "adversarial.layers=1", *more)


def test_a_discriminator_of_features_trains_its_heads_alone(photos: Path, vision: Path) -> None:
    run, batches = start(photos, *judged_by(vision, "adversarial.disc_ramp=0"))
    adversary = run.state.adversary
    assert adversary is not None
    discriminator = adversary.discriminator
    assert isinstance(discriminator, FeatureGAN)
    heads, frozen = snapshot(discriminator), snapshot(discriminator.eyes[0].network)
    terms = optimizer_step(run, batches)
    assert run.state.bad_steps == 0
    assert terms["adaptive_weight"] > 0, "its gradient reaches the decoder through the vision model"
    assert {"heads.0.0.weight", "heads.0.3.weight"} <= changed(heads, discriminator)
    assert not changed(frozen, discriminator.eyes[0].network)
    saved = load_file(save_checkpoint(run) / WEIGHTS)
    assert saved.keys() == heads.keys(), "the vision model is not saved with each checkpoint"


def test_its_logits_are_of_patches_and_of_the_layers_that_were_asked(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=4, image_size=32)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    vision = VisionModel.load(str(tmp_path), torch.device("cpu"), torch.float32)
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    assert FeatureGAN(vision, 8, 2)(images).shape == (2, 2, 6, 6)
    whole = vision.network(images[..., :32, :32], output_hidden_states=True, **vision.more)
    tokens = whole.hidden_states[2][:, 1:].mT.unflatten(-1, (4, 4))
    vision.mean, vision.std = (0.5,) * 3, (0.5,) * 3  # pixels as they come
    halfway, last = vision.levels(images[..., :32, :32], (4, 4), 2)
    assert torch.allclose(halfway, tokens, atol=1e-5)
    assert torch.equal(last, vision(images[..., :32, :32], (4, 4)))
    with pytest.raises(ConfigError, match=r"adversarial\.layers=5, and the model .* has 4"):
        FeatureGAN(vision, 8, 5)


def test_one_vision_model_serves_the_latents_and_the_discriminator(photos: Path, vision: Path) -> None:
    run, _ = start(photos, *settings(vision), *judged_by(vision))
    assert run.state.alignment is not None
    assert run.state.adversary is not None
    assert isinstance(run.state.adversary.discriminator, FeatureGAN)
    assert run.state.adversary.discriminator.eyes[0] is run.state.alignment.vision
    with pytest.raises(ConfigError, match=r"adversarial\.features=.* cannot be loaded"):
        start(photos, *judged_by(vision.parent / "nothing"))


def test_what_cannot_be_aligned_is_refused(photos: Path, vision: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be loaded .* Give a folder"):
        start(photos, *settings(tmp_path / "nothing"))
    on = "regularise.align.weight=0.1"
    with pytest.raises(ConfigError, match="of one forward pass"):
        load_config("tiny", [on, "train.accumulation=2"])
    with pytest.raises(ConfigError, match="decoder_only says what they are"):
        load_config("tiny", [on, "model.mode=decoder_only", "model.init=f8c4-small", "model.overrides={}"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_equal_one_in_float64(photos: Path, vision: Path, tmp_path: Path) -> None:
    few = (*settings(vision), "train.precision=fp64", "train.max_steps=4", "adversarial.disc_start=2")
    few = (*few, f"adversarial.features={vision}", "adversarial.layers=1")
    finish(launch(command(photos, tmp_path / "one", 1, *few, "train.batch_size=4")))
    finish(launch(command(photos, tmp_path / "two", 2, *few, "train.batch_size=2")))
    first, second = (tensors(tmp_path / run / "checkpoints" / "step-00000004") for run in ("one", "two"))
    assert "projection.safetensors:weight" in first
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() < 1e-8 * tensor.abs().max().clamp_min(1e-3), name
