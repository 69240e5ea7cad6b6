"""LPIPS: the right weights or an error, and the distance and gradient of the lpips package."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from latentvae.base.errors import LatentVAEError, MissingWeightsError
from latentvae.measure import lpips as perceptual
from latentvae.measure.lpips import LPIPS, WEIGHTS_ENV, load_lpips

GIVEN = os.environ.get(WEIGHTS_ENV)  # read before the fixture below hides it
FILES = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No weights from this machine's environment or cache, and one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.delenv(WEIGHTS_ENV, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    yield
    torch.set_num_threads(threads)


def torchvision_features(net: str) -> nn.Sequential:
    """torchvision's own features with random weights, large enough for the ReLUs to pass something on."""
    from torchvision import models

    with torch.device("meta"):
        features = models.get_model(FILES[net], weights=None).features
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(value.shape, generator=generator) * (2 / max(1, value[0].numel())) ** 0.5
        for key, value in features.state_dict().items()
    }
    features.load_state_dict(state, assign=True)
    return features


def write_weights(folder: Path, net: str = "squeeze", prefix: str = "") -> Path:
    state = torchvision_features(net).state_dict()
    folder.mkdir(exist_ok=True)
    path = folder / f"{FILES[net]}_random.safetensors"
    save_file({prefix + key: value for key, value in state.items()}, path)
    return path


