"""A store's files and plans: atomic writes, hashes, lines, shards, batches, sizes, locks, captions, verbs."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import textured
from PIL import Image
from stores import write_shard
from typer.testing import CliRunner

from latentvae.base import threads
from latentvae.base.errors import StoreError
from latentvae.base.files import whole_file
from latentvae.cli import encode as encode_verb
from latentvae.cli.verify import verify as verify_verb
from latentvae.images import resizing as geometry
from latentvae.images.reading import read_size
from latentvae.images.resizing import Preprocessing
from latentvae.runtime.memory import SHARE
from latentvae.store import journal
from latentvae.store.format import (
    Entry,
    Failure,
    Manifest,
    ShardRecord,
    StoredShard,
    damage,
    index_path,
    line_starts,
    model_config,
    parse_entry,
    place_shard,
    read_entries,
    read_failures,
    read_manifest,
    shard_files,
    stage_shard,
    write_manifest,
)
from latentvae.store.pipeline import PlannedBatch, plan_batches
from latentvae.store.planning import plan_shards


def entry(key: str, offset: int = 0, **changes: Any) -> Entry:
    values: dict[str, Any] = {
        "key": key, "source": f"photos/{key}", "sha256": "0" * 64, "size_bytes": 1, "mtime_ns": 2,
        "width": 30, "height": 16, "resized": None, "cropped": None, "padding": (0, 0, 2, 0),
        "tensor": "moments.2x4", "offset": offset,
    }  # fmt: skip
    return Entry(**(values | changes))


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "weights_sha256": "0" * 64, "config": {"latent_channels": 4}, "scaling_factor": 1.0,
        "shift_factor": None, "preprocessing": Preprocessing(), "dtype": "fp32", "precision": "fp32",
        "flips": False, "batch_size": 2, "shard_size": 4,
    }  # fmt: skip
    return Manifest(**(values | changes))


def write(store: Path, name: str, keys: list[str], failed: list[str] | None = None) -> ShardRecord:
    store.mkdir(parents=True, exist_ok=True)
    tensors = {"moments.2x4": torch.randn(len(keys), 8, 2, 4)} if keys else {}
    failures = [Failure(key, f"photos/{key}", None, 0, 0, "why") for key in failed or []]
    return write_shard(store, name, tensors, [entry(key, at) for at, key in enumerate(keys)], failures)


def test_a_shard_comes_back(tmp_path: Path) -> None:
    record = write(tmp_path, "latents-00000", ["b.png", "a\n\udcff.png"], ["c.png"])
    entries = read_entries(tmp_path, record.name)
    assert [one.key for one in entries] == ["a\n\udcff.png", "b.png"]
    assert entries[1] == entry("b.png", 0)
    assert [one.key for one in read_failures(tmp_path, record.name)] == ["c.png"]
    index = index_path(tmp_path, record.name)
    starts = line_starts(index)
    assert starts.tolist()[-1] == index.stat().st_size
    assert parse_entry(index.read_bytes()[starts[1] : starts[2]]) == entries[1]
    assert damage(tmp_path, record) is None
    assert len({path.stat().st_mode for path, _ in shard_files(tmp_path, record)}) == 1


def test_every_file_of_a_shard_is_hashed(tmp_path: Path) -> None:
    record = write(tmp_path, "latents-00000", ["a.png"], ["b.png"])
    for path, _ in shard_files(tmp_path, record):
        good = path.read_bytes()
        path.write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
        assert damage(tmp_path, record) == f"{path.name} does not match its sha256"
        path.unlink()
        assert damage(tmp_path, record) == f"{path.name} is missing"
        path.write_bytes(good)


@pytest.mark.parametrize("line", [b"", b"[]", b'{"key": 1}', entry("a").line()[:-5]])
def test_a_damaged_line_is_named(line: bytes) -> None:
    with pytest.raises(StoreError, match="no line of a store's index"):
        parse_entry(line)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(partial: Path) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left"), whole_file(path, StoreError, durable=True) as part:
        fail(part)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("file", b"old")]


def test_the_manifest_comes_back_and_damage_is_said(tmp_path: Path) -> None:
    wanted = manifest(shards=[write(tmp_path, "latents-00000", ["a.png", "b.png"])])
    write_manifest(tmp_path, wanted)
    assert read_manifest(tmp_path) == wanted
    assert wanted.count == 2
    good = json.loads((tmp_path / "store.json").read_text())
    for changes, words in (
        ({"version": 99}, "update it"),
        ({"unknown": 1}, "unknown"),
        ({"dtype": "fp8"}, "dtype"),
    ):
        (tmp_path / "store.json").write_text(json.dumps(good | changes))
        with pytest.raises(StoreError, match=words):
            read_manifest(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        read_manifest(tmp_path)
    with pytest.raises(StoreError, match="no complete store"):
        read_manifest(tmp_path / "nowhere")


def test_the_config_names_no_path_of_this_machine(tiny_vae: Any) -> None:
    tiny_vae.register_to_config(_name_or_path="/home/me")
    assert "/home/me" not in json.dumps(model_config(tiny_vae))


def test_a_journal_completes_what_a_kill_left(tmp_path: Path) -> None:
    """Wherever placing a shard is interrupted, the run after it has either the old or the new one, whole."""
    for renamed in range(4):
        book = journal.Journal(tmp_path / f"{renamed}")
        folder = book.generation(["a.png"])
        old = write(folder, "latents-00000", ["a.png"], ["failed.png"])
        (folder / f"{old.name}.json").write_text(old.model_dump_json())
        new = stage_shard(folder, old.name, {"moments.2x4": torch.ones(1, 8, 2, 4)}, [entry("a.png")], [])
        if renamed:  # the record is there: forward
            (folder / f"{old.name}.json").write_text(new.model_dump_json())
        if renamed == 2:
            (folder / ".latents-00000.safetensors.partial").rename(folder / "latents-00000.safetensors")
        if renamed == 3:
            place_shard(folder, new)
        book.begin(manifest())
        (found,) = book.found()
        assert found == StoredShard(folder, new if renamed else old)
        assert damage(*found) is None
        assert len(read_failures(folder, old.name)) == found.record.failed
        assert not list(folder.glob(".*.partial"))


def test_shards_are_full_and_in_order(tmp_path: Path) -> None:
    keys = [f"{number:02d}" for number in range(10)]
    whole = plan_shards([], keys, 4, False).shards
    assert [len(shard.keys) for shard in whole] == [4, 4, 2]
    found = [StoredShard(tmp_path, write(tmp_path, each.name, list(each.keys))) for each in whole]
    for done in ([0], [2], [0, 2], [0, 1, 2]):  # whatever a killed run had finished, the rest stays the same
        again = plan_shards([found[at] for at in done], keys, 4, False).shards
        assert [(shard.name, shard.keys) for shard in again] == [(one.name, one.keys) for one in whole]
        assert [at for at, shard in enumerate(again) if shard.whole == found[at]] == done
    later = plan_shards(found, ["000", *keys[:5], *keys[6:]], 4, False)  # one is new, one gone
    assert [shard.keys for shard in later.shards[:2]] == [("00", "000", "01", "02"), ("03", "04", "05", "06")]
    assert [shard.vanished for shard in later.shards] == [(), ("05",), ()]
    assert [shard.holders for shard in later.shards] == [
        (found[0],),
        (found[0], found[1]),
        (found[1], found[2]),
    ]
    assert [shard.whole for shard in later.shards] == [None] * 3
    pruned = plan_shards(found, [*keys[:5], *keys[6:]], 4, True)
    assert pruned.dropped == ["05"]
    assert [shard.keys for shard in pruned.shards][1:] == [("04", "06", "07", "08"), ("09",)]


def test_a_damaged_index_gives_its_images_back(tmp_path: Path) -> None:
    record = write(tmp_path, "latents-00000", ["a", "b"])
    index_path(tmp_path, record.name).write_bytes(b"nonsense\n")
    plan = plan_shards([StoredShard(tmp_path, record)], ["a", "b"], 2, False)
    assert [(shard.name, shard.keys, shard.holders) for shard in plan.shards] == [
        ("latents-00000", ("a", "b"), ())
    ]
    assert plan.damaged == ["latents-00000.jsonl does not match its sha256"]


def test_batches_are_of_one_padded_size_and_full() -> None:
    sizes = {"a": (16, 16), "b": (15, 9), "c": (512, 512), "d": (16, 16), "e": (1024, 512), "f": (1024, 512)}
    assert plan_batches(sizes, 8, 2) == [
        PlannedBatch(["e"], 1024 * 512),
        PlannedBatch(["f"], 1024 * 512),
        PlannedBatch(["c"], 512 * 512),
        PlannedBatch(["a", "b"], 512),
        PlannedBatch(["d"], 256),
    ]


@pytest.mark.parametrize("size", [256, 500, 512, 1024])
def test_buckets_have_about_the_same_area(size: int) -> None:
    found = geometry.buckets(size, 8)
    assert all(width % 8 == height % 8 == 0 for width, height in found)
    assert all(0.85 < width * height / size**2 < 1.15 for width, height in found)
    assert {(height, width) for width, height in found} == set(found)
    assert len(found) > 5


@pytest.mark.parametrize("original", [(640, 480), (480, 640), (100, 900), (31, 31), (512, 512), (1, 1)])
@pytest.mark.parametrize("policy", ["size", "centre-crop"])
def test_images_cover_their_bucket(original: tuple[int, int], policy: Any) -> None:
    fitted = geometry.plan_geometry(original, Preprocessing(policy=policy, size=64), 8)
    image = torch.rand(3, original[1], original[0])
    result = fitted.apply(image)
    assert tuple(result.shape[:0:-1]) == fitted.size(original)
    assert fitted.size(original) in (geometry.buckets(64, 8) if policy == "size" else [(64, 64)])
    width, height = fitted.resized or original
    assert abs(width / original[0] - height / original[1]) <= max(1 / original[0], 1 / original[1])


def test_headers_give_upright_sizes(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(textured(30, 20, 0)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_size(tmp_path / "turned.jpg") == (20, 30)
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    assert read_size(tmp_path / "broken.jpg") is None


@pytest.fixture
def app(tiny_vae: Any, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The two verbs, with the tiny model."""
    monkeypatch.setattr("latentvae.runtime.devices.load_model", lambda *_: copy.deepcopy(tiny_vae))
    verbs = typer.Typer()
    verbs.command()(encode_verb.encode)
    verbs.command()(verify_verb)
    return verbs


