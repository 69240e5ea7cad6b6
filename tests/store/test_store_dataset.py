"""Reading a store: the dataset, its batches of one size, and WebDataset shards."""

import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import psutil
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from stores import Size, moments_of, write_store
from torch.utils.data import DataLoader, DistributedSampler

from latentvae.base.errors import StoreError
from latentvae.store import dataset as reading
from latentvae.store.buckets import BucketBatchSampler
from latentvae.store.dataset import LatentDataset
from latentvae.store.format import index_path, read_manifest, tensors_path, write_manifest
from latentvae.store.webdataset import export_webdataset, sample_name

SQUARE: Size = (4, 4)
SIZES: list[Size] = [(4, 4), (4, 6), (6, 4)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three shards, one of them empty, of 4x4 latents: 5 and 7 images."""
    return write_store(tmp_path / "store", [[SQUARE] * 5, [], [SQUARE] * 7])


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Three shards of 40 images, of three sizes, the last one of a single size."""
    shards = [[SIZES[(shard + number) % 3] for number in range(15)] for shard in range(2)]
    return write_store(tmp_path / "mixed", [*shards, [SQUARE] * 10], flips=True)


def test_mode_is_the_scaled_mean(store: Path) -> None:
    dataset = LatentDataset(store, mode="mode")
    assert len(dataset) == 12
    for number in (0, 4, 5, 11):
        item = dataset[number]
        wanted = (moments_of(number, SQUARE)[:4] - 0.25) * 0.5
        assert torch.equal(item["latents"], wanted)
        assert item["latents"].dtype == torch.float32
        assert (item["key"], item["index"]) == (f"image{number:05d}.png", number)
    unscaled = LatentDataset(store, mode="mode", scaled=False)[3]["latents"]
    assert torch.equal(unscaled, moments_of(3, SQUARE)[:4])
    assert torch.equal(dataset[-1]["latents"], dataset[11]["latents"])
    with pytest.raises(IndexError):
        dataset[12]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_moments_are_those_stored_in_float32(tmp_path: Path, dtype: str) -> None:
    store = write_store(tmp_path / "store", [[SQUARE] * 3], dtype=dtype)
    moments = LatentDataset(store, mode="moments")[2]["moments"]
    assert moments.dtype == torch.float32
    rounded = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert torch.equal(moments, moments_of(2, SQUARE).to(rounded).float())


def test_items_may_be_written_to(store: Path) -> None:
    dataset = LatentDataset(store, mode="moments")
    dataset[1]["moments"].zero_()
    assert torch.equal(dataset[1]["moments"], moments_of(1, SQUARE))


def test_samples_come_from_the_posterior(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [[(64, 64)]], shift_factor=None, scaling_factor=1.0)
    moments = moments_of(0, (64, 64))
    noise = (LatentDataset(store)[0]["latents"] - moments[:4]) / torch.exp(0.5 * moments[4:])
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_samples_depend_on_seed_epoch_and_index_alone(store: Path) -> None:
    dataset, again = LatentDataset(store, seed=5), LatentDataset(store, seed=5)
    first = [dataset[number]["latents"] for number in range(12)]
    assert all(torch.equal(again[number]["latents"], first[number]) for number in reversed(range(12)))
    dataset.set_epoch(1)
    assert not any(torch.equal(dataset[number]["latents"], first[number]) for number in range(12))
    dataset.set_epoch(0)
    assert torch.equal(dataset[7]["latents"], first[7])
    assert not torch.equal(LatentDataset(store, seed=6)[7]["latents"], first[7])


def test_a_generator_draws_the_seed(store: Path) -> None:
    first, second = (LatentDataset(store, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0]["latents"], second[0]["latents"])
    other = LatentDataset(store, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(first[0]["latents"], other[0]["latents"])


def test_flips_are_those_that_were_stored(mixed: Path) -> None:
    stored = [moments_of(0, SQUARE, flipped=flipped) for flipped in (False, True)]
    never, always = (LatentDataset(mixed, mode="moments", flip=flip) for flip in (0.0, 1.0))
    assert torch.equal(never[0]["moments"], stored[0])
    assert torch.equal(always[0]["moments"], stored[1])
    assert (never[0]["flipped"], always[0]["flipped"]) == (False, True)
    half = LatentDataset(mixed, mode="moments", flip=0.5)
    flipped = [half[number]["flipped"] for number in range(40)]
    assert 10 < sum(flipped) < 30
    half.set_epoch(1)
    assert flipped != [half[number]["flipped"] for number in range(40)]


def test_flips_that_were_not_stored_are_refused(store: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no flipped latents.*--flips"):
        LatentDataset(store, flip=0.5)


@pytest.mark.parametrize("options", [{"mode": "mean"}, {"flip": 1.5}, {"seed": -1}], ids=str)
def test_bad_options_are_refused(store: Path, options: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="came; wanted"):
        LatentDataset(store, **options)


def test_captions_and_labels(tmp_path: Path) -> None:
    captions = {0: {"caption": "a cat", "text": "no"}, 1: {"text": "a dog"}, 2: {"label": 7, "caption": 3}}
    captions[3] = {"caption": ["one", "two"], "prompt": "three"}
    store = write_store(tmp_path / "store", [[SQUARE] * 5], captions=captions)
    dataset = LatentDataset(store)
    assert [dataset[number]["caption"] for number in (0, 1, 2, 4)] == ["a cat", "a dog", "", ""]
    assert [dataset[number]["label"] for number in range(5)] == [-1, -1, 7, -1, -1]
    drawn = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        drawn.add(dataset[3]["caption"])
    assert drawn == {"one", "two"}
    assert LatentDataset(store, caption_keys=("prompt",))[3]["caption"] == "three"
    assert dataset.entry(2).caption == {"label": 7, "caption": 3}


def test_sizes_and_crops_are_those_of_the_mirror_image_too(tmp_path: Path) -> None:
    line = {"width": 90, "height": 60, "resized": (45, 30), "cropped": (10, 2, 29, 27)}
    store = write_store(tmp_path / "store", [[SQUARE]], details={0: line}, flips=True)
    item, mirrored = LatentDataset(store)[0], LatentDataset(store, flip=1)[0]
    assert item["original_size"].tolist() == [60, 90]
    assert item["size"].tolist() == [27, 29]
    assert item["crop_top_left"].tolist() == [2, 10]
    assert mirrored["crop_top_left"].tolist() == [2, 45 - 10 - 29]


def read_all(loader: DataLoader) -> dict[int, torch.Tensor]:
    """The latents by image number, which must not come twice."""
    found: dict[int, torch.Tensor] = {}
    for batch in loader:
        for number, latents in zip(batch["index"].tolist(), batch["latents"], strict=True):
            assert number not in found
            found[number] = latents
    return found


def assert_equal(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[number], other[number]) for number in one)


def test_two_workers_give_what_none_gives(store: Path) -> None:
    dataset = LatentDataset(store)
    assert dataset[3]["key"]  # files are mapped before the workers start
    workers = DataLoader(dataset, 5, shuffle=True, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(epoch)  # must reach workers that live on
        own = read_all(DataLoader(dataset, 4))
        assert len(own) == 12
        assert_equal(read_all(workers), own)


@pytest.mark.slow
def test_spawned_workers_give_what_none_gives(store: Path) -> None:
    dataset = LatentDataset(store)
    dataset.set_epoch(3)
    own = read_all(DataLoader(dataset, 4))
    assert_equal(read_all(DataLoader(dataset, 4, num_workers=1, multiprocessing_context="spawn")), own)


def test_pickling_leaves_open_shards_behind(store: Path) -> None:
    dataset = LatentDataset(store, seed=2)
    before = dataset[6]["latents"]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.reader._tensors.cache_info().currsize == 0
    assert torch.equal(copy[6]["latents"], before)


def test_two_ranks_see_every_image_once(store: Path) -> None:
    dataset = LatentDataset(store)
    own = read_all(DataLoader(dataset, 4))
    ranks = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=True, seed=1)
        ranks.append(read_all(DataLoader(dataset, 4, sampler=sampler)))
    assert not ranks[0].keys() & ranks[1].keys()
    assert_equal(ranks[0] | ranks[1], own)


def test_opening_reads_the_manifest_alone(store: Path) -> None:
    for path in store.iterdir():
        if path.name != "store.json":
            path.unlink()
    dataset = LatentDataset(store)
    assert len(dataset) == 12
    with pytest.raises(StoreError, match=r"latents-00002 of .* cannot be used: No such file.*verify"):
        dataset[8]


def test_a_row_is_read_without_the_shard(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [[SQUARE] * 2])
    rows, row = 1 << 15, 8 * 64 * 64 * 4
    _sparse_shard(tensors_path(store, "latents-00000"), rows, (64, 64))
    line = json.loads(index_path(store, "latents-00000").read_bytes().splitlines()[1])
    line |= {"tensor": "moments.64x64", "offset": rows - 1}
    _replace_line(store, 1, line)
    process = psutil.Process()
    before = process.memory_info().rss
    moments = LatentDataset(store, mode="moments")[1]["moments"]
    grown = process.memory_info().rss - before
    assert moments.shape == (8, 64, 64)
    assert tensors_path(store, "latents-00000").stat().st_size > rows * row  # 4 GB
    assert grown < 50e6


def _sparse_shard(path: Path, rows: int, size: Size) -> None:
    """A safetensors file of zeros that takes no space."""
    length = rows * 8 * size[0] * size[1] * 4
    name = f"moments.{size[0]}x{size[1]}"
    header = {name: {"dtype": "F32", "shape": [rows, 8, *size], "data_offsets": [0, length]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + length)


def _replace_line(store: Path, number: int, line: dict[str, Any], shard: str = "latents-00000") -> None:
    path = index_path(store, shard)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number] = json.dumps(line).encode() + b"\n"
    path.write_bytes(b"".join(lines))


def test_only_a_few_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SHARDS_KEPT", 2)
    store = write_store(tmp_path / "store", [[SQUARE]] * 6)
    dataset = LatentDataset(store, mode="moments")
    for number in [0, 5, 1, 4, 2, 3, 0, 5]:
        assert torch.equal(dataset[number]["moments"], moments_of(number, SQUARE))
    caches = (dataset.reader._tensors, dataset.reader._line_starts)
    assert [cache.cache_info().currsize for cache in caches] == [2, 2]


def test_no_store_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="latentvae encode"):
        LatentDataset(tmp_path / "missing")


def test_an_empty_store_is_said(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [[], []])
    with pytest.raises(StoreError, match="holds no image"):
        LatentDataset(store)


def test_a_manifest_without_channels_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="latent_channels"):
        LatentDataset(write_store(tmp_path / "store", [[SQUARE]], config={}))


