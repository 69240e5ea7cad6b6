"""Metrics: figures worked out by hand, and a result that says how it was measured."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentvae.base.errors import LatentVAEError
from latentvae.measure.lpips import load_lpips
from latentvae.measure.metrics import Metrics, Protocol, bits_per_pixel, psnr, rate, ssim


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def levels_to_images(levels: Tensor) -> Tensor:
    return levels.float() / 127.5 - 1


def photo_like(size: int = 48, batch: int = 1) -> Tensor:
    """Smooth 8-bit waves: SSIM needs structure, not noise."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = torch.stack([(x / 5 + k).sin() * (y / 7 + k).cos() for k in range(3 * batch)])
    return (127.5 + 90 * waves).round().view(batch, 3, size, size)


# PSNR


@pytest.mark.parametrize(("step", "wanted"), [(1, 48.1308), (10, 28.1308), (255, 0.0)])
def test_psnr_of_a_constant_error(step: int, wanted: float) -> None:
    levels = torch.zeros(1, 3, 4, 5)
    figure = psnr(levels_to_images(levels), levels_to_images(levels + step))
    assert figure.shape == (1,)
    assert figure.item() == pytest.approx(wanted, abs=1e-4)  # 20 log10(255 / step)


def test_psnr_of_one_wrong_value_and_of_identical_images() -> None:
    levels = torch.full((2, 3, 2, 2), 100.0)
    wrong = levels.clone()
    wrong[0, 0, 0, 0] += 12  # mean squared error 144 / 12 = 12
    figures = psnr(levels_to_images(levels), levels_to_images(wrong))
    assert figures[0].item() == pytest.approx(10 * math.log10(255**2 / 12), abs=1e-4)
    assert figures[1] == math.inf


def test_both_sides_are_rounded_and_clamped_to_8_bits() -> None:
    images = levels_to_images(torch.tensor([0.0, 60.0, 255.0])).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    hidden = images + torch.tensor([-3.0, 0.49 / 127.5, 3.0]).view(1, 3, 1, 1)
    assert psnr(images, hidden).item() == math.inf
    assert psnr(hidden, images).item() == math.inf
    assert ssim(images, hidden).item() == 1
    seen = images + torch.tensor([0.0, 0.51 / 127.5, 0.0]).view(1, 3, 1, 1)
    assert psnr(images, seen).item() == pytest.approx(10 * math.log10(255**2 * 3), abs=1e-4)


def test_rounding_is_that_of_saved_images() -> None:
    from latentvae.images.tensors import to_uint8

    images = torch.linspace(-1.2, 1.2, 3 * 64 * 64).view(1, 3, 64, 64)
    assert psnr(images, levels_to_images(to_uint8(images))).item() == math.inf


# SSIM


def test_ssim_of_flat_images_is_the_luminance_term() -> None:
    a, b = 100.0, 110.0
    flat = (levels_to_images(torch.full((1, 3, 16, 16), level)) for level in (a, b))
    c1 = (0.01 * 255) ** 2
    assert ssim(*flat).item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-7)


def test_ssim_equals_torchmetrics_in_float64_and_falls_with_noise() -> None:
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    levels = photo_like(48)[..., :37]
    noise = torch.randn(levels.shape, generator=torch.Generator().manual_seed(0))
    figures = []
    for strength in (5, 20):
        noisy = (levels + strength * noise).round().clamp(0, 255)
        measure = StructuralSimilarityIndexMeasure(gaussian_kernel=True, sigma=1.5, data_range=255.0)
        figures.append(ssim(levels_to_images(levels), levels_to_images(noisy)).item())
        assert figures[-1] == pytest.approx(measure(noisy.double(), levels.double()).item(), abs=1e-7)
    assert 1 > figures[0] > figures[1] > 0


def test_ssim_of_white_with_itself_is_one() -> None:
    """float32 gives 0.9991 here: small differences of large squares."""
    white = torch.full((1, 3, 64, 64), 250 / 127.5 - 1)
    assert ssim(white, white).item() == 1


def test_figures_are_per_image_whatever_the_batch_and_autocast() -> None:
    images = levels_to_images(photo_like(batch=3))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    reconstructions = images + 0.1 * noise * torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1, 1)
    for measure in (psnr, ssim):
        alone = torch.cat([measure(images[i : i + 1], reconstructions[i : i + 1]) for i in range(3)])
        with torch.autocast("cpu", torch.bfloat16):
            together = measure(images, reconstructions)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        assert alone[0] > alone[1] > alone[2]


def test_ssim_of_images_below_the_window_is_nan() -> None:
    images = torch.zeros(2, 3, 10, 40)
    assert ssim(images, images).isnan().all()
    assert ssim(images, images).shape == (2,)


# Bad input


@pytest.mark.parametrize("measure", [psnr, ssim, lambda a, b: Metrics().add("x", a, b)])
def test_bad_tensors_are_named(measure) -> None:  # type: ignore[no-untyped-def]
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(LatentVAEError, match=r"\(1, 3, 16, 16\) and \(1, 3, 16, 15\)"):
        measure(images, images[..., 1:])
    with pytest.raises(LatentVAEError, match="B, C, H, W"):
        measure(images[0], images[0])
    with pytest.raises(LatentVAEError, match="uint8"):
        measure(images.to(torch.uint8), images)
    for value in (math.nan, math.inf):
        broken = images.clone()
        broken[0, 0, 0, 0] = value
        with pytest.raises(LatentVAEError, match="reconstructions hold 1 nan or infinite"):
            measure(images, broken)


