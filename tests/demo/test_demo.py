"""The demo: every endpoint through gradio's own client, what its figures say, and the files it gives."""

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import textured
from demo_server import free_port
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import latentvae
from latentvae.base.errors import LatentVAEError, ModelError
from latentvae.base.optional import install_command
from latentvae.cli import main as cli

pytest.importorskip("gradio")
import httpx
from gradio_client import Client, handle_file

ENDPOINTS = {
    "/reconstruct",
    "/compare",
    "/compress",
    "/decode",
    "/interpolate",
    "/vary",
    "/sample",
    "/odd",
    "/fill",
}


def as_array(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_every_endpoint_is_named_typed_and_described(client: Client) -> None:
    found = client.view_api(return_format="dict")["named_endpoints"]
    assert found.keys() == ENDPOINTS
    for name, endpoint in found.items():
        assert endpoint["description"], name
        for parameter in endpoint["parameters"]:
            assert parameter["python_type"]["type"] != "Any", (name, parameter["label"])
            assert parameter["label"], name


def test_reconstruct_gives_what_the_library_gives(client: Client, model: Path, photo: Path) -> None:
    pair, error, channels, shown, facts, picture, latents = client.predict(
        handle_file(photo), "tiny-model", "mode", 0, api_name="/reconstruct"
    )
    vae = latentvae.load(model)
    images = latentvae.load_image(photo)[None]
    wanted = latentvae.reconstruct(vae, images)
    assert np.array_equal(as_array(pair[0]), as_array(photo))  # PNG: nothing is lost on the way
    found = latentvae.load_image(picture)[None]
    assert found.shape == images.shape
    assert (found - wanted.reconstructions.clamp(-1, 1)).abs().max() <= 1.01 / 255  # rounding to 8 bits
    assert facts["width"], facts["height"] == (61, 45)
    assert facts["psnr"] == pytest.approx(
        10 * np.log10(255**2 / np.square(as_array(picture) - as_array(photo).astype(float)).mean()), abs=1e-3
    )
    assert f"{facts['psnr']:.2f} dB" in shown
    assert "LPIPS" not in shown.replace("LPIPS was not measured", "")
    assert facts["lpips"] is None
    assert len(channels) == 4
    assert Image.open(error).size == (61, 45)
    tensors = load_file(latents)
    assert torch.allclose(tensors["latents"], wanted.posterior.mode(), atol=1e-5)
    assert torch.allclose(tensors["moments"][:, :4], tensors["latents"])
    assert tensors["padding"].tolist() == [0, 0, 3, 3, 45, 61]
    assert Path(latents).name == "my photo.latents.safetensors"


def test_samples_follow_their_seed(client: Client, photo: Path) -> None:
    def latents(mode: str, seed: int) -> torch.Tensor:
        result = client.predict(handle_file(photo), "tiny-model", mode, seed, api_name="/reconstruct")
        return load_file(result[-1])["latents"]

    first = latents("sample", 1)
    assert torch.equal(first, latents("sample", 1))
    assert not torch.allclose(first, latents("sample", 2))


def test_latents_decode_again_to_the_same_picture(client: Client, photo: Path) -> None:
    result = client.predict(handle_file(photo), "tiny-model", "mode", 0, api_name="/reconstruct")
    _, about, picture = client.predict(handle_file(result[-1]), "tiny-model", api_name="/decode")
    assert np.array_equal(as_array(picture), as_array(result[-2]))
    assert "61 x 45" in about


def test_compress_and_back(client: Client, model: Path, photo: Path) -> None:
    pair, shown, facts, file = client.predict(handle_file(photo), "tiny-model", 60, api_name="/compress")
    data = Path(file).read_bytes()
    assert data[:4] == b"LVAE"
    assert facts["bytes"] == len(data)
    assert facts["bpp"] == pytest.approx(8 * len(data) / (61 * 45))
    assert f"{len(data)} bytes" in shown
    _, _, picture = client.predict(handle_file(file), "tiny-model", api_name="/decode")
    assert np.array_equal(as_array(picture), as_array(pair[1]))


def test_interpolate_moves(client: Client, photo: Path, tmp_path: Path) -> None:
    Image.fromarray(textured(80, 80, 3)).save(tmp_path / "other.jpg")
    animation, strip, facts = client.predict(
        handle_file(photo),
        handle_file(tmp_path / "other.jpg"),
        "tiny-model",
        4,
        "linear",
        api_name="/interpolate",
    )
    with Image.open(animation) as moving:
        assert (moving.format, moving.n_frames, moving.size) == ("WEBP", 6, (61, 45))
    assert Image.open(strip).width > 4 * 61
    assert facts["positions"] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert all(step["rms"] >= 0 for step in facts["steps"])


def test_vary_spreads_with_temperature(client: Client, photo: Path) -> None:
    def copies(temperature: float) -> list[np.ndarray]:
        pictures, *_ = client.predict(handle_file(photo), "tiny-model", temperature, 3, 0, api_name="/vary")
        return [as_array(each["image"]).astype(float) for each in pictures]

    still = copies(0)
    assert len(still) == 3
    assert np.array_equal(still[0], still[2])
    moved = copies(20)
    assert np.abs(moved[0] - moved[1]).mean() > 1


def test_odd_ranks_the_painted_one_first(client: Client, tmp_path: Path) -> None:
    for seed in range(7):
        array = textured(48, 48, 1)
        array[:, :, 0] += np.uint8(seed)
        if seed == 3:
            array[10:30, 10:30] = (255, 0, 255)
        Image.fromarray(array).save(tmp_path / f"{seed}.png")
    files = [{"image": handle_file(tmp_path / f"{seed}.png"), "caption": None} for seed in range(7)]
    maps, shown, facts = client.predict(files, "tiny-model", api_name="/odd")
    assert facts["images"][0]["name"] == "3.png"
    assert "3.png" in shown
    assert len(maps) == 7
    scores = [row["score"] for row in facts["images"]]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(Exception, match="5 pictures came"):
        client.predict(files[:5], "tiny-model", api_name="/odd")


def mask_of(width: int, height: int) -> str:
    import base64

    picture = Image.new("L", (width, height))
    picture.paste(255, (5, 5, 15, 12))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_fill_keeps_what_is_known(client: Client, photo: Path) -> None:
    pair, shown, picture, mask = client.predict(
        handle_file(photo), mask_of(61, 45), "tiny-model", "project", api_name="/fill"
    )
    before, after = as_array(photo), as_array(picture)
    hole = np.zeros((45, 61), dtype=bool)
    hole[5:12, 5:15] = True
    assert np.array_equal(as_array(mask)[..., 0] == 255, hole)
    assert np.array_equal(before[~hole], after[~hole])
    assert not np.array_equal(before[hole], after[hole])
    assert (as_array(pair[0])[hole] == 128).all()
    assert "2.6 %" in shown
    for mask, words in (
        ("", "Nothing is painted"),
        ("data:text/html,x", "PNG"),
        (mask_of(45, 61), "45 x 61"),
    ):
        with pytest.raises(Exception, match=words):
            client.predict(handle_file(photo), mask, "tiny-model", "project", api_name="/fill")


def test_page_needs_no_other_server(page: Any) -> None:
    for path in ("", "theme.css", "config"):
        text = httpx.get(f"{page.local_url}{path}").text
        assert not re.findall(r"(?:src|href|url)[=(]['\"]?(?:https?:)?//[^'\"]*\.(?:js|css|woff2?)", text), (
            path
        )
        assert "fonts.g" not in text
    assert page.share is False
    assert page.allowed_paths == []
    assert page.analytics_enabled is False


def test_sliders_say_what_each_side_is(page: Any) -> None:
    from latentvae.demo.widgets import static

    style = static("page.css")
    sliders = [each["props"] for each in page.config["components"] if each["type"] == "imageslider"]
    assert len(sliders) == 3
    for slider in sliders:
        name, (left, right) = slider["elem_id"], slider["label"].split(" and ")
        assert f'#{name}::before {{ content: "{left}"; }} #{name}::after {{ content: "{right}"; }}' in style


def test_pictures_have_names_and_the_page_says_what_it_is(page: Any) -> None:
    text = httpx.get(page.local_url).text
    # the browser writes the title from the configuration
    assert page.config["title"] == "latentvae: what an image autoencoder keeps of a picture"
    assert f'<meta property="og:title" content="{page.config["title"]}" />' in text
    text = page.config["head"]  # which the browser reads there
    assert re.search('<meta name="description" content="[^"]{60,160}">', text)
    named = json.loads(re.search("const PICTURES = ({.*?});", text)[1])  # type: ignore[index]
    shown = [
        each["props"]
        for each in page.config["components"]
        if each["type"] in ("image", "imageslider") and each["props"].get("interactive") is False
    ]
    assert {each["elem_id"]: each["label"] for each in shown} == named
    assert len(named) == len(shown) > 6  # each has an id of its own
    assert "ArrowLeft" in text


def test_port_in_use_is_said_with_a_way_out(page: Any) -> None:
    from latentvae.demo.server import check_port

    port = int(page.local_url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(LatentVAEError, match="--port"):
        check_port("127.0.0.1", port)
    check_port("127.0.0.1", free_port())
    for nowhere in ("host.invalid", "192.0.2.1"):
        with pytest.raises(LatentVAEError, match=r"is no address of this machine.*--host"):
            check_port(nowhere, free_port())


def test_verb_without_gradio_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(cli.app, ["demo"])
    assert isinstance(result.exception, LatentVAEError)
    assert install_command("demo") in str(result.exception)


def test_models_are_named_by_the_end_of_their_path(model: Path, tmp_path: Path) -> None:
    from latentvae.demo.loaded_models import Models

    inner = tmp_path / "run" / "vae"
    inner.parent.mkdir()
    inner.symlink_to(model)
    models = Models([model, model], 1024)
    assert models.names[-2:] == ["tiny-model", "tiny-model (2)"]
    with pytest.raises(ModelError, match="choose one of"), models.use("/etc"):
        pass
    with pytest.raises(ModelError, match="nowhere"):
        Models(["nowhere"], 1024)


def test_large_images_are_tiled_with_the_same_result(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from latentvae.demo import loaded_models, one_model
    from latentvae.demo.desk import Desk
    from latentvae.demo.guard import Limits
    from latentvae.demo.reconstruct import Reconstruct
    from latentvae.runtime.tiling import layers

    monkeypatch.setattr(loaded_models, "bundled", list)
    monkeypatch.setattr(one_model, "_is_faster", lambda *_: False)
    Image.fromarray(textured(100, 70, 2)).save(tmp_path / "a.png")
    (first, whole), (_, tiled) = (
        Reconstruct(Desk(loaded_models.Models([model], above), Limits())).run(
            str(tmp_path / "a.png"), "tiny-model"
        )
        for above in (1024, 32)
    )
    # the pictures come first, the figures when they are measured
    assert first[0] == whole[0]
    assert "<b>-</b>" in first[3]
    assert "<b>-</b>" not in whole[3]
    assert layers
    difference = np.abs(as_array(whole[5]).astype(int) - as_array(tiled[5]))
    assert difference.max() <= 1
    assert whole[4]["psnr"] == pytest.approx(tiled[4]["psnr"], abs=1e-3)


def test_sample_draws_by_seed(client: Client, tmp_path: Path) -> None:
    for seed in range(5):
        Image.fromarray(textured(70, 64, seed)).save(tmp_path / f"{seed}.png")
    files = [{"image": handle_file(tmp_path / f"{seed}.png"), "caption": None} for seed in range(5)]

    def draws(prior: str, seed: int, photos: Any = files) -> list[np.ndarray]:
        pictures, facts = client.predict(photos, "tiny-model", prior, "64", 3, seed, api_name="/sample")
        assert facts["learned_from"] == (10 if prior == "gaussian" else 0)
        return [as_array(each["image"]) for each in pictures]

    for prior in ("gaussian", "standard"):
        first = draws(prior, 1)
        assert [each.shape for each in first] == [(64, 64, 3)] * 3
        assert all(np.array_equal(*pair) for pair in zip(first, draws(prior, 1), strict=True))
        assert not np.array_equal(first[0], draws(prior, 2)[0])
    assert len(draws("standard", 0, None)) == 3
    with pytest.raises(Exception, match="2 pictures came"):
        draws("gaussian", 0, files[:2])


def test_files_go_after_a_while_and_the_pages_own_stay(tmp_path: Path) -> None:
    from latentvae.demo.server import Sweeper

    def file(name: str) -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        return tmp_path / name

    own = file("a/example.png")
    sweeper = Sweeper(tmp_path, keep_seconds=100, sweep_seconds=1)
    upload = file("b/upload.png")
    now = upload.stat().st_mtime
    sweeper.sweep(now + 50)
    assert upload.exists()
    sweeper.sweep(now + 101)
    assert not upload.parent.exists()
    assert own.exists()

    asked, others = file("c/asked.png"), file("d/others.png")
    elsewhere = tmp_path.parent / "elsewhere.png"
    elsewhere.write_bytes(b"x")
    os.utime(elsewhere, (1, 1))
    sweeper.asked_for = lambda: [str(asked), str(elsewhere), "http://there", "a" * 5000, "\0"]
    sweeper.sweep(now + 1000)  # a request waits for long
    assert asked.exists()
    assert not others.exists()
    assert elsewhere.stat().st_mtime == 1


def test_one_picture_and_one_model_hold_for_the_whole_page(page: Any) -> None:
    components = {each["id"]: each["props"] for each in page.config["components"]}
    photos = [number for number, each in components.items() if each.get("elem_classes") == ["lv-photo"]]
    assert [components[number]["label"] for number in photos] == ["Picture", "To"]
    (model,) = (number for number, each in components.items() if each.get("elem_id") == "lv-model")
    events = page.config["dependencies"]
    (both,) = (each for each in events if "lvFollow" in (each["js"] or ""))
    assert not both["backend_fn"]  # the browser knows which tab is open
    assert both["targets"] == [(photos[0], "change"), (model, "change")]
    for name in ENDPOINTS:
        (own,) = (each for each in events if each["api_name"] == name[1:])
        (live,) = (each for each in events if each["api_name"] == f"{name[1:]}_live")
        assert live["api_visibility"] == "undocumented"
        assert live["inputs"][1:] == own["inputs"]
        assert model in live["inputs"]
        pressed_by = [components.get(number, {}).get("elem_id") for number, _ in live["targets"]]
        assert f"lv-follow-{name[1:]}" in pressed_by
        (follow,) = (each for each in components.values() if each.get("elem_id") == f"lv-follow-{name[1:]}")
        assert bool(follow["elem_classes"]) == (name != "/decode")  # whose file names its model
        unveiled = [each["js"] for each in events if each["trigger_after"] == live["id"]]
        assert f"() => lvUnveil('lv-follow-{name[1:]}')" in unveiled
