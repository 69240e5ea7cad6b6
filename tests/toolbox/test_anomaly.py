"""Odd images: terms, calibration, ROC, and the verbs."""

import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import textured
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.nn.functional import adaptive_avg_pool2d
from typer.testing import CliRunner

import latentvae
from latentvae.base.errors import LatentVAEError
from latentvae.cli.anomaly import anomaly, read_labels
from latentvae.cli.session import Session
from latentvae.measure.lpips import load_lpips
from latentvae.models.exporting import export
from latentvae.models.latents import reconstruct
from latentvae.toolbox.anomaly.calibration import (
    FORMAT,
    LEVELS,
    Cloud,
    calibrate,
    check_place,
    excess,
    load_calibration,
    quantiles_of,
    share_below,
)
from latentvae.toolbox.anomaly.roc import auroc, draw_roc, roc_curve
from latentvae.toolbox.anomaly.terms import TERMS, Look, loneliness, lonely_places, look


def some_looks(count: int, seed: int = 0, channels: int = 2, alike: bool = True) -> list[Look]:
    """What a model might have said of normal images, with layouts close to others' or with none alike."""
    random = np.random.default_rng(seed)
    return [
        Look(
            {name: float(random.gamma(3)) for name in ("pixel", "patch", "kl")},
            random.normal(size=2 * channels),
            random.normal(size=2 if alike else 64 * channels),
            torch.zeros(4, 4),
        )
        for _ in range(count)
    ]


def test_terms_are_what_they_say(tiny_vae: Any) -> None:
    images = torch.rand(1, 3, 37, 45) * 2 - 1
    seen = look(tiny_vae, images)
    result = reconstruct(tiny_vae, images)
    error = (result.reconstructions.clamp(-1, 1) - images).square().mean(1)[0]
    assert seen.terms["pixel"] == pytest.approx(float(error.mean()), rel=1e-5)
    assert seen.terms["kl"] == pytest.approx(float(result.posterior.kl()) / (37 * 45), rel=1e-5)
    assert seen.error.shape == (37, 45)
    assert float(seen.error[20, 20]) == pytest.approx(float(error[16:25, 16:25].mean()), rel=1e-4)
    assert float(seen.error[0, 0]) == pytest.approx(float(error[:5, :5].mean()), rel=1e-4)
    assert seen.terms["patch"] == float(seen.error.max())
    latents = result.posterior.mean[0].flatten(1).double()
    wanted = torch.cat([latents.mean(1), latents.std(1, correction=0)])
    assert seen.pooled == pytest.approx(wanted.numpy(), rel=1e-5)
    grid = adaptive_avg_pool2d(result.posterior.mean.double(), 8)
    assert seen.layout == pytest.approx(grid.flatten().numpy(), rel=1e-5)
    assert look(tiny_vae, images[..., :20]).layout.shape == seen.layout.shape


def test_loneliness_is_the_distance_to_the_nearest_place_elsewhere() -> None:
    texture = torch.zeros(1, 3, 20, 20)
    assert loneliness(lonely_places([texture, texture, texture])) == 0
    odd = texture.clone()
    odd[0, :, 5, 5] = torch.tensor([3.0, 4.0, 0.0])
    loneliest = [5.0, 0.0, 0.0]  # of the 18 x 18 places that are not on the border, a hundredth
    assert loneliness(lonely_places([texture, odd, texture])) == pytest.approx(np.mean(loneliest))
    border = texture.clone()
    border[0, :, 0, 7] = 9.0
    assert loneliness(lonely_places([texture, border, texture])) == 0
    odd[0, :, 14, 14] = odd[0, :, 5, 5]  # the same again, elsewhere
    assert loneliness(lonely_places([texture, odd, texture])) == pytest.approx(0, abs=1e-3)
    beside = texture.clone()
    beside[0, 0, 5, 5:8] = 2.0  # three places of one thing are not each other's elsewhere
    assert loneliness(lonely_places([texture, beside, texture])) == pytest.approx(2)  # the three loneliest


def test_loneliness_of_images_too_small_or_large() -> None:
    small = torch.rand(1, 3, 4, 4)
    assert loneliness(lonely_places([small, small, small[..., :2, :2]])) == 0
    large = torch.rand(1, 3, 130, 70)
    assert 0 < loneliness(lonely_places([large, large, large[..., :40, :30]])) < 2


