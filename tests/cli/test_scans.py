"""Scans from files of 12 bits to a model and back: the window, the depth of figures, and their page."""

import json
import re
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from typer.testing import CliRunner

import latentvae
from latentvae.base.errors import ConfigError, ImageError, StoreError, TooManyPixels
from latentvae.cli.main import app
from latentvae.images.scans import Window, load, measure_window, read_samples, save
from latentvae.measure.metrics import Metrics
from latentvae.models.latents import reconstruct
from latentvae.models.loading import set_window, window_of
from latentvae.store.encoding import encode_folder
from latentvae.training.data.crops import CropSequence, split_sources
from latentvae.training.recipes import load_config

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "scans.md"
SMALL = [
    "--set", "model.preset=tiny",
    "--set", "model.overrides={in_channels: 1, out_channels: 1, block_out_channels: [16, 16, 32]}",
    "--set", "train.max_steps=4", "--set", "train.batch_size=4", "--set", "train.tracker=none",
]  # fmt: skip


def scan(seed: int, side: int = 64) -> np.ndarray:
    """Two soft blobs, uint16 of 12 bits (H, W): as a photograph of 16 bits it would be nearly black."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    blobs = sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / 0.03) for a, b in random.uniform(0.2, 0.8, (2, 2)))
    return np.clip(4095 * blobs / 2 + random.normal(0, 20, (side, side)), 0, 4095).astype(np.uint16)


def write_scans(folder: Path) -> Path:
    folder.mkdir()
    for name, seed in zip("abcdefgh", range(8), strict=True):
        Image.fromarray(scan(seed)).save(folder / f"{name}.png")
    return folder


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the commands of the page were run, one after the other, with a tiny model."""
    folder = tmp_path_factory.mktemp("scans")
    write_scans(folder / "scans")
    shell = re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    commands = [line for block in shell for line in block.splitlines() if line.startswith("latentvae ")]
    assert len(commands) == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TORCH_HOME", str(folder / "torch"))  # without this machine's LPIPS weights
        patch.delenv("LATENTVAE_LPIPS", raising=False)
        for command in commands:
            words = shlex.split(command)[1:]
            result = run(*words, *(SMALL if words[0] == "train" else []))
            (folder / f"{words[0]}.txt").write_text(result.output)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        yield folder


def test_the_export_states_the_range_and_is_loaded_with_it(place: Path) -> None:
    sidecar = json.loads((place / "runs/scan/vae/latentvae.json").read_text())
    assert sidecar["intensity_range"] == [0, 4095]
    assert "clipped to [-1, 1]" in (place / "runs/scan/vae/README.md").read_text()
    assert window_of(latentvae.load(place / "runs/scan/vae")) == Window(0, 4095)
    assert window_of(latentvae.build("tiny")) is None


def test_decode_gives_floats_in_the_samples_units(place: Path) -> None:
    vae, window = latentvae.load(place / "runs/scan/vae"), Window(0, 4095)
    samples = scan(0)
    with Image.open(place / "back/a.png.tif") as picture:
        assert picture.mode == "F"
        decoded = np.asarray(picture)
    image, _ = load(place / "scans/a.png", 1, window)
    wanted = window.undo(reconstruct(vae, image[None]).reconstructions)[0, 0].numpy()
    assert decoded.shape == samples.shape
    # a store's moments are bf16
    assert np.abs(decoded - wanted).mean() < 0.01 * 4095
    with Image.open(place / "looked-at/a.png.reconstruction.tif") as picture:
        assert np.asarray(picture) == pytest.approx(wanted, abs=0.5)
    with Image.open(place / "looked-at/a.png.comparison.png") as picture:
        assert picture.mode == "RGB"


def test_the_range_outlives_another_export(place: Path, tmp_path: Path) -> None:
    for number, source in enumerate((place / "runs/scan", place / "runs/scan/vae")):
        run("export", source, "--output", tmp_path / str(number), "--licence", "mit")
        sidecar = json.loads((tmp_path / str(number) / "latentvae.json").read_text())
        assert sidecar["intensity_range"] == [0, 4095]