def test_a_later_version_is_said(store: Path) -> None:
    write_manifest(store, read_manifest(store).model_copy(update={"version": 99}))
    with pytest.raises(StoreError, match="version 99"):
        LatentDataset(store)


def _cut_index(store: Path) -> None:
    path = index_path(store, "latents-00000")
    path.write_bytes(path.read_bytes()[:-400])


def _garble_index(store: Path) -> None:
    path = index_path(store, "latents-00000")
    path.write_bytes(path.read_bytes().replace(b'"offset"', b'"offzet"'))


def _turn_offset(store: Path) -> None:
    path = index_path(store, "latents-00000")
    path.write_bytes(path.read_bytes().replace(b'"offset":4', b'"offset":-1'))


def _drop_index(store: Path) -> None:
    index_path(store, "latents-00000").unlink()


def _cut_tensors(store: Path) -> None:
    path = tensors_path(store, "latents-00000")
    path.write_bytes(path.read_bytes()[:-10])


def _drop_rows(store: Path) -> None:
    _sparse_shard(tensors_path(store, "latents-00000"), 2, SQUARE)


def _drop_tensor(store: Path) -> None:
    _sparse_shard(tensors_path(store, "latents-00000"), 5, (9, 9))


def _drop_shard(store: Path) -> None:
    tensors_path(store, "latents-00000").unlink()


