"""The pages of docs/how-to: all of their commands and Python run, on tiny models and images."""

import io
import re
import shlex
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import textured
from PIL import Image

import latentvae
from latentvae.cli.main import main
from latentvae.measure.lpips import WEIGHTS_ENV
from latentvae.store.dataset import LatentDataset

PAGES = Path(__file__).parents[1] / "docs" / "how-to"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, on a machine without LPIPS weights."""
    monkeypatch.delenv(WEIGHTS_ENV, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def follow(page: str) -> dict[str, Any]:
    """Run a page from top to bottom; returns the names that its Python has made."""
    names: dict[str, Any] = {}
    text = (PAGES / page).read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if language == "python":
            exec(block, names)
            continue
        for line in block.splitlines():
            verb, *arguments = shlex.split(line)
            if verb == "latentvae":
                with pytest.raises(SystemExit) as ended:
                    main(arguments)
                assert not ended.value.code, line
            else:
                subprocess.run(line, shell=True, check=True)
    return names


def save_photos(folder: Path, *sizes: tuple[int, int]) -> None:
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        Image.fromarray(textured(*size, number)).save(folder / f"{'abcdef'[number]}.jpg")


def test_sdxl_latents(here: Path) -> None:
    torch.manual_seed(0)
    latentvae.build("tiny", scaling_factor=0.13025).save_pretrained("path/to/sdxl-vae")
    save_photos(here / "photos", (64, 64), (64, 64), (128, 64))
    (here / "photos" / "a.txt").write_text("a grating")
    names = follow("sdxl-latents.md")
    assert names["latents"].shape[1] == 4
    entries = [names["dataset"].entry(number) for number in range(3)]
    assert [(entry.resized, entry.encoded_width) for entry in entries] == [
        (None, 64),
        (None, 64),
        (None, 128),
    ]
    assert len(list((here / "pictures").iterdir())) == 3


def test_compress_photos(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_photos(here / "photos", (45, 37), (64, 40))
    save_photos(here / "photos" / "sub", (32, 32))
    follow("compress-photos.md")
    said = capsys.readouterr().out
    assert "3 files in small, " in said
    assert re.search(r"model +f8c4-small", said)
    assert [Image.open(here / "back" / f"{key}.jpg.png").size for key in ("a", "b", "sub/a")] == [
        (45, 37),
        (64, 40),
        (32, 32),
    ]


def test_tars(here: Path) -> None:
    (here / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(here / "shards" / f"{shard:06d}.tar", "w") as tar:
            picture = io.BytesIO()
            Image.fromarray(textured(64, 64, shard)).save(picture, "JPEG")
            for name, data in ((f"{shard}.jpg", picture.getvalue()), (f"{shard}.txt", b"waves")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    follow("tars.md")
    dataset = LatentDataset("latents")
    assert [dataset.entry(number).key for number in range(2)] == ["000000/0.jpg", "000001/1.jpg"]
    assert dataset[1]["caption"] == "waves"
    assert (here / "latent-shards" / "latents-000000.tar").is_file()


@pytest.mark.slow
def test_sd15(here: Path) -> None:
    from pipelines import CASES  # it loads every pipeline of diffusers

    pipe = CASES["StableDiffusion"].make()
    latentvae.swap(pipe, "sd-small", allow_new_latent_space=True)
    pipe.save_pretrained(here / "path/to/sd")
    save_photos(here / "photos", (96, 96))
    names = follow("sd15.md")
    assert names["image"].shape[1] == 3
    assert Image.open("cat.png").size == Image.open("cat-by-sd.png").size


def test_every_page_is_followed() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    assert not [page.name for page in PAGES.glob("*.md") if page.name not in tests]