def test_a_parent_of_scans_wants_a_range(place: Path, tmp_path: Path) -> None:
    overrides = SMALL[4:]
    settings = ["--set", f"data.train={place / 'scans'}", "--set", f"output={tmp_path / 'run'}"]
    settings += ["--set", f"model.init={place / 'runs/scan/vae'}", "--set", "data.crop=32", *overrides]
    result = CliRunner().invoke(app, ["train", "-c", "tiny", *settings])
    assert isinstance(result.exception, ConfigError)
    assert "trained on samples from 0 to 4095" in str(result.exception)
    result = CliRunner().invoke(app, ["train", "-c", "tiny", *settings, "--set", "data.range=[0,1]"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("kind", ["i2", "f4", "u4", "f2"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_samples_are_the_files_in_either_byte_order(
    tmp_path: Path, kind: str, compression: str | None
) -> None:
    samples = (np.arange(24 * 16).reshape(24, 16) - (0 if kind == "u4" else 100)).astype(kind)
    for order in "<>":
        tifffile.imwrite(tmp_path / "a.tif", samples, byteorder=order, compression=compression)
        read, info = read_samples(tmp_path / "a.tif")
        assert np.array_equal(read, samples)
        assert (info.width, info.height) == (16, 24)
    with pytest.raises(TooManyPixels):
        read_samples(tmp_path / "a.tif", max_pixels=100)


def test_the_store_remembers_the_range(place: Path) -> None:
    assert json.loads((place / "latents/store.json").read_text())["preprocessing"]["range"] == [0, 4095]


def test_a_store_of_another_range_is_refused_with_both(place: Path) -> None:
    vae = set_window(latentvae.load(place / "runs/scan/vae"), Window(0, 1000))
    with pytest.raises(StoreError, match=r"samples 0 to 4095\).*samples 0 to 1000\) came"):
        encode_folder(vae, [place / "scans"], place / "latents")


def test_figures_are_of_the_datas_own_depth(place: Path) -> None:
    vae, window = latentvae.load(place / "runs/scan/vae"), Window(0, 4095)
    result = json.loads(
        run("evaluate", place / "scans/a.png", "-m", place / "runs/scan/vae", "--json").stdout
    )
    assert result["protocol"]["rounding"].startswith("4096 levels")
    image, _ = load(place / "scans/a.png", 1, window)
    rebuilt = window.undo(reconstruct(vae, image[None]).reconstructions)[0, 0].round().numpy()
    error = np.square(scan(0).astype(float) - rebuilt).mean()
    assert result["mean"]["psnr"] == pytest.approx(10 * np.log10(4095**2 / error), abs=0.01)
    assert "4096 levels rounding" in (place / "evaluate.txt").read_text()


def test_the_python_of_the_page_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    exec(block, names)
    assert np.array_equal(names["samples"][0].round().numpy(), scan(0))


def test_a_range_of_percentiles_is_measured_and_written_down(tmp_path: Path) -> None:
    folder = write_scans(tmp_path / "scans")
    more = [
        "--set",
        "data.range=null",
        "--set",
        "data.percentiles=[5, 95]",
        "--set",
        f"output={tmp_path}/run",
    ]
    run(
        "train",
        "--config",
        "scan",
        *SMALL,
        *more,
        "--set",
        f"data.train={folder}",
        "--set",
        "train.max_steps=1",
    )
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    low, high = np.percentile([scan(seed) for seed in range(8)], [5, 95])
    found = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]
    assert found["percentiles"] is None
    assert found["range"] == pytest.approx([low, high], abs=0.01 * 4095)
    assert window_of(latentvae.load(tmp_path / "run/vae")) == Window(*found["range"])


@pytest.mark.parametrize("percentiles", [(0.1, 99.9), (1, 99), (0.01, 99.99), (0, 100)])
def test_percentiles_are_those_of_all_samples_though_images_differ(percentiles: tuple[float, float]) -> None:
    """The largest sample of a dim image is no rarer than one of the middle of a bright one."""
    random = np.random.default_rng(0)
    images = [random.gamma(2, scale, (96, 96)) for scale in random.uniform(5, 200, 20)]
    found = measure_window(iter(images), percentiles)
    low, high = np.percentile(np.concatenate([image.ravel() for image in images]), percentiles)
    assert (found.low, found.high) == (pytest.approx(low, rel=0.1), pytest.approx(high, rel=0.02))


def test_a_background_that_fills_half_of_a_scan_is_its_low_end() -> None:
    scan = np.where(np.arange(10_000) % 2, -1000, np.arange(10_000) // 10).reshape(100, 100)
    assert measure_window([scan], (0.1, 100)) == Window(-1000, 999)


def test_a_window_and_back_keeps_every_sample_and_clips_what_is_outside(tmp_path: Path) -> None:
    window = Window(-1000, 3095)
    samples = np.arange(-1000, 3096).reshape(64, 64)
    image = window.apply(samples)
    assert image.shape == (1, 64, 64)
    assert (image.min(), image.max()) == (-1, 1)
    save(image, tmp_path / "all.tif", window)
    back, _ = read_samples(tmp_path / "all.tif")
    assert np.array_equal(back.round(), samples)
    assert (window.steps, Window(0, 1).steps, Window(0.5, 2).steps) == (4095, 1, 65535)
    outside, info = load(tmp_path / "all.tif", 1, Window(0, 4095))
    assert outside.min() == -1
    assert info.notes == ["24.41% of its samples lie outside 0 to 4095 and are clipped"]


def test_eight_bits_would_hide_what_twelve_show() -> None:
    image = Window(0, 4095).apply(scan(1))[None]
    changed = Window(0, 4095).apply(np.clip(scan(1) + 3, 0, 4095))[None]
    fine, coarse = Metrics(steps=4095), Metrics()
    assert fine.add("a", image, changed)[0].psnr == pytest.approx(20 * np.log10(4095 / 3), abs=0.1)
    assert abs(coarse.add("a", image, changed)[0].psnr - 20 * np.log10(4095 / 3)) > 1


def test_what_is_no_scan_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    with pytest.raises(ImageError, match=r"colour\.png has the mode RGB"):
        load(tmp_path / "colour.png", 1, Window(0, 4095))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png cannot be read"):
        load(tmp_path / "broken.png", 1, Window(0, 4095))
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ImageError, match="NaN"):
        read_samples(tmp_path / "nan.tif")
    with pytest.raises(ImageError, match="flat"):
        measure_window([np.zeros((4, 4))], (1, 99))
    with pytest.raises(ImageError, match=r"data\.range"):
        measure_window([], (1, 99))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.range=[9, 3]"], "is empty"),
        (["data.percentiles=[1, 99]"], "leave one out"),
        (["model.overrides={}"], "are of one channel, and the model has 3"),
        (["data.range=null", "data.percentiles=[1, 101]"], "percentiles"),
        (["model.mode=distil", "model.teacher=f8c4-small", "distil.cache=kept"], "pictures of 8 bits"),
    ],
)
def test_ranges_that_cannot_be_are_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("scan", settings)


def test_shards_are_no_scans(tmp_path: Path) -> None:
    write_scans(tmp_path / "scans")
    with tarfile.open(tmp_path / "scans.tar", "w") as tar:
        tar.add(tmp_path / "scans/a.png", "a.png")
        tar.add(tmp_path / "scans/b.png", "b.png")
    config = load_config("scan", [f"data.train={tmp_path / 'scans.tar'}"])
    with pytest.raises(ConfigError, match="unpack it"):
        split_sources(config.data)


def test_training_sees_more_than_eight_bits(tmp_path: Path) -> None:
    config = load_config("scan", [f"data.train={write_scans(tmp_path / 'scans')}"])
    train, _ = split_sources(config.data)
    crop, *_ = CropSequence(train, config.data, 1, seed=0)[0]
    samples = Window(0, 4095).undo(crop)
    assert torch.equal(samples.round(), samples.round().clamp(0, 4095))
    assert len(samples.round().unique()) > 300
    assert torch.allclose(samples, samples.round(), atol=0.01)