def test_a_defect_is_the_loneliest_place_of_a_texture(tiny_vae: Any, shared: Path) -> None:
    lpips = load_lpips("alex", shared / "lpips")
    plain = np.tile(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8), (14, 14, 1))
    damaged = plain.copy()
    damaged[90:140, 90:140] = (200, 30, 30)
    before, after = (
        look(tiny_vae, torch.from_numpy(each).permute(2, 0, 1)[None] / 127.5 - 1, lpips).terms["alone"]
        for each in (plain, damaged)
    )
    assert after > 1.5 * before


def test_quantiles_are_those_of_the_normal_images(tiny_vae: Any) -> None:
    looks = some_looks(301)
    made = calibrate(tiny_vae, looks)
    values = sorted(one.terms["pixel"] for one in looks)
    assert made.quantiles["pixel"] == pytest.approx([values[3 * i] for i in range(101)])
    assert made.quantiles.keys() == {"pixel", "patch", "kl", "latent", "neighbour", "layout", "score"}
    for i in (0, 30, 100):
        assert share_below(values[3 * i], made.quantiles["pixel"]) == pytest.approx(i / 100)


def test_new_normal_images_are_spread_evenly_over_the_quantiles(tiny_vae: Any) -> None:
    made = calibrate(tiny_vae, some_looks(400))
    verdicts = [made.judge(one) for one in some_looks(400, seed=1)]
    for name in ("latent", "neighbour", "layout", "kl"):
        assert np.mean([verdict.quantiles[name] for verdict in verdicts]) == pytest.approx(0.5, abs=0.06)
    assert np.mean([verdict.quantile > 0.9 for verdict in verdicts]) == pytest.approx(0.1, abs=0.05)


def test_a_few_normal_images_are_not_closer_to_themselves_than_new_ones(tiny_vae: Any) -> None:
    """With the images inside their own cloud the neighbour's distance would be 0 and every new one odd."""
    made = calibrate(tiny_vae, some_looks(20, channels=4))
    assert min(made.quantiles["neighbour"]) > 0
    assert min(made.quantiles["layout"]) > 0
    found = [made.judge(one).quantiles["latent"] for one in some_looks(200, seed=1, channels=4)]
    assert 0.25 < np.mean(found) < 0.7


@pytest.mark.parametrize("term", ["pixel", "patch", "kl"])
def test_every_term_can_make_an_image_odd(tiny_vae: Any, term: str) -> None:
    looks = some_looks(100)
    made = calibrate(tiny_vae, looks)
    usual = Look(
        {name: made.quantiles[name][50] for name in ("pixel", "patch", "kl")},
        looks[0].pooled,
        looks[0].layout,
        torch.zeros(2, 2),
    )
    odd = Look({**usual.terms, term: 50.0}, usual.pooled, usual.layout, torch.zeros(2, 2))
    before, after = made.judge(usual), made.judge(odd)
    assert after.score > before.score + 1
    assert after.quantiles[term] == after.quantile == 1.0
    # the smooth maximum of six terms of which one is far above the others
    assert after.score == pytest.approx(excess(50.0, made.quantiles[term]) - np.log(6) / 3, abs=1e-3)


def test_score_of_an_image_at_every_median_is_zero(tiny_vae: Any) -> None:
    made = calibrate(tiny_vae, some_looks(50))
    terms = {name: values[50] for name, values in made.quantiles.items() if name != "score"}
    assert made.score(terms) == pytest.approx(0, abs=1e-12)
    assert made.score({**terms, "kl": made.quantiles["kl"][95]}) == pytest.approx(
        np.log((5 + np.exp(3)) / 6) / 3
    )


def test_whole_images_count_only_where_some_are_alike(tiny_vae: Any) -> None:
    alike, different = (calibrate(tiny_vae, some_looks(60, alike=each)) for each in (True, False))
    assert alike.cloud.likeness < 0.5 < different.cloud.likeness < 1
    assert alike.counted == ["pixel", "patch", "kl", "latent", "neighbour", "layout"]
    assert different.counted == ["patch"]
    with_places = {**different.quantiles, "alone": list(range(101))}
    assert replace(different, quantiles=with_places).counted == ["alone"]
    terms = {name: values[50] for name, values in different.quantiles.items() if name != "score"}
    assert different.score({**terms, "kl": 1e6, "layout": 1e6}) == 0
    assert different.score({**terms, "patch": different.quantiles["patch"][95]}) == pytest.approx(1)


