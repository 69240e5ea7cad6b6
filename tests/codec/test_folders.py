"""`compress` and `decompress` of folders: one model, a table, and what is there is kept."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import textured
from PIL import Image

import latentvae
from latentvae.base.errors import CodecError
from latentvae.cli.main import main
from latentvae.cli.session import Session
from latentvae.codec.rivals import best_within, size_at

Command = Callable[..., tuple[int, dict, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run a verb with --json and the tiny model; returns exit code, object and standard error."""
    torch.manual_seed(0)
    latentvae.build("tiny", scaling_factor=2.0).save_pretrained(tmp_path / "model")

    def call(*arguments: object) -> tuple[int, dict, str]:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments), "--model", str(tmp_path / "model"), "--json"])
        said = capsys.readouterr()
        return int(stop.value.code or 0), json.loads(said.out), said.err

    return call


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number, (name, size) in enumerate(
        {"a.png": (45, 37), "a.jpg": (64, 40), "sub/b.png": (32, 32)}.items()
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(textured(*size, number)).save(path)
    return tmp_path / "photos"


def test_the_bundled_model_that_made_a_file_is_found(
    capsys: pytest.CaptureFixture[str], photos: Path
) -> None:
    """Nobody need remember it: the default model made none of these."""
    small, back = photos.parent / "small", photos.parent / "back"

    def call(*arguments: object) -> int:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments), "--json"])
        return int(stop.value.code or 0)

    (name,) = (name for name in latentvae.bundled() if name == "sd-small")
    assert call("compress", photos, small, "--model", name, "--no-compare") == 0
    (small / "a.jpg.lvae").write_bytes(b"damaged")  # the first of them: the next one says whose they are
    assert call("decompress", small, back) == 3
    assert Image.open(back / "a.png.png").size == (45, 37)
    assert call("decompress", small / "a.png.lvae", back / "one.png") == 0
    assert call("decompress", small / "a.png.lvae", back / "two.png", "--model", "f8c4-small") == 2
    assert "the bundled sd-small" in capsys.readouterr().out


def test_a_folder_goes_there_and_back_and_is_resumed(run: Command, photos: Path, tmp_path: Path) -> None:
    small, back = tmp_path / "small", tmp_path / "back"
    code, said, _ = run("compress", photos, small)
    assert code == 0
    names = ["a.jpg.lvae", "a.png.lvae", "sub/b.png.lvae"]
    assert [file["file"] for file in said["files"]] == [str(small / name) for name in names]
    assert said["bytes"] == sum((small / name).stat().st_size for name in names)
    before = (small / "a.jpg.lvae").stat().st_mtime_ns
    (small / "a.png.lvae").unlink()
    code, said, _ = run("compress", photos, small)
    assert (code, said["kept"], len(said["files"])) == (0, 2, 1)
    assert (small / "a.jpg.lvae").stat().st_mtime_ns == before
    code, said, _ = run("decompress", small, back)
    assert (code, len(said["files"])) == (0, 3)
    sizes = {name: Image.open(back / f"{name}.png").size for name in ("a.jpg", "a.png", "sub/b.png")}
    assert sizes == {"a.jpg": (64, 40), "a.png": (45, 37), "sub/b.png": (32, 32)}
    code, said, _ = run("decompress", small, back)
    assert (code, said["kept"], said["files"]) == (0, 3, [])


