"""The tab Compare: ways there and back at equal bytes, their figures, and what is taken home."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import textured
from demo_server import running, tiny_peer
from diffusers import AutoencoderTiny
from PIL import Image

import latentvae
from latentvae.images.kinds import HAS_AVIF

pytest.importorskip("gradio")
import httpx
from gradio_client import Client, handle_file


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_peer(tmp_path_factory.mktemp("peer"))


@pytest.fixture(scope="module")
def page(model: Path, peer: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch, running(model, patch, peers=[peer]) as served:
        yield served


def test_six_ways_each_with_its_figures_and_files(
    page: Any, client: Client, model: Path, peer: Path, photo: Path
) -> None:
    codecs = ["JPEG", "WebP", *(["AVIF"] if HAS_AVIF else [])]
    against = [".lvae", *codecs, "tiny-model", "tiny-peer"]
    view, rows, sheet, table = client.predict(
        handle_file(photo), "tiny-model", against, 90, api_name="/compare"
    )
    assert [row["name"] for row in rows] == against
    own = rows[0]["bytes"]
    for row in rows:
        assert row["encode_seconds"] > 0
        assert row["decode_seconds"] > 0
        assert row["peak_bytes"] >= 0
        if row["name"] in codecs:
            assert row["bytes"] <= own or "smallest" in row["how"]
        if row["name"].startswith("tiny"):
            assert row["bytes"] is None

    # the pictures are whole, and those that the figures are of
    original = np.asarray(Image.open(photo).convert("RGB"), dtype=float)
    files = re.findall(r'<img alt="([^"]+)" draggable="false" src="([^"]+)"', view)
    assert [name for name, _ in files] == ["Original", *against]
    for (_, place), row in zip(files[1:], rows, strict=True):
        found = httpx.get(f"{page.local_url}{place}")
        picture = np.asarray(
            Image.open(photo.parent / _save(photo, found.content)).convert("RGB"), dtype=float
        )
        assert picture.shape == original.shape
        psnr = 10 * np.log10(255**2 / np.square(picture - original).mean())
        assert row["psnr"] == pytest.approx(psnr, abs=1e-3)
    # and so are the files
    for row, suffix in zip(rows, ["lvae", *(name.lower() for name in codecs)], strict=False):
        (place,) = re.findall(rf'href="([^"]+\.{suffix})"', view)
        assert len(httpx.get(f"{page.local_url}{place}").content) == row["bytes"]

    images = latentvae.load_image(photo)[None]
    wanted = latentvae.reconstruct(latentvae.load(model), images).reconstructions
    by_hand = {"tiny-model": wanted, "tiny-peer": _through(peer, images)}
    for row in rows[-2:]:
        levels = (by_hand[row["name"]][0].clamp(-1, 1) * 127.5 + 127.5).round().permute(1, 2, 0).numpy()
        psnr = 10 * np.log10(255**2 / np.square(levels - original).mean())
        assert row["psnr"] == pytest.approx(psnr, abs=0.05)

    with Path(table).open(newline="") as lines:
        read = list(csv.DictReader(lines))
    assert [(row["name"], row["bytes"]) for row in read] == [
        (row["name"], "" if row["bytes"] is None else str(row["bytes"])) for row in rows
    ]
    with Image.open(sheet) as drawn:  # columns of at least 128 pixels, pictures over errors
        assert drawn.width > 7 * 128
        assert drawn.height > 2 * 90
    assert view.count("<tr data-name=") == len(against)


def _save(photo: Path, data: bytes) -> str:
    (photo.parent / "fetched.png").write_bytes(data)
    return "fetched.png"


@torch.no_grad()
def _through(peer: Path, images: torch.Tensor) -> torch.Tensor:
    """(1, C, 45, 61) by hand: padded to 48 x 64 by its edge's mirror image, and cropped."""
    vae = AutoencoderTiny.from_pretrained(peer, local_files_only=True)
    padded = torch.nn.functional.pad(images, (0, 3, 0, 3), mode="reflect")
    return vae.decode(vae.encode(padded).latents).sample[..., :45, :61]


@pytest.mark.parametrize("count", [0, 7])
def test_one_to_six_ways_are_taken(client: Client, photo: Path, count: int) -> None:
    against = [".lvae", "JPEG", "WebP", "AVIF", "tiny-model", "tiny-peer", "tiny-model"][:count]
    if count == 7:  # of seven only two are one
        rows = client.predict(handle_file(photo), "tiny-model", against, 90, api_name="/compare")[1]
        assert len(rows) == 6
        return
    with pytest.raises(Exception, match="compare one to 6"):
        client.predict(handle_file(photo), "tiny-model", against, 90, api_name="/compare")


def test_peers_are_of_no_other_tab(page: Any) -> None:
    pickers = [
        each["props"] for each in page.config["components"] if each["props"].get("elem_id") == "lv-model"
    ]
    assert [name for name, _ in pickers[0]["choices"]] == ["tiny-model"]


@pytest.mark.parametrize("name", ["JPEG", "WebP", *(["AVIF"] if HAS_AVIF else [])])
def test_a_codec_gives_the_best_file_that_fits(name: str) -> None:
    from latentvae.codec import rivals
    from latentvae.demo import ways
    from latentvae.images.saving import to_pil
    from latentvae.images.tensors import from_uint8

    image = from_uint8(textured(96, 64, 2))
    picture = to_pil(image)
    low, high, _ = rivals.WITHIN[name]
    sizes = {quality: len(rivals.write(picture, name, quality)) for quality in range(low, high + 1)}
    budget = sorted(sizes.values())[len(sizes) // 2]
    trip = ways.by_codec(image, name, budget)
    quality = int(re.search(r"\d+", trip.how)[0])  # type: ignore[index]
    assert len(trip.file or b"") == sizes[quality] <= budget
    assert sizes.get(quality + 1, budget + 1) > budget
    least = ways.by_codec(image, name, 1)
    assert len(least.file or b"") == sizes[low]
    assert "smallest" in least.how


def test_memory_is_what_a_step_took_at_most() -> None:
    from latentvae.demo.ways import Meter

    meter = Meter()
    meter(lambda: np.ones(100_000_000, dtype=np.uint8).sum() and None)  # gone when the step is over
    assert 90e6 < meter.peak_bytes < 400e6
    meter(lambda: None)
    assert len(meter.seconds) == 2


def test_figures_without_a_number_are_words(tmp_path: Path) -> None:
    from latentvae.demo import compare

    row = {"name": "a<b", "how": "x", "bytes": None, "bpp": None, "psnr": None, "ssim": None, "lpips": None}
    row |= {"encode_seconds": 1.5, "decode_seconds": 0.0021, "peak_bytes": 2_400_000}
    words = [cell for cell, _ in compare._cells(row)]
    assert words == ["a<b", "x", "-", "-", "∞", "-", "-", "1.50 s", "2 ms", "2 MB"]
