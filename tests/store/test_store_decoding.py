"""From a store back to pictures: `latentvae decode`, `latentvae shards`, and training a diffusion model."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import textured
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from PIL import Image
from stores import write_store
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import latentvae
from latentvae import runtime
from latentvae.base.errors import StoreError
from latentvae.cli.decode import picture_name
from latentvae.cli.main import main
from latentvae.images.reading import load_image
from latentvae.images.tensors import to_uint8
from latentvae.models.exporting import export
from latentvae.models.fingerprint import weight_hash
from latentvae.models.shipped import DEFAULT_MODEL
from latentvae.store import dataset as store_dataset
from latentvae.store.dataset import LatentDataset
from latentvae.store.encoding import encode_folder
from latentvae.store.format import model_config, tensors_path

EXIF_ORIENTATION = 274


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `latentvae ...` in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny untrained model."""
    torch.manual_seed(0)
    vae = latentvae.build("tiny", scaling_factor=0.5)
    return export(vae, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def vae(model: Path) -> AutoencoderKL:
    return latentvae.load(model)


def write_odd_pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Thirty image files of many formats; their upright sizes by key."""
    modes = {"png": ("RGB", "RGBA", "P", "L", "LA", "1", "I;16"), "jpg": ("RGB", "L", "CMYK")}
    modes |= {"webp": ("RGB", "RGBA"), "tiff": ("RGB", "L"), "gif": ("P",), "bmp": ("RGB",), "ppm": ("RGB",)}
    kinds = [(suffix, mode) for suffix, wanted in modes.items() for mode in wanted]
    sizes: dict[str, tuple[int, int]] = {}
    (folder / "sub" / "größe").mkdir(parents=True)
    for number in range(30):
        suffix, mode = kinds[number % len(kinds)]
        width, height = 1 + (number * 37) % 71, 1 + (number * 23) % 67
        key = f"{('', 'sub/', 'sub/größe/')[number % 3]}picture.{number}.{suffix}"
        pixels = textured(width, height, number)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        else:
            image = Image.fromarray(pixels).convert(mode)
        exif = Image.Exif()
        turned = suffix == "jpg" and number % 2 == 1
        exif[EXIF_ORIENTATION] = 6 if turned else 1
        image.save(folder / key, **({"exif": exif} if suffix == "jpg" else {}))
        sizes[key] = (height, width) if turned else (width, height)
    return sizes


def test_decoding_gives_pictures_of_the_original_sizes(
    tmp_path: Path, model: Path, vae: AutoencoderKL, command: Command
) -> None:
    sizes = write_odd_pictures(tmp_path / "photos")
    encode_folder(vae, tmp_path / "photos", tmp_path / "store", dtype="fp32", shard_size=8)
    result = command("decode", tmp_path / "store", tmp_path / "out", "--model", model, "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert report["skipped"] == []
    assert {file["key"]: (file["width"], file["height"]) for file in report["files"]} == sizes
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(written) == sorted(tmp_path / "out" / f"{key}.png" for key in sizes)
    for key, size in sizes.items():
        with Image.open(tmp_path / "out" / f"{key}.png") as picture:
            assert picture.size == size
        wanted = latentvae.reconstruct(vae, load_image(tmp_path / "photos" / key)[None]).reconstructions[0]
        found = load_image(tmp_path / "out" / f"{key}.png")
        assert (to_uint8(found).int() - to_uint8(wanted).int()).abs().max() <= 1, key


@pytest.fixture
def store(tmp_path: Path, vae: AutoencoderKL) -> Path:
    """Latents of one size, in two shards, that the model might have made."""
    return store_of(vae, tmp_path / "store", [[(5, 4)] * 2, [(5, 4)] * 3])


def store_of(vae: AutoencoderKL, folder: Path, shards: list[list[tuple[int, int]]], **options: Any) -> Path:
    """Random latents that name this model as theirs."""
    own = {"weights_sha256": weight_hash(vae), "config": model_config(vae), "scaling_factor": 0.5}
    return write_store(folder, shards, **own, **options)


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_decoding_is_the_mode_or_a_seeded_sample(
    tmp_path: Path, store: Path, model: Path, command: Command
) -> None:
    runs: dict[str, dict[str, bytes]] = {}
    for name, options in {
        "mode": (),
        "sample": ("--sample",),
        "again": ("--sample", "--seed", 0),
        "other": ("--sample", "--seed", 1),
    }.items():
        assert command("decode", store, tmp_path / name, "--model", model, *options).code == 0
        runs[name] = pictures(tmp_path / name)
        assert len(runs[name]) == 5
    assert runs["sample"] == runs["again"]
    assert runs["mode"] != runs["sample"] != runs["other"]


def test_decoding_in_tiles_or_in_half_precision_changes_no_more_than_rounding(
    tmp_path: Path, model: Path, vae: AutoencoderKL, command: Command
) -> None:
    store = store_of(vae, tmp_path / "store", [[(12, 20)] * 2])
    for name, options in {"plain": (), "tiles": ("--tile-size", 32), "half": ("--precision", "bf16")}.items():
        assert command("decode", store, tmp_path / name, "--model", model, *options).code == 0
    plain, tiles, half = (
        load_image(tmp_path / name / "image00001.png.png") for name in ("plain", "tiles", "half")
    )
    assert (to_uint8(plain).int() - to_uint8(tiles).int()).abs().max() <= 1
    assert 0 < (plain - half).abs().mean() < 0.05


def test_small_images_are_decoded_side_by_side(
    tmp_path: Path, vae: AutoencoderKL, model: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store_of(vae, tmp_path / "store", [[(5, 4), (6, 3), (5, 4)], [(6, 3)] * 2])
    asked: list[int] = []
    names: set[str] = set()
    side, threads = runtime.side_by_side, torch.get_num_threads
    run, decoded = side.run, store_dataset.decoded_images

    def counted(jobs: Any, count: int) -> Any:
        asked.append(count)
        return run(jobs, count)

    def named(*arguments: Any) -> Any:
        assert torch.get_num_threads() == 1
        names.add(threading.current_thread().name)
        return decoded(*arguments)

    monkeypatch.setattr(side, "run", counted)
    monkeypatch.setattr(store_dataset, "decoded_images", named)
    found, reports = {}, {}
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        result = command("decode", folder, tmp_path / str(count), "--model", model, "--json")
        assert result.code == 0, result.err
        reports[count] = [file["key"] for file in json.loads(result.out)["files"]]
        found[count] = pictures(tmp_path / str(count))
        assert threads() == count
    assert asked == [2, 3]
    assert names == {"MainThread", *(f"latentvae-side_{number}" for number in range(3))}
    assert reports[1] == reports[2] == reports[3]
    assert found[2] == found[3]
    for name, picture in found[1].items():
        one, other = (to_uint8(load_image(data)).int() for data in (picture, found[2][name]))
        assert (one - other).abs().max() <= 1, name
    monkeypatch.setattr(store_dataset, "decoded_images", decoded)
    torch.set_num_threads(2)
    command("decode", folder, tmp_path / "tiled", "--model", model, "--tile-size", 32)
    monkeypatch.setattr(side, "SMALL", 1)
    command("decode", folder, tmp_path / "large", "--model", model)
    assert asked == [2, 3]  # tiles, and large images, are shared between the cores


def test_decoding_refuses_another_model(tmp_path: Path, store: Path, command: Command) -> None:
    torch.manual_seed(1)
    other = export(latentvae.build("tiny"), tmp_path / "other")
    result = command("decode", store, tmp_path / "out", "--model", other, "--json")
    assert result.code == 2
    assert "were made with weights" in json.loads(result.out)["error"]
    assert not (tmp_path / "out").exists()


def test_the_bundled_model_that_made_a_store_is_found_without_being_named(
    tmp_path: Path, store: Path, command: Command
) -> None:
    other = next(name for name in ("sd-small", "f8c4-small") if name != DEFAULT_MODEL)  # of four channels
    own = store_of(latentvae.load(other), tmp_path / "own", [[(4, 4)]])
    assert command("decode", own, tmp_path / "out").code == 0
    assert len(pictures(tmp_path / "out")) == 1
    result = command("decode", store, tmp_path / "none", "--json")
    assert "no bundled model has these" in json.loads(result.out)["error"]


def test_decoding_says_what_is_no_store(tmp_path: Path, model: Path, command: Command) -> None:
    result = command("decode", tmp_path, tmp_path / "out", "--model", model)
    assert result.code == 2
    assert "store.json" in result.err


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # a value's last bits: the file opens as it did
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [remove, flip])
def test_decoding_passes_over_a_damaged_shard(
    damage: Callable[[Path], None], tmp_path: Path, store: Path, model: Path, command: Command
) -> None:
    damage(tensors_path(store, "latents-00000"))
    result = command("decode", store, tmp_path / "out", "--model", model, "--json")
    assert result.code == 3
    assert len(json.loads(result.out)["files"]) == 3
    assert len(json.loads(result.out)["skipped"]) == 2
    assert result.err.count("latents-00000 of") == 1
    tensors_path(store, "latents-00001").unlink()
    assert command("decode", store, tmp_path / "out", "--model", model).code == 2


def test_keys_that_lead_elsewhere_are_passed_over(
    tmp_path: Path, model: Path, vae: AutoencoderKL, command: Command
) -> None:
    keys = {0: "../escaped.jpg", 1: "/escaped.jpg", 2: "fine/a.jpg", 3: "nul\0.jpg"}
    store = store_of(vae, tmp_path / "store", [[(2, 2)] * 4], keys=keys)
    result = command("decode", store, tmp_path / "out" / "deep", "--model", model, "--json")
    assert result.code == 3
    assert [file["key"] for file in json.loads(result.out)["files"]] == ["fine/a.jpg"]
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 1


def test_names_too_long_for_a_suffix_are_cut() -> None:
    long = ["x" * 251 + ".jpg", "x" * 250 + ".jpeg", "ü" * 126 + ".j", "y/" + "x" * 251 + ".jpg"]
    names = [picture_name(key) for key in long]
    assert len(set(names)) == 4
    assert all(len(name.name.encode()) <= 255 and name.suffix == ".png" for name in names)
    assert picture_name("a/b.jpg") == Path("a/b.jpg.png")
    with pytest.raises(StoreError, match="no path below a folder"):
        picture_name("a/../../b.jpg")


def test_shards_are_exported(tmp_path: Path, store: Path, command: Command) -> None:
    result = command("shards", store, tmp_path / "out", "--images-per-shard", 2)
    assert result.code == 0
    assert "5 images in" in result.out
    assert "latents-{000000..000002}.tar" in result.out
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    result = command("shards", store, tmp_path / "out", "--json")
    assert result.code == 2
    assert "already" in json.loads(result.out)["error"]


def train_unet(dataset: LatentDataset, steps: int, batch_size: int) -> tuple[UNet2DModel, list[float]]:
    """Train a tiny denoiser; the losses of all steps."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    scheduler, optimizer = DDIMScheduler(), torch.optim.AdamW(unet.parameters(), lr=3e-3)
    losses: list[float] = []
    while len(losses) < steps:
        dataset.set_epoch(len(losses))
        for batch in DataLoader(dataset, batch_size, shuffle=True):
            latents = batch["latents"]
            noise, times = torch.randn_like(latents), torch.randint(1000, (len(latents),))
            loss = mse_loss(unet(scheduler.add_noise(latents, noise, times), times).sample, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return unet, losses


@torch.no_grad()
def draw_samples(unet: UNet2DModel, count: int) -> torch.Tensor:
    """Scaled latents that the denoiser makes of noise in ten steps."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    latents = torch.randn(count, 4, 8, 8)
    for time in scheduler.timesteps:
        latents = scheduler.step(unet(latents, time).sample, time, latents).prev_sample
    return latents


def test_a_diffusion_model_trains_from_a_store_and_its_samples_decode(
    tmp_path: Path, photo_folder: Path, vae: AutoencoderKL
) -> None:
    shutil.copytree(photo_folder, tmp_path / "photos")
    encode_folder(vae, tmp_path / "photos", tmp_path / "store", size=64, crop=True, flips=True)
    dataset = LatentDataset(tmp_path / "store", flip=0.5)
    unet, losses = train_unet(dataset, 60, 6)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    images = latentvae.decode(vae, latentvae.unscale(vae, draw_samples(unet, 2)))
    assert images.shape == (2, 3, 64, 64)
    assert images.isfinite().all()