def test_other_files_in_the_way_are_refused_before_anything_is_written(
    run: Command, photos: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    assert run("compress", photos / "a.png", small.with_suffix(".lvae"))[0] == 0
    code, said, _ = run("compress", photos / "a.png", small.with_suffix(".lvae"))
    assert code == 2
    assert "already there" in said["error"]
    assert run("compress", photos / "a.png", small.with_suffix(".lvae"), "--overwrite")[0] == 0
    assert run("compress", photos, small)[0] == 0
    (small / "sub" / "b.png.lvae").unlink()
    code, said, _ = run("compress", photos, small, "--quality", 80)
    assert code == 2
    assert "2 files already there" in said["error"]
    assert not (small / "sub" / "b.png.lvae").exists()
    assert run("compress", photos, small, "--quality", 80, "--overwrite")[1]["kept"] == 0
    later = time.time_ns() + 10**9
    os.utime(photos / "a.png", ns=(later, later))  # the photograph has changed since
    assert "1 file already there" in run("compress", photos, small, "--quality", 80)[1]["error"]


def test_what_cannot_be_used_is_skipped_and_the_rest_done(run: Command, photos: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    (photos / "broken.png").write_bytes(b"broken")
    code, said, _ = run("compress", photos, small)
    assert (code, len(said["files"]), len(said["skipped"])) == (3, 3, 1)
    (small / "a.png.lvae").write_bytes(b"LVAE")
    code, said, error = run("decompress", small, tmp_path / "back")
    assert (code, len(said["files"])) == (3, 2)
    assert "cut off in its header" in error
    (small / "a.PNG.LVAE").write_bytes(b"LVAE")
    (small / "a.PNG.lvae").write_bytes(b"LVAE")
    assert "would both become" in run("decompress", small, tmp_path / "back")[1]["error"]
    (tmp_path / "empty").mkdir()
    assert run("decompress", tmp_path / "empty", tmp_path / "back")[0] == 2
    assert run("compress", photos, photos / "a.png")[0] == 2


class Difference(torch.nn.Module):
    """Stands for LPIPS: the mean absolute difference."""

    net, min_size = "squeeze", 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
        return (images - reconstructions).abs().mean((1, 2, 3))


def test_jpeg_and_webp_stand_beside_at_equal_lpips(
    run: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "find_lpips", lambda self: (Difference(), None))
    _, said, _ = run("compress", photos, tmp_path / "small")
    for file in said["files"]:
        assert file["lpips"] > 0
        assert set(file["at_equal_lpips"]) == {"JPEG", "WEBP"}
        assert all(size is None or size > 50 for size in file["at_equal_lpips"].values())
    assert "at_equal_lpips" not in run("compress", photos, tmp_path / "other", "--no-compare")[1]["files"][0]
    one = run("compress", photos / "a.png", tmp_path / "a.lvae", "--compare")[1]
    assert one["at_equal_lpips"] == said["files"][1]["at_equal_lpips"]
    with pytest.raises(SystemExit):
        main(["compress", str(photos), str(tmp_path / "third"), "-m", str(tmp_path / "model")])


def test_without_lpips_it_is_said_that_jpeg_and_webp_are_left_out(
    run: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "find_lpips", lambda self: (None, "no weights."))
    for option, said_of in (("--compare", True), ("--no-compare", False)):
        (note,) = run("compress", photos, tmp_path / f"without{option}", option)[1]["notes"]
        assert ("JPEG and WebP" in note) is said_of


def test_the_smallest_file_that_is_near_enough_is_found() -> None:
    picture = Image.fromarray(textured(64, 64, 0))
    sizes: list[int] = []

    def distance(data: bytes) -> float:
        sizes.append(len(data))
        return 1e3 / len(data)

    found = size_at(picture, "JPEG", distance, 1.0)
    assert found is not None
    assert found >= 1000
    assert len(sizes) <= 7
    assert found == min(size for size in sizes if size >= 1000)
    assert size_at(picture, "JPEG", distance, 1e-9) is None
    assert size_at(Image.new("L", (17000, 1)), "WEBP", distance, 1.0) is None  # WebP ends at 16,383 pixels


def test_what_cannot_be_written_within_a_size_is_said() -> None:
    with pytest.raises(CodecError, match="17000x1 px cannot be written as WebP"):
        best_within(Image.new("L", (17000, 1)), "WebP", 1000)
    with pytest.raises(CodecError, match="'WEBP' came; wanted one of JPEG, WebP"):
        best_within(Image.new("L", (16, 16)), "WEBP", 1000)
