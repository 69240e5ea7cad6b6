"""What people name on the command line, and what lies beside it: none is taken wrongly or left out unsaid."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import textured
from PIL import Image

import latentvae
from latentvae.base.files import portable
from latentvae.cli.decode import picture_name
from latentvae.cli.main import main
from latentvae.store.format import read_entries


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    def command(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return Result(int(stop.value.code or 0), *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    latentvae.build("tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("a.png", "b.png")):
        Image.fromarray(textured(32, 32, number)).save(folder / name)
    return folder


def test_captions_that_are_left_out_are_counted_and_named(run, model: Path, photos: Path, tmp_path: Path):
    (photos / "a.txt").write_bytes("девочка".encode("windows-1251"))
    (photos / "B.TXT").write_bytes("naïve".encode("latin-1"))
    (photos / "c.txt").write_text("of no image")
    for _ in range(2):  # the second run encodes nothing, and says the same
        result = run("encode", photos, tmp_path / "store", "-m", model)
        assert result.code == 0
        assert "caption: a.png: caption a.txt left out: no text in utf-8" in result.err
        assert "caption: b.png: caption B.TXT read as windows-1252" in result.err
        assert f"caption of no image: {photos / 'c.txt'}" in result.err
        assert "1 caption left out, as named above." in result.out
    report = json.loads(run("encode", photos, tmp_path / "store", "-m", model, "--json").out)
    assert [note.partition(" ")[0] for note in report["captions"]] == ["a.png:", "b.png:"]
    assert report["unclaimed"] == [str(photos / "c.txt")]


# --- addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("encode", "PHOTOS", "s3://bucket/x", "--finish"),
        ("reconstruct", "PHOTOS", "-m", "MODEL", "-o", "s3://bucket/x"),
        ("evaluate", "s3://bucket/x"),
        ("evaluate", "PHOTOS", "-m", "s3://bucket/x"),
        ("evaluate", "PHOTOS", "-m", "s3://bucket/x.safetensors"),
        ("decode", "s3://bucket/x", "out"),
        ("export", "MODEL", "-o", "s3://bucket/x"),
        ("train", "-c", "tiny", "--set", "data.train=PHOTOS", "--set", "output=s3://bucket/x"),
    ],
)
def test_an_address_is_named_as_it_came_and_nothing_is_made(
    run, arguments, model: Path, photos: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {"PHOTOS": str(photos), "MODEL": str(model), "data.train=PHOTOS": f"data.train={photos}"}
    result = run(*(places.get(each, each) for each in arguments))
    assert result.code == 2
    assert "s3://bucket/x" in result.err
    assert "is an address" in result.err
    assert not Path("s3:").exists()


@pytest.mark.parametrize("verb", ["encode", "train"])
def test_a_source_at_an_address_of_no_known_kind_is_named_as_it_came(
    run, model: Path, tmp_path: Path, monkeypatch, verb: str
):
    monkeypatch.chdir(tmp_path)
    train = ("-c", "tiny", "--set", "data.train=odd://bucket/x.tar")
    result = run(verb, *(train if verb == "train" else ("odd://bucket/x.tar", "store", "-m", model)))
    assert result.code == 2
    assert "odd://bucket/x.tar cannot be read: odd:// is no kind of address" in result.err
    assert not list(tmp_path.glob("odd*")) + list(tmp_path.glob("store"))


def test_a_folder_with_a_colon_in_its_name_is_no_address(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s3:/bucket").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("s3:/bucket/a.png")
    assert latentvae.find_images("s3:/bucket") == [Path("s3:/bucket/a.png")]


# --- said before, and by the exit code ---------------------------------------------------------------------


def test_agree_has_an_exit_code_for_no(run, model: Path, photos: Path, tmp_path: Path):
    torch.manual_seed(5)
    latentvae.build("tiny").save_pretrained(tmp_path / "other")
    (photos / "c.png").write_bytes(b"broken")
    result = run("agree", model, tmp_path / "other", photos, "-o", tmp_path / "out")
    assert result.code == 6
    assert "cannot use B" in result.out
    assert "1 of 3 images was skipped" in result.err
    assert run("agree", model, model, photos / "a.png", "-o", tmp_path / "out").code == 0


def test_evaluate_says_before_it_measures_that_rfid_will_be_missing(run, photos: Path, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = run("evaluate", photos, "--rfid", "-m", "no-such-model")
    assert result.err.index("rFID will not be measured") < result.err.index("no-such-model")


# --- order and number ------------------------------------------------------------------------------------


def test_a_way_that_comes_back_keeps_its_last_image(run, model: Path, photos: Path, tmp_path: Path):
    a, b = photos / "a.png", photos / "b.png"
    way = run("interpolate", a, b, a, "-m", model, "-n", 2, "-o", tmp_path / "out", "--json")
    result = json.loads(way.out)
    assert result["images"] == [str(a), str(b), str(a)]
    assert result["routes"][0]["positions"] == [0, 1, 2]
    assert run("interpolate", a, a, "-m", model, "-o", tmp_path / "out").code == 2  # no way at all


def test_one_image_is_no_plural(run, model: Path, photos: Path, tmp_path: Path):
    assert "1 image in " in run("encode", photos / "a.png", tmp_path / "store", "-m", model).out
    assert "1 image in 1 shard: whole." in run("verify", tmp_path / "store").out
    assert "1 picture in" in run("decode", tmp_path / "store", tmp_path / "out", "-m", model).out


# --- what the system says ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["reconstruct", "decode"])
def test_a_full_disk_ends_the_run_and_is_no_picture_that_was_skipped(
    run, verb, model: Path, photos: Path, tmp_path: Path, monkeypatch
):
    source = photos
    if verb == "decode":
        source = tmp_path / "store"
        assert run("encode", photos, source, "-m", model).code == 0
    save = Image.Image.save

    def fill(self: Image.Image, path: Path, *args: object, **options: object) -> None:
        if self.width > 32 or verb == "decode":  # the comparison does not fit
            raise OSError(28, "No space left on device")
        save(self, path, *args, **options)

    monkeypatch.setattr(Image.Image, "save", fill)
    output = ("-o", tmp_path / "out") if verb == "reconstruct" else (tmp_path / "out",)
    result = run(verb, source, *output, "-m", model)
    assert result.code == 2
    assert "cannot be written (No space left on device)" in result.err
    assert "skipped" not in result.err


def deep(folder: Path, name: str, content: bytes) -> Path:
    """A file whose path is longer than the system opens, made step by step."""
    place = os.open(folder, os.O_RDONLY)
    path = folder
    while len(os.fsencode(path / name)) <= 4096:
        os.mkdir("d" * 200, dir_fd=place)
        place, before = os.open("d" * 200, os.O_RDONLY, dir_fd=place), place
        os.close(before)
        path /= "d" * 200
    with os.fdopen(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=place), "wb") as file:
        file.write(content)
    os.close(place)
    return path / name


@pytest.mark.skipif(sys.platform != "linux", reason="PATH_MAX is 4096 on Linux")
@pytest.mark.parametrize("name", ["far.png", f"{'f' * 240}.png"])  # in a folder that is too long too, or not
def test_a_path_that_is_too_long_is_named_and_the_rest_is_done(
    run, name, model: Path, photos: Path, tmp_path: Path
):
    deep(photos, name, b"")
    result = run("encode", photos, tmp_path / "store", "-m", model)
    assert result.code == 3
    assert "cannot be read: File name too long" in result.err
    assert "2 images in " in result.out
    assert run("evaluate", photos, "-m", model).code == 3


def test_a_file_that_was_replaced_at_the_same_size_and_time_is_found(run, model, photos, tmp_path):
    store = tmp_path / "store"
    Image.fromarray(textured(32, 32, 0)).save(photos / "a.bmp")
    assert run("encode", photos, store, "-m", model).code == 0
    assert run("verify", store, "--sources").code == 0
    picture = photos / "a.bmp"  # of one size whatever it shows
    state = picture.stat()
    Image.fromarray(textured(32, 32, 9)).save(picture)
    os.utime(picture, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert run("verify", store).code == 0
    found = run("verify", store, "--sources")
    assert found.code == 2
    assert f"a.bmp: {picture} is not the file that was encoded" in found.err
    report = run("verify", store, "--sources", "--json")
    assert len(json.loads(report.out)["sources"]) == 1
    assert json.loads(run("encode", photos, store, "-m", model, "--json").out)["encoded"] == 0
    assert json.loads(run("encode", photos, store, "-m", model, "--rehash", "--json").out)["encoded"] > 0
    assert run("verify", store, "--sources").code == 0
    picture.unlink()
    assert "cannot be read (No such file or directory)" in run("verify", store, "--sources").err


def test_small_images_keep_their_size_where_that_is_asked(run, model: Path, tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, size in {"large": (400, 300), "small": (150, 100), "tiny": (20, 9)}.items():
        Image.fromarray(textured(*size, 0)).save(photos / f"{name}.png")
    store = tmp_path / "store"
    assert run("encode", photos, store, "-m", model, "--size", 256, "--no-upscale").code == 0
    entries = {each.key: each for each in read_entries(store, "latents-00000")}
    found = {key: (each.encoded_width, each.encoded_height) for key, each in entries.items()}
    assert found == {"large.png": (288, 224), "small.png": (128, 64), "tiny.png": (16, 8)}
    assert entries["small.png"].cropped == (11, 18, 128, 64)
    assert entries["small.png"].resized is None
    assert run("encode", photos, store, "-m", model, "--size", 256).code == 2  # another store
    for options in ((), ("--size", 64, "--crop")):
        assert run("encode", photos, tmp_path / "new", "-m", model, "--no-upscale", *options).code == 2


def test_names_are_text_that_no_locale_changes(monkeypatch: pytest.MonkeyPatch):
    names = {"é猫.png": "é猫.png", "caf\udce9.png": "caf\udce9.png", "\udcc3\udca9.png": "é.png"}
    assert {name: portable(name) for name in names} == names  # the last as an ASCII locale has it
    monkeypatch.setattr(os, "fsdecode", lambda data: data.decode("ascii", "surrogateescape"))
    assert picture_name("é.png") == Path("\udcc3\udca9.png.png")


@pytest.mark.slow  # four processes
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one encoding for names")
def test_keys_are_the_same_in_any_locale(model: Path, photos: Path, tmp_path: Path):
    (photos / "a.png").rename(photos / "é猫.png")
    (photos / "b.png").rename(photos / os.fsdecode(b"caf\xe9.png"))
    line = json.dumps({"file_name": "é猫.png", "text": "cat"})
    (photos / "metadata.jsonl").write_text(line, encoding="utf-8")

    def command(*arguments: object, **environment: str) -> None:
        line = [sys.executable, "-m", "latentvae", *map(str, arguments), "-m", str(model)]
        done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()

    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name, environment in (("utf8", {"PYTHONUTF8": "1"}), ("plain", plain)):
        command("encode", photos, tmp_path / name, **environment)
    same = [(tmp_path / name / "latents-00000.jsonl").read_bytes() for name in ("utf8", "plain")]
    assert same[0] == same[1]
    entries = {each.key: each.caption for each in read_entries(tmp_path / "plain", "latents-00000")}
    assert entries == {"é猫.png": {"text": "cat"}, "caf\udce9.png": None}
    command("decode", tmp_path / "utf8", tmp_path / "out", **plain)
    names = sorted(os.fsencode(path.name) for path in (tmp_path / "out").iterdir())
    assert names == [b"caf\xe9.png.png", "é猫.png.png".encode()]
