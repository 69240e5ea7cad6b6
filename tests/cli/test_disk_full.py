"""A disk that fills up: what a verb writes is whole or not there, and the verb says what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import textured
from PIL import Image

import latentvae
from latentvae.cli.main import main


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photos" / "a.png"
    path.parent.mkdir()
    Image.fromarray(textured(32, 32, 0)).save(path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    latentvae.build("tiny").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("verb", ["agree", "encode"])
def test_a_picture_is_written_whole_or_the_earlier_one_stays(
    verb: str, photo: Path, model: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments: list[object] = ["encode", photo, out, "-m", model, "--preview"]
    picture = out / "preview.png"
    if verb == "agree":
        arguments = ["agree", model, model, photo, "-o", out]
        picture = out / "agreement.png"
    out.mkdir()
    if verb == "encode":  # which makes its store in an empty folder
        with pytest.raises(SystemExit):
            main([str(each) for each in arguments])
    picture.write_bytes(b"earlier")

    def fill(self: Image.Image, path: Any, *args: Any, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill)
    assert f"{picture} cannot be written (No space left on device)" in refused(arguments, capsys)
    assert picture.read_bytes() == b"earlier"
    assert not list(out.glob(".*.partial"))


def test_a_caption_that_cannot_be_written_is_named(
    photo: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo.with_suffix(".txt").write_text("waves")
    caption = tmp_path / "out" / "copies" / "a.png.t1.0.json"
    caption.mkdir(parents=True)  # in its place
    err = refused(["vary", photo, "-m", model, "-n", 1, "-o", tmp_path / "out"], capsys)
    assert f"{caption} cannot be written" in err


def test_doctor_leaves_a_whole_sidecar(
    model: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"latent_statistics": {"latents_std": [1.0]}}
    (model / "latentvae.json").write_text(json.dumps(figures))
    out, write = tmp_path / "out", Path.write_text

    def fill(path: Path, text: str, **options: Any) -> int:
        if path.parent != out:  # the export is written elsewhere, and then renamed
            return write(path, text, **options)
        write(path, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill)
    err = refused(["doctor", model, "--fix", out, "--size", 16], capsys)
    assert "latentvae.json cannot be written (No space left on device)" in err
    assert json.loads((out / "latentvae.json").read_text())["latent_statistics"] is None
