"""Variations: temperatures, seeds, what a copy depends on, files and messages."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.cli.vary import lines_of_variations
from latentvae.cli.vary import vary as verb
from latentvae.images.reading import load_image
from latentvae.images.saving import save_image
from latentvae.images.tensors import to_uint8
from latentvae.measure.lpips import WEIGHTS_ENV
from latentvae.measure.metrics import psnr
from latentvae.models.exporting import export
from latentvae.models.latents import encode, reconstruct, seeded_noise
from latentvae.toolbox.editing.vary import Reference, Variations, image_key, vary


def picture(seed: int = 0, height: int = 37, width: int = 45) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, height, width, generator=generator) * 2 - 1


def test_temperature_0_is_the_reconstruction(tiny_vae):
    image = picture()
    wanted = reconstruct(tiny_vae, image[None]).reconstructions[0]
    copies = vary(tiny_vae, image, temperature=0.0, copies=2)
    assert copies.shape == (2, 3, 37, 45)
    assert all(torch.equal(copy, wanted) for copy in copies)
    assert torch.equal(Variations(tiny_vae, image).reconstruction, wanted)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_samples_deviate_by_temperature_times_the_posteriors_deviation(tiny_vae, temperature):
    variations = Variations(tiny_vae, picture())
    posterior = variations.posterior
    latents = torch.cat([variations.latents(temperature, copy) for copy in range(400)])
    scaled = (latents - posterior.mean) / posterior.std
    assert posterior.std.std() > 0.01 * posterior.std.mean()  # not all the same: the scaling counts
    assert scaled.std().item() == pytest.approx(temperature, rel=0.02)
    assert scaled.std(0).sub(temperature).abs().max() < 0.25 * temperature  # each element for itself
    assert scaled.mean().abs().item() < 0.02 * temperature


def test_a_copy_has_the_same_noise_at_every_temperature(tiny_vae):
    variations = Variations(tiny_vae, picture())
    mean = variations.posterior.mean
    one, two = (variations.latents(t, 3) - mean for t in (1.0, 2.0))
    assert torch.allclose(two, 2 * one, atol=1e-6)


def test_copies_depend_on_pixels_seed_and_number_alone(tiny_vae):
    image = picture()
    few, many = vary(tiny_vae, image, copies=2), vary(tiny_vae, image.clone(), copies=3)
    assert torch.equal(few, many[:2])
    different = [*many, vary(tiny_vae, image, copies=1, seed=1)[0]]
    for number, one in enumerate(different):
        assert not any(torch.equal(one, other) for other in different[:number])
    assert torch.equal(vary(tiny_vae, image, copies=1, seed=1)[0], different[-1])


def test_two_images_of_a_size_have_different_noise(tiny_vae):
    noises = []
    for seed in (0, 1):
        variations = Variations(tiny_vae, picture(seed))
        noises.append((variations.latents(1, 0) - variations.posterior.mean) / variations.posterior.std)
    assert (noises[0] - noises[1]).abs().mean() > 0.5


def test_noise_is_standard_normal_and_a_key_replaces_the_pixels(tiny_vae):
    noise = seeded_noise((4, 100, 100), 0, "key", 0)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    torch.randn(5)
    assert torch.equal(noise, seeded_noise((4, 100, 100), 0, "key", 0))
    pair = [Variations(tiny_vae, picture(seed), key="same") for seed in (0, 1)]
    noises = [(each.latents(1, 0) - each.posterior.mean) / each.posterior.std for each in pair]
    assert torch.allclose(*noises, atol=1e-3)


def test_the_key_is_that_of_8_bit_pixels_and_their_shape():
    image = picture()
    rounded = to_uint8(image).float() / 127.5 - 1
    assert image_key(image) == image_key(rounded)
    assert image_key(torch.zeros(3, 4, 6)) != image_key(torch.zeros(3, 6, 4))


def test_the_spread_is_that_of_the_moments(tiny_vae):
    spread = Variations(tiny_vae, picture()).spread
    posterior, _ = encode(tiny_vae, picture()[None])
    own = posterior.mean.var((2, 3), correction=0).mean().sqrt()
    assert spread.posterior_std == pytest.approx(posterior.std.square().mean().sqrt().item())
    assert spread.latents_std == pytest.approx(own.item(), rel=1e-4)
    assert spread.ratio == pytest.approx(spread.posterior_std / spread.latents_std)


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


def test_distances_are_those_of_8_bit_images():
    grey, white = (torch.full((3, 9, 9), value) for value in (0.0, 1.7))
    found = Reference(grey, Mean()).distance(white)
    assert found.psnr == pytest.approx(20 * math.log10(255 / 127))
    assert found.lpips == pytest.approx(3 * (127 / 127.5) ** 2)
    assert Reference(grey, Mean()).distance(grey).psnr == math.inf
    assert Reference(grey[..., :7], Mean()).distance(white[..., :7]).lpips is None
    with pytest.raises(LatentVAEError, match="nan"):
        Reference(grey).distance(grey * math.nan)


def test_bad_input_is_named(tiny_vae):
    for options in ({"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}):
        with pytest.raises(LatentVAEError, match="temperature"):
            vary(tiny_vae, picture(), **options)
    with pytest.raises(LatentVAEError, match="copies=0"):
        vary(tiny_vae, picture(), copies=0)
    with pytest.raises(ImageError, match="one image"):
        vary(tiny_vae, picture()[None])


# --- the verb ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_vae) -> Callable[..., dict]:
    """Run the verb with a tiny model and without LPIPS weights; return its JSON."""
    monkeypatch.delenv(WEIGHTS_ENV, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    model = export(tiny_vae, tmp_path / "model")
    app = typer.Typer()
    app.command()(verb)

    def call(*arguments: object, output: str = "out", code: int = 0) -> dict:
        options = ["--model", str(model), "--output", str(tmp_path / output), "--json", "--device", "cpu"]
        result = CliRunner().invoke(app, [*map(str, arguments), *options])
        if isinstance(result.exception, LatentVAEError):
            raise result.exception
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.png with a caption, class/a.png, and class/b.jpg, of two sizes."""
    root = tmp_path / "in"
    (root / "class").mkdir(parents=True)
    save_image(picture(0), root / "a.png")
    (root / "a.txt").write_text("a caption", encoding="utf-8")
    save_image(picture(1, 40, 33), root / "class" / "a.png")
    save_image(picture(2), root / "class" / "b.jpg")
    return root


