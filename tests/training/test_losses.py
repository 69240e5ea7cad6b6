"""Losses have the values worked out by hand, and each term's gradient reaches what it should and no more."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from latentvae.measure.lpips import LPIPS, load_lpips
from latentvae.models.latents import Posterior, encode
from latentvae.training.config import LossConfig
from latentvae.training.losses import (
    LOGVAR_WEIGHT,
    VAELoss,
    adaptive_weight,
    d_loss,
    distillation_loss,
    g_loss,
    latent_cosine,
    pixel_loss,
)
from latentvae.training.step import add

# Two images of 1 x 1 x 2 pixels. The differences are 0.5 and -0.25, then 0 and 1.
IMAGES = torch.tensor([[[[0.25, 0.5]]], [[[-1.0, 0.0]]]], dtype=torch.float64)
RECONSTRUCTIONS = torch.tensor([[[[0.75, 0.25]]], [[[-1.0, 1.0]]]], dtype=torch.float64)
ELEMENTS = 2


def posterior_of(mean: float, variance: float, batch: int = 2, count: int = 3) -> Posterior:
    """`count` latents per image, all alike."""
    pair = torch.tensor([mean, math.log(variance)], dtype=torch.float64)
    return Posterior(pair.view(1, 2, 1, 1).expand(batch, 2, 1, count))


def vae_loss(lpips: nn.Module | None = None, **settings: object) -> VAELoss:
    return VAELoss(LossConfig.model_validate(settings), lpips)


def judge(
    loss: VAELoss, images: torch.Tensor, reconstructions: torch.Tensor, posterior: Posterior
) -> SimpleNamespace:
    """The terms and the total that training minimises."""
    nll, of_images = loss.reconstruction(images, reconstructions)
    kl, of_latents = loss.kl(posterior, images[0].numel(), step=0)
    return SimpleNamespace(total=nll + kl, **of_images, kl_loss=of_latents["kl_loss"])


class KnownLPIPS(nn.Module):
    """Stands in for LPIPS: the distance of an image is its largest difference, its features itself."""

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images]

    def distance_from_features(self, f0: list[torch.Tensor], f1: list[torch.Tensor]) -> torch.Tensor:
        return (f0[0] - f1[0]).flatten(1).abs().amax(1)


@pytest.fixture
def random_lpips(tmp_path: Path) -> LPIPS:
    """LPIPS on a random SqueezeNet, read from a file keyed as torchvision's."""
    from torchvision import models

    with torch.device("meta"):
        features = models.squeezenet1_1(weights=None).features
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(value.shape, generator=generator) * (2 / max(1, value[0].numel())) ** 0.5
        for key, value in features.state_dict().items()
    }
    save_file(weights, tmp_path / "squeezenet1_1_random.safetensors")
    return load_lpips("squeeze", tmp_path)


def noise_images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


def forward(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, Posterior]:
    """Reconstructions through a sample of the posterior, as in training."""
    posterior, _ = encode(vae, images)
    latents = posterior.sample(torch.Generator().manual_seed(0))
    return vae.decode(latents).sample, posterior


def gradients(part: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in part.parameters() if p.grad is not None]


def assert_every_parameter_moves(part: nn.Module) -> None:
    """All have a finite gradient; kernels a non-zero one (biases before a norm truly have none)."""
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if parameter.ndim > 1:
            assert parameter.grad.abs().max() > 0, name


# --- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "difference", "expected"),
    [
        ("l1", 0.5, 0.5),
        ("l1", -0.25, 0.25),
        ("l2", 0.5, 0.25),
        ("l2", -0.25, 0.0625),
        ("charbonnier", 0.0, 0.0),
        ("charbonnier", 3e-4, 1e-4),  # a 3-4-5 triangle with eps = 4e-4
        ("charbonnier", -3e-4, 1e-4),
        ("charbonnier", 1.0, 0.9996),  # L1 less eps, far from the corner
    ],
)
def test_pixel_loss_of_one_element(kind, difference, expected):
    images = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    loss = pixel_loss(images, images + difference, kind)
    assert loss.shape == images.shape
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_charbonnier_has_a_finite_gradient_where_the_images_agree():
    images = torch.zeros(1, 1, 1, 3, requires_grad=True)
    pixel_loss(torch.zeros(1, 1, 1, 3), images, "charbonnier").sum().backward()
    assert images.grad.eq(0).all()