def call(app: typer.Typer, *arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_verbs(app: typer.Typer, tmp_path: Path) -> None:
    photos, store = tmp_path / "photos", tmp_path / "store"
    photos.mkdir()
    for number in range(3):
        Image.fromarray(textured(24, 16, number)).save(photos / f"{number}.png")
    result = call(app, "encode", photos, store, "--preview", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "3 images in" in result.stdout
    assert Image.open(store / "preview.png").height > 3 * 16
    result = call(app, "encode", photos, store, "--json", "--device", "cpu")
    assert json.loads(result.stdout) | {"store": "", "seconds": 0} == {
        "store": "", "images": 3, "encoded": 0, "failures": [], "vanished": [], "dropped": [],
        "repaired": [], "seconds": 0, "waiting": 0.0, "images_per_second": 0.0,
        "captions": [], "unclaimed": [], "left_out": {}, "part": "0/1", "missing": {}, "others": [],
    }  # fmt: skip
    (photos / "3.png").write_bytes(b"broken")
    (photos / os.fsdecode(b"\xff.png")).write_bytes(b"broken")
    result = call(app, "encode", photos, store, "--json", "--device", "cpu")
    assert result.exit_code == 3
    assert [one["key"] for one in json.loads(result.stdout)["failures"]] == ["3.png", "\udcff.png"]
    assert call(app, "verify", store).exit_code == 0
    (store / "latents-00000.jsonl").write_text("")
    assert isinstance(call(app, "verify", store).exception, StoreError)
    result = call(app, "verify", store, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["problems"] == ["latents-00000.jsonl does not match its sha256"]
    assert isinstance(call(app, "encode", photos, photos, "--device", "cpu").exception, StoreError)


def test_a_line_that_would_become_terabytes_is_listed_and_the_rest_is_there(
    app: typer.Typer, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (2, 60_000)).save(photos / "line.png")
    Image.fromarray(textured(24, 16, 0)).save(photos / "photo.png")
    result = call(app, "encode", photos, tmp_path / "store", "--size", 64, "--json", "--device", "cpu")
    assert result.exit_code == 3
    (failure,) = json.loads(result.stdout)["failures"]
    assert failure["key"] == "line.png"
    assert "to 48x1440000 px before they are cropped" in failure["reason"]
    assert json.loads(result.stdout)["images"] == 1


@pytest.mark.slow
def test_a_large_image_is_the_same_whatever_memory_and_threads_there_are(
    app: typer.Typer, tiny_vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = copy.deepcopy(tiny_vae)
    encode_verb.tile_large(vae)
    for_one = 1.5 * encode_verb.plan_peak(vae, 760, 1400) / SHARE
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        Image.fromarray(textured(1400, 760, number)).save(photos / f"{number}.png")
    stores = []
    for free, at_once in ((1e12, 2), (1e12, 1), (for_one, 2)):
        monkeypatch.setattr("latentvae.runtime.memory.free_memory", lambda device, free=free: free)
        stores.append(tmp_path / f"{free:g}-{at_once}")
        result = call(app, "encode", photos, stores[-1], "--threads", at_once, "--device", "cpu")
        assert result.exit_code == 0, result.output
    contents = [{file.name: file.read_bytes() for file in store.glob("latents-*")} for store in stores]
    assert contents[0] == contents[1] == contents[2]
    monkeypatch.setattr("latentvae.runtime.memory.free_memory", lambda device: 1e6)
    result = call(app, "encode", photos, tmp_path / "none", "--device", "cpu")
    assert "px takes about" in str(result.exception)


def test_threads_of_the_pool_stay_at_one_core_each() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threads.pool(2, "test") as pool:
            assert [pool.submit(torch.get_num_threads).result() for _ in range(4)] == [1] * 4
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
