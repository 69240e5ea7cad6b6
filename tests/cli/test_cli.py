"""The command line: files, tables, JSON and exit codes."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import typer
from conftest import textured
from PIL import Image
from safetensors.torch import load_file, save_file

import latentvae
from latentvae.cli.main import VERBS, load_verb, main
from latentvae.images.reading import load_image
from latentvae.measure.lpips import WEIGHTS_ENV
from latentvae.measure.metrics import psnr
from latentvae.models.exporting import export
from latentvae.models.latents import compute_latent_statistics

ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> dict:
        """The one JSON object that is all of standard output."""
        assert self.out.count("\n") == 1
        return json.loads(self.out)


Command = Callable[..., Result]


@pytest.fixture
def latentvae_command(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> Command:
    """Run `latentvae ...` in this process, in an empty folder, without this machine's LPIPS weights."""
    monkeypatch.delenv(WEIGHTS_ENV, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(stop.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny untrained model."""
    torch.manual_seed(0)
    return export(latentvae.build("tiny", scaling_factor=0.5), tmp_path_factory.mktemp("model") / "tiny")


def write_picture(path: Path, seed: int, width: int = 45, height: int = 37) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:height, :width]
    waves = (128 + 100 * np.sin(x / 7 + seed), 128 + 90 * np.cos((x + y) / 9 + seed), 2 * x + y + seed)
    Image.fromarray(np.stack(waves, -1).clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """a.jpg, a.png and sub/b.png, of sizes that no compression ratio divides."""
    write_picture(tmp_path / "pictures" / "a.jpg", 1)
    write_picture(tmp_path / "pictures" / "a.png", 2, 50, 41)
    write_picture(tmp_path / "pictures" / "sub" / "b.png", 3)
    return tmp_path / "pictures"


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def rows(table: str) -> dict[str, list[str]]:
    """The figures of a table by the name in the first column."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 3}


def test_a_bright_picture_is_not_taken_for_one_of_another_scale(tmp_path, model, latentvae_command, recwarn):
    levels = np.linspace(130, 255, 32 * 32, dtype=np.uint8).reshape(32, 32)
    Image.fromarray(levels).save(tmp_path / "snow.png")
    done = latentvae_command("reconstruct", tmp_path / "snow.png", "-m", model, "-o", tmp_path / "out")
    assert done.code == 0
    assert [each for each in recwarn if "wanted [-1, 1]" in str(each.message)] == []


# --- reconstruct -------------------------------------------------------------------------------------------


def test_reconstruct_writes_the_reconstruction_at_the_originals_size_and_a_comparison(
    latentvae_command, model, pictures, tmp_path
):
    result = latentvae_command("reconstruct", pictures / "a.png", "--model", model, "--output", "out")
    assert result.code == 0
    assert files_in(Path("out")) == ["a.png.comparison.png", "a.png.reconstruction.png"]
    with Image.open("out/a.png.reconstruction.png") as picture:
        assert picture.size == (50, 41)
    with Image.open("out/a.png.comparison.png") as picture:
        assert picture.width > 3 * 50


def test_the_table_holds_the_figures_of_the_files_that_were_written(latentvae_command, model, pictures):
    result = latentvae_command("reconstruct", pictures, "--model", model, "--output", "out")
    table = rows(result.out)
    measured = {}
    for name in ("a.jpg", "a.png", "sub/b.png"):
        original = load_image(pictures / name)[None]
        written = load_image(Path("out") / f"{name}.reconstruction.png")[None]
        measured[name] = float(psnr(original, written))
        assert table[name][0] == f"{original.shape[-1]}x{original.shape[-2]}"
        assert table[name][1] == f"{measured[name]:.2f}"
    assert table["mean of 3"][0] == f"{np.mean(list(measured.values())):.2f}"
    assert table["image"] == ["size", "PSNR dB", "SSIM", "LPIPS", "bpp (KL)"]
    assert "a.jpg.comparison.png" in result.out  # where to look


def test_a_folder_is_mirrored_and_suffixes_tell_files_apart(latentvae_command, model, pictures):
    assert latentvae_command("reconstruct", pictures, "-m", model, "-o", "out").code == 0
    assert files_in(Path("out")) == [
        f"{name}.{kind}.png"
        for name in ("a.jpg", "a.png", "sub/b.png")
        for kind in ("comparison", "reconstruction")
    ]


def test_files_of_one_name_from_several_folders_are_all_kept(latentvae_command, model, tmp_path):
    one = write_picture(tmp_path / "one" / "a.png", 1)
    two = write_picture(tmp_path / "two" / "a.png", 2, 50, 41)
    result = latentvae_command("reconstruct", one.parent, two.parent, "-m", model, "-o", "out", "--json")
    files = result.json()["files"]
    assert len({entry["reconstruction"] for entry in files}) == 2
    sizes = [Image.open(entry["reconstruction"]).size for entry in files]
    assert sizes == [(45, 37), (50, 41)]
    assert len({image["name"] for image in result.json()["images"]}) == 2
    again = latentvae_command("reconstruct", one, two, "-m", model, "-o", "again", "--json").json()
    assert len({entry["comparison"] for entry in again["files"]}) == 2


def test_without_a_path_the_sample_picture_is_reconstructed_here(latentvae_command, model):
    result = latentvae_command("reconstruct", "--model", model)
    assert result.code == 0
    assert files_in(Path("latentvae-output")) == [
        "chelsea.png.comparison.png",
        "chelsea.png.reconstruction.png",
    ]
    assert "chelsea.png" in rows(result.out)


def test_the_bundled_default_is_used_where_no_model_is_named(latentvae_command):
    if "f8c4-small" not in latentvae.bundled():
        result = latentvae_command("reconstruct")
        assert result.code == 2
        pytest.skip("no weights are bundled")
    result = latentvae_command("reconstruct", "--json")
    assert result.code == 0
    assert result.json()["mean"]["psnr"] > 25  # of the sample picture: it is trained


def test_what_was_done_to_a_picture_is_said(latentvae_command, model, tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 128)).save(tmp_path / "glass.png")
    result = latentvae_command("reconstruct", tmp_path / "glass.png", "-m", model)
    assert "glass.png: transparent pixels composited on white" in result.out


def test_a_sample_depends_on_the_seed_and_the_mode_does_not(latentvae_command, model, pictures):
    def pixels(*options: str) -> bytes:
        options = ("-m", model, "-o", "out", *options)
        assert latentvae_command("reconstruct", pictures / "a.png", *options).code == 0
        return Path("out/a.png.reconstruction.png").read_bytes()

    assert pixels("--sample", "--seed", "1") == pixels("--sample", "--seed", "1")
    assert pixels("--sample", "--seed", "1") != pixels("--sample", "--seed", "2")
    assert pixels("--seed", "1") == pixels("--seed", "2") != pixels("--sample")


def test_bfloat16_gives_nearly_the_same(latentvae_command, model, pictures):
    full, half = (
        latentvae_command(
            *("reconstruct", pictures / "a.png", "-m", model, "-o", precision),
            *("--precision", precision, "--json"),
        ).json()["images"][0]
        for precision in ("fp32", "bf16")
    )
    assert full["psnr"] == pytest.approx(half["psnr"], abs=0.2)
    images = [load_image(f"{name}/a.png.reconstruction.png") for name in ("fp32", "bf16")]
    assert 0 < (images[0] - images[1]).abs().mean() < 0.02


def test_large_pictures_say_their_time_first_and_are_computed_in_bf16_where_that_is_fast(
    latentvae_command, model, pictures, monkeypatch
):
    write_picture(pictures / "large.png", 7, 48, 48)
    monkeypatch.setattr("latentvae.cli.session.LARGE", 50 * 41)
    shown = {}
    for fast in (True, False):
        monkeypatch.setattr("latentvae.runtime.devices.has_fast_bfloat16", lambda device, fast=fast: fast)
        result = latentvae_command("reconstruct", pictures, "-m", model, "-o", f"fast-{fast}", "--json")
        assert result.code == 0
        assert re.search(r"large\.png: 0\.0 megapixels take at least .+ to encode and decode", result.err)
        assert "--size 2048" in result.err
        assert ("half precision" in result.err) == fast
        shown[fast] = {Path(entry["comparison"]).name: entry["notes"] for entry in result.json()["files"]}
    assert [name for name, notes in shown[True].items() if "bf16" in "".join(notes)] == [
        "large.png.comparison.png"
    ]
    assert "bf16" not in str(shown[False])
    # exactly, by name; and small enough that there is nothing to say
    exact = latentvae_command(
        *("reconstruct", pictures / "large.png", "-m", model, "-o", "exact", "--precision", "fp32")
    )
    assert "half precision" not in exact.err
    assert (Path("exact") / "large.png.reconstruction.png").read_bytes() == (
        Path("fast-False") / "large.png.reconstruction.png"
    ).read_bytes()
    result = latentvae_command(
        *("reconstruct", pictures / "large.png", "-m", model, "-o", "small", "--size", "16", "--json")
    )
    assert "megapixels" not in result.err
    assert result.json()["files"][0]["notes"] == ["shrunk from 48x48 px (--size)"]
    assert Image.open("small/large.png.reconstruction.png").size == (16, 16)


def test_a_scratch_folder_that_is_not_there_is_refused_before_the_model_is_loaded(
    latentvae_command, pictures
):
    result = latentvae_command("evaluate", pictures, "-m", "nowhere", "--scratch", "missing")
    assert result.code == 2
    assert "the scratch folder missing does not exist" in result.err


# --- bad input -------------------------------------------------------------------------------------------

# verb and arguments; what has to be in the message. `text` is a file of text, `store` and `photos` are right.
MISTAKES = [
    ("reconstruct text", "an image was wanted"),
    ("reconstruct photos -m text", "text is no model"),
    ("reconstruct photos --device gpu", "there is no device 'gpu': wanted cpu"),
    ("encode text store", "text"),
    ("encode photos text", "text cannot be made"),
    ("decode text out", "text is no complete store"),
    ("verify text", "text is no complete store"),
    ("info text", "text is no model"),
    ("shards text out", "text is no complete store"),
    ("hand-over text photos --to npz", "text is no complete store"),
    ("compress text out.lvae", "an image was wanted"),
    ("decompress text out.png", "text is no .lvae file"),
    ("sample text", "text is no prior"),
    ("prior fit text prior", "text"),
    ("interpolate text text", "an image was wanted"),
    ("vary text", "an image was wanted"),
    ("fill missing.png photos/a.png", "missing.png does not exist: name one image file"),
    ("fill photos/a.png photos", "photos is no file: name one image file"),
    ("project text", "an image was wanted"),
    ("features photos out.txt", "features are written as .npy or .parquet"),
    ("train --config text --set data.train=photos", "text"),
    ("train --config tiny --set data.train=missing", "missing"),
    ("export text out", "text is no model"),
    ("export sd-small photos", "photos is not empty and no earlier export"),
    ("convert text out.safetensors --to ldm", "text"),
    ("plan text 512", "text is no model"),
    ("doctor text", "text is no model"),
    ("agree sd-small text", "text"),
    ("diffusability text photos", "text is no model"),
    ("anomaly score text photos", "text"),
    ("anomaly fit text out.safetensors", "an image was wanted"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_named_and_ends_with_2(latentvae_command, pictures, monkeypatch, line, message):
    """Any other exception than ours would come out of the call here."""
    monkeypatch.chdir(pictures.parent)
    pictures.rename("photos")
    Path("text").write_text("hello\n")
    result = latentvae_command(*line.split())
    assert result.code == 2
    assert message in result.err
    assert "error: " in result.err


def test_every_verb_has_a_mistake_to_name():
    assert {line.split()[0] for line, _ in MISTAKES} | {"evaluate", "demo"} == set(
        VERBS
    )  # these have tests of their own


# --- JSON --------------------------------------------------------------------------------------------------


def test_json_is_one_object_with_figures_protocol_and_files(latentvae_command, model, pictures):
    result = latentvae_command("reconstruct", pictures, "-m", model, "-o", "out", "--json")
    assert result.code == 0
    report = result.json()
    assert [image["name"] for image in report["images"]] == ["a.jpg", "a.png", "sub/b.png"]
    assert report["mean"]["psnr"] == pytest.approx(np.mean([image["psnr"] for image in report["images"]]))
    assert report["protocol"]["latents"] == "mode"
    assert report["skipped"] == []
    assert all(Path(entry[kind]).is_file() for entry in report["files"] for kind in entry if kind != "notes")


@pytest.mark.parametrize("verb", ["reconstruct", "evaluate"])
def test_json_stays_one_object_where_images_are_skipped(latentvae_command, model, pictures, verb):
    (pictures / "broken.png").write_bytes(b"broken")
    result = latentvae_command(verb, pictures, "-m", model, "--json")
    assert result.code == 3
    (skipped,) = result.json()["skipped"]
    assert skipped["path"] == str(pictures / "broken.png")
    assert len(result.json()["images"]) == 3


@pytest.mark.parametrize("verb", ["reconstruct", "evaluate", "info", "export", "train"])
def test_json_is_one_object_that_says_what_was_wrong(latentvae_command, verb, pictures):
    arguments = {
        "reconstruct": (pictures, "--model", "nothing"),
        "evaluate": (pictures, "--model", "nothing"),
        "info": ("nothing",),
        "export": ("nothing",),
        "train": ("--config", "nothing"),
    }
    result = latentvae_command(verb, *arguments[verb], "--json")
    assert result.code == 2
    assert "nothing" in result.json()["error"]
    assert "nothing" in result.err


# --- evaluate ----------------------------------------------------------------------------------------------


def test_evaluate_gives_the_figures_of_reconstruct(latentvae_command, model, pictures):
    one = latentvae_command("reconstruct", pictures, "-m", model, "--json").json()
    two = latentvae_command("evaluate", pictures, "-m", model, "--json").json()
    assert two["mean"] == one["mean"]
    assert two["protocol"] == one["protocol"]
    assert [image["psnr"] for image in two["images"]] == [image["psnr"] for image in one["images"]]


def test_evaluate_prints_a_table_and_writes_nothing(latentvae_command, model, pictures):
    result = latentvae_command("evaluate", pictures / "a.png", pictures / "sub", "-m", model)
    assert result.code == 0
    table = rows(result.out)
    assert {"a.png", "b.png", "mean of 2"} <= table.keys()
    assert float(table["mean of 2"][0]) > 3
    assert files_in(Path()) == []


def test_evaluate_names_pictures_of_one_name_apart(latentvae_command, model, pictures):
    write_picture(pictures / "sub" / "a.png", 9)
    images = latentvae_command("evaluate", pictures, "-m", model, "--json").json()["images"]
    assert [image["name"] for image in images] == ["a.jpg", "a.png", "sub/a.png", "sub/b.png"]


def test_a_name_too_long_for_an_ending_is_cut(latentvae_command, model, tmp_path):
    long = tmp_path / f"{'é' * 120}.png"
    Image.fromarray(textured(32, 32, 1)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(long)
    result = latentvae_command("reconstruct", long, "--model", model, "-o", tmp_path / "out", "--json")
    assert result.code == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.slow
def test_names_that_are_not_utf_8_are_printed_all_the_same(model, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    Image.fromarray(textured(32, 32, 1)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / name)
    command = [sys.executable, "-m", "latentvae", "evaluate", str(tmp_path), "--model", str(model)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"caf\udce9.png" in done.stdout


def test_evaluate_says_which_latents_it_decoded(latentvae_command, model, pictures):
    results = [
        latentvae_command("evaluate", pictures / "a.png", "-m", model, "--json", *options).json()
        for options in ((), ("--sample",), ("--sample", "--seed", "5"))
    ]
    assert [result["protocol"]["latents"] for result in results] == ["mode", "sample", "sample"]
    assert len({result["mean"]["psnr"] for result in results}) == 3


def test_an_error_in_measuring_is_not_blamed_on_a_skipped_image(latentvae_command, model, pictures):
    """A model that gives NaN is what is wrong here, not the one picture that cannot be read."""
    tensors = load_file(model / "diffusion_pytorch_model.safetensors")
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] * float("nan")
    shutil.copytree(model, "broken")
    save_file(tensors, "broken/diffusion_pytorch_model.safetensors")
    (pictures / "0.png").write_bytes(b"broken")
    result = latentvae_command("evaluate", pictures, "-m", "broken")
    assert result.code == 2
    assert "nan" in result.err
    assert "none of the" not in result.err


# --- LPIPS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["reconstruct", "evaluate"])
def test_without_lpips_weights_the_column_is_empty_and_the_reason_given(
    latentvae_command, model, pictures, verb
):
    result = latentvae_command(verb, pictures / "a.png", "-m", model)
    assert result.code == 0
    table = rows(result.out)
    assert table["image"][3] == "LPIPS"
    assert table["a.png"][3] == "-"
    assert table["mean of 1"][2] == "-"
    assert "LPIPS was not measured: no weights for LPIPS 'alex'" in result.out
    assert WEIGHTS_ENV in result.out
    report = latentvae_command(verb, pictures / "a.png", "-m", model, "--json").json()
    assert report["mean"]["lpips"] is None
    assert WEIGHTS_ENV in report["protocol"]["lpips_missing_reason"]


@pytest.fixture
def squeeze(tmp_path: Path) -> Path:
    """A folder with random SqueezeNet features."""
    from torchvision import models

    (tmp_path / "lpips").mkdir()
    features = models.squeezenet1_1(weights=None).features.state_dict()
    save_file(features, tmp_path / "lpips" / "squeezenet1_1.safetensors")
    return tmp_path / "lpips"


def test_lpips_is_measured_with_weights_from_a_path_or_the_environment(
    latentvae_command, model, pictures, squeeze, monkeypatch
):
    net = ("--lpips-net", "squeeze")
    command = ("evaluate", pictures / "a.png", "-m", model, *net)
    given = latentvae_command(*command, "--lpips-weights", squeeze)
    assert given.code == 0
    table = rows(given.out)
    assert table["image"][3] == "LPIPS-squeeze"
    assert float(table["a.png"][3]) > 0
    monkeypatch.setenv(WEIGHTS_ENV, str(squeeze))
    assert rows(latentvae_command(*command).out) == table
    drawn = latentvae_command("reconstruct", *command[1:])
    assert rows(drawn.out) == table


def test_lpips_weights_that_were_named_and_are_not_there_are_an_error(latentvae_command, model, pictures):
    result = latentvae_command("evaluate", pictures, "-m", model, "--lpips-weights", "nowhere")
    assert result.code == 2
    assert "nowhere" in result.err


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["reconstruct", "evaluate"])
def test_a_missing_or_empty_folder_is_bad_input(latentvae_command, model, tmp_path, verb):
    missing = latentvae_command(verb, tmp_path / "nowhere", "-m", model)
    assert missing.code == 2
    assert "nowhere does not exist" in missing.err
    assert "Traceback" not in missing.err
    (tmp_path / "empty").mkdir()
    empty = latentvae_command(verb, tmp_path / "empty", "-m", model)
    assert empty.code == 2
    assert "no image in the folder" in empty.err
    assert missing.out == empty.out == ""
    assert files_in(Path()) == []


def test_an_unknown_model_is_bad_input_naming_the_nearest(latentvae_command, pictures):
    for command in (("reconstruct", pictures, "--model"), ("evaluate", pictures, "--model"), ("info",)):
        result = latentvae_command(*command, "f8c4-smal")
        assert result.code == 2
        assert "'f8c4-smal'" in result.err
        assert "Did you mean 'f8c4-small'?" in result.err
    assert not Path("latentvae-output").exists()


def test_a_checkpoint_that_is_no_autoencoderkl_is_bad_input(latentvae_command, pictures):
    Path("unet").mkdir()
    Path("unet/config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    save_file({"x": torch.zeros(1)}, "unet/diffusion_pytorch_model.safetensors")
    for command in (("reconstruct", pictures, "--model"), ("info",), ("export",)):
        result = latentvae_command(*command, "unet")
        assert result.code == 2
        assert "UNet2DConditionModel" in result.err
        assert "AutoencoderKL" in result.err


def test_pickled_weights_are_bad_input_and_never_opened(latentvae_command, pictures):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (Path("sprung"),))

    torch.save(Trap(), "model.ckpt")
    for command in (("reconstruct", pictures, "--model"), ("info",), ("export",)):
        result = latentvae_command(*command, "model.ckpt")
        assert result.code == 2
        assert "pickled" in result.err
        assert "safetensors" in result.err
    assert not Path("sprung").exists()


def test_a_model_whose_weights_are_cut_off_is_bad_input(latentvae_command, model, pictures):
    shutil.copytree(model, "cut")
    weights = Path("cut/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    result = latentvae_command("evaluate", pictures, "-m", "cut")
    assert result.code == 2
    assert weights.name in result.err


@pytest.mark.parametrize("verb", ["reconstruct", "export", "train"])
def test_an_output_below_a_file_is_bad_input(latentvae_command, model, pictures, verb):
    Path("file").write_text("mine")
    arguments = {
        "reconstruct": (pictures, "-m", model, "-o", "file/out"),
        "export": (model, "-o", "file/out"),
        "train": ("-c", "tiny", "--set", f"data.train={pictures}", "--set", "output=file/out"),
    }
    result = latentvae_command(verb, *arguments[verb])
    assert result.code == 2
    assert "file" in result.err
    assert "Traceback" not in result.err
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_bad_input(latentvae_command, model, pictures, device):
    result = latentvae_command("evaluate", pictures, "-m", model, "--device", device)
    assert result.code == 2
    assert device in result.err


def test_an_unknown_option_or_verb_is_bad_input(latentvae_command):
    for arguments in (("reconstruct", "--modle", "x"), ("reconstrct",), ("evaluate",)):
        result = latentvae_command(*arguments)
        assert result.code == 2
        assert result.out == ""


def test_info_takes_the_model_either_way_and_shows_channel_statistics(latentvae_command):
    one = latentvae_command("info", "f8c4-small", "--json")
    other = latentvae_command("info", "--model", "f8c4-small", "--json")
    assert one.out == other.out
    statistics = json.loads(one.out)["latent_statistics"]
    assert statistics["latents_mean"] == [0.0] * 4
    assert statistics["scaling_factor"] == json.loads(one.out)["config"]["scaling_factor"]
    assert len(statistics["latents_std"]) == 4


def test_one_corrupt_image_among_good_ones_is_named_and_the_rest_is_done(latentvae_command, model, pictures):
    (pictures / "0.png").write_bytes(b"broken")
    (pictures / "sub" / "half.png").write_bytes((pictures / "a.png").read_bytes()[:-100])
    result = latentvae_command("reconstruct", pictures, "-m", model, "-o", "out")
    assert result.code == 3
    assert len(files_in(Path("out"))) == 6
    assert "mean of 3" in rows(result.out)
    for name in ("0.png", "half.png"):
        (line,) = [line for line in result.err.splitlines() if name in line]
        assert line.removeprefix("\x1b[A").startswith("skipped: ")  # beside the bar
    assert "2 of 5 images were skipped" in result.err
    assert latentvae_command("evaluate", pictures, "-m", model).code == 3


def test_an_image_that_would_not_fit_even_in_tiles_is_skipped_with_all_figures(
    latentvae_command, model, pictures, monkeypatch
):
    monkeypatch.setattr("latentvae.runtime.memory.free_memory", lambda device: 20_000)
    result = latentvae_command("reconstruct", pictures, "-m", model, "-o", "out")
    assert result.code in (2, 3)
    pattern = r"would take about [\d.]+ GB, or [\d.]+ GB in tiles, and [\d.]+ GB are free: make it smaller"
    assert re.search(pattern, result.err)


def tiled_figures(latentvae_command, model, *options: object) -> tuple[dict, list[int]]:
    """The figures of a picture of 300 x 451 px, and the tile sizes that were chosen for it."""
    chosen = []
    real = latentvae.runtime.tiling.switch.enable_exact_tiling

    def spy(vae, tile_size, *others, **named):
        chosen.append(tile_size)
        return real(vae, tile_size, *others, **named)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("latentvae.runtime.tiling.switch.enable_exact_tiling", spy)
        result = latentvae_command("reconstruct", "-m", model, "-o", "out", "--json", *options)
    assert result.code == 0, result.err
    return result.json()["images"][0], chosen


def test_an_image_that_would_not_fit_is_tiled_with_the_same_figures(latentvae_command, model, monkeypatch):
    whole, chosen = tiled_figures(latentvae_command, model)
    assert chosen == []
    room = 5 * 16 * 4 * (300 * 451 - 1)  # five maps of 16 channels in float32, but for one pixel
    monkeypatch.setattr("latentvae.runtime.memory.free_memory", lambda device: room)
    tiled, chosen = tiled_figures(latentvae_command, model)
    assert len(chosen) == 1
    assert chosen[0] < 451
    for figure in ("psnr", "ssim"):
        assert tiled[figure] == pytest.approx(whole[figure], abs=1e-3)


def test_tiles_of_a_chosen_size_and_maps_in_files(latentvae_command, model, tmp_path):
    whole, _ = tiled_figures(latentvae_command, model)
    (tmp_path / "scratch").mkdir()
    options = ("--tile-size", "64", "--scratch", tmp_path / "scratch")
    tiled, chosen = tiled_figures(latentvae_command, model, *options)
    assert chosen == [64]
    assert tiled["psnr"] == pytest.approx(whole["psnr"], abs=1e-3)
    assert not list((tmp_path / "scratch").iterdir())


def test_a_model_that_overflows_skips_the_image_and_does_the_rest(latentvae_command, pictures):
    vae = latentvae.build("tiny")
    torch.nn.init.constant_(vae.decoder.conv_out.bias, float("nan"))
    save = Path("broken")
    vae.save_pretrained(save)
    result = latentvae_command("reconstruct", pictures, "-m", save, "-o", "out")
    assert result.code == 2
    assert "skipped: a.png: reconstructions" in result.err
    assert "nan or infinite values" in result.err


@pytest.mark.parametrize("verb", ["reconstruct", "evaluate"])
def test_only_corrupt_images_are_bad_input(latentvae_command, model, tmp_path, verb):
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"broken")
    result = latentvae_command(verb, tmp_path / "a.png", tmp_path / "b.jpg", "-m", model)
    assert result.code == 2
    assert result.out == ""
    assert "none of the 2 images could be read" in result.err
    assert "a.png" in result.err
    assert "b.jpg" in result.err


def test_a_model_of_other_channels_is_bad_input(latentvae_command, pictures):
    export(latentvae.build("tiny", in_channels=2, out_channels=2), "two")
    result = latentvae_command("evaluate", pictures, "-m", "two")
    assert result.code == 2
    assert "2 channels" in result.err


def test_a_model_of_one_channel_takes_pictures_as_luminance(latentvae_command, pictures):
    export(latentvae.build("tiny", in_channels=1, out_channels=1), "grey")
    assert latentvae_command("reconstruct", pictures / "a.png", "-m", "grey", "-o", "out").code == 0
    with Image.open("out/a.png.reconstruction.png") as picture:
        assert picture.mode == "L"


# --- info --------------------------------------------------------------------------------------------------


def test_info_says_what_a_model_is(latentvae_command, model):
    result = latentvae_command("info", model)
    assert result.code == 0
    count = sum(p.numel() for p in latentvae.build("tiny").parameters())
    lines = dict(
        re.split(r"\s{2,}", line, maxsplit=1) for line in result.out.splitlines() if "  " in line[1:]
    )
    assert lines["parameters"] == f"{count:,}"
    assert lines["compression"] == "8 x 8 pixels to one latent"
    assert lines["latent channels"] == "4"
    assert lines["scaling_factor"] == "0.5"
    assert "block_out_channels" in result.out


def test_info_as_json_is_one_object(latentvae_command, model):
    figures = latentvae_command("info", model, "--json").json()
    assert figures["spatial_compression_ratio"] == 8
    assert figures["config"]["scaling_factor"] == 0.5
    assert figures["parameters"] == figures["encoder_parameters"] + figures["decoder_parameters"]
    assert figures["bundled_models"] == latentvae.bundled()


# --- train and export --------------------------------------------------------------------------------------

FEW_STEPS = {
    "train.max_steps": 2,
    "train.save_every": 1,
    "train.validate_every": 1,
    "train.batch_size": 2,
    "train.precision": "fp32",
    "train.tracker": "none",
    "optim.warmup_steps": 0,
    "data.crop": 32,
    "data.val_size": 32,
    "data.val_images": 2,
    "data.workers": 0,
}


def settings(**values: object) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def photos(folder: Path, count: int = 6) -> Path:
    for number in range(count):
        write_picture(folder / f"{number}.png", number)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps; its photographs are beside it."""
    folder = tmp_path_factory.mktemp("trained")
    data = photos(folder / "photos")
    values = FEW_STEPS | {"data.train": data, "output": folder / "run"}
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", "tiny", *settings(**values)])
    assert not stop.value.code
    return folder / "run"


def test_train_from_a_recipe_ends_with_a_model_that_reconstructs(latentvae_command, trained, pictures):
    assert {"vae", "checkpoints", "config.yaml", "metrics.jsonl"} <= {p.name for p in trained.iterdir()}
    result = latentvae_command("reconstruct", pictures, "--model", trained / "vae")
    assert result.code == 0


def test_train_prints_where_the_export_is(latentvae_command, tmp_path):
    values = FEW_STEPS | {"data.train": photos(tmp_path / "photos"), "train.max_steps": 1}
    plain = latentvae_command("train", "-c", "tiny", *settings(**values, output="plain"))
    assert plain.code == 0
    assert plain.out.strip().endswith("latentvae reconstruct --model plain/vae")
    as_json = latentvae_command("train", "-c", "tiny", *settings(**values, output="json"), "--json")
    assert as_json.json() == {"export": "json/vae", "output": "json", "left_out": {}}
    assert Path("json/vae/config.json").is_file()


def test_train_refuses_a_taken_output_and_resumes_it(latentvae_command, trained):
    folder = shutil.copytree(trained, "run")
    values = FEW_STEPS | {"data.train": trained.parent / "photos", "output": folder, "train.max_steps": 3}
    command = ("train", "-c", "tiny", *settings(**values))
    taken = latentvae_command(*command)
    assert taken.code == 2
    assert "--resume latest" in taken.err
    resumed = latentvae_command(*command, "--resume", "latest")
    assert resumed.code == 0
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 3]  # step 1 was not the last one then, so only its validation is there


def test_train_refuses_bad_configurations_before_it_writes_anything(latentvae_command, pictures):
    cases = {
        ("--set", "train.max_step=5"): "Did you mean 'max_steps'?",
        ("--set", "train.max_steps=many"): "train.max_steps",
        ("--set", "max_steps"): "section.key=value",
        (): "data.train is not set",
        ("--set", "data.train=nowhere"): "nowhere",
        ("--set", f"data.train={pictures}", "--set", "loss.perceptual_weight=1"): WEIGHTS_ENV,
        ("--set", f"data.train={pictures}", "--resume", "latest"): "no complete checkpoint",
    }
    for options, words in cases.items():
        result = latentvae_command("train", "-c", "tiny", *options)
        assert result.code == 2, options
        assert words in result.err
        assert "Traceback" not in result.err
    unknown = latentvae_command("train", "--config", "tyny")
    assert unknown.code == 2
    assert "Did you mean 'tiny'?" in unknown.err
    assert files_in(Path()) == []


@pytest.mark.parametrize("which", ["run", "checkpoint"])
@pytest.mark.parametrize("ema", [True, False])
def test_export_of_a_run_or_checkpoint_is_a_model(latentvae_command, trained, which, ema):
    checkpoint = trained / "checkpoints" / "step-00000002"
    source = trained if which == "run" else checkpoint
    result = latentvae_command("export", source, "-o", "out", "--json", *(() if ema else ("--no-ema",)))
    assert result.code == 0
    report = result.json()
    assert report["export"] == "out"
    assert len(report["latent_statistics"]["latents_mean"]) == 4
    exported = latentvae.load("out").state_dict()
    weights = load_file(checkpoint / ("ema.safetensors" if ema else "model.safetensors"))
    assert torch.equal(exported["decoder.conv_in.weight"], weights["decoder.conv_in.weight"])
    sidecar = json.loads(Path("out/latentvae.json").read_text())
    assert sidecar["training"].startswith("2 steps")
    assert sidecar["config"]["model"]["preset"] == "tiny"


def test_export_of_a_run_is_what_the_run_exported_itself(latentvae_command, trained):
    assert latentvae_command("export", trained, "-o", "out").code == 0
    later, own = latentvae.load("out"), latentvae.load(trained / "vae")
    assert later.config["scaling_factor"] == pytest.approx(own.config["scaling_factor"], rel=1e-5)
    tensors = own.state_dict()
    # the run measures in another memory layout, so the last digits of the folded mean differ
    assert all(torch.allclose(t, tensors[key], atol=1e-5) for key, t in later.state_dict().items())


def test_export_of_a_model_keeps_it_and_its_factors(latentvae_command, model):
    result = latentvae_command("export", model, "-o", "out", "--name", "mine", "--licence", "cc-by-4.0")
    assert result.code == 0
    assert "reloaded in diffusers" in result.out
    assert latentvae.load("out").config["scaling_factor"] == 0.5
    assert latentvae.load("out").config["force_upcast"] is False  # as `doctor` says of it, and not as it came
    before, after = (load_file(Path(f) / "diffusion_pytorch_model.safetensors") for f in (model, "out"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    card = Path("out/README.md").read_text()
    assert "cc-by-4.0" in card
    assert "# mine" in card


def test_export_measures_the_images_it_is_given(latentvae_command, model, pictures):
    result = latentvae_command("export", model, "-o", "out", "--images", pictures, "--json")
    assert result.json()["latent_statistics"]["image_count"] == 3
    vae = latentvae.load("out")
    statistics = compute_latent_statistics(
        vae, [load_image(pictures / name)[None] for name in ("a.jpg", "a.png", "sub/b.png")]
    )
    assert vae.config["scaling_factor"] == pytest.approx(statistics.scaling_factor, rel=1e-4)


def test_export_of_a_grey_model_measures_luminance(latentvae_command, pictures):
    export(latentvae.build("tiny", in_channels=1, out_channels=1), "grey")
    assert latentvae_command("export", "grey", "-o", "out", "--images", pictures).code == 0


def test_export_passes_over_corrupt_images_and_says_so_where_all_are(latentvae_command, model, pictures):
    (pictures / "broken.png").write_bytes(b"broken")
    result = latentvae_command("export", model, "-o", "out", "--images", pictures, "--json")
    assert result.code == 3
    assert "broken.png" in result.err
    assert result.json()["latent_statistics"]["image_count"] == 3
    assert Path("out/config.json").is_file()
    only = latentvae_command("export", model, "-o", "other", "--images", pictures / "broken.png")
    assert only.code == 2
    assert "broken.png" in only.err
    assert "Traceback" not in only.err
    assert not Path("other").exists()


def change_config(run: Path, section: str, **values: object) -> None:
    """Let the newest checkpoint of a run say that it was configured otherwise."""
    state = run / "checkpoints" / "step-00000002" / "state.json"
    saved = json.loads(state.read_text())
    saved["config"][section] |= values
    state.write_text(json.dumps(saved))
    manifest = state.with_name("manifest.json")
    digest = hashlib.sha256(state.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state.json": digest}))


def test_export_without_the_runs_images_asks_for_others(latentvae_command, trained, pictures):
    run = Path(shutil.copytree(trained, "run"))
    change_config(run, "data", train="/gone/photos")
    result = latentvae_command("export", run, "-o", "out")
    assert result.code == 2
    assert "/gone/photos" in result.err
    assert "--images" in result.err
    assert latentvae_command("export", run, "-o", "out", "--images", pictures).code == 0


@pytest.mark.parametrize("parent", ["init", "teacher"])
def test_export_of_a_fine_tuned_or_distilled_run_keeps_the_parents_factors(
    latentvae_command, trained, parent
):
    run = Path(shutil.copytree(trained, "run"))
    change_config(run, "model", **{parent: "parent"})
    result = latentvae_command("export", run, "-o", "out", "--json")
    assert result.json()["latent_statistics"] is None
    before = json.loads((run / "checkpoints" / "step-00000002" / "config.json").read_text())
    assert latentvae.load("out").config["scaling_factor"] == before["scaling_factor"] == 1
    weights = load_file(run / "checkpoints" / "step-00000002" / "ema.safetensors")
    exported = latentvae.load("out").state_dict()
    assert all(torch.equal(exported[key], weights[key]) for key in weights)  # no mean folded in


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
def test_export_writes_graphs_and_says_how_far_they_are_from_torch(latentvae_command, trained):
    result = latentvae_command("export", trained, "out", "--to", "openvino")
    assert result.code == 0
    assert re.search(r"vae_decoder: largest difference from torch \d\.\de-0[67] of the range", result.out)
    assert {"vae_decoder/openvino_model.xml", "vae_encoder/openvino_model.bin"} < set(files_in(Path("out")))
    own = latentvae.load(trained / "vae").config  # with the factors of the images it was trained on
    config = json.loads(Path("out/vae_encoder/config.json").read_text())
    assert config["scaling_factor"] == pytest.approx(own["scaling_factor"], rel=1e-5)
    again = latentvae_command("export", trained / "vae", "-o", "out", "--to", "openvino", "--json")
    assert again.code == 2
    assert "--overwrite" in again.json()["error"]
    refused = latentvae_command("export", trained / "vae", "other", "--to", "onnx", "--half")
    assert refused.code == 2
    assert "--half is of weights" in refused.err
    assert not Path("other").exists()


def test_export_does_not_replace_what_is_there_unless_told(latentvae_command, model):
    assert latentvae_command("export", model, "-o", "out").code == 0
    again = latentvae_command("export", model, "-o", "out")
    assert again.code == 2
    assert "--overwrite" in again.err
    assert latentvae_command("export", model, "-o", "out", "--overwrite").code == 0
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    other = latentvae_command("export", model, "-o", "mine", "--overwrite")
    assert other.code == 2
    assert files_in(Path("mine")) == ["thesis.txt"]


def test_export_of_a_damaged_checkpoint_is_refused_and_of_the_run_takes_the_one_before(
    latentvae_command, trained
):
    run = Path(shutil.copytree(trained, "run"))
    newest = run / "checkpoints" / "step-00000002"
    with (newest / "ema.safetensors").open("r+b") as file:
        file.truncate(5000)
    named = latentvae_command("export", newest, "-o", "out")
    assert named.code == 2
    assert "ema.safetensors" in named.err
    assert latentvae_command("export", run, "-o", "out").code == 0
    assert json.loads(Path("out/latentvae.json").read_text())["training"].startswith("1 steps")


# --- the command itself ------------------------------------------------------------------------------------


def test_the_version_is_printed(latentvae_command):
    result = latentvae_command("--version")
    assert (result.code, result.out) == (0, f"latentvae {latentvae.__version__}\n")


@pytest.mark.parametrize(
    "verb", [(), ("reconstruct",), ("evaluate",), ("export",), ("info",), ("train",), ("doctor",)]
)
def test_help_names_what_there_is(latentvae_command, verb):
    result = latentvae_command(*verb, "--help")
    assert result.code == 0
    assert "Usage" in result.out
    if not verb:
        assert all(
            name in result.out for name in ("reconstruct", "evaluate", "export", "info", "train", "doctor")
        )
        assert "Exit codes" in result.out


def test_help_and_usage_errors_are_instant_as_they_import_nothing_heavy():
    code = (
        "import sys\n"
        "from latentvae.cli.main import main\n"
        "for line in sys.argv[1:]:\n"
        "    try:\n"
        "        main(line.split())\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == (0 if '--help' in line else 2), (line, stop.code)\n"
        "    heavy = {'torch', 'numpy', 'diffusers', 'accelerate', 'PIL', 'torchvision', 'yaml', 'gradio'}\n"
        "    assert not heavy & sys.modules.keys(), (line, heavy & sys.modules.keys())\n"
    )
    verbs = [*VERBS, "anomaly fit", "anomaly score", "prior fit"]
    lacking = ("encode", "compress", "export", "train", "agree", "plan", "anomaly score")  # an argument
    lines = [*(f"{verb} {option}" for verb in verbs for option in ("--help", "--no-such")), *lacking]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code, "--help", *lines],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage") == len(verbs) + 1


def test_the_list_of_verbs_says_what_each_verb_says_of_itself():
    for name, line in VERBS.items():
        command = typer.main.get_command(load_verb(name))
        assert command.help.split("\n\n")[0].replace("\n", " ").strip() == line


def test_the_module_and_the_training_script_are_commands():
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    for command, words in (
        (["-m", "latentvae", "--help"], "reconstruct"),
        ([str(ROOT / "train" / "train.py"), "--help"], "--resume"),
    ):
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert words in done.stdout
