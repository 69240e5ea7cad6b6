"""Interpolation: ends, steps, norms, degenerate angles, files and messages."""

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.cli.interpolate import interpolate as verb
from latentvae.images.reading import load_image
from latentvae.images.resizing import thumbnail
from latentvae.images.saving import save_image
from latentvae.images.tensors import to_uint8
from latentvae.measure.lpips import WEIGHTS_ENV
from latentvae.models.exporting import export
from latentvae.models.latents import reconstruct
from latentvae.toolbox.editing.interpolate import (
    interpolate,
    interpolate_latents,
    match_size,
    save_animation,
    slerp,
    step_sizes,
    strip,
)

ROUTES = ("linear", "spherical")


def images(count: int, height: int = 37, width: int = 45) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, height, width, generator=generator) * 2 - 1 for _ in range(count)]


def vectors(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("route", ROUTES)
def test_the_frames_at_images_are_exactly_their_reconstructions(tiny_vae, route):
    three = images(3)
    found = interpolate(tiny_vae, three, frames=4, route=route)
    assert found.frames.shape == (7, 3, 37, 45)
    assert found.positions == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    for index, image in zip((0, 3, 6), three, strict=True):
        assert torch.equal(found.frames[index], reconstruct(tiny_vae, image[None]).reconstructions[0])
    assert not torch.equal(found.frames[1], found.frames[0])


def test_more_frames_do_not_change_those_in_common(tiny_vae):
    pair = images(2)
    few, many = (interpolate(tiny_vae, pair, frames=n).frames for n in (3, 5))
    assert torch.equal(few, many[::2])


def test_linear_steps_are_equal():
    start, end = vectors(2)
    steps = [b - a for a, b in pairwise(interpolate_latents(start, end, 6, "linear"))]
    assert all(torch.allclose(step, (end - start) / 5) for step in steps)


@pytest.mark.parametrize("factor", [3.0, 1.0, -1.0, -0.5])
def test_spherical_steps_of_collinear_latents_are_equal_and_straight(factor):
    (start,) = vectors(1)
    mean = torch.full((1, 4, 1, 1), 0.25, dtype=torch.float64)
    end = mean + factor * (start - mean)
    way = [slerp(start, end, number / 5, mean) for number in range(6)]
    assert all(torch.allclose(b - a, (end - start) / 5, atol=1e-9) for a, b in pairwise(way))


def test_spherical_steps_of_a_flat_or_repeated_image_are_straight():
    (start,) = vectors(1)
    for end in (start, torch.zeros_like(start) + start.mean((2, 3), keepdim=True)):
        steps = [b - a for a, b in pairwise(interpolate_latents(start, end, 6, "spherical"))]
        assert all(step.isfinite().all() for step in steps)
        assert torch.allclose(sum(steps), end - start)


def test_an_arc_keeps_the_norm_about_both_means_and_the_speed():
    start, end = (each - each.mean((2, 3), keepdim=True) for each in vectors(2))
    mean = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)[None, :, None, None]
    start, end = (mean + 7 * each / each.norm() for each in (start, end))
    way = interpolate_latents(start, end, 9, "spherical")
    assert torch.tensor([float((each - mean).norm()) for each in way]) == pytest.approx(7)
    steps = torch.tensor([float((b - a).norm()) for a, b in pairwise(way)])
    assert steps == pytest.approx(float(steps[0]))
    line = interpolate_latents(start, end, 9, "linear")
    assert float((line[4] - mean).norm()) < 6.5  # what the arc is for


def test_norms_of_different_images_go_along_linearly_each_of_a_batch_for_itself():
    start, end = torch.cat(vectors(2)), torch.cat([3 * each for each in vectors(2, seed=5)])
    norms = [each.flatten(1).norm(dim=1) for each in (start, slerp(start, end, 0.25), end)]
    assert torch.allclose(norms[1], 0.75 * norms[0] + 0.25 * norms[2])


def test_latents_that_are_the_mean_have_no_direction_and_give_a_line():
    (end,) = vectors(1)
    start = torch.zeros_like(end)
    assert torch.allclose(slerp(start, end, 0.3), 0.3 * end)
    assert torch.equal(slerp(start, start, 0.3), start)


