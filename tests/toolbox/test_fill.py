"""Filling in: known pixels, masks, smooth extensions, weights, and the verb."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import latentvae
from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.cli.fill import fill as verb
from latentvae.images.tensors import from_uint8
from latentvae.models.exporting import export
from latentvae.models.latents import decode, encode
from latentvae.toolbox.editing import fill as filling
from latentvae.toolbox.editing.fill import (
    Layers,
    elsewhere,
    extend,
    fill,
    fill_in_windows,
    fit_weights,
    hole_psnr,
    is_solid,
    windows,
)

METHODS = ["optimise", "project", "one_pass"]


def picture(height: int = 37, width: int = 45) -> torch.Tensor:
    """A smooth picture with 8-bit values, (1, 3, H, W)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin(x / 5 + y / 9 + phase) for phase in (0.0, 1.0, 2.0)]
    return from_uint8((torch.stack(waves)[None] * 100 + 128).to(torch.uint8))


def scattered(share: float = 0.3, height: int = 37, width: int = 45) -> torch.Tensor:
    return torch.rand(height, width, generator=torch.Generator().manual_seed(1)) < share


def box(height: int = 37, width: int = 45) -> torch.Tensor:
    missing = torch.zeros(height, width, dtype=torch.bool)
    missing[10:24, 12:26] = True
    return missing


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("blend", [True, False])
def test_known_pixels_are_kept_bit_for_bit_and_missing_ones_are_not_looked_at(
    tiny_vae: Any, method: Any, blend: bool
) -> None:
    images, missing = picture(), scattered()
    hidden = images.masked_fill(missing, torch.nan)
    result = fill(tiny_vae, hidden, missing, method=method, steps=1, blend=blend)
    assert torch.equal(result.images[..., ~missing], images[..., ~missing])
    assert result.images.isfinite().all()
    assert result.images.abs().max() <= 1
    again = fill(tiny_vae, images, missing, method=method, steps=1, blend=blend)
    assert torch.equal(result.images, again.images)


def test_without_blend_the_hole_holds_what_the_latents_decode_to(tiny_vae: Any) -> None:
    images, missing = picture(), box()
    result = fill(tiny_vae, images, missing, method="one_pass", blend=False)
    with torch.no_grad():
        posterior, padding = encode(tiny_vae, images.masked_fill(missing, 0.0))
        wanted = decode(tiny_vae, posterior.mode(), padding)
    assert torch.equal(result.decoded, wanted)
    assert torch.equal(result.images[..., missing], wanted.clamp(-1, 1)[..., missing])


def test_blended_hole_is_the_smooth_part_plus_the_detail(tiny_vae: Any, monkeypatch: Any) -> None:
    images, missing = picture(), box()
    monkeypatch.setattr(filling, "fit_weights", lambda *_: (0.25, 0.5))
    result = fill(tiny_vae, images, missing, method="project", steps=1)
    membrane, plate = (extend(images, missing, order=order) for order in (1, 2))
    smooth = membrane + 0.25 * (plate - membrane)
    detail = result.decoded - extend(result.decoded, missing)
    assert torch.allclose(result.smooth, smooth)
    wanted = (smooth + 0.5 * detail).clamp(-1, 1)
    assert torch.allclose(result.images[..., missing], wanted[..., missing])
    assert (result.plate, result.detail) == (0.25, 0.5)


def test_optimised_latents_agree_with_known_pixels_better_than_the_encoders(tiny_vae: Any) -> None:
    images, missing = picture(), scattered()
    start = fill(tiny_vae, images, missing, method="project", steps=1, blend=False)
    steps: list[int] = []
    result = fill(tiny_vae, images, missing, steps=20, blend=False, progress=lambda: steps.append(1))
    errors = [(each.decoded - images)[..., ~missing].square().mean() for each in (start, result)]
    assert errors[1] < 0.8 * errors[0]
    assert len(steps) == 20
    assert all(parameter.grad is None for parameter in tiny_vae.parameters())


