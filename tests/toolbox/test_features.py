"""Pooled latents and their tables: the mathematics, keys and labels, files, and the verb."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import textured
from PIL import Image
from stores import moments_of, write_store
from typer.testing import CliRunner

import latentvae
from latentvae.base.errors import LatentVAEError
from latentvae.cli.main import app
from latentvae.images.reading import load_image
from latentvae.models.exporting import export
from latentvae.models.fingerprint import weight_hash
from latentvae.models.latents import encode, pool_latents
from latentvae.store.dataset import StoreReader
from latentvae.toolbox.atlas import encoding, gallery
from latentvae.toolbox.atlas.features import Features, column_names
from latentvae.toolbox.atlas.gallery import Gallery, raw_pixels, stored_images
from latentvae.toolbox.atlas.labels import folder_labels, label_of, match_labels, read_table


def test_pooling_is_mean_deviation_and_means_of_cells() -> None:
    latents = torch.randn(3, 2, 6, 8)
    found = pool_latents(latents, grid=2)
    values = latents.double().numpy()
    assert found.shape == (3, 2 + 2 + 2 * 4)
    assert found[:, :2] == pytest.approx(values.mean((2, 3)))
    assert found[:, 2:4] == pytest.approx(values.std((2, 3)))
    cells = values.reshape(3, 2, 2, 3, 2, 4).mean((3, 5))  # channel, row, column
    assert found[:, 4:] == pytest.approx(cells.reshape(3, 8))
    assert np.array_equal(pool_latents(latents), found[:, :4])


def test_columns_are_named_in_the_order_of_pooling() -> None:
    latents = torch.zeros(1, 2, 4, 4)
    latents[0, 1, 3, 0] = 16.0  # channel 1, lower left
    found = dict(zip(column_names(2, 2), pool_latents(latents, 2)[0], strict=True))
    assert list(found)[:6] == ["mean_0", "mean_1", "std_0", "std_1", "cell_0_0_0", "cell_0_0_1"]
    assert found["cell_1_1_0"] == 4.0
    assert found["mean_1"] == 1.0
    assert sum(value for name, value in found.items() if name.startswith("cell")) == 4.0


def test_plain_means_lose_position_and_cells_keep_it() -> None:
    left, right = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    left[..., :2], right[..., 2:] = 1.0, 1.0
    assert np.array_equal(pool_latents(left), pool_latents(right))
    assert not np.array_equal(pool_latents(left, 2), pool_latents(right, 2))


def test_images_of_any_size_give_rows_of_one_length() -> None:
    assert {pool_latents(torch.randn(1, 4, h, w), 4).shape for h, w in ((1, 1), (3, 9), (17, 4))} == {(1, 72)}


@pytest.mark.parametrize("grid", [-1, 65])
def test_a_grid_out_of_range_is_refused(grid: int) -> None:
    with pytest.raises(LatentVAEError, match=f"grid {grid} came"):
        pool_latents(torch.zeros(1, 1, 2, 2), grid)


def test_latents_that_are_not_finite_are_refused() -> None:
    with pytest.raises(LatentVAEError, match="NaN"):
        pool_latents(torch.tensor([[[[0.0, float("nan")]]]]))


def some_features(labels: list[str] | None = None) -> Features:
    values = np.arange(3 * 12, dtype=np.float32).reshape(3, 12)
    keys = ["a.png", "b/ä.png", "bad\udcff.png"]
    return Features(keys, labels or ["cat", "", "dog"], values, 2, "f" * 64)


def test_npy_has_keys_labels_and_columns_beside_it(tmp_path: Path) -> None:
    made = some_features()
    files = made.save(tmp_path / "out.npy")
    assert [file.name for file in files] == ["out.npy", "out.json"]
    found = np.load(files[0], allow_pickle=False)
    assert found.dtype == np.float32
    assert np.array_equal(found, made.values)
    about = json.loads(files[1].read_text())
    assert about["keys"] == made.keys
    assert about["labels"] == made.labels
    assert about["columns"] == column_names(2, 2)
    assert about["weights_sha256"] == "f" * 64
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.json", "out.npy"]


def test_parquet_is_one_table_with_keys_and_labels(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    parquet = pytest.importorskip("pyarrow.parquet")
    made = some_features()
    assert made.save(tmp_path / "out.parquet") == [tmp_path / "out.parquet"]
    found = pandas.read_parquet(tmp_path / "out.parquet")
    assert list(found["key"]) == ["a.png", "b/ä.png", "bad?.png"]
    assert found["label"].fillna("none").tolist() == ["cat", "none", "dog"]
    assert np.array_equal(found[made.columns].to_numpy(), made.values)
    about = json.loads(parquet.read_schema(tmp_path / "out.parquet").metadata[b"latentvae"])
    assert about["pooling"] == "mean and std per channel, means of 2 x 2 cells"


def test_places_and_formats_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LatentVAEError, match=r"'\.csv'; features are written as \.npy or \.parquet"):
        some_features().save(tmp_path / "out.csv")
    with pytest.raises(LatentVAEError, match="cannot be written"):
        some_features().save(tmp_path / "none" / "out.npy")
    with pytest.raises(LatentVAEError, match="3 keys and 2 labels"):
        some_features(["cat", "dog"])


def test_stored_images_are_the_posteriors_modes(tmp_path: Path) -> None:
    sizes = [(3, 4), (2, 2), (3, 4)]
    captions = {0: {"label": 7}, 2: {"label": "cat"}}
    store = write_store(tmp_path / "store", [sizes[:2], sizes[2:]], captions=captions)
    found = list(stored_images(StoreReader(store)))
    assert [each.label for each in found] == ["7", "", "cat"]
    for number, each in enumerate(found):
        assert torch.equal(each.latents[0], moments_of(number, sizes[number])[:4])


def test_labels_are_texts_or_numbers_of_caption_records() -> None:
    assert label_of({"label": 3}) == "3"
    assert label_of({"label": " cat "}) == "cat"
    assert label_of({"caption": "a cat"}) == label_of(None) == label_of({"label": ["cat"]}) == ""


def test_subfolders_are_labels_where_they_tell_something() -> None:
    assert folder_labels(["cat/1.png", "cat/2.png", "dog/1.png", "3.png"]) == ["cat", "cat", "dog", ""]
    assert folder_labels(["1.png", "2.png"]) == ["", ""]
    assert folder_labels(["cat/1.png", "cat/2.png"]) == ["", ""]  # all alike
    assert folder_labels(["a/1.png", "b/1.png", "c/1.png"]) == ["", "", ""]  # none shared


@pytest.mark.parametrize(
    ("text", "wrong"), [("a.png\n", "a.png"), ("a.png,\n", "a.png,"), ("a.png,1\na.png,2\n", "a.png,2")]
)
def test_tables_with_a_bad_line_are_refused(tmp_path: Path, text: str, wrong: str) -> None:
    (tmp_path / "labels.csv").write_text("name,label\n" + text)
    with pytest.raises(LatentVAEError, match=f"the line '{wrong}'"):
        read_table(tmp_path / "labels.csv")


def test_a_table_may_leave_images_out_but_not_name_others() -> None:
    match_labels(Path("t.csv"), {"a": "1"}, ["a", "b"], whole=False)
    for table, whole, said in (({"a": "1"}, True, "'b' has none"), ({"c": "1"}, False, "'c' is no image")):
        with pytest.raises(LatentVAEError, match=said):
            match_labels(Path("t.csv"), table, ["a", "b"], whole=whole)
    with pytest.raises(LatentVAEError, match="without a label: 2"):
        match_labels(Path("t.csv"), {}, ["a", "b"], whole=False)


def test_labels_come_from_the_table_then_captions_then_folders() -> None:
    def gallery(captions: list[str]) -> Gallery:
        made = Gallery("0" * 64)
        for key, label in zip(("x/1", "x/2", "y/3"), captions, strict=True):
            made.add(key, label, torch.zeros(1, 1, 2, 2))
        return made

    for captions, table, wanted in (
        (["a", "", "b"], {"x/1": "t"}, ("table", ["t", "", ""])),
        (["a", "", "b"], None, ("captions", ["a", "", "b"])),
        (["", "", ""], None, ("folders", ["x", "x", "y"])),
    ):
        made = gallery(captions)
        made.label(table)
        assert (made.labels_from, made.labels) == wanted


def test_raw_pixels_are_the_image_itself_at_its_size_and_none_where_one_is_missing() -> None:
    image = torch.rand(1, 32, 32) * 2 - 1
    assert raw_pixels(image) == pytest.approx(image.flatten().numpy())
    made = Gallery("0" * 64)
    made.add("a", "", torch.zeros(1, 1, 2, 2), image)
    assert made.raw() == pytest.approx(image.flatten()[None].numpy())
    made.add("b", "", torch.zeros(1, 1, 2, 2), image, decoded=True)
    assert made.raw() is None
    assert made.pictures[1] is not None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat/0.png", "cat/1.png", "dog/2.png")):
        place = tmp_path / "photos" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(textured(64 + 8 * number, 48, number)).save(place)
    return tmp_path / "photos"


@pytest.fixture
def model(tmp_path: Path, tiny_vae: Any) -> Path:
    return export(tiny_vae, tmp_path / "tiny")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_verb_writes_what_the_library_gives(folder: Path, model: Path, tmp_path: Path) -> None:
    result = run("features", folder, tmp_path / "out.npy", "-m", model, "--grid", 2, "--json")
    assert result.exit_code == 0, result.output
    assert "3/3" in result.stderr  # its progress, for encoding takes the time
    said, about = json.loads(result.stdout), json.loads((tmp_path / "out.json").read_text())
    vae = latentvae.load(model)
    assert said["labels_from"] == "folders"
    assert about["weights_sha256"] == weight_hash(vae)
    assert dict(zip(about["keys"], about["labels"], strict=True)) == {
        "cat/0.png": "cat",
        "cat/1.png": "cat",
        "dog/2.png": "dog",
    }
    rows = np.load(tmp_path / "out.npy")
    for key, row in zip(about["keys"], rows, strict=True):
        with torch.no_grad():
            latents = encode(vae, load_image(folder / key)[None])[0].mode()
        assert row == pytest.approx(pool_latents(latents, 2)[0], abs=1e-4)


def test_small_images_are_encoded_side_by_side_each_on_one_core(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    seen: list[tuple[int, str]] = []

    def watched(vae: Any, images: torch.Tensor) -> Any:
        seen.append((torch.get_num_threads(), threading.current_thread().name))
        return encode(vae, images)

    monkeypatch.setattr(encoding, "encode", watched)
    monkeypatch.setattr(gallery, "encode", watched)
    for threads, name in ((2, "two"), (1, "one")):
        torch.set_num_threads(threads)
        said = run("features", folder, tmp_path / f"{name}.npy", "-m", model, "--json")
        assert said.exit_code == 3, said.output
        assert [Path(each["path"]).name for each in json.loads(said.stdout)["skipped"]] == ["broken.png"]
    assert [count for count, _ in seen] == [1] * 6
    assert [name.startswith("latentvae-side") for _, name in seen] == [True] * 3 + [False] * 3
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()
    one, two = (np.load(tmp_path / f"{name}.npy") for name in ("one", "two"))
    assert np.array_equal(one, two)


def test_a_store_gives_the_features_of_its_images(folder: Path, model: Path, tmp_path: Path) -> None:
    assert run("encode", folder, tmp_path / "store", "-m", model, "--dtype", "fp32").exit_code == 0
    for source, name in ((folder, "a"), (tmp_path / "store", "b")):
        result = run("features", source, tmp_path / f"{name}.npy", "-m", model, "--grid", 2)
        assert result.exit_code == 0, result.output
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert one == other
    assert np.load(tmp_path / "a.npy") == pytest.approx(np.load(tmp_path / "b.npy"), abs=1e-4)


def test_bad_input_is_said(folder: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("other.png,cat\n")
    (tmp_path / "empty").mkdir()
    write_store(tmp_path / "store", [])
    (folder / "dog" / "3.png").write_bytes(b"no image")
    for arguments, said in (
        ((folder, tmp_path / "out.csv"), "'.csv'"),
        ((folder, tmp_path / "out.npy", "--labels", tmp_path / "labels.csv"), "'other.png' is no image here"),
        ((tmp_path / "empty", tmp_path / "out.npy"), "no image in the folder"),
        ((tmp_path / "store", tmp_path / "out.npy"), "holds no image"),
        ((tmp_path / "store", folder, tmp_path / "out.npy"), "one store alone"),
    ):
        result = run("features", *arguments, "-m", model)
        assert isinstance(result.exception, LatentVAEError), result.output
        assert said in str(result.exception)
    assert not (tmp_path / "out.npy").exists()
    result = run("features", folder, tmp_path / "out.npy", "-m", model)
    assert result.exit_code == 3, result.output
    assert len(np.load(tmp_path / "out.npy")) == 3


@pytest.mark.parametrize("table", [None, "a.png,cat\nother.png,dog\n"])
def test_a_table_of_labels_that_does_not_fit_is_refused_before_anything_is_encoded(
    tiny_vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str | None
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("an image was encoded")

    export(tiny_vae, tmp_path / "vae")
    Image.fromarray(textured(32, 32, 1)).save(tmp_path / "a.png")
    if table is not None:
        (tmp_path / "labels.csv").write_text(table)
    monkeypatch.setattr("latentvae.models.latents.encode", never)
    arguments = ["features", "a.png", "out.npy", "-m", "vae", "--labels", "labels.csv"]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, LatentVAEError)
    wanted = "No such file or directory" if table is None else "'other.png' is no image here"
    assert wanted in str(result.exception)
    assert "Errno" not in str(result.exception)