def test_small_angles_are_exact_and_float32_stays_float32():
    start, other = vectors(2)
    end = start + 1e-7 * other
    assert torch.allclose(slerp(start, end, 0.5), (start + end) / 2, atol=1e-12, rtol=0)
    assert slerp(start.float(), end.float(), 0.5).dtype == torch.float32


class Mean(torch.nn.Module):
    """Stands in for LPIPS: the square of the difference of mean colours."""

    net, min_size = "alex", 8

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(1))

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x.mean((2, 3), keepdim=True)]

    def distance_from_features(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
        return (a[0] - b[0]).square().sum((1, 2, 3))


def test_steps_are_measured_between_neighbours_in_8_bit_levels():
    frames = torch.stack([torch.full((3, 9, 9), value) for value in (-1.0, 0.0, 1.0, 5.0)])
    steps = step_sizes(frames, Mean())
    assert [step.rms for step in steps] == pytest.approx([128, 127, 0])
    assert [step.lpips for step in steps] == pytest.approx(
        [3 * (128 / 127.5) ** 2, 3 * (127 / 127.5) ** 2, 0]
    )
    assert [step.lpips for step in step_sizes(frames[..., :7, :7], Mean())] == [None] * 3
    assert [step.lpips for step in step_sizes(frames)] == [None] * 3


def test_bad_input_is_named(tiny_vae):
    one, two = images(2)
    for message, given, options in (
        ("1 image came", [one], {}),
        ("2 or more", [one, two], {"frames": 1}),
        ("linear, spherical", [one, two], {"route": "curved"}),
        ("45x37 and 40x37", [one, two[..., :40]], {}),
    ):
        with pytest.raises(LatentVAEError, match=message):
            interpolate(tiny_vae, given, **options)


@pytest.mark.parametrize("size", [(20, 20), (37, 45), (10, 60), (80, 90)])
def test_images_are_scaled_and_cropped_to_a_size(size):
    image = images(1)[0]
    matched = match_size(image, *size)
    assert matched.shape == (3, *size)
    assert matched.abs().max() <= 1
    if size == (37, 45):
        assert torch.equal(matched, image)


def test_a_crop_takes_the_middle():
    image = torch.zeros(1, 10, 30)
    image[..., 10:20] = 1
    assert match_size(image, 10, 10).eq(1).all()


def test_thumbnails_only_shrink():
    image = images(1)[0]
    assert torch.equal(thumbnail(image, 45), image)
    assert thumbnail(image, 9).shape == (3, 7, 9)


def test_a_strip_has_rows_of_nine(tiny_vae):
    found = interpolate(tiny_vae, images(2), frames=10)
    short = interpolate(tiny_vae, images(2), frames=9)
    tall, low = (strip(each, step_sizes(each.frames)) for each in (found, short))
    assert (tall.width, tall.height) == (low.width, 2 * low.height)


def test_animations_hold_every_frame_and_webp_exactly(tiny_vae, tmp_path):
    frames = interpolate(tiny_vae, images(2), frames=4).frames
    save_animation(frames, tmp_path / "a.webp", fps=20)
    save_animation(frames, tmp_path / "a.gif", fps=20)
    for name in ("a.webp", "a.gif"):
        with Image.open(tmp_path / name) as picture:
            assert picture.n_frames == 4
            assert picture.info.get("loop") == 0
            picture.load()
            assert picture.info["duration"] == 50
    with Image.open(tmp_path / "a.webp") as picture:
        for number, frame in enumerate(frames):
            picture.seek(number)
            seen = torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.uint8)
            assert torch.equal(seen, to_uint8(frame).permute(1, 2, 0).flatten())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.webp"]
    with pytest.raises(ImageError, match=r"\.webp, \.gif"):
        save_animation(frames, tmp_path / "a.mp4")
    with pytest.raises(ImageError, match="folder that exists"):
        save_animation(frames, tmp_path / "gone" / "a.gif")