def test_likeness_is_the_nearest_distance_over_any() -> None:
    cloud = Cloud(np.zeros((4, 2)), np.array([[0.0], [1.0], [10.0], [11.0]]))
    assert cloud.likeness == pytest.approx(1 / 9.5)  # of the distances 1, 1, 9, 10, 10, 11: 9 and 10


def test_excess_counts_from_the_median_to_the_95_percent_quantile() -> None:
    quantiles = quantiles_of(list(range(101)))
    assert excess(50, quantiles) == 0
    assert excess(95, quantiles) == pytest.approx(1)
    assert excess(140, quantiles) == pytest.approx(2)
    assert np.isfinite(excess(1.0, quantiles_of([3.0] * 9)))


def test_share_below_of_equal_values_is_their_middle() -> None:
    assert share_below(3.0, [3.0] * 101) == 0.5
    assert share_below(2.0, [3.0] * 101) == 0.0
    assert share_below(4.0, [3.0] * 101) == 1.0


def at(pooled: list[float], layout: list[float]) -> Look:
    return Look({}, np.array(pooled), np.array(layout), torch.zeros(1, 1))


def test_distances_are_mahalanobis_and_nearest() -> None:
    normal = np.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # variances 2 and 0.5
    cloud = Cloud(normal, np.array([[0.0, 0.0], [1.0, 0.0], [9.0, 9.0], [5.0, 5.0]]))
    found = cloud.distances(at([4.0, 0.0], [1.0, 3.0]))
    assert found["latent"] == pytest.approx(4 / np.sqrt(2), rel=1e-6)
    assert found["neighbour"] == pytest.approx(2 / np.sqrt(2), rel=1e-6)
    assert found["layout"] == pytest.approx(3)  # to the nearest, in the latents' own units
    inside = cloud.distances(at([0.0, 1.0], [5.0, 5.0]))
    assert inside["neighbour"] == inside["layout"] == 0


def test_heat_is_in_units_of_normal_images_worst_places(tiny_vae: Any) -> None:
    made = calibrate(tiny_vae, some_looks(50))
    terms = dict.fromkeys(("pixel", "patch", "kl"), 1.0)
    one = Look(terms, np.zeros(4), np.zeros(2), torch.full((3, 3), 6.0))
    assert torch.allclose(made.judge(one).heat, torch.tensor(6.0 / made.quantiles["patch"][95]).sqrt())


def test_heat_shows_lonely_places_where_they_alone_count(tiny_vae: Any) -> None:
    looks = [
        Look({**one.terms, "lpips": 1.0, "alone": 2.0 + n / 100}, one.pooled, one.layout, one.error)
        for n, one in enumerate(some_looks(50, alike=False))
    ]
    made = calibrate(tiny_vae, looks, "alex")
    assert made.counted == ["alone"]
    lonely = torch.ones(12, 12)
    lonely[0], lonely[4, 4] = torch.nan, made.quantiles["alone"][95]
    lonely[8, 8] = 0.2  # less lonely than most: not odd
    heat = made.judge(replace(looks[0], error=torch.ones(24, 24), lonely=lonely)).heat
    assert heat.shape == (24, 24)
    assert float(heat.max()) == heat[8:10, 8:10].max()
    assert float(heat.max()) == pytest.approx(0.75**2)  # bilinear: between four places
    assert float(heat.min()) == float(heat[16, 16]) == 0
    noise = torch.full((12, 12), 2 * made.quantiles["alone"][95])  # lonely everywhere: all of it is odd
    assert float(made.judge(replace(looks[0], error=torch.ones(24, 24), lonely=noise)).heat.min()) > 1
    with pytest.raises(LatentVAEError, match="too small for its places"):
        made.judge(replace(looks[0], lonely=torch.full((3, 3), torch.nan)))
    few = made.judge(replace(looks[0], error=torch.full((24, 24), 9.0))).heat  # a look without the map
    assert torch.allclose(few, torch.tensor(9.0 / made.quantiles["patch"][95]).sqrt())