def test_an_unknown_pixel_loss_is_named():
    with pytest.raises(ValueError, match=r"unknown pixel loss 'l3'; wanted l1, l2 or charbonnier"):
        pixel_loss(IMAGES, RECONSTRUCTIONS, "l3")


@pytest.mark.parametrize(
    ("kind", "sums"),
    [
        ("l1", (0.75, 1.0)),
        ("l2", (0.3125, 1.0)),
        ("charbonnier", (0.75 - 8e-4 + 4e-4**2 / 2 * (2 + 4), 1 - 4e-4 + 4e-4**2 / 2)),  # to second order
    ],
)
def test_rec_loss_is_summed_over_an_image_and_averaged_over_the_batch(kind, sums):
    terms = judge(vae_loss(pixel=kind), IMAGES, RECONSTRUCTIONS, posterior_of(0, 1))
    assert terms.rec_loss.item() == pytest.approx(sum(sums) / 2, rel=1e-9)


@pytest.mark.parametrize(
    ("mean", "variance", "nats"),
    [
        (0.0, 1.0, 0.0),
        (1.0, 1.0, 0.5),
        (-2.0, 1.0, 2.0),
        (0.0, 4.0, 0.5 * (3 - math.log(4))),
        (3.0, 0.25, 0.5 * (9 - 0.75 + math.log(4))),
    ],
)
def test_kl_loss_is_summed_over_latents_and_averaged_over_the_batch(mean, variance, nats):
    for batch, count in ((1, 1), (2, 3), (5, 2)):
        images = torch.zeros(batch, 1, 1, 2, dtype=torch.float64)
        terms = judge(vae_loss(), images, images, posterior_of(mean, variance, batch, count))
        assert terms.kl_loss.item() == pytest.approx(count * nats, rel=1e-12, abs=1e-12)


def test_the_total_is_the_documented_formula():
    loss = vae_loss(lpips=KnownLPIPS(), perceptual_weight=0.3, kl_weight=0.01)
    terms = judge(loss, IMAGES, RECONSTRUCTIONS, posterior_of(1, 1))
    assert terms.rec_loss.item() == pytest.approx(0.875)  # (0.75 + 1) / 2
    assert terms.perceptual_loss.item() == pytest.approx(0.75)  # (0.5 + 1) / 2
    assert terms.kl_loss.item() == pytest.approx(1.5)
    # rec_loss + weight * C*H*W * perceptual_loss + weight * kl_loss, over C*H*W
    expected = (0.875 + 0.3 * ELEMENTS * 0.75 + 0.01 * 1.5) / ELEMENTS
    assert terms.total.item() == pytest.approx(expected, rel=1e-12)


def test_weights_scale_the_total_and_leave_the_terms_alone():
    one = vae_loss(lpips=KnownLPIPS(), perceptual_weight=1, kl_weight=1)
    two = vae_loss(lpips=KnownLPIPS(), perceptual_weight=0, kl_weight=0)
    a, b = (judge(loss, IMAGES, RECONSTRUCTIONS, posterior_of(1, 4)) for loss in (one, two))
    assert (a.rec_loss, a.perceptual_loss, a.kl_loss) == (b.rec_loss, b.perceptual_loss, b.kl_loss)
    assert b.total.item() == pytest.approx(b.rec_loss.item() / ELEMENTS)
    assert a.total > b.total


