"""One folder with everything in it, through the verbs that take folders: no file goes unmentioned."""

import json
import logging
from pathlib import Path

import numpy as np
import OpenImageIO as oiio
import pillow_heif
import pillow_jxl  # noqa: F401  (Pillow writes JPEG XL with it)
import pytest
import tifffile
import torch
from conftest import textured
from image_files import dng
from PIL import Image
from training_runs import records

import latentvae
from latentvae.cli.main import main
from latentvae.images import kinds

READ = ("a.jpg", "b.heic", "c.jxl", "d.mpo", "e.exr", "g.png", "i.tif", "k.dng")
BROKEN, LEFT_OUT = "h.jpg", {".mp3": 1, ".psd": 1}
EXTRAS = ("b.heic", "c.jxl", "e.exr", "k.dng")  # that an extra reads
SIDE = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    latentvae.build("tiny").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    pictures = [Image.fromarray(textured(SIDE, SIDE, number)) for number in range(9)]
    pictures[0].save(folder / "a.jpg")
    heif = pillow_heif.from_pillow(pictures[1])
    heif.save(folder / "b.heic")
    pictures[2].save(folder / "c.jxl")
    pictures[3].save(folder / "d.mpo", save_all=True, append_images=[pictures[4]])
    light = oiio.ImageOutput.create(str(folder / "e.exr"))
    light.open(str(folder / "e.exr"), oiio.ImageSpec(SIDE, SIDE, 3, "half"))
    light.write_image(np.asarray(pictures[5], dtype=np.float32) / 255)
    light.close()
    (folder / "f.psd").write_bytes(b"8BPS\0\1" + bytes(64))
    pictures[6].save(folder / "g.png")
    (folder / "h.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    tifffile.imwrite(folder / "i.tif", np.asarray(pictures[8]).astype(np.uint16) * 257, photometric="rgb")
    dng(folder / "k.dng", SIDE)
    (folder / "a.txt").write_text("a caption")
    (folder / "j.mp3").write_bytes(b"ID3\4\0\0\0\0\0\0")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict, str]:
    """A verb's exit code, what it tells as JSON, and what it says on standard error."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), json.loads(out), err


def names(rows: list[dict], key: str) -> list[str]:
    return sorted(Path(row[key]).name for row in rows)


def test_encode_counts_every_file(mixed: Path, model: Path, tmp_path: Path, capsys):
    code, told, err = run(capsys, "encode", mixed, tmp_path / "store", "-m", model)
    assert (code, told["images"], told["encoded"], told["left_out"]) == (
        3,
        len(READ),
        len(READ) + 1,
        LEFT_OUT,
    )
    assert names(told["failures"], "key") == [BROKEN]
    assert "left out: 1 .mp3, 1 .psd" in err
    assert f"{mixed / BROKEN} cannot be read as JPEG" in err


@pytest.mark.parametrize("verb", ["reconstruct", "evaluate", "project"])
def test_verbs_that_show_or_measure_count_every_file(mixed: Path, model: Path, tmp_path: Path, capsys, verb):
    output = () if verb == "evaluate" else ("-o", tmp_path / "out")
    code, told, err = run(capsys, verb, mixed, "-m", model, *output)
    done = told["images"] if verb == "project" else len(told["images"])
    assert (code, done, told["left_out"]) == (3, len(READ), LEFT_OUT)
    assert names(told["skipped"], "path") == [BROKEN]
    assert "left out: 1 .mp3, 1 .psd" in err
    assert f"{mixed / BROKEN} cannot be read as JPEG" in err
    assert f"1 of {len(READ) + 1} images was skipped" in err
    if verb == "reconstruct":
        written = names(told["files"], "reconstruction")
        assert written == [f"{name}.reconstruction.png" for name in READ]
    if verb != "project":
        assert names(told["images"], "name") == list(READ)


def test_train_counts_every_file(mixed: Path, tmp_path: Path, capsys, caplog):
    settings = {
        "data.train": mixed,
        "output": tmp_path / "run",
        "data.val_images": 1,
        "data.val_size": SIDE,
        "train.max_steps": 2,
        "train.log_every": 1,
        "train.batch_size": len(READ),  # so that every image is asked for
    }
    with caplog.at_level(logging.INFO):
        code, told, err = run(
            capsys, "train", "-c", "tiny", *(f"--set={key}={value}" for key, value in settings.items())
        )
    assert (code, told["left_out"]) == (0, LEFT_OUT)
    assert "left out: 1 .mp3, 1 .psd" in err
    said = [record.getMessage() for record in caplog.records]
    assert any(f"{len(READ)} images to train on, 1 held out" in line for line in said)  # the broken one too
    named = f"{mixed / BROKEN} cannot be read as JPEG"
    assert sum(line.startswith(f"training image passed over: {named}") for line in said) == 1
    counts = [line["skipped_images"] for line in records(tmp_path / "run") if "skipped_images" in line]
    assert counts[-1] >= 1


def test_without_the_extras_their_files_are_named_with_the_remedy(
    mixed: Path, model: Path, capsys, monkeypatch
):
    monkeypatch.setattr(kinds, "optional", lambda module: None)
    monkeypatch.delitem(Image.OPEN, "JXL")  # which this file's import has registered
    code, told, err = run(capsys, "evaluate", mixed, "-m", model)
    assert code == 3
    assert len(told["images"]) == len(READ) - len(EXTRAS)
    assert told["left_out"] == LEFT_OUT | {Path(name).suffix: 1 for name in EXTRAS}
    for module in ("pillow_heif", "pillow_jxl", "OpenImageIO", "rawpy"):
        assert kinds.remedy(module) in err
