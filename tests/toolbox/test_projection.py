"""Maps, clusters and few labels: the mathematics, what a seed decides, bad input, and the verb."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from conftest import textured
from PIL import Image
from stores import write_store
from typer.testing import CliRunner

from latentvae.base.errors import LatentVAEError
from latentvae.cli.main import app
from latentvae.models.exporting import export
from latentvae.toolbox.atlas import projection
from latentvae.toolbox.atlas.clusters import cluster, few_label_accuracy, nmi
from latentvae.toolbox.atlas.projection import neighbours, normalise, project


def blobs(sizes: tuple[int, ...] = (30, 20, 10), spread: float = 0.1, seed: int = 0) -> tuple[Any, list[str]]:
    """Points around far corners, shuffled, and which corner each belongs to."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    corners = 5 * np.eye(len(sizes), 6)
    return corners[labels] + spread * random.normal(size=(len(labels), 6)), [f"l{label}" for label in labels]


def test_normalise_divides_all_columns_by_one_number() -> None:
    values = np.random.default_rng(0).normal(size=(50, 3)) * (1, 10, 0) + 7
    found = normalise(values)
    assert found.mean(0) == pytest.approx(0, abs=1e-12)
    assert found.var(0).mean() == pytest.approx(1)
    assert found.std(0)[1] / found.std(0)[0] == pytest.approx(values.std(0)[1] / values.std(0)[0])
    assert normalise(1e5 * values) == pytest.approx(found)
    assert not normalise(np.full((4, 2), 0.1)).any()


def test_pca_is_the_singular_value_decomposition() -> None:
    values = np.random.default_rng(0).normal(size=(40, 7)) @ np.diag(range(1, 8))
    found = project(values)
    centred = normalise(values)
    _, lengths, directions = np.linalg.svd(centred, full_matrices=False)
    wanted = centred @ directions[:2].T
    signs = np.sign((wanted * found.points).sum(0))
    assert found.points == pytest.approx(wanted * signs)
    assert found.explained == pytest.approx(lengths[:2] ** 2 / (lengths**2).sum())