def test_a_larger_crop_of_the_same_content_has_the_same_total():
    loss = vae_loss(kl_weight=0.1)
    small = judge(loss, IMAGES, RECONSTRUCTIONS, posterior_of(1, 2, count=3))
    large = judge(
        loss, IMAGES.repeat(1, 1, 4, 2), RECONSTRUCTIONS.repeat(1, 1, 4, 2), posterior_of(1, 2, count=24)
    )
    assert large.rec_loss.item() == pytest.approx(8 * small.rec_loss.item())
    assert large.kl_loss.item() == pytest.approx(8 * small.kl_loss.item())
    assert large.total.item() == pytest.approx(small.total.item(), rel=1e-12)


def test_without_lpips_the_perceptual_loss_is_zero_and_differentiable_code_still_runs():
    reconstructions = RECONSTRUCTIONS.clone().requires_grad_()
    terms = judge(vae_loss(lpips=None, perceptual_weight=5), IMAGES, reconstructions, posterior_of(0, 1))
    assert terms.perceptual_loss.item() == 0
    assert terms.total.item() == pytest.approx(0.875 / ELEMENTS)
    terms.total.backward()
    assert reconstructions.grad is not None


def test_detached_gives_every_term_without_its_graph():
    reconstructions = RECONSTRUCTIONS.clone().requires_grad_()
    terms = judge(vae_loss(), IMAGES, reconstructions, posterior_of(1, 1))
    detached: dict[str, torch.Tensor] = {}
    add(detached, vars(terms), 1)
    assert set(detached) == {"total", "rec_loss", "perceptual_loss", "kl_loss"}
    assert terms.total.requires_grad
    assert not any(value.requires_grad for value in detached.values())


def test_adversarial_losses_are_the_hinge_worked_out_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert g_loss(fake).item() == pytest.approx(2 / 3)
    # real: 0, 0.5, 2; fake: 0, 1, 2
    assert d_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 3 / 3))


def test_the_adaptive_weight_is_a_clamped_ratio_of_norms():
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])).item() == pytest.approx(
        5 / 2.0001
    )
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.zeros(2)).item() == 1e4
    assert adaptive_weight(torch.zeros(2), torch.ones(2)).item() == 0


# --- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["random", "real"])
def test_the_perceptual_loss_alone_moves_the_encoder_and_the_decoder(tiny_vae, random_lpips, net, request):
    lpips = random_lpips
    if net == "real":
        lpips = load_lpips("squeeze", request.getfixturevalue("shared") / "lpips")
    before = {key: value.clone() for key, value in lpips.state_dict().items()}
    images = noise_images(2, 3, 32, 32)
    reconstructions, posterior = forward(tiny_vae, images)
    judge(vae_loss(lpips=lpips), images, reconstructions, posterior).perceptual_loss.backward()
    assert_every_parameter_moves(tiny_vae)
    assert all(p.grad is None and not p.requires_grad for p in lpips.parameters())
    assert all(torch.equal(value, before[key]) for key, value in lpips.state_dict().items())


def test_the_perceptual_gradient_at_the_encoder_is_that_of_finite_differences(tiny_vae, random_lpips):
    vae, lpips = tiny_vae.double(), random_lpips.double()
    images = noise_images(1, 3, 32, 32).double()
    loss = vae_loss(lpips=lpips)
    weight = vae.encoder.conv_in.weight
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(3))

    def value() -> torch.Tensor:
        return loss.perceptual(images, forward(vae, images)[0])

    value().backward()
    slope = (weight.grad * direction).sum().item()
    step = 1e-5
    with torch.no_grad():
        ahead = (weight.add_(step * direction), value())[1]
        behind = (weight.sub_(2 * step * direction), value())[1]
    assert abs(slope) > 1e-6
    assert slope == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-4)


def test_the_perceptual_loss_is_that_of_lpips_itself(random_lpips):
    images, reconstructions = noise_images(2, 2, 3, 24, 24)
    expected = random_lpips(images, reconstructions).mean()
    assert expected > 0
    assert vae_loss(lpips=random_lpips).perceptual(images, reconstructions).item() == pytest.approx(
        expected.item(), rel=1e-6
    )
    assert vae_loss(lpips=random_lpips).perceptual(images, images).item() == 0