def test_what_is_hidden_for_the_weights_is_not_seen_by_the_model(tiny_vae: Any, monkeypatch: Any) -> None:
    images, missing = picture(), box()
    hidden, seen = elsewhere(missing), []
    monkeypatch.setattr(filling, "fit_weights", lambda layers, *_: seen.append(layers.membrane) or (0.0, 0.0))
    fill(tiny_vae, images, missing, method="one_pass")
    assert torch.equal(seen[0], extend(images.masked_fill(hidden, torch.nan), missing | hidden))


def test_nothing_missing_gives_the_image_itself_without_the_model() -> None:
    images = picture()
    none = torch.zeros(37, 45, dtype=torch.bool)
    assert fill(None, images, none).images is images  # type: ignore[arg-type]


def test_everything_missing_is_refused(tiny_vae: Any) -> None:
    with pytest.raises(ImageError, match=r"every pixel is missing.*inverted"):
        fill(tiny_vae, picture(), torch.ones(37, 45, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"missing": torch.zeros(45, 37, dtype=torch.bool)}, r"mask \(45, 37\).*same size"),
        ({"images": torch.zeros(2, 3, 37, 45)}, "one image"),
        ({"method": "magic"}, "optimise, project, one_pass"),
        ({"method": "one_pass", "steps": 3}, "exactly 1"),
        ({"steps": 0}, "1 or more"),
    ],
)
def test_bad_input_is_named(tiny_vae: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(LatentVAEError, match=match):
        fill(tiny_vae, **{"images": picture(), "missing": scattered(), **options})


def test_membrane_and_plate_continue_a_ramp() -> None:
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    ramp = ((x + 2 * y) / 40 - 0.5)[None, None]
    missing = torch.zeros(24, 24, dtype=torch.bool)
    missing[8:15, 9:16] = True
    for order in (1, 2):  # a ramp has no curvature, so both are exact
        assert torch.allclose(extend(ramp, missing, order=order), ramp, atol=2e-3)
    bowl = ((x - 12) ** 2 / 144)[None, None]
    errors = [(extend(bowl, missing, order=order) - bowl).abs().max() for order in (1, 2)]
    assert errors[1] < 0.3 * errors[0]


def test_membrane_is_the_solution_of_laplaces_equation() -> None:
    images, missing = picture(20, 22).double(), torch.zeros(20, 22, dtype=torch.bool)
    missing[3:9, 0:7] = True  # at the edge, over which nothing flows
    found = extend(images, missing)
    padded = torch.nn.functional.pad(found, (1, 1, 1, 1), mode="replicate")
    around = padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:] + padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]
    assert (around / 4 - found)[..., missing].abs().max() < 1e-3
    known = images[..., ~missing]
    assert found.min() >= known.min() - 1e-6
    assert found.max() <= known.max() + 1e-6


def test_hidden_pixels_are_known_and_like_the_hole() -> None:
    hole = box()
    hidden = elsewhere(hole)
    assert not (hidden & hole).any()
    assert is_solid(hole)
    assert hidden.sum() > 0.5 * hole.sum()
    many = scattered(0.5)
    few = elsewhere(many, seed=3)
    assert not is_solid(many)
    assert not (few & many).any()
    assert 0.05 < few.sum() / (~many).sum() < 0.15
    assert torch.equal(few, elsewhere(many, seed=3))
    assert not torch.equal(few, elsewhere(many, seed=4))


@pytest.mark.parametrize("true", [(0.3, 0.6), (0.0, 1.0), (1.0, 0.0)])
def test_weights_are_found_again(true: tuple[float, float]) -> None:
    parts = torch.randn(4, 1, 3, 16, 16, dtype=torch.float64)
    layers = Layers(*parts, latents=parts[0])
    hidden = torch.rand(16, 16) < 0.5
    assert fit_weights(layers, layers.mix(*true), hidden) == pytest.approx(true, abs=1e-9)


def test_weights_outside_the_range_are_the_best_inside_it() -> None:
    parts = torch.randn(4, 1, 3, 16, 16, dtype=torch.float64)
    layers, hidden = Layers(*parts, latents=parts[0]), torch.rand(16, 16) < 0.5
    images = layers.mix(0.4, -0.7)
    found = fit_weights(layers, images, hidden)

    def loss(plate: float, detail: float) -> float:
        return float((layers.mix(plate, detail) - images)[..., hidden].square().sum())

    grid = [(p, d) for p in np.linspace(0, 1, 21) for d in np.linspace(0, 1, 21)]
    assert found[1] == 0
    assert loss(*found) <= min(loss(*point) for point in grid) + 1e-9