def copies_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def test_the_verb_writes_copies_in_folders_as_they_were_with_their_captions(run, folder, tmp_path):
    result = run(folder, "--copies", 2)
    copies = tmp_path / "out" / "copies"
    assert set(copies_in(copies)) == {
        *("a.png.t1.0.png", "a.png.t1.1.png", "class/a.png.t1.0.png", "class/a.png.t1.1.png"),
        *("class/b.jpg.t1.0.png", "class/b.jpg.t1.1.png"),
    }
    assert {path.name for path in copies.rglob("*.json")} == {"a.png.t1.0.json", "a.png.t1.1.json"}
    assert json.loads((copies / "a.png.t1.1.json").read_text()) == {"caption": "a caption"}
    assert json.loads((tmp_path / "out" / "variations.json").read_text()) == result
    with Image.open(copies / "class" / "a.png.t1.0.png") as image:
        assert image.size == (33, 40)
    assert (tmp_path / "out" / "contact-sheet.png").is_file()


def test_files_do_not_depend_on_the_others_or_their_order(run, folder, tmp_path):
    run(folder / "class", folder / "a.png", "--copies", 3, output="all")
    run(folder / "a.png", "--copies", 2, output="one")
    alone, among = copies_in(tmp_path / "one"), copies_in(tmp_path / "all")
    written = {name: data for name, data in alone.items() if name.startswith("copies")}
    assert len(written) == 2
    for name, data in written.items():
        same = [key for key, other in among.items() if other == data]
        assert len(same) == 1
        assert same[0].endswith(name.rsplit(".", 2)[1] + ".png")
    run(folder / "a.png", "--copies", 2, "--seed", 1, output="other")
    assert not set(copies_in(tmp_path / "other").values()) & set(among.values())


def test_the_table_has_the_reconstruction_and_every_temperature(run, folder, tmp_path):
    result = run(folder / "a.png", "--copies", 2, "-t", 8, "-t", 0.5)
    rows = {row["temperature"]: row for row in result["temperatures"]}
    assert list(rows) == [0, 0.5, 8]
    assert rows[0]["psnr_to_reconstruction"] is None  # identical
    assert rows[8]["psnr_to_reconstruction"] < rows[0.5]["psnr_to_reconstruction"]
    original = load_image(folder / "a.png")[None]
    for temperature in (0.5, 8):
        files = [tmp_path / "out" / "copies" / f"a.png.t{temperature:g}.{copy}.png" for copy in (0, 1)]
        found = [psnr(original, load_image(file)[None]).item() for file in files]
        assert rows[temperature]["psnr_to_original"] == pytest.approx(sum(found) / 2, abs=1e-3)
        assert rows[temperature]["lpips_to_original"] is None
    assert result["lpips_missing_reason"]
    assert result["spread"]["posterior_std"] > 0


def test_bad_files_are_skipped_and_a_taken_place_is_refused(run, folder):
    (folder / "broken.png").write_bytes(b"broken")
    assert len(run(folder, "--copies", 1, code=3)["skipped"]) == 1
    with pytest.raises(LatentVAEError, match="another --output"):
        run(folder, output="in/out")
    with pytest.raises(LatentVAEError, match="the only image could not"):
        run(folder / "broken.png")


def test_people_are_told_that_copies_are_alike_and_what_would_show():
    figures = dict.fromkeys(("psnr_to_original", "lpips_to_original"), 30.0)
    figures |= dict.fromkeys(("psnr_to_reconstruction", "lpips_to_reconstruction"))
    result = {
        "spread": {"posterior_std": 0.0046, "latents_std": 4.1, "ratio": 0.0046 / 4.1},
        "temperatures": [{"temperature": 0.0, **figures}, {"temperature": 1.0, **figures}],
        "lpips_missing_reason": None,
        "notes": [],
    }
    assert "all but alike; try --temperature 90." in "\n".join(lines_of_variations(result))
    result["temperatures"][1]["temperature"] = 90.0
    assert "alike" not in "\n".join(lines_of_variations(result))