def test_errors_count_where_images_are_too_small_to_have_lonely_places(tiny_vae: Any) -> None:
    looks = [
        Look({**one.terms, "lpips": 1.0, "alone": 0.0}, one.pooled, one.layout, one.error)
        for one in some_looks(50, alike=False)
    ]
    made = calibrate(tiny_vae, looks, "alex")
    assert made.counted == ["patch"]
    usual, odd = (made.judge(replace(looks[0], terms={**looks[0].terms, "patch": p})) for p in (1.0, 99.0))
    assert odd.score > 1 > usual.score


def test_calibration_comes_back_whole_and_refuses_another_vae(tiny_vae: Any, tmp_path: Path) -> None:
    made = calibrate(tiny_vae, some_looks(9), "alex")
    made.save(tmp_path / "cal.safetensors")
    again = load_calibration(tmp_path / "cal.safetensors")
    assert (again.weights_sha256, again.lpips_net, again.quantiles) == (
        *(made.weights_sha256, "alex"),
        made.quantiles,
    )
    assert np.array_equal(again.cloud.pooled, made.cloud.pooled)
    assert np.array_equal(again.cloud.layout, made.cloud.layout)
    assert [path.name for path in tmp_path.iterdir()] == ["cal.safetensors"]
    again.check(tiny_vae)
    with torch.no_grad():
        tiny_vae.decoder.conv_out.bias[0] += 1e-3
    with pytest.raises(LatentVAEError, match="made with the VAE"):
        again.check(tiny_vae)


def test_too_few_images_and_files_that_are_no_calibration(tiny_vae: Any, tmp_path: Path) -> None:
    with pytest.raises(LatentVAEError, match="4 normal images"):
        calibrate(tiny_vae, some_looks(4))
    with pytest.raises(LatentVAEError, match="cannot be read"):
        load_calibration(tmp_path / "none.json")
    with pytest.raises(LatentVAEError, match="1 normal image came"):
        calibrate(tiny_vae, some_looks(1))


@pytest.mark.parametrize(
    "change",
    [
        {"format": "latentvae-anomaly-2"},
        {"quantiles": "{"},
        {"quantiles": json.dumps({"pixel": [1.0], "kl": [1.0], "score": [1.0]})},
        {"quantiles": json.dumps(dict.fromkeys(("pixel", "kl", "score", "smell"), [0.0] * 101))},
    ],
)
def test_a_calibration_with_something_wrong_is_refused(tiny_vae: Any, tmp_path: Path, change: Any) -> None:
    place = tmp_path / "cal.safetensors"
    calibrate(tiny_vae, some_looks(9)).save(place)
    load_calibration(place)
    with safe_open(place, "numpy") as file:
        about, tables = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert about["format"] == FORMAT
    save_file(tables, place, {**about, **change})
    with pytest.raises(LatentVAEError, match="is no calibration"):
        load_calibration(place)
    check_place(place)  # what is damaged or of an earlier format may be made again
    save_file({**tables, "layout": tables["layout"][:3]}, place, about)
    with pytest.raises(LatentVAEError, match="tables of latents do not match"):
        load_calibration(place)
    place.write_bytes(place.read_bytes()[:-9])
    with pytest.raises(LatentVAEError, match="is no calibration"):
        load_calibration(place)
    with pytest.raises(LatentVAEError, match="name another file"):
        check_place(place)


def test_a_calibration_of_the_first_format_says_how_to_make_it_again(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"format": 1, "quantiles": {}, "pooled": []}))
    with pytest.raises(LatentVAEError, match=r"is JSON.*make it again with `latentvae anomaly fit`"):
        load_calibration(tmp_path / "old.json")


def test_terms_are_explained() -> None:
    assert {"pixel", "patch", "lpips", "alone", "kl", "latent", "neighbour", "layout"} == TERMS.keys()


def test_an_image_measured_with_lpips_needs_a_calibration_with_it(tiny_vae: Any) -> None:
    made = calibrate(tiny_vae, some_looks(9))
    one = some_looks(1)[0]
    with pytest.raises(LatentVAEError, match="'lpips'"):
        made.judge(Look({**one.terms, "lpips": 0.1}, one.pooled, one.layout, one.error))


