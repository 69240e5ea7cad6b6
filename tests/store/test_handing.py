"""Stores as other tools' caches: read as each tool's code reads them, beside the VAE's own latents."""

import base64
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import textured
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file
from stores import write_store
from torch.utils.data import DataLoader

import latentvae
from latentvae.base.errors import StoreError
from latentvae.cli.main import main
from latentvae.images.reading import load_image
from latentvae.images.resizing import Preprocessing
from latentvae.store.dataset import LatentDataset
from latentvae.store.encoding import encode_folder
from latentvae.store.handing import ai_toolkit_bucket, hand_over, sd_scripts_buckets

RGB_MODEL = {"scaling_factor": 0.13025}


@pytest.fixture
def vae(tiny_vae: Any) -> Any:
    tiny_vae.register_to_config(**RGB_MODEL)
    return tiny_vae


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures, one below a folder; all but the first are no squares."""
    for name, width, height in (("a.png", 64, 64), ("b.png", 96, 64), ("sub/c.png", 64, 128)):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(textured(width, height, width + height)).save(path)
    return tmp_path / "photos"


def encode(vae: Any, photos: Path, store: Path, **options: Any) -> Path:
    encode_folder(vae, photos, store, dtype="fp32", batch_size=1, **options)
    return store


def own_latents(vae: Any, path: Path, *, flip: bool = False) -> np.ndarray:
    """What the VAE itself makes of a picture as it is, unscaled: the mean, (C, h, w)."""
    image = load_image(path)[None]
    with torch.no_grad():
        mean = vae.encode(image.flip(-1) if flip else image).latent_dist.mode()
    return mean[0].numpy()


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=1e-4, atol=1e-5)


class SdScriptsReader:
    """The reading side of LatentsCachingStrategy and its subclasses for sd, sdxl, sd3 and flux."""

    def __init__(self, family: str) -> None:
        self.family, self.multi = family, family in ("sd3", "flux")

    def path(self, image: Path, size: tuple[int, int]) -> Path:
        return image.parent / f"{image.stem}_{size[0]:04d}x{size[1]:04d}_{self.family}.npz"

    def load(self, path: Path, bucket: tuple[int, int]) -> dict[str, Any]:
        ending = f"_{bucket[1] // 8}x{bucket[0] // 8}" if self.multi else ""
        npz = np.load(path)
        names = ("latents", "original_size", "crop_ltrb", "latents_flipped")
        return {name: npz[name + ending] for name in names if name + ending in npz}


def test_sd_scripts_reads_what_its_vae_gives(vae: Any, photos: Path, tmp_path: Path) -> None:
    store = encode(vae, photos, tmp_path / "store", flips=True)
    done = hand_over(store, photos, "sd-scripts")  # beside the images, where it looks
    assert (done.images, done.untaken) == (3, {})
    assert not any("scaling" in line for line in done.lost)
    reader = SdScriptsReader("sdxl")
    for key, size in (("a.png", (64, 64)), ("b.png", (96, 64)), ("sub/c.png", (64, 128))):
        found = reader.load(reader.path(photos / key, size), size)
        assert found["latents"].dtype == np.float32
        close(found["latents"], own_latents(vae, photos / key))
        close(found["latents_flipped"], own_latents(vae, photos / key, flip=True))
        assert found["original_size"].tolist() == list(size)
        assert found["crop_ltrb"].tolist() == [0, 0, *size]
    assert encode_folder(vae, photos, store, dtype="fp32", batch_size=1, flips=True).encoded == 0


def test_diffusers_scripts_take_moments_for_their_posteriors(vae: Any, photos: Path, tmp_path: Path) -> None:
    """Their cache is a list of what `vae.encode` gave for each batch: `latent_dist`."""
    store = encode(vae, photos, tmp_path / "store")
    loader = DataLoader(LatentDataset(store, mode="moments"), batch_size=1)
    for batch in loader:
        found = DiagonalGaussianDistribution(batch["moments"])
        with torch.no_grad():
            wanted = vae.encode(load_image(photos / batch["key"][0])[None]).latent_dist
        close(found.mean, wanted.mean)
        close(found.std, wanted.std)
        close(found.sample(torch.Generator().manual_seed(1)), wanted.sample(torch.Generator().manual_seed(1)))


def test_sd_scripts_for_flux_is_scaled_by_its_own_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = latentvae.build("tiny", latent_channels=16, scaling_factor=0.5, shift_factor=0.1).eval()
    Image.fromarray(textured(64, 32, 0)).save(tmp_path / "a.png")
    store = encode(vae, tmp_path / "a.png", tmp_path / "store")
    done = hand_over(store, tmp_path / "out", "sd-scripts")
    assert any("0.3611" in line and "0.5" in line for line in done.lost)
    reader = SdScriptsReader("flux")
    found = reader.load(reader.path(tmp_path / "out" / "a.png", (64, 32)), (64, 32))
    close(found["latents"], 0.3611 * (own_latents(vae, tmp_path / "a.png") - 0.1159))
    hand_over(store, tmp_path / "sd3", "sd-scripts", family="sd3")
    found = SdScriptsReader("sd3").load(tmp_path / "sd3" / "a_0064x0032_sd3.npz", (64, 32))
    close(found["latents"], own_latents(vae, tmp_path / "a.png"))


def test_sd_scripts_buckets_are_its_own() -> None:
    found = sd_scripts_buckets(512)
    assert (512, 512) in found
    assert {(256, 1024), (320, 768), (384, 640), (448, 576), (640, 384), (1024, 256)} <= set(found)
    assert all(min(pair) >= 256 and max(pair) <= 1024 and pair[0] * pair[1] <= 512 * 512 for pair in found)


def details(width: int, height: int, resized: Any, cropped: Any) -> dict[str, Any]:
    return {"width": width, "height": height, "resized": resized, "cropped": cropped, "padding": (0, 0, 0, 0)}


def test_images_of_other_buckets_are_left_to_the_tool(tmp_path: Path) -> None:
    store = write_store(
        tmp_path / "store",
        [[(48, 80), (48, 88), (64, 64)]],
        preprocessing=Preprocessing(policy="size", size=512),
        details={
            0: details(1500, 1000, (640, 427), (0, 21, 640, 384)),  # 3:2, alike in both
            1: details(1600, 900, (704, 396), (0, 6, 704, 384)),  # 16:9: 640x384 there
            2: {**details(512, 512, None, None), "notes": ["rotated by EXIF orientation 6"]},
        },
    )
    done = hand_over(store, tmp_path / "out", "sd-scripts", family="sd")
    assert done.images == 1
    assert "640x384" in done.untaken["image00001.png"]
    assert "orientation" in done.untaken["image00002.png"]
    found = np.load(tmp_path / "out" / "image00000_1500x1000_sd.npz")
    assert found["original_size"].tolist() == [1500, 1000]
    # as get_crop_ltrb has it: the whole image fitted into 640x384
    np.testing.assert_allclose(found["crop_ltrb"], [32.0, 0.0, 608.0, 384.0])
    assert "resolution = 512, enable_bucket = true" in done.settings


def test_padded_images_are_left_to_the_tool(vae: Any, tmp_path: Path) -> None:
    Image.fromarray(textured(60, 64, 0)).save(tmp_path / "a.png")
    store = encode(vae, tmp_path / "a.png", tmp_path / "store")
    with pytest.raises(StoreError, match="takes none of the 1 images"):
        hand_over(store, tmp_path / "out", "sd-scripts")
    assert not (tmp_path / "out").exists()


def ai_toolkit_reader(image: Path, shape: dict[str, int], space: str) -> torch.Tensor:
    """`get_latent_path` and `get_latent`."""
    described = {"filename": image.name, **shape, "latent_space_version": space, "latent_version": 1}
    digest = hashlib.md5(json.dumps(described, sort_keys=True).encode("utf-8")).digest()
    name = base64.urlsafe_b64encode(digest).decode("ascii").replace("=", "")
    return load_file(image.parent / "_latent_cache" / f"{image.stem}_{name}.safetensors")["latent"]


def test_ai_toolkit_reads_what_its_vae_gives(vae: Any, photos: Path, tmp_path: Path) -> None:
    store = encode(vae, photos, tmp_path / "store", size=64, crop=True)
    done = hand_over(store, photos, "ai-toolkit")
    assert (done.images, "square_crop: true" in done.settings) == (3, True)
    dataset = LatentDataset(store, mode="mode")
    for index, (key, width, height) in enumerate(
        [("a.png", 64, 64), ("b.png", 96, 64), ("sub/c.png", 64, 128)]
    ):
        scale = 64 / min(width, height)
        wide, high = math.ceil(width * scale), math.ceil(height * scale)
        shape = {"scale_to_width": wide, "scale_to_height": high, "crop_width": 64, "crop_height": 64}
        # of the longer side the middle
        shape |= {"crop_x": int(wide / 2 - 32) if width > height else 0}
        shape |= {"crop_y": 0 if width > height else int(high / 2 - 32)}
        close(ai_toolkit_reader(photos / key, shape, "sdxl"), dataset[index]["latents"])
    square = own_latents(vae, photos / "a.png") * vae.config["scaling_factor"]
    close(dataset[0]["latents"], square)


def test_ai_toolkit_never_enlarges() -> None:
    assert ai_toolkit_bucket((1000, 1000), 512, 16) == (512, 512)
    assert ai_toolkit_bucket((200, 130), 512, 64) == (192, 128)
    assert ai_toolkit_bucket((1500, 1000), 512, 16) == (624, 416)
    assert ai_toolkit_bucket((1500, 1000), 512, 32) == (608, 416)
    assert ai_toolkit_bucket((20, 20), 512, 32) == (32, 32)


def test_ai_toolkit_has_buckets_of_its_models(tmp_path: Path) -> None:
    """Of steps of 16 px for SDXL, and not of 64 as the store: what that cropped otherwise is left to it."""
    store = write_store(
        tmp_path / "store",
        [[(48, 80), (64, 64)]],
        preprocessing=Preprocessing(policy="size", size=512),
        details={
            0: details(1500, 1000, (640, 427), (0, 21, 640, 384)),
            1: details(512, 512, None, None),
        },
    )
    done = hand_over(store, tmp_path / "out", "ai-toolkit", family="sdxl")
    assert "makes 624x416 px of 1500x1000" in done.untaken["image00000.png"]
    assert (done.images, "bucket_tolerance" in done.settings) == (1, False)


def test_simpletuner_reads_what_its_vae_gives(vae: Any, photos: Path, tmp_path: Path) -> None:
    store = encode(vae, photos, tmp_path / "store", size=64, crop=True, flips=True)
    done = hand_over(store, tmp_path / "cache", "simpletuner")
    assert (done.images, len(done.lost)) == (3, 2)
    for index, key in enumerate(["a.png", "b.png", "sub/c.png"]):
        name = hashlib.sha256(Path(key).stem.encode()).hexdigest() + ".pt"
        found = torch.load(tmp_path / "cache" / Path(key).parent / name, map_location="cpu")
        close(found, LatentDataset(store, mode="mode", scaled=False)[index]["latents"])
    plain = hashlib.sha256(b"a").hexdigest() + ".pt"
    close(torch.load(tmp_path / "cache" / plain), own_latents(vae, photos / "a.png"))


def test_simpletuner_takes_squares_alone(vae: Any, photos: Path, tmp_path: Path) -> None:
    store = encode(vae, photos, tmp_path / "store")
    with pytest.raises(StoreError, match="takes squares"):
        hand_over(store, tmp_path / "cache", "simpletuner")


def test_npz_holds_all_of_the_store(vae: Any, photos: Path, tmp_path: Path) -> None:
    (photos / "b.txt").write_text("a caption")
    store = encode(vae, photos, tmp_path / "store", flips=True)
    assert hand_over(store, tmp_path / "out", "npz").lost == []
    found = np.load(tmp_path / "out" / "b.png.npz")
    item = LatentDataset(store, mode="moments")[1]
    assert np.array_equal(found["moments"], item["moments"])
    close(found["latents"], own_latents(vae, photos / "b.png") * 0.13025)
    close(found["latents_flipped"], own_latents(vae, photos / "b.png", flip=True) * 0.13025)
    assert str(found["caption"]) == "a caption"
    assert (tmp_path / "out" / "sub" / "c.png.npz").is_file()


def test_draws_are_of_the_key(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [[(2, 3)]])
    for name in ("one", "two"):
        hand_over(store, tmp_path / name, "npz", sample=True)
    hand_over(store, tmp_path / "mean", "npz")
    one, two, mean = (np.load(tmp_path / name / "image00000.png.npz") for name in ("one", "two", "mean"))
    assert np.array_equal(one["latents"], two["latents"])
    assert not np.allclose(one["latents"], mean["latents"], atol=0.01)


def test_nothing_is_replaced(vae: Any, photos: Path, tmp_path: Path) -> None:
    store = encode(vae, photos, tmp_path / "store")
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    there = out / "sub" / "c_0064x0128_sdxl.npz"
    there.write_bytes(b"mine")
    with pytest.raises(StoreError, match="is there already"):
        hand_over(store, out, "sd-scripts")
    assert [path for path in out.rglob("*") if path.is_file()] == [there]
    assert there.read_bytes() == b"mine"


def test_what_cannot_be_handed_over_is_said(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [[(2, 3)] * 3], keys={0: "../a.png", 1: "b.png", 2: "b.jpg"})
    done = hand_over(store, tmp_path / "out" / "deep", "npz")
    assert list(done.untaken) == ["../a.png"]
    with pytest.raises(StoreError, match="flux has 16 latent channels"):
        hand_over(store, tmp_path / "out", "sd-scripts", family="flux")
    squares = write_store(
        tmp_path / "squares",
        [[(8, 8), (8, 8)]],
        keys={0: "b.jpg", 1: "b.png"},
        preprocessing=Preprocessing(policy="centre-crop", size=64),
    )
    done = hand_over(squares, tmp_path / "cache", "simpletuner")
    assert "one file for it and b.jpg" in done.untaken["b.png"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `latentvae ...` in this process: its exit code, what it printed, what it said beside."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return run


def test_encode_says_what_it_makes_of_caches(
    vae: Any, photos: Path, tmp_path: Path, command: Any, monkeypatch: Any
) -> None:
    hand_over(encode(vae, photos, tmp_path / "store"), photos, "sd-scripts")
    np.savez(photos / "mine.npz", a=1)
    monkeypatch.setattr("latentvae.cli.encode._prepare", lambda session: (vae, "0" * 64))
    code, out, err = command("encode", photos, tmp_path / "again", "--model", "any")
    assert (code, "3 images in" in out) == (0, True)
    assert "3 caches of sd-scripts for sdxl are there" in err
    assert "not read" in err


def test_the_verb(tmp_path: Path, command: Any) -> None:
    store = write_store(tmp_path / "store", [[(2, 3)] * 3], keys={0: "../a.png"})
    for tool, why in (("onetrainer", "on another picture"), ("diffusers", "as it is, by LatentDataset")):
        code, _, err = command("hand-over", store, tmp_path / "none", "--to", tool)
        assert (code, why in err, (tmp_path / "none").exists()) == (2, True, False)
    code, out, err = command("hand-over", store, tmp_path / "out" / "deep", "--to", "npz")
    assert code == 3
    assert "2 of 3 images" in out
    assert "left to npz: ../a.png" in err
    code, out, _ = command("hand-over", store, tmp_path / "tars", "--to", "webdataset", "--json")
    assert (code, json.loads(out)["images"]) == (0, 3)
    assert (tmp_path / "tars" / "latents-000000.tar").is_file()
    code, _, err = command("hand-over", store, tmp_path / "x", "--to", "onetrainer")
    assert code == 2
