"""The posterior is the normal distribution it says, sizes come back, and statistics are those of samples."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.distributions import Normal, kl_divergence

from latentvae.images.reading import load_image
from latentvae.images.tensors import ImageError
from latentvae.models.latents import (
    LatentStatistics,
    Posterior,
    compute_latent_statistics,
    decode,
    encode,
    reconstruct,
    scale,
    unscale,
)


def moments(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random moments with means of about 2 and standard deviations from 0.1 to 10."""
    drawn = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (2 * drawn).to(dtype)


def noise_images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


def spread_out(vae: AutoencoderKL, logvar: float | None = None) -> AutoencoderKL:
    """Give an untrained model latents whose channels differ in mean, and vary over an image."""
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[:channels] *= 6
        vae.quant_conv.bias[:channels] = torch.linspace(-2, 3, channels)
        if logvar is not None:
            vae.quant_conv.weight[channels:] = 0
            vae.quant_conv.bias[channels:] = logvar
    return vae


# --- posterior -------------------------------------------------------------------------------------------


def test_kl_is_that_of_torch_distributions_summed_over_each_image():
    posterior = Posterior(moments(3, 8, 5, 7))
    reference = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0))
    assert posterior.mean.shape == (3, 4, 5, 7)
    torch.testing.assert_close(posterior.kl_map(), reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(posterior.kl(), reference.sum((1, 2, 3)), rtol=1e-12, atol=0)


def test_means_come_first_and_std_is_the_root_of_the_variance():
    both = torch.cat([torch.full((1, 4, 2, 2), 5.0), torch.full((1, 4, 2, 2), math.log(9.0))], 1)
    posterior = Posterior(both)
    assert posterior.mode().eq(5).all()
    torch.testing.assert_close(posterior.std, torch.full((1, 4, 2, 2), 3.0))
    torch.testing.assert_close(posterior.at(torch.full((1, 4, 2, 2), -2.0)), torch.full((1, 4, 2, 2), -1.0))


def test_kl_of_half_precision_moments_does_not_overflow():
    mean, logvar = 100.0, 10.0
    half = torch.cat([torch.full((2, 4, 64, 64), mean), torch.full((2, 4, 64, 64), logvar)], 1).half()
    expected = 0.5 * (mean**2 + math.exp(logvar) - 1 - logvar) * 4 * 64 * 64  # 2.6e8; fp16 ends at 65504
    kl = Posterior(half).kl()
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, torch.full((2,), expected), rtol=1e-5, atol=0)


def test_extreme_log_variances_are_clamped_so_that_kl_and_samples_stay_finite():
    wild = torch.tensor([0.0, 0.0, 1e4, -1e4]).view(1, 4, 1, 1)
    posterior = Posterior(wild)
    assert posterior.logvar.flatten().tolist() == [20.0, -30.0]
    assert posterior.kl().isfinite().all()
    assert posterior.sample().isfinite().all()


