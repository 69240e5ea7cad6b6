"""Stores read shard after shard, and from addresses through a cache of bounded size."""

import os
import time
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from remote import Shaky, put, shaky, upload  # noqa: F401  # a fixture
from stores import Size, write_store
from torch.utils.data import DataLoader

from latentvae.base.addresses import TRIES
from latentvae.base.cache import Cache
from latentvae.base.errors import SourceError, StoreError
from latentvae.cli.main import main
from latentvae.store.dataset import LatentDataset
from latentvae.store.format import read_manifest, tensors_path
from latentvae.store.stream import LatentStream
from latentvae.store.verification import verify

SQUARE: Size = (4, 4)
SIZES: list[Size] = [(4, 4), (4, 6), (6, 4)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Eight shards of ten images of one size, and an empty one."""
    return write_store(tmp_path / "store", [[SQUARE] * 10] * 4 + [[]] + [[SQUARE] * 10] * 4)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Six shards of fifteen images of three sizes."""
    shards = [[SIZES[(shard + number) % 3] for number in range(15)] for shard in range(6)]
    return write_store(tmp_path / "mixed", shards)


@pytest.fixture
def far(store: Path) -> str:
    return upload(store, "shaky://bucket/store")


def numbers(batches: Any) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def load(stream: LatentStream, workers: int = 0) -> list[Any]:
    options = {"multiprocessing_context": "fork"} if workers else {}
    return list(DataLoader(stream, batch_size=None, num_workers=workers, **options))


def test_an_epoch_has_each_image_once_and_each_another_order(store: Path) -> None:
    stream = LatentStream(store, 4, buffer=20)
    first = numbers(stream)
    assert sorted(chain.from_iterable(first)) == list(range(80))
    assert len(first) == len(stream) == 20
    assert first == numbers(LatentStream(store, 4, buffer=20))
    stream.set_epoch(1)
    assert numbers(stream) != first
    assert numbers(LatentStream(store, 4, buffer=20, seed=1)) != first
    straight = numbers(LatentStream(store, 4, shuffle=False))
    assert list(chain.from_iterable(straight)) == list(range(80))


def test_shards_of_a_buffer_are_mixed_and_others_are_not(store: Path) -> None:
    batches = numbers(LatentStream(store, 10, buffer=20))
    for first in range(0, 8, 2):
        shards = {number // 10 for number in list(chain.from_iterable(batches[first : first + 2]))}
        assert len(shards) == 2
        assert all(len({number // 10 for number in batch}) == 2 for batch in batches[first : first + 2])


def test_a_batch_is_what_the_dataset_has(store: Path) -> None:
    stream, dataset = LatentStream(store, 4, seed=3), LatentDataset(store, seed=3)
    for given in (stream, dataset):
        given.set_epoch(2)
    for batch in islice(stream, 3):
        for at, number in enumerate(batch["index"].tolist()):
            assert torch.equal(batch["latents"][at], dataset[number]["latents"])
            assert batch["key"][at] == dataset[number]["key"]


def test_batches_are_of_one_size_and_full_but_the_last(mixed: Path) -> None:
    batches = list(LatentStream(mixed, 4, buffer=30))
    assert len(batches) == 90 // 4
    sizes = [tuple(batch["latents"].shape[2:]) for batch in batches]
    short = [size for size, batch in zip(sizes, batches, strict=True) if len(batch["index"]) < 4]
    assert set(sizes) == set(SIZES)
    assert max(Counter(short).values(), default=0) <= 1
    found = list(chain.from_iterable(numbers(batches)))
    assert len(found) == len(set(found)) > 90 - 4 * len(SIZES)


@pytest.mark.parametrize("world", [3, 8])
def test_ranks_share_an_epoch(store: Path, mixed: Path, world: int) -> None:
    for one in (store, mixed):
        ranks = [LatentStream(one, 2, buffer=20, rank=rank, world=world) for rank in range(world)]
        parts = [numbers(rank) for rank in ranks]
        assert {len(part) for part in parts} == {len(ranks[0])}
        found = [number for part in parts for batch in part for number in batch]
        assert len(found) == len(set(found))
        total = len(ranks[0].dataset)
        assert len(found) > total - world * (1 + 2 * (3 if one is mixed else 1))


def test_workers_change_nothing(mixed: Path) -> None:
    wanted, found = (load(LatentStream(mixed, 4, buffer=30), count) for count in (0, 2))
    assert numbers(found) == numbers(wanted)
    assert all(torch.equal(a["latents"], b["latents"]) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("stop", [1, 3, 11, 21, 22])
def test_a_state_goes_on_after_its_batch(mixed: Path, stop: int) -> None:
    stream = LatentStream(mixed, 4, buffer=30)
    stream.set_epoch(5)
    whole = load(stream)
    for workers in (0, 2):
        again = LatentStream(mixed, 4, buffer=30)
        again.load_state_dict(whole[stop - 1]["state"])
        assert numbers(load(again, workers)) == numbers(whole[stop:])
        again.set_epoch(6)
        stream.set_epoch(6)
        assert numbers(again) == numbers(stream)
        stream.set_epoch(5)


def test_what_was_read_is_not_read_again_by_a_resumed_run(far: str, tmp_path: Path) -> None:
    def opened() -> set[str]:
        found = {path.rpartition("/")[2].partition(".")[0] for path in Shaky.asked if "latents-" in path}
        Shaky.asked.clear()
        return found

    opened()  # when it was put there
    stream = LatentStream(far, 5, buffer=20, cache=tmp_path / "one")
    whole = list(stream)
    assert len(opened()) == 8
    again = LatentStream(far, 5, buffer=20, cache=tmp_path / "two")
    again.load_state_dict(whole[11]["state"])  # 60 of 80 images
    assert numbers(again) == numbers(whole[12:])
    assert len(opened()) == 2 + 2  # of the block that was just done, and of the next


def test_a_state_of_another_stream_is_refused(store: Path, mixed: Path) -> None:
    state = next(iter(LatentStream(store, 4)))["state"]
    for other, message in (
        (LatentStream(store, 5), "batch_size 4; this one has batch_size 5"),
        (LatentStream(store, 4, rank=1, world=2), "rank 0, world 1; this one has rank 1, world 2"),
        (LatentStream(mixed, 4), "of a stream with store"),
    ):
        with pytest.raises(StoreError, match=message):
            other.load_state_dict(state)
    with pytest.raises(StoreError, match=r"\{'epoch': 1\} came; wanted the `state` of a batch"):
        LatentStream(store, 4).load_state_dict({"epoch": 1})


def test_options_out_of_range_are_refused(store: Path, tmp_path: Path) -> None:
    for options in ({"buffer": 0}, {"rank": 2, "world": 2}, {"cache_bytes": -1}):
        with pytest.raises(StoreError, match="came; wanted"):
            LatentStream(store, 4, **options)
    with pytest.raises(StoreError, match="80 images, too few for 81 ranks"):
        LatentStream(store, 4, world=81)


def test_a_dataset_and_a_stream_read_an_address(far: str, store: Path, tmp_path: Path) -> None:
    options = {"cache": tmp_path / "cache"}
    near, distant = LatentDataset(store), LatentDataset(far, **options)
    assert all(torch.equal(near[i]["latents"], distant[i]["latents"]) for i in range(0, 80, 7))
    wanted = load(LatentStream(store, 4, buffer=20))
    for workers in (0, 2):
        found = load(LatentStream(far, 4, buffer=20, **options), workers)
        assert all(torch.equal(a["latents"], b["latents"]) for a, b in zip(found, wanted, strict=True))
    assert verify(far) == []


def test_the_cache_is_bounded_and_keeps_what_was_used_last(far: str, store: Path, tmp_path: Path) -> None:
    shard = tensors_path(store, "latents-00000").stat().st_size
    folder = tmp_path / "cache"
    limit = 4 * shard  # with their indexes three
    for _ in range(2):
        stream = LatentStream(far, 4, buffer=20, cache=folder, cache_bytes=limit)
        assert len(load(stream, 2)) == 20
        held = sum(path.stat().st_size for path in folder.iterdir())
        assert held <= limit
    cache = Cache(folder, limit)
    records = [record for record in read_manifest(store).shards if record.count]
    dataset = LatentDataset(far, cache=folder, cache_bytes=limit)
    address = dataset.reader.store
    first = cache.fetch(address / "latents-00000.safetensors", records[0].sha256)
    for record in records[1:3]:
        cache.fetch(address / f"{record.name}.safetensors", record.sha256)
    os.utime(first, (time.time() + 10,) * 2)
    for record in records[3:]:
        cache.fetch(address / f"{record.name}.safetensors", record.sha256)
    assert first.exists()


def test_a_cache_smaller_than_a_shard_still_reads(far: str, tmp_path: Path) -> None:
    stream = LatentStream(far, 4, buffer=20, cache=tmp_path / "cache", cache_bytes=0)
    assert len(load(stream, 2)) == 20


def test_a_download_that_breaks_is_tried_again_and_then_named(far: str, tmp_path: Path) -> None:
    dataset = LatentDataset(far, cache=tmp_path / "cache")
    Shaky.breaks["latents-00000.safetensors"] = TRIES - 1
    assert dataset[0]["key"] == "image00000.png"
    Shaky.breaks["latents-00001.safetensors"] = TRIES
    with pytest.raises(SourceError, match=r"latents-00001\.safetensors cannot be read .*tried 4 times"):
        dataset[10]
    assert dataset[10]["key"] == "image00010.png"
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_another_file_than_the_manifest_names_is_refused(far: str, tmp_path: Path) -> None:
    dataset = LatentDataset(far, cache=tmp_path / "cache")
    put({"latents-00000.safetensors": b"something else"}, far)
    with pytest.raises(StoreError, match=r"latents-00000\.safetensors is not the file that store\.json "):
        dataset[0]
    assert verify(far) == ["latents-00000.safetensors does not match its sha256"]
    put({"latents-00077.jsonl": b""}, far)
    assert "latents-00077.jsonl is in no list of shards" in verify(far)


def test_no_store_at_an_address_is_said() -> None:
    put({"a.txt": b""}, "shaky://bucket/other")
    with pytest.raises(StoreError, match=r"shaky://bucket/other is no complete store: it has no store\.json"):
        LatentDataset("shaky://bucket/other")


def test_verbs_read_an_address(far: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, said in (("verify", "80 images in 9 shards: whole."), ("info", "weights_sha256")):
        with pytest.raises(SystemExit) as stop:
            main([verb, far])
        assert not stop.value.code
        assert said in capsys.readouterr().out