def test_images_need_no_gradient_of_the_perceptual_loss(random_lpips):
    images = noise_images(1, 3, 24, 24).requires_grad_()
    reconstructions = (noise_images(1, 3, 24, 24) * 0.5).requires_grad_()
    vae_loss(lpips=random_lpips).perceptual(images, reconstructions).backward()
    assert images.grad is None
    assert reconstructions.grad.abs().sum() > 0


def test_the_kl_alone_moves_the_encoder_and_never_the_decoder(tiny_vae):
    images = noise_images(2, 3, 16, 16)
    reconstructions, posterior = forward(tiny_vae, images)
    judge(vae_loss(), images, reconstructions, posterior).kl_loss.backward()
    assert_every_parameter_moves(tiny_vae.encoder)
    assert_every_parameter_moves(tiny_vae.quant_conv)
    assert gradients(tiny_vae.decoder) == []
    assert gradients(tiny_vae.post_quant_conv) == []


@pytest.mark.parametrize("kind", ["l1", "l2", "charbonnier"])
def test_the_pixel_loss_alone_moves_the_encoder_and_the_decoder(tiny_vae, kind):
    images = noise_images(2, 3, 16, 16)
    reconstructions, posterior = forward(tiny_vae, images)
    judge(vae_loss(pixel=kind), images, reconstructions, posterior).rec_loss.backward()
    assert_every_parameter_moves(tiny_vae)


def test_the_totals_gradient_is_the_weighted_sum_of_its_terms(tiny_vae, random_lpips):
    vae, images = tiny_vae.double(), noise_images(1, 3, 24, 24).double()
    loss = vae_loss(lpips=random_lpips.double(), perceptual_weight=0.7, kl_weight=1e-2)
    terms = judge(loss, images, *forward(vae, images))
    weight, elements = vae.encoder.conv_in.weight, images[0].numel()
    by_term = [
        torch.autograd.grad(term, weight, retain_graph=True)[0]
        for term in (terms.rec_loss, terms.perceptual_loss, terms.kl_loss)
    ]
    expected = by_term[0] / elements + 0.7 * by_term[1] + 1e-2 * by_term[2] / elements
    torch.testing.assert_close(torch.autograd.grad(terms.total, weight)[0], expected, rtol=1e-9, atol=1e-15)


def test_images_of_other_shapes_are_refused_rather_than_broadcast():
    with pytest.raises(ValueError, match="differ"):
        pixel_loss(torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8))


def test_distillation_loss_by_hand():
    student, teacher = posterior_of(mean=1.0, variance=4.0), posterior_of(mean=3.0, variance=0.25)
    logvar = LOGVAR_WEIGHT * math.log(16) ** 2
    assert distillation_loss(student, teacher, 0.5).item() == pytest.approx(0.25 * 4 + 0.25 * 1.5**2 + logvar)
    assert distillation_loss(teacher, teacher, 0.5).item() == 0


def test_deviations_that_hardly_move_a_sample_hardly_count():
    narrow, narrower = posterior_of(mean=0.0, variance=1e-6), posterior_of(mean=0.0, variance=1e-8)
    assert distillation_loss(narrow, narrower, 1.0) < 0.05


def test_latent_cosine_by_hand():
    def means(*values: float) -> Posterior:
        return Posterior(torch.tensor([*values, 0.0, 0.0]).view(1, 4, 1, 1))

    assert latent_cosine(means(3, 4), means(6, 8)).item() == pytest.approx(1)
    assert latent_cosine(means(3, 4), means(4, -3)).item() == pytest.approx(0, abs=1e-6)
    assert latent_cosine(means(1, 0), means(-2, 0)).item() == pytest.approx(-1)