def test_psnr_is_of_the_hole_alone() -> None:
    images, missing = picture(), box()
    other = images + 2 / 255 * 10 * missing
    assert hole_psnr(other.where(missing, -images), images, missing) == pytest.approx(
        20 * np.log10(255 / 10), abs=1e-4
    )
    assert hole_psnr(images, images, missing) == float("inf")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A model, a picture and its mask, as a person has them."""
    paths = {name: tmp_path / f"{name}.png" for name in ("image", "mask", "small", "none")}
    levels = ((picture()[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(paths["image"])
    Image.fromarray(scattered().numpy()).save(paths["mask"])
    Image.fromarray(scattered(0.3, 20, 20).numpy()).save(paths["small"])
    Image.new("1", (45, 37)).save(paths["none"])
    torch.manual_seed(0)
    return {**paths, "model": export(latentvae.build("tiny"), tmp_path / "tiny"), "out": tmp_path / "out"}


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_verb_writes_a_picture_whose_known_pixels_are_the_files(files: dict[str, Path]) -> None:
    common = ("-m", files["model"], "-o", files["out"], "--original", files["image"], "--json")
    result = run(files["image"], files["mask"], *common, "--steps", 2)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    filled, original = (np.asarray(Image.open(path)) for path in (figures["filled"], files["image"]))
    known = ~scattered().numpy()
    assert (filled[known] == original[known]).all()
    assert (filled[~known] != original[~known]).any()
    assert figures["missing_share"] == pytest.approx(1 - known.mean())
    assert figures["psnr_in_hole"].keys() == {"filled", "smooth", "decoded"}
    assert json.loads((files["out"] / "image.png.fill.json").read_text()) == figures
    assert Path(figures["comparison"]).is_file()


def test_verb_takes_the_longest_names(files: dict[str, Path]) -> None:
    image = files["image"].rename(files["image"].with_name("x" * 251 + ".png"))
    result = run(image, files["none"], "-m", files["model"], "-o", files["out"])
    assert result.exit_code == 0, result.output
    kinds = sorted("".join(path.suffixes) for path in files["out"].iterdir())
    assert kinds == [".comparison.png", ".fill.json", ".filled.png"]


def test_verb_refuses_a_mask_of_another_size_and_says_what_the_hole_holds(files: dict[str, Path]) -> None:
    result = run(files["image"], files["small"], "-m", files["model"], "-o", files["out"])
    assert isinstance(result.exception, ImageError)
    assert "20 x 20 px, but" in str(result.exception)
    result = run(files["image"], files["none"], "-m", files["model"], "-o", files["out"])
    assert result.exit_code == 0
    assert "no white pixel" in result.output
    filled = np.asarray(Image.open(files["out"] / "image.png.filled.png"))
    assert (filled == np.asarray(Image.open(files["image"]))).all()
    said = run(files["image"], files["mask"], "-m", files["model"], "-o", files["out"], "--steps", 1).output
    assert "a smooth extension of the rest and " in said


def test_windows_cover_every_pixel_and_overlap() -> None:
    covered = torch.zeros(150, 333)
    for window in windows(150, 333, 64):
        assert (window.height, window.width) == (64, 64)
        assert (window.weights() > 0).all()
        window.of(covered).add_(1)
    assert covered.min() >= 1
    tops = sorted({window.top for window in windows(150, 333, 64)})
    assert max(np.diff(tops)) <= 48
    assert [(one.height, one.width) for one in windows(50, 64, 64)] == [(50, 64)]


def test_windows_keep_known_pixels_and_leave_out_those_without_a_hole(
    tiny_vae: Any, monkeypatch: Any
) -> None:
    images, missing = picture(100, 260), torch.zeros(100, 260, dtype=torch.bool)
    missing[40:52, 60:70] = True
    seen = []

    def spy(vae: Any, part: torch.Tensor, hole: torch.Tensor, **options: Any) -> Any:
        seen.append(tuple(part.shape[-2:]))
        return fill(vae, part, hole, **options)

    monkeypatch.setattr("latentvae.toolbox.editing.fill.fill", spy)
    result = fill_in_windows(tiny_vae, images.masked_fill(missing, torch.nan), missing, 64, method="project")
    total = len(list(windows(100, 260, 64)))
    assert 0 < len(seen) < total / 2
    assert set(seen) == {(64, 64)}
    assert torch.equal(result.images[..., ~missing], images[..., ~missing])
    assert result.images.isfinite().all()
    whole = fill(tiny_vae, images, missing, method="project")
    assert hole_psnr(result.images, images, missing) > hole_psnr(whole.smooth, images, missing) - 1


def test_a_window_without_known_pixels_keeps_the_smooth_extension(tiny_vae: Any) -> None:
    images, missing = picture(64, 192), torch.ones(64, 192, dtype=torch.bool)
    missing[:, :8] = False
    result = fill_in_windows(tiny_vae, images, missing, 64, method="project", steps=1)
    assert torch.equal(result.images[..., 70:], extend(images, missing)[..., 70:])


def test_one_window_is_fill_itself_and_tiny_windows_are_refused(tiny_vae: Any) -> None:
    images, missing = picture(), scattered()
    one = fill_in_windows(tiny_vae, images, missing, 64, method="project")
    assert torch.equal(one.images, fill(tiny_vae, images, missing, method="project").images)
    with pytest.raises(LatentVAEError, match="windows of 32 pixels"):
        fill_in_windows(tiny_vae, images, missing, 32)


def test_the_final_run_goes_on_from_the_trials_latents(tiny_vae: Any, monkeypatch: Any) -> None:
    """With a trial as good as this one, no step is needed to stay close to it; from the start it is."""
    images, missing = picture(), scattered()
    steps = []
    fill(tiny_vae, images, missing, steps=6, progress=lambda: steps.append(1))
    assert len(steps) == 6 + 2
    steps.clear()
    fill(tiny_vae, images, missing, steps=6, blend=False, progress=lambda: steps.append(1))
    assert len(steps) == 6
    run = filling._Run(tiny_vae, "optimise", 6, None)
    trial = run.layers(images, missing)
    monkeypatch.setattr(filling, "LEARNING_RATE", 0.0)
    assert torch.equal(run.layers(images, missing, trial).latents, trial.latents)
    assert not torch.equal(run.layers(images, missing).latents, trial.latents)


def test_verb_fills_in_windows_where_gradients_do_not_fit(files: dict[str, Path], monkeypatch: Any) -> None:
    levels = ((picture(96, 130)[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(files["image"])
    Image.fromarray(scattered(0.1, 96, 130).numpy()).save(files["mask"])
    arguments = (files["image"], files["mask"], "-m", files["model"], "-o", files["out"], "--json")
    monkeypatch.setattr("latentvae.runtime.memory.free_memory", lambda _: 4 * 5 * 16 * 4 * 64 * 64)
    result = run(*arguments, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tile_size"] == 64
    with monkeypatch.context() as less:
        less.setattr("latentvae.runtime.memory.free_memory", lambda _: 10**5)
        result = run(*arguments)
    assert isinstance(result.exception, ImageError)
    assert "even in windows" in str(result.exception)
    assert json.loads(run(*arguments, "--method", "project").stdout)["tile_size"] is None


def test_a_hole_that_is_filled_exactly_and_a_method_without_gradients_that_must_tile(
    files: dict[str, Path], monkeypatch: Any
) -> None:
    flat = Image.new("RGB", (45, 37), (128, 128, 128))
    flat.save(files["image"])
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "latentvae.runtime.tiling.fitting.tile_to_fit", lambda *arguments: asked.append(arguments)
    )
    common = ("-m", files["model"], "-o", files["out"], "--original", files["image"], "--method", "project")
    result = run(files["image"], files["mask"], *common)
    assert result.exit_code == 0, result.output
    text = (files["out"] / "image.png.fill.json").read_text()
    assert "Infinity" not in text
    assert [arguments[2:] for arguments in asked] == [(37, 45, None, None)]