def reference(net: str, ours: LPIPS) -> nn.Module:
    """lpips.LPIPS with the backbone of `ours`, put in slice by slice."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    for i in range(1, theirs.net.N_slices + 1):
        for name, layer in getattr(theirs.net, f"slice{i}").named_children():
            layer.load_state_dict(ours.backbone[int(name)].state_dict())
    return theirs


def pair(size: int = 64, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    return images, (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def real_weights() -> Path:
    folder = Path(GIVEN) if GIVEN else Path(__file__).resolve().parents[3] / "shared" / "lpips"
    if not folder.is_dir():
        pytest.skip(f"the real LPIPS weights are not in {folder}; set {WEIGHTS_ENV}")
    return folder


# The distance


@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
def test_distance_and_gradient_equal_the_lpips_package(net: str, tmp_path: Path) -> None:
    ours = load_lpips(net, write_weights(tmp_path, net))
    theirs = reference(net, ours)
    images, reconstructions = pair()
    gradients, distances = [], []
    for measure in (ours, theirs):
        leaf = reconstructions.clone().requires_grad_()
        distance = measure(images, leaf).flatten()
        distance.sum().backward()
        distances.append(distance.detach())
        gradients.append(leaf.grad)
    assert distances[0].shape == (2,)
    assert distances[1].min() > 1e-3  # else the agreement below says nothing
    torch.testing.assert_close(distances[0], distances[1], atol=1e-6, rtol=1e-6)
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(
        gradients[0], gradients[1], rtol=1e-4, atol=1e-5 * gradients[1].abs().max().item()
    )


@pytest.mark.parametrize(("net", "near", "far"), [("alex", 0.138, 0.722), ("squeeze", 0.148, 0.711)])
def test_real_weights_give_the_published_example(net: str, near: float, far: float) -> None:
    folder = real_weights()
    reference, p0, p1 = (
        torch.from_numpy(np.array(Image.open(folder / f"ex_{name}.png").convert("RGB"))).permute(2, 0, 1)[
            None
        ]
        / 127.5
        - 1
        for name in ("ref", "p0", "p1")
    )
    lpips = load_lpips(net, folder)
    with torch.no_grad():
        assert lpips(reference, p0).item() == pytest.approx(far, abs=6e-4)
        assert lpips(reference, p1).item() == pytest.approx(near, abs=6e-4)


def test_target_features_without_gradient_give_the_same_loss(tmp_path: Path) -> None:
    lpips = load_lpips("squeeze", write_weights(tmp_path))
    images, reconstructions = pair()
    with torch.no_grad():
        target = lpips.features(images)
    assert not any(f.requires_grad for f in target)
    reconstructions.requires_grad_()
    loss = lpips.distance_from_features(target, lpips.features(reconstructions))
    assert torch.equal(loss, lpips(images, reconstructions))
    loss.sum().backward()
    assert reconstructions.grad is not None
    assert reconstructions.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in lpips.parameters())


def test_gradient_survives_a_second_backward(tmp_path: Path) -> None:
    """The adaptive discriminator weight takes gradients of a graph that is used again."""
    lpips = load_lpips("squeeze", write_weights(tmp_path))
    images, reconstructions = pair(32)
    reconstructions.requires_grad_()
    loss = lpips(images, reconstructions).sum()
    (first,) = torch.autograd.grad(loss, reconstructions, retain_graph=True)
    (second,) = torch.autograd.grad(loss, reconstructions)
    assert torch.equal(first, second)


def test_written_out_gradients_are_right() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in "xy")
    scale = torch.rand(1, 3, 1, 1, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: perceptual._UnitChannels.apply(a, scale), (x,))
    assert torch.autograd.gradcheck(perceptual._SquaredDistance.apply, (x, y))


def test_gradient_is_zero_where_all_features_are_zero(tmp_path: Path) -> None:
    """Dividing by the norm of a dead position must not put a NaN into a training run."""
    scale = torch.ones(1, 3, 1, 1)
    features = torch.zeros(1, 3, 2, 2)
    features[..., 0] = 1
    (gradient,) = torch.autograd.grad(
        perceptual._UnitChannels.apply(features.requires_grad_(), scale).square()[:, 0].sum(), features
    )
    assert gradient[..., 1].eq(0).all()
    assert gradient[..., 0].abs().sum() > 0
    path = write_weights(tmp_path)
    state = load_file(path)
    save_file({**state, "0.bias": state["0.bias"] - 1e4}, path)  # the first ReLU lets nothing through
    images, reconstructions = pair(32)
    distance = load_lpips("squeeze", path)(images, reconstructions.requires_grad_()).sum()
    assert torch.autograd.grad(distance, reconstructions)[0].eq(0).all()


def test_bf16_autocast_agrees_and_stays_float32_in_its_sums(tmp_path: Path) -> None:
    lpips = load_lpips("squeeze", write_weights(tmp_path))
    images, reconstructions = pair()
    full = lpips(images, reconstructions)
    leaf = reconstructions.bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(f.dtype == torch.float32 for f in lpips.features(images))
        half = lpips(images, leaf)
    torch.testing.assert_close(half, full, rtol=1e-2, atol=0)
    half.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
    assert leaf.grad.abs().sum() > 0


def test_one_channel_is_repeated(tmp_path: Path) -> None:
    lpips = load_lpips("squeeze", write_weights(tmp_path))
    images, reconstructions = (x[:, :1] for x in pair(32))
    torch.testing.assert_close(
        lpips(images, reconstructions),
        lpips(images.repeat(1, 3, 1, 1), reconstructions.repeat(1, 3, 1, 1)),
    )


@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
def test_minimum_size_is_the_network_s(net: str, tmp_path: Path) -> None:
    lpips = load_lpips(net, write_weights(tmp_path, net))
    images, reconstructions = pair(lpips.min_size)
    assert lpips(images, reconstructions).isfinite().all()
    with pytest.raises(RuntimeError, match="too small"):
        lpips.backbone(images[..., 1:])
    with pytest.raises(LatentVAEError, match=f"{lpips.min_size} pixels or more"):
        lpips(images[..., 1:], reconstructions[..., 1:])


def test_bad_images_are_named(tmp_path: Path) -> None:
    lpips = load_lpips("squeeze", write_weights(tmp_path))
    images, reconstructions = pair(32)
    with pytest.raises(LatentVAEError, match="one shape"):
        lpips(images, reconstructions[:1])
    with pytest.raises(LatentVAEError, match="float tensor"):
        lpips.features(images.to(torch.uint8))
    with pytest.raises(LatentVAEError, match="3 or 1"):
        lpips.features(images[:, :2])


# The weights


def test_loading_is_silent_frozen_and_draws_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_weights(tmp_path)
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpips = load_lpips("squeeze", path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert capsys.readouterr() == ("", "")
    assert not lpips.training
    assert not any(p.requires_grad for p in lpips.parameters())


@pytest.mark.parametrize("prefix", ["", "features."])
def test_every_backbone_weight_comes_from_the_file(prefix: str, tmp_path: Path) -> None:
    path = write_weights(tmp_path, prefix=prefix)
    if prefix:  # a whole model's file: the classifier is dropped
        save_file({**load_file(path), "classifier.1.weight": torch.zeros(1)}, path)
    loaded = load_lpips("squeeze", path).backbone.state_dict()
    wanted = torchvision_features("squeeze").state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)


def test_a_folder_is_searched_by_network(tmp_path: Path) -> None:
    for net in ("alex", "squeeze"):
        write_weights(tmp_path, net)
    assert load_lpips("alex", tmp_path).backbone[0].weight.shape[-1] == 11
    assert load_lpips("squeeze", str(tmp_path)).backbone[0].weight.shape[-1] == 3


def test_environment_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_weights(tmp_path)
    monkeypatch.setenv(WEIGHTS_ENV, str(tmp_path))
    assert load_lpips("squeeze").net == "squeeze"
    with pytest.raises(MissingWeightsError, match="holds no alexnet"):
        load_lpips("alex")


def test_torchvision_cache_is_read_without_running_it(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    state = {f"features.{k}": v for k, v in torchvision_features("squeeze").state_dict().items()}
    path = cache / "squeezenet1_1-b8a52dc0.pth"
    torch.save({**state, "classifier.1.bias": torch.zeros(1)}, path)
    assert load_lpips("squeeze").net == "squeeze"
    torch.save(SimpleNamespace(code="any object runs code when it is unpickled"), path)
    with pytest.raises(LatentVAEError, match="cannot read"):
        load_lpips("squeeze")


@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
def test_missing_weights_name_both_ways_out(net: str) -> None:
    with pytest.raises(MissingWeightsError) as caught:
        load_lpips(net)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "path" in message
    assert WEIGHTS_ENV in message
    assert "weights='DEFAULT'" in message


def test_a_given_path_is_the_only_one_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_weights(tmp_path / "environment")
    monkeypatch.setenv(WEIGHTS_ENV, str(tmp_path / "environment"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingWeightsError, match="holds no squeezenet1_1"):
        load_lpips("squeeze", tmp_path / "empty")
    with pytest.raises(MissingWeightsError, match="does not exist"):
        load_lpips("squeeze", tmp_path / "nowhere")


def test_a_failed_download_is_a_missing_weights_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str, **options: object) -> None:
        assert options["weights_only"]
        raise OSError("offline")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(MissingWeightsError, match="offline"):
        load_lpips("vgg", download=True)


def test_weights_are_fetched_where_their_server_answers_and_never_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked: list[str] = []

    def fetch(url: str, **options: object) -> None:
        asked.append(url)
        cached = tmp_path / "checkpoints" / url.rsplit("/", 1)[-1]
        cached.parent.mkdir()
        torch.save(torchvision_features("squeeze").state_dict(), cached)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    with pytest.raises(MissingWeightsError, match="there is no connection"):
        load_lpips("squeeze")  # HF_HUB_OFFLINE, which all tests set
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(perceptual.socket, "create_connection", refuse)
    with pytest.raises(MissingWeightsError, match="there is no connection"):
        load_lpips("squeeze")
    assert not asked
    monkeypatch.setattr(perceptual.socket, "create_connection", lambda *address, **options: nullcontext())
    with caplog.at_level("INFO"):
        assert load_lpips("squeeze").net == "squeeze"
    assert len(asked) == 1
    assert str(tmp_path) in caplog.text  # where they went


def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    answer = threading.Event()
    monkeypatch.setattr(perceptual, "PATIENCE", 0.05)
    monkeypatch.setattr(perceptual.socket, "create_connection", lambda *address, **options: answer.wait(30))
    try:
        with pytest.raises(MissingWeightsError, match="there is no connection") as caught:
            load_lpips("vgg")
    finally:
        answer.set()
    assert "\n" not in str(caught.value)  # one line


def refuse(*address: object, **options: object) -> None:
    raise OSError("no route")


def test_a_wrong_file_names_the_key(tmp_path: Path) -> None:
    squeeze, alex = write_weights(tmp_path), write_weights(tmp_path, "alex")
    with pytest.raises(LatentVAEError, match=r"not for LPIPS 'squeeze': '0\.weight' is"):
        load_lpips("squeeze", alex)
    state = load_file(squeeze)
    save_file({**state, "13.weight": torch.zeros(1)}, squeeze)
    with pytest.raises(LatentVAEError, match=r"unknown key '13\.weight'"):
        load_lpips("squeeze", squeeze)
    save_file({**state, "0.weight": torch.zeros(64, 3, 5, 5)}, squeeze)
    with pytest.raises(LatentVAEError, match=r"'0\.weight' is \(64, 3, 5, 5\), wanted \(64, 3, 3, 3\)"):
        load_lpips("squeeze", squeeze)
    del state["12.squeeze.bias"]
    save_file(state, squeeze)
    with pytest.raises(LatentVAEError, match=r"key '12\.squeeze\.bias' is missing"):
        load_lpips("squeeze", squeeze)


def test_unreadable_and_pickled_files_are_refused(tmp_path: Path) -> None:
    cut = write_weights(tmp_path)
    cut.write_bytes(cut.read_bytes()[:100])
    with pytest.raises(LatentVAEError, match="cannot read"):
        load_lpips("squeeze", cut)
    pickled = tmp_path / "squeezenet1_1.pth"
    torch.save({}, pickled)
    with pytest.raises(LatentVAEError, match="pickle can run code"):
        load_lpips("squeeze", pickled)
    with pytest.raises(LatentVAEError, match="unknown LPIPS network"):
        load_lpips("resnet")  # type: ignore[arg-type]