def test_maps_of_few_or_equal_images_are_finite() -> None:
    two = project(np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert two.explained == pytest.approx((1.0, 0.0))
    assert project(np.array([[1.0], [2.0], [4.0]])).points[:, 1].tolist() == [0, 0, 0]
    same = project(np.ones((3, 4)))
    assert not same.points.any()
    assert same.explained == (0.0, 0.0)


@pytest.mark.slow  # umap-learn compiles itself when it is first used
def test_umap_keeps_groups_and_its_seed() -> None:
    pytest.importorskip("umap")
    values, labels = blobs()
    one, same, other = (project(values, "umap", seed).points for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert nmi(cluster(one, 3).numbers, labels) == pytest.approx(1)
    assert project(values[:5], "umap").points.shape == (5, 2)


def test_without_umap_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(LatentVAEError, match=r"umap-learn.*pip install -e \".*\[umap\]\""):
        project(blobs()[0], "umap")


@pytest.mark.parametrize(
    ("values", "method", "said"),
    [
        (np.zeros((1, 3)), "pca", "2 images or more; 1 came"),
        (np.zeros((4, 3)), "umap", "needs 5"),
        (np.zeros((4, 3)), "tsne", "choose one of pca, umap"),
        (np.zeros(4), "pca", r"shape \(4,\)"),
        (np.full((4, 3), np.nan), "pca", "finite"),
    ],
)
def test_features_that_make_no_map_are_refused(values: np.ndarray, method: Any, said: str) -> None:
    with pytest.raises(LatentVAEError, match=said):
        project(values, method)


def test_neighbours_are_the_nearest_others_in_order() -> None:
    values = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert neighbours(values, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert neighbours(values, 9).shape == (4, 3)
    assert neighbours(np.zeros((3, 2)), 2).tolist() in ([[1, 2], [0, 2], [0, 1]], [[1, 2], [2, 0], [1, 0]])
    assert neighbours(values[:1], 5).shape == (1, 0)


def test_silhouette_finds_the_number_of_clusters_and_the_largest_comes_first() -> None:
    values, labels = blobs()
    found = cluster(values)
    assert found.count == 3
    assert max(found.silhouettes, key=lambda each: found.silhouettes[each]) == 3
    assert np.bincount(found.numbers).tolist() == [30, 20, 10]
    assert nmi(found.numbers, labels) == pytest.approx(1)
    given = cluster(values, 3)
    assert np.array_equal(given.numbers, found.numbers)
    assert given.silhouettes == {}


def test_small_tables_are_clustered_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.cluster import KMeans

    fit, seen = KMeans.fit_predict, []

    def watched(self: Any, table: np.ndarray) -> np.ndarray:
        seen.append({pool["num_threads"] for pool in threadpoolctl.threadpool_info()})
        return fit(self, table)

    monkeypatch.setattr(KMeans, "fit_predict", watched)
    with threadpoolctl.threadpool_limits(2):
        cluster(blobs()[0], 3)
        monkeypatch.setattr(projection, "SMALL", 2)
        cluster(blobs()[0], 3)
    assert seen[0] == {1}
    assert 2 in seen[1]


def test_clusters_are_decided_by_the_seed() -> None:
    values = np.random.default_rng(1).normal(size=(200, 4))
    one, same = (cluster(values, 8, seed=3).numbers for _ in range(2))
    assert np.array_equal(one, same)


def test_images_that_are_alike_are_grouped_without_a_crash() -> None:
    assert cluster(np.ones((4, 3))).count == 1
    assert cluster(np.array([[0.0], [0.0], [1.0]])).numbers.tolist() == [0, 0, 1]
    assert cluster(np.array([[0.0], [1.0]])).count == 2


@pytest.mark.parametrize("count", [0, 4, 61])
def test_more_clusters_than_different_images_are_refused(count: int) -> None:
    values = np.repeat(np.array([[0.0], [1.0], [2.0]]), 20, axis=0)
    with pytest.raises(LatentVAEError, match=f"{count} clusters came for 60 images, 3 of them different"):
        cluster(values, count)


def test_nmi_of_perfect_and_of_independent_clusters() -> None:
    labels = ["a", "a", "b", "b"]
    assert nmi(np.array([1, 1, 0, 0]), labels) == pytest.approx(1)
    assert nmi(np.array([0, 1, 0, 1]), labels) == pytest.approx(0, abs=1e-12)
    # one image of the other label: entropies ln 2 and H(3/4, 1/4), their mutual information 0.2158 nats
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    mutual = np.log(2) + entropy - (0.5 * np.log(2) + 2 * 0.25 * np.log(4))
    assert nmi(np.array([0, 0, 0, 1]), labels) == pytest.approx(mutual / ((np.log(2) + entropy) / 2))
    assert nmi(np.array([0, 0, 1, 1, 1]), [*labels, ""]) == pytest.approx(1)  # no label does not count
    for wrong in (["a"], [""] * 4):
        with pytest.raises(LatentVAEError):
            nmi(np.array([0, 0, 1, 1]), wrong)


def test_few_labels_are_enough_for_far_groups_and_no_help_for_noise() -> None:
    values, labels = blobs((40, 40, 40, 5))
    found = few_label_accuracy(values, labels, per_class=10, draws=4)
    assert (found.accuracy, found.spread) == (1.0, 0.0)
    assert (found.classes, found.tested, found.left_out) == (3, 90, 5)
    noise = np.random.default_rng(0).normal(size=values.shape)
    assert few_label_accuracy(noise, labels).accuracy == pytest.approx(1 / 3, abs=0.1)


def test_few_labels_never_ask_about_what_was_learned() -> None:
    """Each image has a direction of its own, so that only those that were learned could be known."""
    labels = ["a", "b"] * 20
    found = few_label_accuracy(np.eye(40), labels, per_class=10, draws=5)
    assert found.accuracy == pytest.approx(0.5, abs=0.2)


def test_few_labels_draw_the_same_images_whatever_the_features() -> None:
    values, labels = blobs((40, 40), spread=4.0)
    one, same, other = (few_label_accuracy(values, labels, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    assert one == few_label_accuracy(3 * values + 1, labels)


def test_labels_that_are_too_few_or_do_not_match_are_refused() -> None:
    values, labels = blobs((40, 5))
    with pytest.raises(LatentVAEError, match="two labels of more, and there are 1"):
        few_label_accuracy(values, labels)
    with pytest.raises(LatentVAEError, match="3 labels came for 45"):
        few_label_accuracy(values, labels[:3])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Dark pictures in one subfolder, bright ones in another."""
    for number in range(26):
        name = "dark" if number % 2 else "bright"
        place = tmp_path / "photos" / name / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(textured(32, 32, number) // 4 + 180 * (name == "bright")).save(place)
    return tmp_path / "photos"


@pytest.fixture
def model(tmp_path: Path, tiny_vae: Any) -> Path:
    return export(tiny_vae, tmp_path / "tiny")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["project", *(str(argument) for argument in arguments)])


def test_the_verb_maps_clusters_and_measures(folder: Path, model: Path, tmp_path: Path) -> None:
    result = run(folder, "-o", tmp_path / "out", "-m", model, "--clusters", 2, "--json")
    assert result.exit_code == 0, result.output
    assert "26/26" in result.stderr  # its progress, for encoding takes the time
    said = json.loads(result.stdout)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("projection.html", "projection.png", "projection-pictures.png", "projection.json", "clusters.csv")
    }
    assert (said["images"], said["labels_from"], said["clusters"]["count"]) == (26, "folders", 2)
    assert said["nmi"]["pixels"] == pytest.approx(1)
    assert said["few_labels"]["pixels"]["accuracy"] == 1.0
    assert said["few_labels"]["latents"]["tested"] == 6
    written = json.loads((out / "projection.json").read_text())
    assert written == {name: value for name, value in said.items() if name != "files"}
    with (out / "clusters.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["label"] == row["key"].partition("/")[0] for row in rows)
    assert nmi(np.array([int(row["cluster"]) for row in rows]), [row["label"] for row in rows]) == (
        pytest.approx(said["nmi"]["latents"])
    )
    assert Image.open(out / "projection.png").width > 1000
    plain = run(folder, "-o", out, "-m", model, "--clusters", 2)
    assert "Clusters against labels (NMI)" in plain.output
    assert "2 labels of 26 images, from their folders" in plain.output


def test_a_store_is_mapped_with_pictures_from_files_or_decoded(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    encoded = CliRunner().invoke(app, ["encode", str(folder), str(tmp_path / "store"), "-m", str(model)])
    assert encoded.exit_code == 0, encoded.output
    arguments = (tmp_path / "store", "-o", tmp_path / "out", "-m", model, "--json")
    with_files = json.loads(run(*arguments).stdout)
    assert with_files["few_labels"].keys() == {"latents", "pixels"}
    (folder / "dark" / "1.png").unlink()
    decoded = json.loads(run(*arguments).stdout)
    assert (
        decoded["few_labels"].keys() == decoded["nmi"].keys() == {"latents"}
    )  # decoded pixels are no baseline
    assert decoded["nmi"]["latents"] == with_files["nmi"]["latents"]
    assert "decoded from the latents" in decoded["notes"][0]


def test_a_store_of_another_model_without_files_has_no_pictures(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [[(2, 2), (3, 2), (2, 2)]])
    result = run(store, "-o", tmp_path / "out", "--json")  # none is named, and the default is another one
    assert result.exit_code == 0, result.output
    assert "3 image files are gone, and there is no picture" in json.loads(result.stdout)["notes"][0]
    assert not (tmp_path / "out" / "projection-pictures.png").exists()
    assert (tmp_path / "out" / "projection.html").is_file()


def test_bad_input_is_said(folder: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels.csv").write_text("dark/1.png,night\nnone.png,day\n")
    one = folder / "dark" / "1.png"
    for arguments, said in (
        ((one,), "1 image came (1.png); a map needs two"),
        ((tmp_path / "empty",), "no image in the folder"),
        ((write_store(tmp_path / "store", []),), "holds no image"),
        ((folder, "--labels", tmp_path / "labels.csv"), "'none.png' is no image here"),
        ((folder, "--clusters", 40), "40 clusters came for 26 images"),
    ):
        result = run(*arguments, "-o", tmp_path / "out", "-m", model)
        assert isinstance(result.exception, LatentVAEError), result.output
        assert said in str(result.exception)
        assert not list((tmp_path / "out").iterdir())


def test_a_missing_umap_is_said_before_anything_is_encoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    result = run(folder, "-o", tmp_path / "out", "--method", "umap")
    assert isinstance(result.exception, LatentVAEError)
    assert "umap-learn" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_skipped_and_some_may_lack_a_label(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    (folder / "dark" / "1.png").write_bytes(b"no image")
    (tmp_path / "labels.csv").write_text("name,label\nbright/0.png,day\ndark/3.png,night\ndark/1.png,night\n")
    out = tmp_path / "out"
    result = run(folder, "-o", out, "-m", model, "--labels", tmp_path / "labels.csv")
    assert result.exit_code == 3, result.output
    figures = json.loads((out / "projection.json").read_text())
    assert figures["images"] == 25
    assert figures["few_labels"] == {}
    assert any("No classifier from few labels" in note for note in figures["notes"])


def test_a_silhouette_of_a_sample_that_holds_one_cluster_is_the_worst() -> None:
    values = np.zeros((6000, 2))
    values[0] = 1e6  # a blank frame in a camera's folder, which the sample need not hold
    values[1:] += np.random.default_rng(0).normal(size=(5999, 2))
    found = cluster(values)
    assert len(found.numbers) == 6000
