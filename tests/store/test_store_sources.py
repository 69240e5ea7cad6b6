"""Encoding from folders, tars, tables and lists: the same pictures give the same, bad ones are named."""

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from conftest import textured
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file

from latentvae.base.errors import ConfigError, ImageError, StoreError
from latentvae.store.dataset import LatentDataset, original_image
from latentvae.store.encoding import EncodeReport, encode_folder
from latentvae.store.format import Entry, read_entries, read_manifest, tensors_path
from latentvae.store.pipeline import Computer
from latentvae.store.verification import verify, verify_sources

COUNT = 6
KEYS = {
    "folder": "3.jpg",
    "tars": "001/3.jpg",
    "pattern": "001/3.jpg",
    "parquet": "pictures/00000003",
    "saved": "saved/00000003",
    "jsonl": "folder/3.jpg",
    "csv": "folder/3.jpg",
}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def said(number: int) -> dict[str, Any]:
    return {"caption": f"picture {number}", "label": number}


def write_kinds(place: Path) -> dict[str, str]:
    """The same pictures, captions and labels in every form that is taken."""
    folder, data = place / "folder", dict[str, bytes]()
    folder.mkdir()
    for number in range(COUNT):
        file = io.BytesIO()
        Image.fromarray(textured((24, 16, 30)[number % 3], 16, number)).save(
            file, ("PNG", "JPEG")[number % 2]
        )
        name = f"{number}.{('png', 'jpg')[number % 2]}"
        data[name] = file.getvalue()
        (folder / name).write_bytes(data[name])
        (folder / f"{number}.txt").write_text(f"picture {number}\n")
        (folder / f"{number}.json").write_text(json.dumps({"label": number}))
    for shard in range(2):
        members = dict[str, bytes]()
        for number in range(3 * shard, 3 * shard + 3):
            name = list(data)[number]
            members |= {f"{number}.txt": f"picture {number}".encode(), f"./{name}": data[name]}
            members[f"./{number}.cls" if shard else f"{number}.json"] = (
                str(number) if shard else json.dumps({"label": number})
            ).encode()
            members = {key.removeprefix("./"): value for key, value in members.items()}
        write_tar(place / "tars" / f"{shard:03d}.tar", members)
    rows = [{"image": {"bytes": data[name], "path": None}, **said(at)} for at, name in enumerate(data)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.save_to_disk(place / "saved")
    table.to_parquet(place / "pictures.parquet")
    lines = [{"file_name": f"folder/{name}", **said(at)} for at, name in enumerate(data)]
    (place / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (place / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    specs = {"pattern": "tars/*.tar", "parquet": "pictures.parquet", "jsonl": "list.jsonl", "csv": "list.csv"}
    return {kind: str(place / specs.get(kind, kind)) for kind in KEYS}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where each form lies. Do not write here."""
    place = tmp_path_factory.mktemp("kinds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        datasets.disable_progress_bars()
        yield write_kinds(place)
        datasets.enable_progress_bars()


def encode(vae: Any, sources: Any, store: Path, **options: Any) -> EncodeReport:
    return encode_folder(vae, sources, store, **{"shard_size": 4, "batch_size": 1, **options})


def entries(store: Path) -> dict[str, Entry]:
    shards = read_manifest(store).shards
    return {entry.key: entry for shard in shards for entry in read_entries(store, shard.name)}


def by_content(store: Path) -> dict[str, tuple[torch.Tensor, Any]]:
    """Moments and what is said of each image, by the hash of its file."""
    found = {}
    for shard in read_manifest(store).shards:
        tensors = load_file(tensors_path(store, shard.name))
        for entry in read_entries(store, shard.name):
            found[entry.sha256] = tensors[entry.tensor][entry.offset], entry.caption
    return found


@pytest.fixture(scope="module")
def of_the_folder(kinds: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    import latentvae

    torch.manual_seed(0)
    store = tmp_path_factory.mktemp("stores") / "folder"
    encode(latentvae.build("tiny").eval(), kinds["folder"], store)
    return store


@pytest.mark.parametrize("kind", KEYS)
def test_every_form_gives_the_folders_moments_captions_and_labels(
    tiny_vae: Any, kinds: dict[str, str], of_the_folder: Path, tmp_path: Path, kind: str
) -> None:
    report = encode(tiny_vae, kinds[kind], tmp_path / "store")
    assert (report.images, report.failures, report.captions) == (COUNT, [], [])
    wanted, found = by_content(of_the_folder), by_content(tmp_path / "store")
    assert len(wanted) == COUNT
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[each][0], wanted[each][0]) for each in wanted)
    assert all(found[each][1] == wanted[each][1] for each in wanted)
    assert {found[each][1]["label"] for each in found} == set(range(COUNT))
    assert KEYS[kind] in entries(tmp_path / "store")
    assert entries(tmp_path / "store")[KEYS[kind]].caption == said(3)


@pytest.mark.parametrize("kind", ["tars", "parquet", "saved", "csv"])
def test_a_second_run_does_nothing_and_originals_are_found_again(
    tiny_vae: Any, kinds: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, kinds[kind], store)
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    monkeypatch.setattr(Computer, "_encode", None)
    assert encode(tiny_vae, kinds[kind], store).encoded == 0
    assert encode(tiny_vae, kinds[kind], store, rehash=True).encoded == 0
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    assert verify(store) == verify_sources(store) == []
    entry = entries(store)[KEYS[kind]]
    original = original_image(entry, read_manifest(store))
    assert original is not None
    assert original.shape == (3, 16, entry.width)
    assert LatentDataset(store)[3]["caption"] == "picture 3"


def test_a_shard_that_was_packed_anew_is_compared_by_content(
    tiny_vae: Any, kinds: dict[str, str], tmp_path: Path
) -> None:
    """And of one member that was replaced it alone is encoded; what was unpacked has the same keys."""
    data = {path.name: path.read_bytes() for path in Path(kinds["folder"]).iterdir()}
    for name, content in data.items():
        (tmp_path / "unpacked" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "unpacked" / "a" / name).write_bytes(content)
    store = tmp_path / "store"
    assert encode(tiny_vae, tmp_path / "unpacked", store).encoded == COUNT
    shard = write_tar(tmp_path / "tars" / "a.tar", data)
    assert encode(tiny_vae, tmp_path / "tars", store).encoded == 0
    assert entries(store)["a/3.jpg"].source == f"{shard}:3.jpg"
    write_tar(shard, {**data, "5.jpg": data["3.jpg"]})
    assert encode(tiny_vae, shard, store).encoded == 1
    assert entries(store)["a/5.jpg"].sha256 == entries(store)["a/3.jpg"].sha256


def test_a_column_and_an_extension_can_be_named(tiny_vae: Any, kinds: dict[str, str], tmp_path: Path) -> None:
    data = Path(kinds["folder"], "3.jpg").read_bytes()
    both = {"photo": [{"bytes": data, "path": None}], "mask": [{"bytes": data, "path": None}]}
    parquet.write_table(pyarrow.table(both), tmp_path / "two.parquet")
    with pytest.raises(ConfigError, match=r"several image columns.*--column"):
        encode(tiny_vae, tmp_path / "two.parquet", tmp_path / "store")
    assert encode(tiny_vae, tmp_path / "two.parquet", tmp_path / "store", column="mask").images == 1
    shard = write_tar(tmp_path / "a.tar", {"1.jpg": data, "1.mask.png": data, "1.txt": b"one", "1.psd": b"x"})
    report = encode(tiny_vae, shard, tmp_path / "masks", column="mask.png")
    assert (report.images, report.left_out) == (1, {".psd": 1})
    assert entries(tmp_path / "masks")["a/1.mask.png"].caption == {"caption": "one"}
    (tmp_path / "l.csv").write_text(f"where,text\n{kinds['folder']}/3.jpg,three\n")
    assert encode(tiny_vae, tmp_path / "l.csv", tmp_path / "listed", column="where").images == 1
    (key,) = entries(tmp_path / "listed")
    assert key == f"{kinds['folder'].lstrip('/')}/3.jpg"


def test_rows_may_name_files_whose_changes_are_noticed(
    tiny_vae: Any, kinds: dict[str, str], tmp_path: Path
) -> None:
    for number, name in enumerate(("a.png", "b.png")):
        Image.fromarray(textured(16, 16, number)).save(tmp_path / name)
    rows = {"image": [str(tmp_path / "a.png"), str(tmp_path / "b.png")], "text": ["a", None]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "named")
    store = tmp_path / "store"
    assert encode(tiny_vae, tmp_path / "named", store).images == 2
    assert [entry.caption for entry in entries(store).values()] == [{"text": "a"}, None]
    Image.fromarray(textured(24, 16, 7)).save(tmp_path / "b.png")
    assert encode(tiny_vae, tmp_path / "named", store).encoded == 1
    assert entries(store)["named/00000001"].width == 24


def test_a_damaged_member_row_or_line_is_named_and_the_others_are_encoded(
    tiny_vae: Any, kinds: dict[str, str], tmp_path: Path
) -> None:
    good = Path(kinds["folder"], "3.jpg").read_bytes()
    shard = write_tar(
        tmp_path / "a.tar", {"good.jpg": good, "bad.jpg": good[:200], "bad.txt": b"\xff\xfe\xff"}
    )
    table = pyarrow.table({"image": pyarrow.array([good, b"no picture", None], pyarrow.binary())})
    parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "list.jsonl").write_text(
        f'{{"file_name": "{kinds["folder"]}/3.jpg"}}\n{{"file_name": "gone.jpg"}}\n'
    )
    for source, bad in (
        (shard, {f"{shard}:bad.jpg"}),
        (tmp_path / "rows.parquet", {f"{tmp_path}/rows.parquet[1]", f"{tmp_path}/rows.parquet[2]"}),
        (tmp_path / "list.jsonl", {f"{tmp_path}/gone.jpg"}),
    ):
        report = encode(tiny_vae, source, tmp_path / source.name.partition(".")[0])
        assert report.images == 1
        assert {failure.source for failure in report.failures} == bad
        assert all(failure.source in failure.reason for failure in report.failures)


def test_a_tar_that_goes_while_it_is_read_costs_no_finished_image_and_is_tried_again(
    tiny_vae: Any, kinds: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(kinds["tars"], "001.tar").read_bytes()
    (tmp_path / "001.tar").write_bytes(whole)
    from latentvae.store import planning

    found = planning.find_sources

    def cut_after_listing(*args: Any) -> Any:
        sources = found(*args)
        (tmp_path / "001.tar").write_bytes(whole[:2000])
        return sources

    monkeypatch.setattr(planning, "find_sources", cut_after_listing)
    report = encode(tiny_vae, tmp_path / "001.tar", tmp_path / "store")
    assert report.failures
    assert all("001.tar is shorter than when the run began" in failure.reason for failure in report.failures)
    monkeypatch.undo()
    (tmp_path / "001.tar").write_bytes(whole)
    report = encode(tiny_vae, tmp_path / "001.tar", tmp_path / "store")
    assert (report.images, report.failures) == (3, [])


def test_what_cannot_be_taken_is_refused_and_nothing_is_made(
    tiny_vae: Any, kinds: dict[str, str], tmp_path: Path
) -> None:
    image = Path(kinds["folder"], "3.jpg").read_bytes()
    whole = write_tar(tmp_path / "whole.tar", {"1.jpg": image, "2.jpg": image}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 512 + 300])
    write_tar(tmp_path / "texts.tar", {"a.txt": b"x", "b.psd": b"y"})
    write_tar(tmp_path / "x" / "a.tar", {"1.jpg": image})
    write_tar(tmp_path / "y" / "a.tar", {"1.jpg": image})
    write_tar(tmp_path / "twice.tar", {"1.jpg": image, "./1.jpg": image})
    parquet.write_table(pyarrow.table({"image": [1, 2]}), tmp_path / "numbers.parquet")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "lines.jsonl").write_text('{"name": "a.jpg"}\n')
    (tmp_path / "table.csv").write_text("name\na.jpg\n")
    for sources, kind, message in (
        (["cut.tar"], ImageError, r"cut\.tar cannot be listed \(unexpected end of data\).*leave it out"),
        (["texts.tar"], ImageError, r"no image in .*texts\.tar: members \.png"),
        (
            ["x/a.tar", "y/a.tar"],
            StoreError,
            r"x/a\.tar:1\.jpg and .*y/a\.tar:1\.jpg would both have .*'a/1\.jpg'",
        ),
        (["twice.tar"], StoreError, r"would both have the key 'twice/1\.jpg'"),
        (["numbers.parquet"], ConfigError, r"no image column: image \(int64\).*--column"),
        (["{a,b}.tar"], ImageError, r"a\.tar does not exist \(.*\{a,b\}\.tar\)"),
        (["none*.tar"], ImageError, r"none\*\.tar does not exist"),
        (["empty.jsonl"], ImageError, r"empty\.jsonl lists no image"),
        (["lines.jsonl"], StoreError, r"line 1 of .*lines\.jsonl is no JSON object with a `file_name`"),
        (["table.csv"], StoreError, r"line 2 of .*table\.csv has no `file_name`"),
    ):
        with pytest.raises(kind, match=message):
            encode(tiny_vae, [tmp_path / source for source in sources], tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert encode(tiny_vae, tmp_path / "{x,y}/a.tar", tmp_path / "store").images == 2  # a folder holds both
    assert list(entries(tmp_path / "store")) == ["x/a/1.jpg", "y/a/1.jpg"]


def test_tars_beside_images_are_left_where_they_are(
    tiny_vae: Any, kinds: dict[str, str], tmp_path: Path
) -> None:
    image = Path(kinds["folder"], "3.jpg").read_bytes()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(image)
    write_tar(tmp_path / "photos" / "copy.tar", {"a.jpg": image})
    report = encode(tiny_vae, tmp_path / "photos", tmp_path / "store")
    assert (report.images, report.left_out) == (1, {".tar": 1})
    both = encode(tiny_vae, [tmp_path / "photos", tmp_path / "photos" / "copy.tar"], tmp_path / "store")
    assert both.images == 2
    assert list(entries(tmp_path / "store")) == ["a.jpg", "copy/a.jpg"]


def test_members_that_lead_out_of_their_shard_stay_in_it(
    tiny_vae: Any, kinds: dict[str, str], tmp_path: Path
) -> None:
    image = Path(kinds["folder"], "3.jpg").read_bytes()
    shard = write_tar(tmp_path / "a.tar", {"../../b.jpg": image, "/c.jpg": image, "d\udcff.jpg": image})
    encode(tiny_vae, shard, tmp_path / "store")
    assert list(entries(tmp_path / "store")) == ["a/b.jpg", "a/c.jpg", "a/d\udcff.jpg"]
