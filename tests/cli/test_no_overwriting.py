"""What a verb writes never takes the place of something of the user's, and never of another VAE's."""

from pathlib import Path

import numpy as np
import pytest
from conftest import textured
from PIL import Image
from stores import write_store

import latentvae
from latentvae.cli.main import main


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(textured(64, 64, number)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_forgotten_calibration_does_not_cost_the_last_photo(
    photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = photos[-1].read_bytes()
    assert "ends in .safetensors" in refused(["anomaly", "fit", *photos], capsys)
    assert photos[-1].read_bytes() == before


def test_a_calibration_does_not_replace_a_model(
    photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = latentvae.build("tiny")
    model.save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    assert "no calibration" in refused(["anomaly", "fit", *photos, weights], capsys)
    assert weights.read_bytes() == before


def test_features_do_not_replace_a_caption_record(
    photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    record = photos[0].with_suffix(".json")
    record.write_text('{"label": 3}')
    said = refused(["features", photos[0].parent, photos[0].with_suffix(".npy")], capsys)
    assert "another file of that name" in said
    assert record.read_text() == '{"label": 3}'


def test_a_prior_does_not_take_samples_beside_an_earlier_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "store", [[(2, 2)] * 12])
    fit = ["prior", "fit", store, tmp_path / "prior", "--kind", "gaussian"]
    for _ in range(2):  # an earlier prior alone is replaced
        main_ends_well(fit)
    kept = tmp_path / "prior" / "samples" / "0.png"
    kept.parent.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(kept)
    assert "'samples' beside an earlier prior" in refused(fit, capsys)
    assert kept.is_file()


def main_ends_well(arguments: list[object]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0


@pytest.mark.parametrize("verb", ["project", "vary", "interpolate"])
def test_nothing_is_written_among_the_images_that_were_named(
    verb: str, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    there = set(photos[0].parent.iterdir())
    assert "lies among the images" in refused([verb, *photos, "-o", photos[0].parent], capsys)
    assert set(photos[0].parent.iterdir()) == there


@pytest.mark.parametrize("verb", ["project", "prior", "features"])
def test_a_store_of_another_vae_is_refused(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "store", [[(2, 2)] * 12])
    latentvae.build("tiny").save_pretrained(tmp_path / "vae")
    model = ["--model", tmp_path / "vae"]
    arguments: list[object] = {
        "project": ["project", store, "-o", tmp_path / "out"],
        "prior": ["prior", "fit", store, tmp_path / "out", "--kind", "gaussian"],
        "features": ["features", store, tmp_path / "out.npy"],
    }[verb]
    assert "were made with weights" in refused([*arguments, *model], capsys)


def test_frames_are_not_written_over_the_frames_of_an_earlier_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "linear").mkdir()
    frames = [tmp_path / "linear" / f"{number:04d}.png" for number in range(2)]
    for number, frame in enumerate(frames):
        Image.fromarray(textured(64, 64, number)).save(frame)
    monkeypatch.chdir(tmp_path)
    said = refused(["interpolate", *frames, "--route", "linear", "--separate", "-o", "."], capsys)
    assert "lies among the images" in said
    assert sorted((tmp_path / "linear").iterdir()) == frames


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_forgotten_name_of_features_does_not_cost_the_last_table(
    photos: list[Path], suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = photos[0].parent / f"train{suffix}"
    table.write_bytes(b"data of mine")
    assert "no earlier table of features" in refused(["features", *photos, table], capsys)
    assert table.read_bytes() == b"data of mine"


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_an_earlier_table_of_features_is_replaced(photos: list[Path], tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    for _ in range(2):
        main_ends_well(["features", photos[0], tmp_path / f"table{suffix}"])


def test_a_run_does_not_write_pictures_among_its_images(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photos[0].parent)
    train = ["train", "-c", "tiny", "--set", "data.train=.", "--set", "loss.perceptual_weight=0"]
    assert "the folder of data.train" in refused(train, capsys)
    assert sorted(Path().iterdir()) == [Path(photo.name) for photo in photos]