# --- the verb ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_vae) -> Callable[..., dict]:
    """Run the verb with a tiny model and without LPIPS weights; return its JSON."""
    monkeypatch.delenv(WEIGHTS_ENV, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    model = export(tiny_vae, tmp_path / "model")
    app = typer.Typer()
    app.command()(verb)

    def call(*arguments: object, code: int = 0) -> dict:
        options = ["--model", str(model), "--output", str(tmp_path / "out"), "--json", "--device", "cpu"]
        result = CliRunner().invoke(app, [*map(str, arguments), *options])
        if isinstance(result.exception, LatentVAEError):
            raise result.exception
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    return call


def photographs(folder: Path, count: int = 2) -> list[Path]:
    folder.mkdir()
    for number, image in enumerate(images(count)):
        save_image(image, folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(count)]


def test_the_verb_writes_what_it_says(run, tmp_path, tiny_vae):
    paths = photographs(tmp_path / "in")
    result = run(*paths, "--frames", 3, "--route", "both", "--separate")
    assert [each["route"] for each in result["routes"]] == ["linear", "spherical"]
    for each in result["routes"]:
        assert each["lpips_steps"] is None
        assert each["rms_total"] == pytest.approx(sum(each["rms_steps"]))
        assert each["rms_largest_over_mean"] == pytest.approx(max(each["rms_steps"]) / each["rms_total"] * 2)
    assert result["lpips_missing_reason"]
    out = tmp_path / "out"
    assert json.loads((out / "interpolation.json").read_text()) == result
    assert {path.name for path in out.iterdir()} == {
        *("linear", "linear.strip.png", "linear.webp", "spherical", "spherical.strip.png"),
        *("spherical.webp", "interpolation.json"),
    }
    wanted = reconstruct(tiny_vae, load_image(paths[1])[None]).reconstructions[0]
    written = load_image(out / "spherical" / "0002.png")
    assert (
        to_uint8(written).int() - to_uint8(wanted).int()
    ).abs().max() <= 1  # the verb's model is optimized


def test_the_verb_comes_back_and_fits_other_sizes(run, tmp_path):
    paths = photographs(tmp_path / "in")
    save_image(images(1, 50, 40)[0], tmp_path / "in" / "other.png")
    with pytest.raises(ImageError, match="--fit"):
        run(tmp_path / "in")
    result = run(tmp_path / "in", "--fit", "--closed", "--frames", 3, "--animation", "gif")
    assert result["images"] == [str(path) for path in (*paths, tmp_path / "in" / "other.png", paths[0])]
    assert len(result["routes"][0]["positions"]) == 7
    with Image.open(tmp_path / "out" / "spherical.gif") as picture:
        assert picture.n_frames == 6
        assert picture.size == (45, 37)


def test_the_verb_needs_two_images_and_skips_a_broken_third(run, tmp_path):
    paths = photographs(tmp_path / "in")
    with pytest.raises(LatentVAEError, match="1 of 1 image could"):
        run(paths[0])
    broken = tmp_path / "in" / "broken.png"
    broken.write_bytes(b"broken")
    with pytest.raises(LatentVAEError, match=r"1 of 2 images.*broken\.png"):
        run(paths[0], broken)
    assert len(run(*paths, broken, "--frames", 2, code=3)["skipped"]) == 1


@pytest.mark.parametrize("size", [(1, 16000), (16000, 1)])
def test_a_line_of_pixels_is_refused_and_not_blown_up(size):
    with pytest.raises(ImageError, match="crop it first"):
        match_size(torch.zeros(3, *size), 384, 384)


def test_frames_that_would_not_fit_into_memory_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("latentvae.runtime.memory.free_memory", lambda device: 1e6)
    with pytest.raises(ImageError, match="fewer --frames"):
        run(*photographs(tmp_path / "in"), "--frames", 200)


def test_a_name_that_is_not_utf_8_is_no_problem(run, tmp_path):
    paths = photographs(tmp_path / "in")
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.png"))
    paths[1].rename(odd)
    result = run(paths[0], odd, "--frames", 2)
    assert result["images"][1] == str(odd)
    assert json.loads((tmp_path / "out" / "interpolation.json").read_text()) == result
