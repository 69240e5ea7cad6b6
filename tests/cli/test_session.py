"""What the verbs share: numbers with their nouns, sidecars of models, models that do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from latentvae.base.errors import LatentVAEError, TooManyPixels
from latentvae.cli.main import main
from latentvae.cli.options import EXIT_SKIPPED, counted
from latentvae.cli.session import Session, read_sidecar
from latentvae.images import kinds
from latentvae.models.exporting import SIDECAR
from latentvae.models.shipped import DEFAULT_MODEL
from latentvae.training.data.sources import left_out


def finish(skipped: list[dict[str, str]], done: int) -> None:
    session = Session()
    session.skipped += skipped
    session.finish(done)


def test_one_thing_is_no_plural(capsys: pytest.CaptureFixture[str]) -> None:
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    skipped = [{"path": "a.png", "reason": "broken"}]
    with pytest.raises(LatentVAEError, match="the only image could not be read: broken"):
        finish(skipped, 0)
    with pytest.raises(LatentVAEError, match="none of the 2 images could be read; the first: broken"):
        finish(skipped * 2, 0)
    for number, words in ((1, "1 of 4 images was skipped"), (2, "2 of 5 images were skipped")):
        with pytest.raises(typer.Exit) as stop:
            finish(skipped * number, 3)
        assert stop.value.exit_code == EXIT_SKIPPED
        assert words in capsys.readouterr().err


def test_what_a_folder_leaves_out_is_told_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.heic", "c.psd"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(kinds, "optional", lambda module: None)
    session = Session()
    assert session.find_images([tmp_path]) == [tmp_path / "a.png"]
    said = f"left out: 1 .heic ({kinds.remedy('pillow_heif')}), 1 .psd"
    assert capsys.readouterr().err.strip() == said
    assert session.passed_over == {"skipped": [], "left_out": {".heic": 1, ".psd": 1}}
    with pytest.raises(typer.Exit) as stop:
        session.finish(1)
    assert stop.value.exit_code == EXIT_SKIPPED
    del session.left_out[".heic"]
    session.finish(1)  # nothing that an extra would read: all is well
    assert left_out(tmp_path, None) == {".heic": 1, ".psd": 1}  # what `train` counts


def test_a_larger_limit_is_advised_where_there_is_an_option_for_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for options, advised in ((frozenset({"max_pixels"}), True), (frozenset(), False)):
        session = Session()
        session.of_verb = options
        session.skip("a.png", TooManyPixels("a.png is too large: shrink it"))
        assert ("or raise --max-pixels" in capsys.readouterr().err) is advised


def test_a_sidecar_is_read_of_the_model_that_was_named_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / SIDECAR).write_text('{"name": "here"}')
    (tmp_path / "plain").mkdir()
    (tmp_path / "weights.safetensors").touch()
    assert read_sidecar(DEFAULT_MODEL)["name"] != "here"
    assert read_sidecar("somebody") == read_sidecar("plain") == read_sidecar(str(tmp_path / "plain")) == {}
    assert read_sidecar(".") == read_sidecar("weights.safetensors") == {"name": "here"}


def test_a_model_too_large_for_a_gpu_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("latentvae.models.spaces.load_autoencoder", refuse)
    monkeypatch.setattr("latentvae.models.loading.load", refuse)
    for arguments in (["agree", "a", "b"], ["reconstruct"]):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--device", "cpu"])
        assert stop.value.code == 2
        assert "does not fit on cpu: CUDA out of memory" in capsys.readouterr().err