def test_auroc_of_known_scores() -> None:
    assert auroc([1, 2, 3, 4], [False, False, True, True]) == 1
    assert auroc([1, 2, 3, 4], [True, True, False, False]) == 0
    assert auroc([1, 1, 1, 1], [True, False, True, False]) == 0.5
    assert auroc([1, 3, 2, 4], [False, False, True, True]) == 0.75
    random = np.random.default_rng(0)
    scores, odd = random.integers(0, 9, 80), random.random(80) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[odd] for b in scores[~odd]]
    assert auroc(scores.tolist(), odd.tolist()) == pytest.approx(np.mean(pairs))


def test_roc_curve_takes_equal_scores_together_and_is_drawn() -> None:
    rates = roc_curve([2, 1, 1, 0], [True, True, False, False])
    assert rates.tolist() == [[0, 0], [0, 0.5], [0.5, 1], [1, 1]]
    assert draw_roc(rates, "AUROC").size == (560, 560)
    for labels in ([True] * 4, [False] * 4, [True, False]):
        with pytest.raises(LatentVAEError):
            roc_curve([2, 1, 1, 0], labels)


def test_without_scikit_learn_a_roc_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(LatentVAEError, match=r"needs scikit-learn.*pip install -e \".*\[explore\]\""):
        auroc([1, 2], [False, True])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A model, normal pictures, and others of which one has a defect."""
    torch.manual_seed(0)
    for name, seeds in (("normal", range(8)), ("photos", range(8, 12))):
        (tmp_path / name).mkdir()
        for seed in seeds:
            Image.fromarray(textured(48, 40, seed)).save(tmp_path / name / f"{seed}.png")
    broken = Image.open(tmp_path / "photos" / "9.png")
    ImageDraw.Draw(broken).rectangle((10, 10, 30, 30), fill=(255, 255, 255))
    broken.save(tmp_path / "photos" / "9.png")
    names = {name: tmp_path / name for name in ("normal", "photos", "out")}
    names["labels"] = tmp_path / "labels.csv"
    names["labels"].write_text("name,label\n8.png,0\n9.png,1\n10.png,0\n11.png,0\n")
    names["calibration"] = tmp_path / "cal.safetensors"
    return {**names, "model": export(latentvae.build("tiny"), tmp_path / "tiny")}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(anomaly, [str(argument) for argument in arguments])


def test_too_few_images_are_refused_before_they_are_looked_at(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "load", lambda self: pytest.fail("a model was loaded"))
    refused = run("fit", files["photos"], files["calibration"], "-m", files["model"]).exception
    assert isinstance(refused, LatentVAEError)
    assert "4 normal images came; at least 5 are needed" in str(refused)


def test_verbs_rank_and_draw(files: dict[str, Path]) -> None:
    common = ("-m", files["model"], "--json")
    result = run("fit", files["normal"], files["calibration"], "--no-lpips", *common)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"] == 8
    arguments = (
        "score",
        files["calibration"],
        files["photos"],
        "-o",
        files["out"],
        "--labels",
        files["labels"],
    )
    result = run(*arguments, *common)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    scores = [row["score"] for row in figures["images"]]
    assert scores == sorted(scores, reverse=True)
    assert figures["auroc"].keys() == {"score", "pixel", "patch", "kl", "latent", "neighbour", "layout"}
    with (files["out"] / "anomalies.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [row["name"] for row in figures["images"]]
    assert all(Path(row["heat_map"]).is_file() for row in figures["images"])
    assert (files["out"] / "roc.png").is_file()
    ranked = json.loads(run(*arguments, *common, "--by", "kl").stdout)["images"]
    said = "".join(run("score", "--help").stdout.split())
    assert all(f"{term}," in said or f"{term}." in said for term in TERMS)  # what --by takes
    values = [row["terms"]["kl"] for row in ranked]
    assert values == sorted(values, reverse=True)
    refused = run(*arguments, *common, "--by", "smell").exception
    assert isinstance(refused, LatentVAEError)
    assert "no term 'smell'; choose one of pixel, patch" in str(refused)
    assert "AUROC" in run(*arguments, "-m", files["model"]).output


def test_score_refuses_another_model(files: dict[str, Path], tmp_path: Path) -> None:
    run("fit", files["normal"], files["calibration"], "--no-lpips", "-m", files["model"])
    torch.manual_seed(1)
    other = export(latentvae.build("tiny"), tmp_path / "other")
    result = run("score", files["calibration"], files["photos"], "-o", files["out"], "-m", other)
    assert isinstance(result.exception, LatentVAEError)
    assert "made with the VAE" in str(result.exception)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a.png,1\n", "without a label: 1,.*'b.png' has none"),
        ("a.png,1\nb.png,0\nc.png,0\n", "'c.png' is no image"),
        ("a.png,yes\nb.png,0\n", "'a.png,yes'"),
        ("a.png,1\na.png,0\n", "once"),
    ],
)
def test_labels_that_do_not_match_are_named(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(LatentVAEError, match=match):
        read_labels(tmp_path / "labels.csv", {"a.png", "b.png"})


def test_levels_hold_the_places_that_are_used() -> None:
    assert LEVELS[50] == 0.5
    assert LEVELS[95] == pytest.approx(0.95)


def test_labels_of_one_kind_are_refused_before_anything_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("a.png,0\nb.png,0\n")
    with pytest.raises(LatentVAEError, match="labels every image 0; an ROC needs images of both kinds"):
        read_labels(tmp_path / "labels.csv", {"a.png", "b.png"})


def test_the_ranking_is_written_where_all_of_one_kind_were_skipped(files: dict[str, Path]) -> None:
    run("fit", files["normal"], files["calibration"], "--no-lpips", "-m", files["model"])
    (files["photos"] / "9.png").write_bytes(b"broken")
    arguments = (files["calibration"], files["photos"], "-m", files["model"], "-o", files["out"])
    result = run("score", *arguments, "--labels", files["labels"], "--json")
    assert result.exit_code == 3, result.output
    assert json.loads((files["out"] / "anomalies.json").read_text())["auroc"] is None
    assert (files["out"] / "anomalies.csv").is_file()


def test_names_that_are_not_utf_8_are_written_as_they_are(files: dict[str, Path]) -> None:
    run("fit", files["normal"], files["calibration"], "--no-lpips", "-m", files["model"])
    (files["photos"] / "8.png").rename(os.fsdecode(os.fsencode(files["photos"]) + b"/caf\xe9.png"))
    arguments = (files["calibration"], files["photos"], "-m", files["model"], "-o", files["out"])
    result = run("score", *arguments, "--json")
    assert result.exit_code == 0, result.output
    assert b"caf\xe9.png" in (files["out"] / "anomalies.csv").read_bytes()
    assert os.fsdecode(b"caf\xe9.png") in {row["name"] for row in json.loads(result.stdout)["images"]}


def test_the_longest_names_get_heat_maps(files: dict[str, Path]) -> None:
    run("fit", files["normal"], files["calibration"], "--no-lpips", "-m", files["model"])
    (files["photos"] / "8.png").rename(files["photos"] / f"{'x' * 251}.png")
    arguments = (files["calibration"], files["photos"], "-m", files["model"], "-o", files["out"])
    rows = json.loads(run("score", *arguments, "--json").stdout)["images"]
    assert len(rows) == 4
    assert all(Path(row["heat_map"]).is_file() for row in rows)


def test_labels_of_one_kind_by_the_end_are_said(files: dict[str, Path]) -> None:
    run("fit", files["normal"], files["calibration"], "--no-lpips", "-m", files["model"])
    (files["photos"] / "9.png").write_bytes(b"no picture")  # the odd one
    arguments = (files["calibration"], files["photos"], "-m", files["model"], "-o", files["out"])
    result = run("score", *arguments, "--labels", files["labels"])
    assert result.exit_code == 3
    assert "no ROC: all images that could be read are of one kind." in result.output


def test_a_large_clouds_likeness_is_measured_on_some() -> None:
    layout = np.random.default_rng(0).normal(size=(5000, 8))
    whole = Cloud(np.zeros((1700, 2)), layout[:1700]).likeness
    assert Cloud(np.zeros((5000, 2)), layout).likeness == pytest.approx(whole, abs=0.02)


def test_images_too_small_for_lpips_are_told_the_way_out(files: dict[str, Path], shared: Path) -> None:
    for seed in range(8):
        Image.fromarray(textured(28, 28, seed)).save(files["normal"] / f"{seed}.png")
    weights = ("--lpips-weights", shared / "lpips")
    result = run("fit", files["normal"], files["calibration"], "-m", files["model"], *weights)
    assert isinstance(result.exception, LatentVAEError)
    assert "--no-lpips leaves it out" in str(result.exception)