DAMAGES = [
    _cut_index,
    _garble_index,
    _turn_offset,
    _drop_index,
    _cut_tensors,
    _drop_rows,
    _drop_tensor,
    _drop_shard,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_a_damaged_shard_is_said_and_the_others_are_read(store: Path, damage: Any) -> None:
    damage(store)
    dataset = LatentDataset(store)
    with pytest.raises(StoreError, match=r"latents-00000 .* cannot be used: .*latentvae verify"):
        dataset[4]
    assert dataset[5]["key"] == "image00005.png"


def test_an_index_that_is_replaced_while_open_is_said(store: Path) -> None:
    dataset = LatentDataset(store)
    assert dataset[0]["index"] == 0
    line = json.loads(index_path(store, "latents-00000").read_bytes().splitlines()[0])
    _replace_line(store, 0, line | {"source": "another/folder/of/photographs/image.png"})
    with pytest.raises(StoreError, match="has changed since the store was opened"):
        dataset[2]


def batches_of(dataset: LatentDataset, world: int, epoch: int = 0, **options: Any) -> list[list[list[int]]]:
    """The batches of every rank; as many as each sampler said."""
    ranks = []
    for rank in range(world):
        sampler = BucketBatchSampler(dataset, rank=rank, world=world, **options)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    return ranks


def size_of(number: int) -> Size:
    """Of an image of the store `mixed`."""
    return SQUARE if number >= 30 else SIZES[(number // 15 + number % 15) % 3]


@pytest.mark.parametrize("batch_size", [2, 3, 4, 100])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_batches_are_of_one_size_and_cover_every_image_once(mixed: Path, batch_size: int, world: int) -> None:
    ranks = batches_of(LatentDataset(mixed), world, batch_size=batch_size)
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(number for batch in batches for number in batch) == list(range(40))
    assert all(len({size_of(number) for number in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) <= batch_size


def test_batches_of_one_image_that_ranks_cannot_share_are_left_out(mixed: Path) -> None:
    seen = []
    for epoch in range(2):
        ranks = batches_of(LatentDataset(mixed), 3, epoch, batch_size=1)
        assert [len(batches) for batches in ranks] == [13, 13, 13]
        seen.append({number for rank in ranks for (number,) in rank})
        assert len(seen[-1]) == 39
    assert seen[0] != seen[1]


def test_batches_are_seeded(mixed: Path) -> None:
    dataset = LatentDataset(mixed)
    first = batches_of(dataset, 1, batch_size=4)
    assert batches_of(dataset, 1, batch_size=4) == first
    assert batches_of(dataset, 1, batch_size=4, seed=1) != first
    assert batches_of(dataset, 1, batch_size=4, epoch=1) != first
    in_order = batches_of(dataset, 1, batch_size=4, shuffle=False)[0]
    assert in_order[0] == [number for number in range(40) if size_of(number) == SQUARE][:4]


def test_batches_can_all_be_full(mixed: Path) -> None:
    ranks = batches_of(LatentDataset(mixed), 2, batch_size=4, drop_last=True)
    assert [len(batch) for rank in ranks for batch in rank] == [4] * 8  # of 20, 10 and 10 images
    sampler = BucketBatchSampler(LatentDataset(mixed), 4, drop_last=True)
    shares = [list(BatchSamplerShard(sampler, num_processes=2, process_index=rank)) for rank in range(2)]
    assert [len(share) for share in shares] == [4, 4]
    assert sorted(shares[0] + shares[1]) == sorted(list(sampler)[:8])


def test_batches_load(mixed: Path) -> None:
    dataset = LatentDataset(mixed)
    sampler = BucketBatchSampler(dataset, 4)
    assert sampler.sizes == {(4, 4): 20, (4, 6): 10, (6, 4): 10}
    batches = list(DataLoader(dataset, batch_sampler=sampler, num_workers=2))
    assert sum(len(batch["key"]) for batch in batches) == 40
    assert {tuple(batch["latents"].shape[1:]) for batch in batches} == {(4, *size) for size in SIZES}


def test_sizes_of_shards_of_one_size_take_no_index(store: Path) -> None:
    for name in ("latents-00000", "latents-00002"):
        index_path(store, name).unlink()
    assert BucketBatchSampler(LatentDataset(store), 4).sizes == {SQUARE: 12}


def test_captions_that_look_like_an_index_do_not_mislead(tmp_path: Path) -> None:
    captions = {0: {"tensor": "moments.6x4", "caption": '"tensor":"moments.4x6"'}}
    store = write_store(tmp_path / "store", [[SQUARE, (4, 6), (6, 4)]], captions=captions)
    assert list(BucketBatchSampler(LatentDataset(store), 4).sizes) == [SQUARE, (4, 6), (6, 4)]


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"seed": -1}, {"rank": 2, "world": 2}, {"world": 0}], ids=str
)
def test_bad_batches_are_refused(store: Path, options: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="came; wanted a batch size"):
        BucketBatchSampler(LatentDataset(store), **{"batch_size": 4, **options})


def tar_members(tars: list[Path]) -> Iterator[tuple[str, str, bytes]]:
    """Sample name, extension and content as WebDataset splits them: at the first dot of the last part."""
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                name, _, extension = member.name.rpartition("/")[2].partition(".")
                yield name, extension, tar.extractfile(member).read()  # type: ignore[union-attr]


def test_webdataset_shards_hold_every_image(tmp_path: Path) -> None:
    keys = {0: "a.b/c.jpg", 1: "a.jpg", 2: "a/b.png", 3: "größe %2E.png"}
    captions = {1: {"caption": "ein Mädchen", "label": 4}}
    store = write_store(
        tmp_path / "store", [[SQUARE] * 4], keys=keys, captions=captions, dtype="bf16", flips=True
    )
    counts: list[int] = []
    tars = export_webdataset(store, tmp_path / "out", images_per_shard=3, progress=counts.append)
    assert [tar.name for tar in tars] == ["latents-000000.tar", "latents-000001.tar"]
    assert counts == [3, 1]
    samples: dict[str, dict[str, bytes]] = {}
    for name, extension, content in tar_members(tars):
        assert extension not in samples.setdefault(unquote(name), {})
        samples[unquote(name)][extension] = content
    assert samples.keys() == set(keys.values())
    dataset = LatentDataset(store, mode="moments")
    for number in range(4):
        item, sample = dataset[number], samples[dataset[number]["key"]]
        assert np.array_equal(np.load(io.BytesIO(sample["moments.npy"])), item["moments"].numpy())
        flipped = moments_of(number, SQUARE, flipped=True).bfloat16().float().numpy()
        assert np.array_equal(np.load(io.BytesIO(sample["moments_flipped.npy"])), flipped)
        said = json.loads(sample["json"])
        assert (said["key"], said["scaling_factor"], said["shift_factor"]) == (item["key"], 0.5, 0.25)
    assert samples["a.jpg"]["txt"].decode() == "ein Mädchen"
    assert samples["a.jpg"]["cls"] == b"4"
    assert "txt" not in samples["a/b.png"]
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["weights_sha256"] == "0" * 64


def test_webdataset_shards_are_the_same_bytes_every_time(store: Path, tmp_path: Path) -> None:
    first, second = (export_webdataset(store, tmp_path / name) for name in ("one", "two"))
    assert [tar.read_bytes() for tar in first] == [tar.read_bytes() for tar in second]
    with pytest.raises(StoreError, match=r"holds latents-000000.tar already"):
        export_webdataset(store, tmp_path / "one")


def test_sample_names_do_not_collide() -> None:
    keys = ["a.jpg", "a_jpg", "a%2Ejpg", "a/b.jpg", "a%2Fb.jpg", "a.b/jpg", "\udcff.jpg", "é.jpg", "~.jpg"]
    keys += ["x" * 300, "x" * 301, "x" * 300 + ".png", "/", "a..b", "../a"]
    names = [sample_name(key) for key in keys]
    assert len(set(names)) == len(keys)
    assert all(name.isascii() and len(name) <= 200 and not set(name) & set("./") for name in names)
    short = [key for key in keys if len(key) < 300]
    assert [unquote(sample_name(key), errors="surrogateescape") for key in short] == short
