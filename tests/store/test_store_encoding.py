"""Encoding folders to stores: what is stored, what is skipped, what goes wrong, and what a kill leaves."""

import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import textured
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from stores import write_shard

import latentvae
from latentvae.base.errors import ImageError, StoreError
from latentvae.images.reading import load_image
from latentvae.store import format as shard_module
from latentvae.store.encoding import EncodeReport, Worker, Workload, encode_folder
from latentvae.store.format import Entry, StoredShard, read_entries, read_manifest, tensors_path
from latentvae.store.journal import Journal, locked
from latentvae.store.parts import WHOLE, Part
from latentvae.store.planning import plan_shards
from latentvae.store.verification import verify


def save(path: Path, width: int = 24, height: int = 16, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(textured(width, height, seed)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten small pictures of three sizes, one of them in a subfolder."""
    folder = tmp_path / "photos"
    for number in range(9):
        save(folder / f"{number}.png", (24, 16, 30)[number % 3], 16, number)
    save(folder / "sub" / "a.jpg", 24, 16, 9)
    return folder


def encode(vae: Any, photos: Any, store: Path, **options: Any) -> EncodeReport:
    return encode_folder(vae, photos, store, **{"shard_size": 4, "batch_size": 2, **options})


def content(store: Path) -> dict[str, bytes]:
    """All files of a store, byte for byte; hidden ones too."""
    return {path.name: path.read_bytes() for path in store.rglob("*") if path.is_file()}


def all_entries(store: Path) -> dict[str, Entry]:
    shards = read_manifest(store).shards
    return {entry.key: entry for shard in shards for entry in read_entries(store, shard.name)}


def moments(store: Path, key: str, flipped: bool = False) -> torch.Tensor:
    for shard in read_manifest(store).shards:
        for entry in read_entries(store, shard.name):
            if entry.key == key:
                name = entry.tensor.replace("moments", "moments_flipped") if flipped else entry.tensor
                return load_file(tensors_path(store, shard.name))[name][entry.offset]
    raise KeyError(key)


def test_moments_are_the_models_own(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    report = encode(tiny_vae, photos, tmp_path / "store", dtype="fp32", flips=True, batch_size=1)
    assert (report.images, report.encoded, report.failures) == (10, 10, [])
    assert list(all_entries(tmp_path / "store")) == sorted(all_entries(tmp_path / "store"))
    for key in ("0.png", "2.png", "sub/a.jpg"):
        image = load_image(photos / key)[None]
        for flipped, images in ((False, image), (True, image.flip(-1))):
            padded, _ = latentvae.images.tensors.pad_to_multiple(images, 8)
            wanted = tiny_vae.encode(padded).latent_dist.parameters[0]
            torch.testing.assert_close(
                moments(tmp_path / "store", key, flipped), wanted, atol=1e-5, rtol=1e-5
            )
    entry = all_entries(tmp_path / "store")["2.png"]
    assert (entry.width, entry.height, entry.padding, entry.tensor) == (30, 16, (0, 0, 2, 0), "moments.2x4")


def test_store_dtype_rounds_float32(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16", "fp16"):
        encode(tiny_vae, photos, tmp_path / dtype, dtype=dtype)
        assert read_manifest(tmp_path / dtype).dtype == dtype
    full, half = (moments(tmp_path / dtype, "4.png") for dtype in ("fp32", "bf16"))
    assert half.dtype == torch.bfloat16
    assert torch.equal(full.bfloat16(), half)


def test_bytes_do_not_depend_on_threads(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        encode(tiny_vae, photos, tmp_path / f"{threads}", workload=Workload(threads, workers=threads))
    assert content(tmp_path / "1") == content(tmp_path / "3")
    assert sorted(content(tmp_path / "1")) == sorted(
        ["store.json", *(f"latents-{n:05d}.{kind}" for n in range(3) for kind in ("jsonl", "safetensors"))]
    )


def test_a_second_run_does_nothing(tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    before = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    monkeypatch.setattr(tiny_vae, "encode", None)
    monkeypatch.setattr(Path, "read_bytes", _refusing(Path.read_bytes, ".png"))
    report = encode(tiny_vae, photos, store, batch_size=None, shard_size=None)
    assert (report.images, report.encoded) == (10, 0)
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == before


def _refusing(read: Any, suffix: str) -> Any:
    def reading(path: Path) -> Any:
        assert path.suffix != suffix, "an unchanged image was read"
        return read(path)

    return reading


def test_a_changed_image_alone_is_encoded_again(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    old = content(store)
    save(photos / "5.png", 40, 24, 77)
    report = encode(tiny_vae, photos, store)
    changed = {name for name, data in content(store).items() if data != old[name]}
    assert report.encoded == 1
    assert changed == {"store.json", "latents-00001.jsonl", "latents-00001.safetensors"}
    encode(tiny_vae, photos, tmp_path / "clean")
    assert content(store) == content(tmp_path / "clean")


def test_a_touched_image_is_not_encoded_again(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    os.utime(photos / "5.png", ns=(1, 1))
    assert encode(tiny_vae, photos, store).encoded == 0
    assert all_entries(store)["5.png"].mtime_ns == 1
    encode(tiny_vae, photos, tmp_path / "clean")
    assert content(store) == content(tmp_path / "clean")


def test_new_images_go_where_a_new_store_has_them(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    for number in range(6):
        save(photos / f"0-{number}.png", seed=50 + number)
    report = encode(tiny_vae, photos, store)
    assert (report.images, report.encoded) == (16, 6)
    encode(tiny_vae, photos, tmp_path / "clean")
    assert content(store) == content(tmp_path / "clean")


def test_vanished_images_stay_until_pruned(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, photos, store, flips=True)
    kept = moments(store, "1.png"), moments(store, "1.png", flipped=True)
    (photos / "1.png").unlink()
    assert encode(tiny_vae, photos, store, flips=True).vanished == ["1.png"]
    save(photos / "2.png", seed=99)  # the shard is written again; what has no file any more is carried over
    report = encode(tiny_vae, photos, store, flips=True)
    assert (report.vanished, report.images, report.encoded) == (["1.png"], 10, 1)
    assert torch.equal(moments(store, "1.png"), kept[0])
    assert torch.equal(moments(store, "1.png", flipped=True), kept[1])
    report = encode(tiny_vae, photos, store, flips=True, prune=True)
    assert (report.dropped, report.images) == (["1.png"], 9)
    assert verify(store) == []


def test_after_pruning_shards_are_those_of_a_new_store(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    for number in range(4):
        (photos / f"{number}.png").unlink()
    report = encode(tiny_vae, photos, store, prune=True)
    assert (report.images, report.encoded) == (6, 0)
    encode(tiny_vae, photos, tmp_path / "clean")
    assert content(store) == content(tmp_path / "clean")
    assert not (store / "latents-00002.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "fp32"}, "dtype bf16"),
        ({"flips": True}, "flips False"),
        ({"size": 32}, "as-is"),
        ({"batch_size": 3}, "batch_size 2"),
        ({"shard_size": 5}, "shard_size 4"),
    ],
)
def test_other_options_are_refused(
    tiny_vae: Any, photos: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    encode(tiny_vae, photos, tmp_path / "store")
    old = content(tmp_path / "store")
    with pytest.raises(StoreError, match=words):
        encode(tiny_vae, photos, tmp_path / "store", **options)
    assert {name: data for name, data in content(tmp_path / "store").items() if name in old} == old


def test_another_vae_is_refused(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    encode(tiny_vae, photos, tmp_path / "store")
    with torch.no_grad():
        next(tiny_vae.parameters())[0] += 1e-6
    with pytest.raises(StoreError, match="another VAE"):
        encode(tiny_vae, photos, tmp_path / "store")
    with pytest.raises(StoreError, match="precision fp32"):
        encode(
            latentvae.restore(tiny_vae).bfloat16(),
            photos,
            tmp_path / "store",
            weights_sha256=read_manifest(tmp_path / "store").weights_sha256,
        )


def test_a_folder_of_other_files_is_no_store(tiny_vae: Any, photos: Path) -> None:
    with pytest.raises(StoreError, match="no store"):
        encode(tiny_vae, photos, photos)


def test_a_store_inside_its_photos_holds_no_image(tiny_vae: Any, photos: Path) -> None:
    save(photos / "store" / "preview.png")
    (photos / "store" / ".run").mkdir()
    assert encode(tiny_vae, photos, photos / "store").images == 10


@pytest.mark.parametrize(
    ("crop", "size", "policy"), [(False, (48, 24), "size"), (True, (32, 32), "centre-crop")]
)
def test_size_policies(tiny_vae: Any, tmp_path: Path, crop: bool, size: tuple[int, int], policy: str) -> None:
    save(tmp_path / "photos" / "wide.png", 120, 60)
    encode(tiny_vae, tmp_path / "photos", tmp_path / "store", size=32, crop=crop)
    entry = all_entries(tmp_path / "store")["wide.png"]
    assert (entry.width, entry.height) == (120, 60)
    assert (entry.encoded_width, entry.encoded_height) == size
    assert entry.padding == (0, 0, 0, 0)
    assert read_manifest(tmp_path / "store").preprocessing.policy == policy


def test_bad_images_are_listed_and_stay_so(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    (photos / "2b.png").write_bytes(b"no picture")
    (photos / "2c.png").write_bytes((photos / "0.png").read_bytes()[:-40])
    (photos / "2d.png").write_bytes(b"")
    store = tmp_path / "store"
    report = encode(tiny_vae, photos, store)
    assert [failure.key for failure in report.failures] == ["2b.png", "2c.png", "2d.png"]
    assert report.images == 10
    old = content(store)
    again = encode(tiny_vae, photos, store)
    assert (again.encoded, again.failures) == (0, report.failures)
    assert content(store) == old
    save(photos / "2c.png")
    assert [failure.key for failure in encode(tiny_vae, photos, store).failures] == ["2b.png", "2d.png"]
    encode(tiny_vae, photos, tmp_path / "clean")
    assert content(store) == content(tmp_path / "clean")
    assert verify(store) == []


def test_not_finite_moments_are_failures(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_vae.quant_conv.weight.fill_(1e30)
    report = encode(tiny_vae, photos, tmp_path / "store", dtype="fp16")
    assert report.images == 0
    assert len(report.failures) == 10
    assert "NaN or infinite" in report.failures[0].reason


def test_odd_names(tiny_vae: Any, tmp_path: Path) -> None:
    photos, store = tmp_path / "photos", tmp_path / "store"
    names = ["a.jpg", "a.png", "été ☃/Ω.png", "n" * 240 + ".png", 'quo"te\n.png']
    for seed, name in enumerate(names):
        save(photos / name, seed=seed)
    (photos / "loop").symlink_to(photos, target_is_directory=True)
    encode(tiny_vae, photos, store)
    assert sorted(all_entries(store)) == sorted(names)
    if sys.platform == "linux":
        (photos / "a.jpg").rename(photos / "\udcff.jpg")
        encode(tiny_vae, photos, store, prune=True)
        assert "\udcff.jpg" in all_entries(store)
        assert verify(store) == []


def test_one_key_twice_is_refused(tiny_vae: Any, tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "b" / "1.png", seed=1)
    with pytest.raises(StoreError, match=r"the key '1\.png'"):
        encode(tiny_vae, [tmp_path / "a", tmp_path / "b"], tmp_path / "store")
    with pytest.raises(ImageError):
        encode(tiny_vae, tmp_path / "missing", tmp_path / "store")


def test_captions_are_carried_and_kept_up_to_date(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    (photos / "0.txt").write_text("a grating\n")
    (photos / "1.json").write_text('{"label": 3}')
    (photos / "2.json").write_text("[]")
    lines = [{"file_name": "3.png", "text": "three"}, {"file_name": "sub/a.jpg", "text": "sub"}]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    entries = all_entries(store)
    found = [entries[key].caption for key in ("0.png", "1.png", "2.png", "3.png", "sub/a.jpg", "4.png")]
    assert found == [{"caption": "a grating"}, {"label": 3}, None, {"text": "three"}, {"text": "sub"}, None]
    assert entries["2.png"].notes == ["caption 2.json left out: no JSON object"]
    (photos / "0.txt").write_text("a wave")
    assert encode(tiny_vae, photos, store).encoded == 0
    assert all_entries(store)["0.png"].caption == {"caption": "a wave"}
    encode(tiny_vae, photos, tmp_path / "clean")
    assert content(store) == content(tmp_path / "clean")
    (photos / "metadata.jsonl").write_text("nonsense\n")
    with pytest.raises(StoreError, match="line 1"):
        encode(tiny_vae, photos, store)


@pytest.mark.parametrize("name", ["latents-00001.safetensors", "latents-00001.jsonl"])
def test_a_flipped_byte_is_named_and_mended(tiny_vae: Any, photos: Path, tmp_path: Path, name: str) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    good = content(store)
    data = bytearray(good[name])
    data[len(data) // 2] ^= 1
    (store / name).write_bytes(data)
    assert verify(store) == [f"{name} does not match its sha256"]
    report = encode(tiny_vae, photos, store)
    assert (report.repaired, report.encoded) == ([f"{name} does not match its sha256"], 4)
    assert content(store) == good


def flip(path: Path, text: bytes = b"") -> None:
    """Flip a bit in the middle of a file, or in the first letter of a text in it."""
    data = bytearray(path.read_bytes())
    data[data.index(text) if text else len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["safetensors", "jsonl"])
def test_a_repair_loses_no_image_of_another_folder(tiny_vae: Any, tmp_path: Path, kind: str) -> None:
    store, first, second = tmp_path / "store", tmp_path / "first", tmp_path / "second"
    for number in range(6):
        save(first / f"a{number}.png", seed=number)
    for number in range(2):
        save(second / f"b{number}.png", seed=10 + number)
    encode(tiny_vae, first, store)
    encode(tiny_vae, second, store)
    whole = content(store)
    flip(store / f"latents-00000.{kind}", b"a2.png" if kind == "jsonl" else b"")
    damaged = content(store)
    with pytest.raises(StoreError) as caught:
        encode(tiny_vae, second, store)
    named = "4 of its images .*'a2.png'"  # a damaged index too: the tensors' metadata has the keys
    assert re.search(rf"latents-00000\.{kind} does not match its sha256: {named}", str(caught.value))
    assert "--prune" in str(caught.value)
    assert content(store) == damaged
    report = encode(tiny_vae, [first, second], store)
    assert (report.encoded, report.dropped) == (4, [])
    assert content(store) == whole


@pytest.mark.parametrize("kind", ["safetensors", "jsonl"])
def test_pruning_gives_up_what_is_damaged(tiny_vae: Any, photos: Path, tmp_path: Path, kind: str) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    (photos / "1.png").unlink()
    flip(store / f"latents-00000.{kind}", b"sha256" if kind == "jsonl" else b"")
    with pytest.raises(StoreError, match=r"1 of its images cannot be encoded again \('1\.png'\)\."):
        encode(tiny_vae, photos, store)
    report = encode(tiny_vae, photos, store, prune=True)
    assert (report.dropped, report.images) == (["1.png"], 9)
    assert verify(store) == []


def test_damage_elsewhere_keeps_an_image_that_is_gone(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    (photos / "1.png").unlink()
    flip(store / "latents-00001.safetensors")
    report = encode(tiny_vae, photos, store)
    assert (report.vanished, report.dropped, report.encoded, report.images) == (["1.png"], [], 4, 10)
    assert verify(store) == []


def test_any_flipped_bit_of_an_index_line_is_repaired_or_refused(tmp_path: Path) -> None:
    """In every byte of a line: with all files there it is repaired; an image that is gone is not lost."""
    keys = ["sub/a.png", "sub/b.png", "sub/c.png"]
    entries = [
        Entry(key, f"photos/{key}", "0" * 64, 9, 9, 16, 16, None, None, (0, 0, 0, 0), "moments.2x2", at)
        for at, key in enumerate(keys)
    ]
    tensors = {"moments.2x2": torch.zeros(3, 8, 2, 2)}
    found = [StoredShard(tmp_path, write_shard(tmp_path, "latents-00000", tensors, entries))]
    index, start = tmp_path / "latents-00000.jsonl", len(entries[0].line())
    good = index.read_bytes()
    for at in range(start, start + len(entries[1].line())):
        for bit in (0, 1, 5):
            data = bytearray(good)
            data[at] ^= 1 << bit
            index.write_bytes(data)
            assert plan_shards(found, keys, 4, False).losses == []
            gone = plan_shards(found, ["b.png", keys[0], keys[2]], 4, False).losses
            assert sum(len(loss.keys) + loss.unread for loss in gone) == 1


def test_a_full_disk_keeps_what_is_finished(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    store, written = tmp_path / "store", []

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        written.append(path)
        if len(written) == 2:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, metadata)

    original = shard_module.save_file
    monkeypatch.setattr(shard_module, "save_file", save_file)
    with pytest.raises(StoreError, match="No space left"):
        encode(tiny_vae, photos, store)
    assert list(store.glob(".run/*/latents-00000.safetensors"))
    assert not [*store.rglob("*.partial"), *store.rglob("latents-00001*")]
    assert encode(tiny_vae, photos, store).encoded == 6
    encode(tiny_vae, photos, tmp_path / "clean")
    assert content(store) == content(tmp_path / "clean")


def test_a_second_run_at_once_is_refused(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with locked(store), pytest.raises(StoreError, match=f"process {os.getpid()} on "):
        encode(tiny_vae, photos, store)
    (store / ".lock").write_text('{"pid": 1, "host": "left by a killed run"}')
    assert encode(tiny_vae, photos, store).images == 10
    assert not (store / ".lock").exists()


def test_parts_are_beside_each_other_and_nothing_else_is(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    """Not the same part again, no part of another number, and no run in one."""
    store = tmp_path / "store"
    store.mkdir()
    with locked(store, Part(0, 2)), locked(store, Part(1, 2)) as second:
        assert [name.partition(" as ")[2] for name in second.others()] == ["part 0 of 2"]
        for part in (Part(0, 2), Part(1, 2), Part(2, 3), WHOLE):
            with pytest.raises(StoreError, match=rf"process {os.getpid()} on .* as part [01] of 2"):
                encode(tiny_vae, photos, store, workload=Workload(part=part))
        assert [path.name for path in store.iterdir()] == [".lock-others"]
    assert encode(tiny_vae, photos, store).missing == {}
    assert not list(store.glob(".*"))


def test_a_run_that_starts_as_another_lets_go_is_not_refused(tmp_path: Path) -> None:
    held = threading.Event()

    def hold() -> None:
        with locked(tmp_path):
            held.set()
            time.sleep(0.05)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(60)
    with locked(tmp_path) as mine:
        assert mine.others() == []
        assert len(list((tmp_path / ".lock-others").iterdir())) == 1
    other.join()


def test_after_an_interrupt_no_shard_is_begun(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, write, written, interrupted = Worker._add, Journal.write, [], threading.Event()

    def interrupted_add(worker: Worker, batch: Any, pending: Any, computer: Any) -> None:
        if pending.name == "latents-00002":  # the first is being written, the second waits
            interrupted.set()
            raise KeyboardInterrupt
        add(worker, batch, pending, computer)

    def slow_write(journal: Journal, folder: Path, name: str, *args: Any) -> Any:
        assert interrupted.wait(60)
        time.sleep(0.5)
        written.append(name)
        return write(journal, folder, name, *args)

    monkeypatch.setattr(Worker, "_add", interrupted_add)
    monkeypatch.setattr(Journal, "write", slow_write)
    with pytest.raises(KeyboardInterrupt):
        encode(tiny_vae, photos, tmp_path / "store")
    assert written == ["latents-00000"]


def test_an_error_of_the_disk_without_a_number_is_named(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def odd(path: Path) -> bytes:
        if path.name == "3.png":
            raise OSError("odd disk")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", odd)
    (failure,) = encode(tiny_vae, photos, tmp_path / "store").failures
    assert failure.reason == f"{photos / '3.png'} cannot be read: odd disk"


def test_a_large_image_is_encoded_alone(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr("latentvae.store.pipeline.LARGE", 100_000)
    save(photos / "large.png", 1032, 104)
    save(photos / "larger.png", 1040, 104)
    asked = []

    def room(name: str, height: int, width: int) -> Any:
        asked.append((Path(name).name, height, width))
        if Path(name).name == "larger.png":
            raise ImageError("no room")
        return nullcontext()

    report = encode(tiny_vae, photos, tmp_path / "store", workload=Workload(room=room))
    assert sorted(asked) == [("large.png", 104, 1032), ("larger.png", 104, 1040)]
    assert [(failure.key, failure.reason) for failure in report.failures] == [("larger.png", "no room")]
    assert all_entries(tmp_path / "store")["large.png"].tensor == "moments.13x129"
    assert encode(tiny_vae, photos, tmp_path / "store").encoded == 0
    assert encode(tiny_vae, photos, tmp_path / "store", retry_failed=True).failures == []


def many(folder: Path, count: int) -> Path:
    for number in range(count):
        save(folder / f"{number:03d}.png", *((24, 16), (40, 32), (33, 47))[number % 3], number)
    (folder / "broken.png").write_bytes(b"broken")
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server")
@pytest.mark.slow
def test_two_processes_make_the_same_store(tmp_path: Path) -> None:
    from store_runs import finish, start, start_two

    photos = many(tmp_path / "photos", 12)
    for name, processes in (
        ("one", [start(photos, tmp_path / "one")]),
        ("two", start_two(photos, tmp_path / "two")),
    ):
        assert set(finish(*processes)) == {0}, name
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert read_manifest(tmp_path / "two").count == 12


@pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server")
@pytest.mark.slow
def test_two_processes_refuse_to_lose_an_image(tmp_path: Path) -> None:
    from store_runs import finish, start, start_two

    photos, store = many(tmp_path / "photos", 8), tmp_path / "store"
    assert finish(start(photos, store)) == [0]
    (photos / "002.png").unlink()
    flip(store / "latents-00001.safetensors")  # which the second process does
    before = content(store)
    assert finish(*start_two(photos, store)) == [0, 1]  # the first has nothing to do, and does not end it
    assert {name: data for name, data in content(store).items() if name in before} == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server and signals")
@pytest.mark.slow
def test_a_part_may_outlive_another(tmp_path: Path) -> None:
    """What is killed costs no other part anything: the killed one runs again, and the last ends the store."""
    from store_runs import finish, start, start_two

    photos, store, clean = many(tmp_path / "photos", 200), tmp_path / "store", tmp_path / "clean"
    first, second = start_two(photos, store)
    _wait(lambda: any(store.glob(".run/*/latents-00001.jsonl")))
    os.kill(second.pid or 0, signal.SIGSTOP)
    first.kill()
    finish(first)
    try:
        assert finish(start(photos, store)) == [1]  # all of it, while a part is at it
    finally:
        os.kill(second.pid or 0, signal.SIGCONT)
    assert finish(second) == [0]
    assert not (store / "store.json").exists()
    assert finish(start(photos, store, RANK="0", WORLD_SIZE="2")) == [0]
    assert finish(start(photos, clean)) == [0]
    assert content(store) == content(clean)
    assert verify(store) == []


def _wait(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server and SIGKILL")
def test_what_a_killed_write_left_is_swept(tmp_path: Path, tiny_vae) -> None:
    photos, store = many(tmp_path / "photos", 2), tmp_path / "store"
    encode(tiny_vae, photos, store)
    (store / ".tmpa1B2c3").touch()
    encode(tiny_vae, photos, store)
    assert not [*store.glob(".tmp*")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_runs_end_as_a_clean_one(tmp_path: Path) -> None:
    """30 kills at random moments: of first runs, and after images were added, changed and taken away."""
    from store_runs import finish, start, start_two

    photos, store, clean = many(tmp_path / "photos", 40), tmp_path / "store", tmp_path / "clean"
    chance, unfinished = random.Random(0), 0
    assert finish(start(photos, tmp_path / "first")) == [0]  # imports everything, which would be timed else
    for stage in range(2):
        if stage:
            (photos / "003.png").unlink()
            for number in (1, 3, 20, 50, 51, 52, 53, 54):
                save(photos / f"{number:03d}.png", 48, 32, 100 + number)
            (photos / "003.png").unlink()
        began = time.perf_counter()
        assert finish(start(photos, clean)) == [0]
        whole = time.perf_counter() - began
        for kill in range(15):
            if kill % 3 == 0 and stage == 0:
                shutil.rmtree(store, ignore_errors=True)
            processes = start_two(photos, store) if kill % 5 == 4 else [start(photos, store)]
            time.sleep(whole * chance.uniform(0, 0.9))
            for process in processes:
                process.kill()
            finish(*processes)
            unfinished += (store / ".run").exists() and any(store.glob(".run/*/latents-*.jsonl"))
        assert finish(start(photos, store)) == [0]
        assert content(store) == content(clean)
        assert verify(store) == []
    assert unfinished > 5, "hardly a run was killed in the middle"


@pytest.mark.parametrize("place", ["missing", "empty"])
def test_without_images_nothing_is_made(tiny_vae: Any, tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError):
        encode(tiny_vae, tmp_path / place, tmp_path / "new" / "store")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty"]


@pytest.fixture
def older(tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store whose shards were written before keys stood in their metadata."""
    with monkeypatch.context() as before:
        before.setattr(shard_module, "keys_metadata", lambda entries: None)
        encode(tiny_vae, photos, tmp_path / "older")
    return tmp_path / "older"


def test_keys_stand_in_the_metadata_row_by_row(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    encode(tiny_vae, photos, tmp_path / "store", flips=True)
    for record in read_manifest(tmp_path / "store").shards:
        with safe_open(tensors_path(tmp_path / "store", record.name), framework="pt") as tensors:
            rows = json.loads(tensors.metadata()["keys"])
        entries = read_entries(tmp_path / "store", record.name)
        assert {key: (name, at) for name, keys in rows.items() for at, key in enumerate(keys)} == {
            entry.key: (entry.tensor, entry.offset) for entry in entries
        }
        assert shard_module.read_keys(tmp_path / "store", record) == {entry.key for entry in entries}


def test_an_older_store_is_as_good_and_stays_as_it_is(tiny_vae: Any, photos: Path, older: Path) -> None:
    before = content(older)
    assert [shard_module.read_keys(older, shard) for shard in read_manifest(older).shards] == [None] * 3
    assert encode(tiny_vae, photos, older).encoded == 0
    assert content(older) == before
    assert verify(older) == []
    assert len(latentvae.LatentDataset(older)) == 10
    save(photos / "9.png", seed=9)
    assert encode(tiny_vae, photos, older).encoded == 1
    changed = {name for name, data in before.items() if content(older)[name] != data}
    assert changed == {"store.json", "latents-00002.jsonl", "latents-00002.safetensors"}
    assert verify(older) == []


def test_a_damaged_index_of_an_older_store_is_given_up_when_asked(
    tiny_vae: Any, photos: Path, older: Path
) -> None:
    flip(older / "latents-00001.jsonl")
    damaged = content(older)
    words = (
        r"latents-00001\.jsonl does not match its sha256: nothing else says which 4 images it held\. Put .*"
        r" copy .*if no image file is missing, .* --prune.* takes out all images of the store whose files"
    )
    with pytest.raises(StoreError, match=words):
        encode(tiny_vae, photos, older)
    assert content(older) == damaged
    report = encode(tiny_vae, photos, older, prune=True)
    assert (report.encoded, report.images, report.dropped) == (4, 10, [])
    assert any("nothing else says" in problem for problem in report.repaired)
    assert verify(older) == []


@pytest.mark.parametrize("kind", ["older", "tensors damaged too"])
def test_a_damaged_list_of_failures_loses_no_image(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The index says what the shard holds, whether or not the tensors could."""
    store = tmp_path / "store"
    (photos / "2b.png").write_bytes(b"no picture")
    with monkeypatch.context() as before:
        if kind == "older":
            before.setattr(shard_module, "keys_metadata", lambda entries: None)
        encode(tiny_vae, photos, store)
    (store / "latents-00000.failed.jsonl").unlink()
    if kind != "older":
        flip(store / "latents-00000.safetensors")
    (photos / "1.png").rename(tmp_path / "1.png")
    with pytest.raises(StoreError, match=r"1 of its images cannot be encoded again \('1\.png'\)\. Bring"):
        encode(tiny_vae, photos, store)
    (tmp_path / "1.png").rename(photos / "1.png")
    report = encode(tiny_vae, photos, store)
    assert report.repaired == ["latents-00000.failed.jsonl is missing"]
    assert (report.encoded, report.images, report.dropped) == (4, 10, [])
    assert [failure.key for failure in report.failures] == ["2b.png"]
    assert verify(store) == []


def test_keys_that_fit_no_header_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "MAX_KEYS", 10)
    entry = Entry("a.png", "a.png", "0" * 64, 9, 9, 16, 16, None, None, (0, 0, 0, 0), "moments.2x2", 0)
    record = write_shard(tmp_path, "latents-00000", {"moments.2x2": torch.zeros(1, 8, 2, 2)}, [entry])
    assert shard_module.read_keys(tmp_path, record) is None


def test_what_a_killed_run_of_an_earlier_version_left_is_no_lock(
    tiny_vae: Any, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "store" / ".run").mkdir(parents=True)
    (tmp_path / "store" / ".lock-others").write_text("process 1 on elsewhere\n")
    assert encode(tiny_vae, photos, tmp_path / "store").images == 10
    assert not list((tmp_path / "store").glob(".*"))


def test_a_full_memory_costs_one_image_one_run(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    save(photos / "large.png", 640, 480)
    real_empty, real_stack = torch.empty, torch.stack

    def empty(*sizes: Any, **options: Any) -> torch.Tensor:
        if sizes[-2:] == (480, 640):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory")
        return real_empty(*sizes, **options)

    def stack(images: list[torch.Tensor]) -> torch.Tensor:
        if images[0].shape[-1] == 640:
            raise MemoryError
        return real_stack(images)

    whole = encode(tiny_vae, photos, tmp_path / "whole")
    for name, target, refuse in (("loading", "empty", empty), ("encoding", "stack", stack)):
        store = tmp_path / name
        with monkeypatch.context() as full:
            full.setattr(torch, target, refuse)
            report = encode(tiny_vae, photos, store)
        assert report.images == whole.images - 1
        (failure,) = report.failures
        assert failure.key == "large.png"
        assert failure.sha256 is None  # so that it is tried again
        assert "memory" in failure.reason
        assert encode(tiny_vae, photos, store).failures == []
        assert content(store) == content(tmp_path / "whole")


def test_what_is_left_out_is_in_the_report(tiny_vae: Any, photos: Path) -> None:
    before = encode(tiny_vae, photos, photos / "latents")
    (photos / "scene.xcf").write_bytes(b"x")
    (photos / "layers.PSD").write_bytes(b"x")
    report = encode(tiny_vae, photos, photos / "latents")
    assert report.images == before.images
    assert report.left_out == {**before.left_out, ".xcf": 1, ".psd": 1}
    assert ".safetensors" not in report.left_out  # the store lies among the images