def test_bad_arguments_of_add_are_named() -> None:
    images = torch.zeros(2, 3, 16, 16)
    metrics = Metrics()
    with pytest.raises(LatentVAEError, match="2 names, got 1"):
        metrics.add("one", images, images)
    for kl in (torch.ones(1), torch.tensor([1.0, math.inf])):
        with pytest.raises(LatentVAEError, match="kl_nats must be finite"):
            metrics.add(["a", "b"], images, images, kl)
    with pytest.raises(LatentVAEError, match="no images"):
        metrics.summary()
    with pytest.raises(LatentVAEError, match="'mode' or 'sample'"):
        Metrics(latents="mean")  # type: ignore[arg-type]


# Rate


def test_rate_is_kl_in_bits() -> None:
    bits = rate(torch.tensor([math.log(2), 8 * math.log(2)]))
    torch.testing.assert_close(bits, torch.tensor([1.0, 8.0]))
    torch.testing.assert_close(bits_per_pixel(bits, 2, 4), torch.tensor([0.125, 1.0]))
    with pytest.raises(LatentVAEError, match="at least one pixel"):
        bits_per_pixel(bits, 0, 4)


# The summary


def summary_of_two():  # type: ignore[no-untyped-def]
    """Errors of one and of ten levels: 48.13 and 28.13 dB."""
    levels = photo_like(16, batch=2)
    moved = levels + torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)
    metrics = Metrics(lpips_missing_reason="no weights on this machine", latents="sample")
    kl = torch.tensor([256.0, 512.0]) * math.log(2)
    metrics.add(["first.png", "second.png"], levels_to_images(levels), levels_to_images(moved), kl)
    return metrics.summary()


def test_means_are_over_images() -> None:
    summary = summary_of_two()
    assert [image.name for image in summary.images] == ["first.png", "second.png"]
    assert summary.psnr == pytest.approx((48.1308 + 28.1308) / 2, abs=1e-3)
    assert summary.ssim == pytest.approx(sum(image.ssim for image in summary.images) / 2)
    assert [image.rate_bpp for image in summary.images] == pytest.approx([1, 2])
    assert summary.rate_bpp == pytest.approx(1.5)
    assert summary.lpips is None


def test_the_protocol_travels_with_the_figures() -> None:
    protocol = summary_of_two().protocol
    assert protocol == Protocol(2, "sample", None, "no weights on this machine")
    stored = json.loads(json.dumps(summary_of_two().as_dict(), allow_nan=False))
    assert stored["protocol"]["latents"] == "sample"
    assert stored["protocol"]["rounding"].startswith("8-bit")
    assert stored["mean"]["psnr"] == pytest.approx(38.1308, abs=1e-3)
    assert stored["images"][1]["height"] == 16
    assert stored["notes"] == ["LPIPS was not measured: no weights on this machine"]


def test_infinite_and_missing_figures_are_null_with_a_note() -> None:
    images = torch.zeros(1, 3, 8, 8)
    metrics = Metrics()
    metrics.add("same", images, images)
    stored = json.loads(json.dumps(metrics.summary().as_dict(), allow_nan=False))
    assert stored["images"][0]["psnr"] is None
    assert stored["mean"] == {"psnr": None, "ssim": None, "lpips": None, "rate_bpp": None}
    assert any("identical" in note for note in stored["notes"])
    assert any("window" in note for note in stored["notes"])


def test_the_table_is_aligned_and_says_what_is_missing() -> None:
    lines = summary_of_two().table().splitlines()
    header, first, second, mean = lines[0], lines[2], lines[3], lines[5]
    assert len({len(line) for line in (header, first, second, mean)}) == 1
    assert first.split() == ["first.png", "16x16", "48.13", first.split()[3], "-", "1.000"]
    assert mean.split()[:4] == ["mean", "of", "2", "38.13"]
    foot = "\n".join(lines[6:])
    assert "latents: sample" in foot
    assert "not a file size" in foot
    assert "no weights on this machine" in foot


def test_lpips_is_measured_on_rounded_images(tmp_path: Path) -> None:
    from test_lpips import write_weights

    lpips = load_lpips("squeeze", write_weights(tmp_path))
    images = levels_to_images(photo_like(32))
    noisy = images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    metrics = Metrics(lpips)
    (hidden,) = metrics.add("hidden", images, images + 0.4 / 127.5)
    (seen,) = metrics.add("seen", images, noisy)
    (small,) = metrics.add("small", images[..., :12], noisy[..., :12])
    assert hidden.lpips == 0
    rounded = ((noisy.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    assert seen.lpips == pytest.approx(lpips(images, rounded).item(), rel=1e-5)
    assert seen.lpips > 1e-3
    assert small.lpips is None
    summary = metrics.summary()
    assert summary.protocol.lpips_net == "squeeze"
    assert summary.protocol.lpips_missing_reason is None
    assert summary.lpips == pytest.approx(seen.lpips / 2)
    assert "LPIPS-squeeze" in summary.table()
    assert any("too small for the network" in note for note in summary.notes)