def test_a_sample_is_the_generators_draw():
    posterior = Posterior(moments(2, 8, 4, 4))
    first, again, other = (posterior.sample(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(first, posterior.at(noise))


def test_a_sample_with_a_generator_leaves_torchs_own_alone():
    before = torch.get_rng_state()
    Posterior(moments(1, 8, 4, 4)).sample(torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_have_the_posteriors_mean_and_std():
    count = 40_000
    posterior = Posterior(
        torch.tensor([3.0, -1.0, 0.0, math.log(4.0)]).view(1, 4, 1, 1).repeat(count, 1, 1, 1)
    )
    samples = posterior.sample()[:, :, 0, 0]
    std = torch.tensor([1.0, 2.0])
    # five standard errors: std / sqrt(n) of a mean, std / sqrt(2 n) of a deviation
    assert ((samples.mean(0) - torch.tensor([3.0, -1.0])).abs() < 5 * std / count**0.5).all()
    assert ((samples.std(0) - std).abs() < 5 * std / (2 * count) ** 0.5).all()


# --- encode and decode -----------------------------------------------------------------------------------

SIZES = [(1, 1), (1, 9), (3, 2), (7, 8), (37, 53), (53, 37), (64, 65), (17, 100)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_comes_back_as_it_was(tiny_vae, size):
    images = noise_images(2, 3, *size)
    posterior, padding = encode(tiny_vae, images)
    assert posterior.mean.shape == (2, 4, -(-size[0] // 8), -(-size[1] // 8))
    reconstructions = decode(tiny_vae, posterior.mode(), padding)
    assert reconstructions.shape == images.shape
    assert torch.equal(reconstruct(tiny_vae, images).reconstructions, reconstructions)


def test_a_padded_image_is_encoded_as_its_reflection_and_cropped_at_the_same_place(tiny_vae):
    images = noise_images(1, 3, 13, 22)
    by_hand = torch.nn.functional.pad(images, (0, 2, 0, 3), mode="reflect")
    with torch.no_grad():
        expected = tiny_vae(by_hand).sample[..., :13, :22]
    assert torch.equal(reconstruct(tiny_vae, images).reconstructions, expected)


def test_sizes_that_the_factor_divides_are_not_padded(tiny_vae):
    images = noise_images(1, 3, 40, 16)
    posterior, padding = encode(tiny_vae, images)
    assert (padding.left, padding.top, padding.right, padding.bottom) == (0, 0, 0, 0)
    with torch.no_grad():
        distribution = tiny_vae.encode(images).latent_dist
        stock = tiny_vae.decode(distribution.mode()).sample
    assert torch.equal(posterior.mean, distribution.mean)
    assert torch.equal(decode(tiny_vae, posterior.mode(), padding), stock)
    assert torch.equal(decode(tiny_vae, posterior.mode()), stock)


def test_padding_of_another_image_is_refused(tiny_vae):
    _, padding = encode(tiny_vae, noise_images(1, 3, 20, 20))
    with pytest.raises(ImageError):
        decode(tiny_vae, torch.zeros(1, 4, 5, 5), padding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_any_dtype_takes_images_of_any_and_gives_full_precision(tiny_vae, dtype):
    images = noise_images(1, 3, 16, 16)
    expected = reconstruct(tiny_vae, images).reconstructions
    result = reconstruct(tiny_vae.to(dtype), images)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.reconstructions.dtype == result.posterior.mean.dtype == wanted
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    assert (result.reconstructions - expected).abs().max() < tolerance


def test_reconstruct_from_samples_is_reproducible_and_differs_from_the_mode(tiny_vae):
    images = noise_images(1, 3, 24, 24)
    first, again = (
        reconstruct(tiny_vae, images, sample=True, generator=torch.Generator().manual_seed(1)).reconstructions
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, reconstruct(tiny_vae, images).reconstructions)


def test_reconstruct_keeps_no_graph_and_encode_and_decode_do(tiny_vae):
    images = noise_images(1, 3, 16, 16)
    assert not reconstruct(tiny_vae, images).reconstructions.requires_grad
    posterior, padding = encode(tiny_vae, images)
    assert decode(tiny_vae, posterior.mode(), padding).requires_grad


# --- scaling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [None, 0.0, 0.75])
def test_unscale_undoes_scale(tiny_vae, shift):
    tiny_vae.register_to_config(scaling_factor=0.25, shift_factor=shift)
    latents = moments(2, 4, 3, 3)
    scaled = scale(tiny_vae, latents)
    torch.testing.assert_close(scaled, (latents - (shift or 0)) * 0.25, rtol=1e-12, atol=0)
    torch.testing.assert_close(unscale(tiny_vae, scaled), latents, rtol=1e-12, atol=1e-12)


# --- statistics ------------------------------------------------------------------------------------------


def test_statistics_are_those_of_posterior_samples(tiny_vae):
    vae = spread_out(tiny_vae)
    batches = [noise_images(2, 3, 40, 48), noise_images(1, 3, 37, 53) ** 3]  # differently sized and made
    statistics = compute_latent_statistics(vae, batches)
    draws, samples, spread = 500, [], []
    with torch.no_grad():
        for batch in batches:
            posterior, _ = encode(vae, batch)
            mean, std = posterior.mean.double(), posterior.std.double()
            drawn = mean + std * torch.randn(draws, *mean.shape, dtype=torch.float64)
            samples.append(drawn.movedim(2, 0).flatten(1))
            spread.append(torch.stack([mean, std]).movedim(2, 0).flatten(2))  # (C, 2, pixels)
    drawn = torch.cat(samples, 1)  # (C, draws * latent pixels)
    mean, std = torch.cat(spread, 2).unbind(1)  # (C, latent pixels) each
    assert (mean.std(1) > 0.2).all(), "both terms of the variance should count"
    assert (std > 0.2).all(), "both terms of the variance should count"
    centred = mean - mean.mean(1, keepdim=True)
    # Only the draws are random. Given means m and deviations s, their mean has the variance s^2 / n and their
    # mean square (4 m^2 s^2 + 2 s^4) / n. Five standard errors.
    count = drawn.shape[1]
    mean_error = (std.square().mean(1) / count).sqrt()
    variance_error = ((4 * centred.square() * std.square() + 2 * std**4).mean(1) / count).sqrt()
    expected_mean, expected_std = torch.tensor(statistics.latents_mean), torch.tensor(statistics.latents_std)
    assert ((drawn.mean(1) - expected_mean).abs() < 5 * mean_error).all()
    assert ((drawn.var(1) - expected_std**2).abs() < 5 * variance_error).all()
    assert (variance_error < 0.02 * expected_std**2).all(), "a tolerance too wide to catch anything"
    assert statistics.image_count == 3


def test_statistics_of_a_sharp_posterior_are_those_of_its_modes(tiny_vae):
    vae = spread_out(tiny_vae, logvar=-100).double()
    batches = [noise_images(2, 3, 32, 24), noise_images(1, 3, 41, 17)]
    modes = torch.cat(
        [encode(vae, batch)[0].mode().detach().movedim(1, 0).flatten(1) for batch in batches], 1
    )
    statistics = compute_latent_statistics(vae, batches)
    mean, std = modes.mean(1), modes.std(1, correction=0)
    torch.testing.assert_close(torch.tensor(statistics.latents_mean).double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(statistics.latents_std).double(), std, rtol=1e-6, atol=0)
    assert statistics.shift_factor == pytest.approx(modes.mean().item(), rel=1e-9)
    assert statistics.scaling_factor == pytest.approx(std.square().mean().rsqrt().item(), rel=1e-9)
    assert statistics.pooled_std == pytest.approx(modes.std(correction=0).item(), rel=1e-9)


def test_statistics_do_not_depend_on_batching(tiny_vae):
    vae = spread_out(tiny_vae).double()
    images = noise_images(5, 3, 24, 16)
    whole, *others = (
        compute_latent_statistics(vae, images.split(size)).as_dict() for size in (5, [2, 3], 1, [4, 1])
    )
    for other in others:
        assert other.keys() == whole.keys()
        for key, value in whole.items():
            assert other[key] == pytest.approx(value, rel=1e-10), key


def test_statistics_of_photographs_are_plain_json(tiny_vae, photo_folder: Path):
    paths = sorted(photo_folder.iterdir())
    statistics = compute_latent_statistics(tiny_vae, (load_image(path)[None] for path in paths))
    assert statistics.image_count == len(paths) == 6
    assert LatentStatistics(**json.loads(json.dumps(statistics.as_dict()))) == statistics
    assert len(statistics.latents_mean) == len(statistics.latents_std) == 4


def test_statistics_draw_nothing_and_keep_no_graph(tiny_vae):
    before = torch.get_rng_state()
    compute_latent_statistics(tiny_vae, [noise_images(1, 3, 16, 16)])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in tiny_vae.parameters())


def test_no_images_are_an_error_not_nan(tiny_vae):
    for nothing in ([], iter(())):
        with pytest.raises(ValueError, match="no images"):
            compute_latent_statistics(tiny_vae, nothing)


def test_pooled_std_counts_the_distance_between_channel_means():
    # channels at -1 and 1 with deviation 0, or 3: all latents together deviate by 1, or sqrt(1 + 9)
    for std, pooled in ((0.0, 1.0), (3.0, math.sqrt(10.0))):
        statistics = LatentStatistics([-1.0, 1.0], [std, std], 1.0, 0.0, 1)
        assert statistics.pooled_std == pytest.approx(pooled)


def test_images_of_other_channels_are_refused_with_both_numbers(tiny_vae):
    with pytest.raises(ImageError, match=r"\(1, 1, 16, 16\).*\(B, 3, H, W\)"):
        encode(tiny_vae, torch.zeros(1, 1, 16, 16))
