"""rFID: streaming statistics, the Fréchet distance, torch-fidelity's features, and no downloads."""

import hashlib
import io
import json
import math
import os
import pickle
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from latentvae.base.errors import LatentVAEError, MissingWeightsError
from latentvae.measure.evaluate import evaluate
from latentvae.measure.rfid import (
    FEATURES,
    RFID,
    WEIGHTS,
    FeatureStatistics,
    Inception,
    RFIDProtocol,
    frechet_distance,
    load_inception,
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and an empty torch.hub cache."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file with a random InceptionV3, scaled so that its features differ from image to image."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=empty)
    state = network.state_dict()
    for value in state.values():
        if value.ndim == 4:
            value.mul_(6**0.5)  # torch's default shrinks what passes a ReLU layer by this
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, path)
    yield path
    path.unlink()  # 96 MB, which pytest would keep


@pytest.fixture(scope="module")
def inception(weights: Path) -> Inception:
    return load_inception(weights)


def correlated(count: int, size: int, seed: int) -> Tensor:
    """Vectors (count, size) whose elements have other means, and go together."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=random) / size**0.5
    return 3 * torch.randn(size, generator=random) + torch.randn(count, size, generator=random) @ mix


def statistics_of(features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.add(features)
    return statistics


def distance_of(features0: Tensor, features1: Tensor) -> float:
    a, b = statistics_of(features0), statistics_of(features1)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


# Statistics


@pytest.mark.parametrize("batches", [[40], [1] * 40, [1, 7, 30, 2]])
def test_streaming_statistics_are_those_of_all_at_once(batches: list[int]) -> None:
    features = correlated(40, 16, seed=0) + 1e4  # far from zero: sums of squares would lose half the digits
    statistics = FeatureStatistics(16)
    for batch in features.split(batches):
        statistics.add(batch)
    assert statistics.count == 40
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64
    whole = features.double().numpy()
    np.testing.assert_allclose(statistics.mean, whole.mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, np.cov(whole, rowvar=False), rtol=1e-10, atol=1e-10)


def test_statistics_name_bad_features_and_too_few() -> None:
    statistics = FeatureStatistics(4)
    for wrong in (torch.zeros(4), torch.zeros(2, 5), torch.zeros(0, 4)):
        with pytest.raises(LatentVAEError, match=r"must be \(B, 4\)"):
            statistics.add(wrong)
    statistics.add(torch.zeros(1, 4))
    with pytest.raises(LatentVAEError, match="two images or more, got 1"):
        _ = statistics.covariance


# Distance


def test_the_distance_of_known_gaussians() -> None:
    """Covariances that commute: the sum of (difference of means)^2 and of (difference of deviations)^2."""
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    std0, std1 = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([4.0, 0.5, 3.0]).double()
    covariances = [basis @ (std**2).diag() @ basis.T for std in (std0, std1)]
    mean0, mean1 = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, -2.0, 1.0])
    wanted = 1 + 4 + (1 - 4) ** 2 + (2 - 0.5) ** 2 + (0 - 3) ** 2
    assert frechet_distance(mean0, covariances[0], mean1, covariances[1]) == pytest.approx(wanted, abs=1e-12)


def test_the_distance_of_two_by_two_gaussians_that_do_not_commute() -> None:
    """For 2x2 matrices tr sqrt(AB) = sqrt(tr(AB) + 2 sqrt(det(AB)))."""
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    b = torch.tensor([[5.0, -2.0], [-2.0, 1.5]]).double()
    product = a @ b
    overlap = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    zero = torch.zeros(2)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(5 + 6.5 - 2 * overlap, abs=1e-12)


@pytest.mark.parametrize("count", [12, 200], ids=["singular", "full rank"])
def test_the_distance_is_torch_fidelitys(count: int) -> None:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    features = correlated(count, 32, seed=0), correlated(count, 32, seed=1)
    theirs = [fid_features_to_statistics(x.double()) for x in features]
    wanted = fid_statistics_to_metric(*theirs, verbose=False)[KEY_METRIC_FID]
    assert distance_of(*features) == pytest.approx(wanted, rel=1e-6 if count == 12 else 1e-10)
    assert wanted > 1


@pytest.mark.parametrize("count", [2, 12, 200])
def test_identical_sets_have_no_distance(count: int) -> None:
    features = correlated(count, 32, seed=0)
    assert distance_of(features, features.flip(0)) == pytest.approx(0, abs=1e-11)


def test_constant_features_differ_by_their_means() -> None:
    assert distance_of(torch.zeros(3, 4), torch.full((3, 4), 2.0)) == 16


def test_bad_gaussians_are_named() -> None:
    mean, covariance = torch.zeros(3), torch.eye(3)
    with pytest.raises(LatentVAEError, match=r"were wanted, got \(3,\), \(3, 3\), \(3,\), \(2, 2\)"):
        frechet_distance(mean, covariance, mean, torch.eye(2))
    with pytest.raises(LatentVAEError, match="not all finite"):
        frechet_distance(mean, covariance, mean + math.nan, covariance)


@pytest.mark.slow
def test_the_distance_is_torch_fidelitys_at_full_size() -> None:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    features = correlated(2500, FEATURES, seed=0), correlated(2500, FEATURES, seed=1)
    theirs = [fid_features_to_statistics(x.double()) for x in features]
    wanted = fid_statistics_to_metric(*theirs, verbose=False)[KEY_METRIC_FID]
    assert distance_of(*features) == pytest.approx(wanted, rel=1e-9)


# The network


def test_features_are_torch_fidelitys_of_the_rounded_images(inception: Inception, weights: Path) -> None:
    from torch_fidelity.utils import create_feature_extractor

    images = torch.rand(2, 3, 40, 57) * 2.4 - 1.2
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    with torch.random.fork_rng():
        theirs = create_feature_extractor(
            "inception-v3-compat", ["2048"], cuda=False, verbose=False, feature_extractor_weights_path=weights
        )
    with torch.autocast("cpu", torch.bfloat16):
        features = inception(images)
    assert features.shape == (2, FEATURES)
    assert features.dtype == torch.float32
    assert not inception.training
    assert not any(parameter.requires_grad for parameter in inception.parameters())
    torch.testing.assert_close(features, theirs(levels)[0], rtol=0, atol=0)
    grey = images[:, :1]
    torch.testing.assert_close(inception(grey), inception(grey.repeat(1, 3, 1, 1)), rtol=0, atol=0)


def test_bad_images_are_named(inception: Inception) -> None:
    images = torch.zeros(1, 3, 16, 16)
    for wrong in (images[0], images[:, :2], images.to(torch.uint8)):
        with pytest.raises(LatentVAEError, match="rFID wants float images"):
            inception(wrong)
    with pytest.raises(LatentVAEError, match="1 of 768 values are NaN"):
        inception(torch.cat([images.flatten()[1:], torch.tensor([math.nan])]).view_as(images))
    with pytest.raises(LatentVAEError, match=r"\(1, 3, 16, 16\) and .* \(1, 3, 16, 15\)"):
        RFID(inception).add(images, images[..., 1:])


# Weights


def test_loading_draws_no_random_numbers(weights: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    load_inception(weights)
    assert torch.rand(1) == wanted


def test_weights_are_found_in_the_cache(weights: Path, tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert URL_INCEPTION_V3.endswith(f"/weights-{WEIGHTS}")
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / f"weights-{WEIGHTS}").hardlink_to(weights)
    loaded = load_inception()
    assert loaded.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_missing_weights_say_where_and_how(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="hub/checkpoints has no") as caught:
        load_inception()
    assert "check_hash=True" in str(caught.value)
    with pytest.raises(MissingWeightsError, match="no such file"):
        load_inception(tmp_path / "none.pth")
    with pytest.raises(MissingWeightsError, match="no such file"):
        load_inception(tmp_path)


def test_a_missing_package_names_the_extra(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(MissingWeightsError, match=r"pip install -e \".*\[fid\]\""):
        load_inception(weights)


class Payload:
    """A pickle that runs a command when it is read unsafely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    torch.save({"a": Payload(tmp_path / "pwned")}, tmp_path / "evil.pth")
    with pytest.raises(LatentVAEError, match="can run code and are not read"):
        load_inception(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", {"a": 1}, [torch.zeros(1)]], ids=str)
def test_a_file_of_something_else_is_an_error(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(LatentVAEError, match=r"other\.pth is damaged, or no dictionary of tensors"):
        load_inception(path)


def test_every_key_is_checked(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    path = tmp_path / "wrong.pth"
    bias = state.pop("fc.bias")
    for wrong, problem in (
        (state, r"Missing key\(s\).*fc\.bias"),
        ({**state, "fc.bias": bias, "more": bias}, r"Unexpected key\(s\).*more"),
        ({**state, "fc.bias": bias[1:]}, r"size mismatch for fc\.bias"),
    ):
        torch.save(wrong, path)
        with pytest.raises(LatentVAEError, match=rf"not for this network: .*{problem}"):
            load_inception(path)
    path.unlink()


# The protocol


def test_the_protocol_says_what_not_to_compare() -> None:
    genuine = "6726825d" + "0" * 56
    few, many, all_of_them = (RFIDProtocol(count, genuine) for count in (24, 5_000, 50_000))
    assert few.biased
    assert "24 images are fewer than the 2,048 features" in few.notes[0]
    assert "50,000" in few.notes[0]
    assert not many.biased
    assert "5,000 here" in many.notes[0]
    assert all_of_them.notes == ()
    assert "not the published ones" in RFIDProtocol(50_000, "f" * 64).notes[0]


# Evaluation


@pytest.fixture
def images() -> Iterator[tuple[str, Tensor]]:
    return ((f"{i}.png", torch.rand(3, 32 + 8 * i, 40) * 2 - 1) for i in range(3))


@pytest.mark.slow
def test_evaluate_measures_rfid(tiny_vae, images, inception: Inception) -> None:  # type: ignore[no-untyped-def]
    from latentvae.models.latents import reconstruct

    pairs = [(name, image, reconstruct(tiny_vae, image[None]).reconstructions) for name, image in images]
    summary = evaluate(tiny_vae, [(name, image) for name, image, _ in pairs], inception=inception)
    features = [
        torch.cat([inception(x) for x in side])
        for side in ([p[1][None] for p in pairs], [p[2] for p in pairs])
    ]
    means = [x.double().mean(0) for x in features]
    # Of n < 2048 vectors, the same figure from n x n matrices: tr sqrt(C0 C1) is the nuclear norm of X0 X1^T.
    centred = [(x.double() - mean) / 2**0.5 for x, mean in zip(features, means, strict=True)]
    overlap = torch.linalg.matrix_norm(centred[0] @ centred[1].T, "nuc")
    wanted = (means[0] - means[1]).square().sum() + sum(x.square().sum() for x in centred) - 2 * overlap
    assert summary.rfid == pytest.approx(wanted.item(), rel=1e-6)
    assert summary.rfid_protocol == RFIDProtocol(3, inception.weights_sha256)
    stored = json.loads(json.dumps(summary.as_dict(), allow_nan=False))
    assert stored["rfid"] == summary.rfid
    assert stored["rfid_protocol"]["image_count"] == 3
    assert "299x299" in stored["rfid_protocol"]["resize"]
    assert stored["mean"]["psnr"] == pytest.approx(summary.psnr)
    assert any("3 images are fewer" in note for note in stored["notes"])
    assert f"\nrFID {summary.rfid:.3f} (n = 3: biased, fewer than 2,048 images)\n" in summary.table()
    assert "Note: rFID: 3 images are fewer" in summary.table()


def test_evaluate_of_one_image_leaves_rfid_out(tiny_vae, images, inception) -> None:  # type: ignore[no-untyped-def]
    summary = evaluate(tiny_vae, [next(images)], inception=inception)
    assert summary.rfid is None
    assert "Note: rFID was not measured: it takes two images or more, got one" in summary.table()


def test_evaluate_without_rfid_does_not_speak_of_it(tiny_vae, images) -> None:  # type: ignore[no-untyped-def]
    summary = evaluate(tiny_vae, images)
    assert summary.as_dict()["rfid"] is None
    assert "rFID" not in summary.table()
    assert not any("rFID" in note for note in summary.notes)


# The command


def run(*arguments: str | Path) -> Any:
    from latentvae.cli.main import app

    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture
def model(tiny_vae, tmp_path: Path) -> Path:  # type: ignore[no-untyped-def]
    tiny_vae.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_leaves_rfid_out_with_a_reason(model: Path, photo_folder: Path) -> None:
    result = run(photo_folder, "--model", model, "--device", "cpu", "--rfid", "--json")
    assert result.exit_code == 0, result.output
    stored = json.loads(result.stdout)
    assert stored["rfid"] is None
    assert any("rFID was not measured: no weights" in note for note in stored["notes"])


def test_the_command_measures_rfid(
    model: Path, photo_folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "latentvae.measure.rfid.frechet_distance", lambda *gaussians: 12.3456
    )  # it takes seconds
    result = run(photo_folder, "--model", model, "--device", "cpu", "--rfid", "--inception-weights", weights)
    assert result.exit_code == 0, result.output
    assert "\nrFID 12.346 (n = 6: biased" in result.stdout
    assert "not the published ones" in result.stdout


def test_the_command_refuses_bad_weights(model: Path, photo_folder: Path, tmp_path: Path) -> None:
    options = ("--model", model, "--device", "cpu", "--inception-weights", tmp_path / "none.pth")
    result = run(photo_folder, *options, "--rfid")
    assert isinstance(result.exception, MissingWeightsError)
    assert "none.pth: no such file" in str(result.exception)
    result = run(photo_folder, *options)
    assert "add --rfid" in str(result.exception)


def test_statistics_of_parts_are_those_of_the_whole_also_from_other_processes() -> None:
    vectors = correlated(40, 7, 0)
    whole, parts = FeatureStatistics(7), [FeatureStatistics(7) for _ in range(3)]  # the last stays empty
    whole.add(vectors)
    parts[0].add(vectors[:11])
    parts[1].add(vectors[11:])
    for part in parts[1:]:
        parts[0].merge(pickle.loads(pickle.dumps(part)))
    assert parts[0].count == 40
    torch.testing.assert_close(parts[0].mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[0].covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    empty = FeatureStatistics(7)
    empty.merge(whole)
    assert torch.equal(empty.covariance, whole.covariance)
