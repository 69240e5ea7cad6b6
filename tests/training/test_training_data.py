"""Training images: item k is the same everywhere, each image comes once an epoch, bad files are named."""

import logging
import os
import signal
import time
from itertools import chain
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentvae.base.errors import ConfigError, ImageError, LatentVAEError
from latentvae.images.reading import load_image
from latentvae.images.resizing import resize_short_side
from latentvae.images.tensors import to_uint8
from latentvae.training.config import Config, DataConfig, TrainConfig
from latentvae.training.data import batches, memory
from latentvae.training.data.batches import CropBatch, PositionSampler, training_batches
from latentvae.training.data.crops import CropSequence, EpochOrder, split_sources, validation_images
from latentvae.training.data.sources import FolderSource

COUNT, HEIGHT, WIDTH, CROP = 7, 40, 52, 32


try:
    import resource
except ImportError:  # Windows
    resource = None


def write_map(path: Path, number: int, height: int = HEIGHT, width: int = WIDTH) -> Path:
    """An image whose every pixel says where it is: red is x, green is y, blue is 30 times the number."""
    y, x = np.mgrid[:height, :width]
    Image.fromarray(np.stack([x, y, np.full_like(x, 30 * number)], -1).astype(np.uint8)).save(path)
    return path


def where(crop: torch.Tensor) -> tuple[int, int, int, bool]:
    """(number, top, left, flipped) of a crop of such an image."""
    red, green, blue = crop.int()
    flipped = bool(red[0, 0] > red[0, -1])
    return int(blue[0, 0]) // 30, int(green.min()), int(red.min()), flipped


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [write_map(tmp_path / f"{number}.png", number) for number in range(COUNT)]


def sequence(paths: list[Path], seed: int = 0, channels: int = 3, **settings: object) -> CropSequence:
    return CropSequence(FolderSource(paths), DataConfig(crop=CROP, **settings), channels, seed)


def run_config(batch_size: int, accumulation: int, max_steps: int, workers: int = 0) -> Config:
    train = TrainConfig(batch_size=batch_size, accumulation=accumulation, max_steps=max_steps)
    return Config(
        data={"crop": CROP, "workers": workers}, train=train.model_dump(), optim={"warmup_steps": 0}
    )


def same(left: CropBatch, right: CropBatch) -> bool:
    return (
        torch.equal(left.pixel_values, right.pixel_values)
        and torch.equal(left.positions, right.positions)
        and left.skipped == right.skipped
    )


# --- item k ------------------------------------------------------------------------------------------------


def test_item_k_depends_on_seed_and_k_alone(paths):
    one, other = sequence(paths, seed=3), sequence(paths, seed=3)
    forwards = {k: one[k][0] for k in range(30)}
    np.random.seed(99)  # noqa: NPY002  # nobody's global generator matters
    torch.manual_seed(99)
    backwards = {k: other[k][0] for k in reversed(range(30))}
    assert all(torch.equal(forwards[k], backwards[k]) for k in range(30))
    assert torch.equal(sequence(paths, seed=3)[1_000_000_007][0], one[1_000_000_007][0])


def test_another_seed_or_k_gives_another_crop(paths):
    places = [[where(sequence(paths, seed=seed)[k][0]) for k in range(40)] for seed in (0, 1)]
    assert sum(a == b for a, b in zip(*places, strict=True)) < 4
    assert len(set(places[0])) > 30


def test_an_item_is_a_crop_of_its_image_in_8_bits(paths):
    for k in range(COUNT):
        crop, position, skipped = sequence(paths)[k]
        number, top, left, flipped = where(crop)
        image = to_uint8(load_image(paths[number]))
        expected = image[:, top : top + CROP, left : left + CROP]
        assert torch.equal(crop, expected.flip(-1) if flipped else expected)
        assert (position, skipped, crop.dtype) == (k, [], torch.uint8)


@pytest.mark.parametrize("short_side", [None, 36])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_memory_give_the_same_crops_bitwise(paths, short_side, channels):
    settings = {"short_side": short_side, "channels": channels}
    lazy, eager = sequence(paths, **settings), sequence(paths, in_memory=True, **settings)
    for path in paths:
        path.unlink() if path is paths[0] else None  # the eager one must not read it again
    first = int(np.flatnonzero(np.array([*map(EpochOrder(0, 0, COUNT).__getitem__, range(COUNT))]) == 0)[0])
    assert eager[first][2] == []
    for k in range(2 * COUNT):
        if EpochOrder(0, k // COUNT, COUNT)[k % COUNT] != 0:
            assert torch.equal(lazy[k][0], eager[k][0])
    assert eager[0][0].shape == (channels, CROP, CROP)


def test_worker_processes_make_the_same_batches(paths):
    alone, helped = (
        list(training_batches(run_config(3, 1, 4, workers), sequence(paths), 0, 0, 1)) for workers in (0, 2)
    )
    assert len(alone) == 4
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


# --- what is drawn -----------------------------------------------------------------------------------------


def test_every_epoch_visits_every_image_once_in_its_own_order(paths):
    items = sequence(paths, in_memory=True)
    epochs = [[where(items[epoch * COUNT + k][0])[0] for k in range(COUNT)] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4
    assert tuple(epochs[0]) != tuple(range(COUNT))


def test_crops_reach_every_place_of_the_image_and_flip_half_the_time(paths):
    items = sequence(paths[:1], in_memory=True)
    drawn = [where(items[k][0]) for k in range(800)]
    assert {top for _, top, _, _ in drawn} == set(range(HEIGHT - CROP + 1))
    assert {left for _, _, left, _ in drawn} == set(range(WIDTH - CROP + 1))
    assert 340 < sum(flipped for *_, flipped in drawn) < 460  # 4 standard deviations are 57


def test_without_horizontal_flip_nothing_flips_and_the_places_stay(paths):
    flipping, still = sequence(paths), sequence(paths, horizontal_flip=False)
    places = [(where(flipping[k][0]), where(still[k][0])) for k in range(30)]
    assert all(before[:3] == after[:3] for before, after in places)
    assert not any(after[3] for _, after in places)
    assert any(before[3] for before, _ in places)


def test_crops_are_of_every_scale_between_the_two_and_of_one_seed(tmp_path):
    paths = [write_map(tmp_path / "0.png", 0, 128, 160)]
    items = sequence(paths, zoom=(0.125, 1), horizontal_flip=False)
    # red is x: its slope over the crop tells how many pixels of the image one of the crop stands for
    crops = [items[k][0] for k in range(200)]
    scales = [float(crop[0, 0, -1] - crop[0, 0, 0].int()) / (CROP - 1) for crop in crops]
    assert all(crop.shape == (3, CROP, CROP) for crop in crops)
    assert min(scales) == pytest.approx(1, abs=0.05)  # never enlarged, though an eighth would be 16 pixels
    assert max(scales) == pytest.approx(128 / CROP, abs=0.15)
    assert sum(scale > 2 for scale in scales) == pytest.approx(200 * np.log(2) / np.log(8), abs=30)
    again = sequence(paths, zoom=(0.125, 1), horizontal_flip=False)
    assert all(torch.equal(again[k][0], crops[k]) for k in reversed(range(200)))


def test_crops_of_a_step_share_a_shape_and_each_shape_comes(tmp_path):
    path = write_map(tmp_path / "0.png", 0, 128, 160)
    config = DataConfig(crop=64, max_aspect=1.5, zoom=(0.125, 1), horizontal_flip=False)
    items, again = (CropSequence(FolderSource([path]), config, 3, 0, ratio=8, step_images=4) for _ in "ab")
    crops = [items[k][0] for k in range(160)]
    shapes = [tuple(crop.shape[1:]) for crop in crops]
    assert set(shapes) == {(64, 64), (56, 72), (72, 56)}
    assert all(len(set(shapes[step : step + 4])) == 1 for step in range(0, 160, 4))
    assert all(torch.equal(again[k][0], crops[k]) for k in reversed(range(160)))
    # red is x and green is y: pixels of the image for one of the crop, of both axes alike
    scales = [
        (
            float(c[0, 0, -1] - c[0, 0, 0].int()) / (c.shape[2] - 1),
            float(c[1, -1, 0] - c[1, 0, 0].int()) / (c.shape[1] - 1),
        )
        for c in crops
    ]
    assert all(across == pytest.approx(down, abs=0.05) for across, down in scales)
    assert max(across for across, _ in scales) > 1.6
    # one that is large enough for the square alone is passed over, whichever shape its step has
    small = write_map(tmp_path / "1.png", 1, 64, 64)
    lacking = CropSequence(FolderSource([small, path]), config, 3, 0, ratio=8)
    assert all("smaller than data.crop=64 with data.max_aspect=1.5 (72 px)" in lacking.decode(0) for _ in "a")


@pytest.mark.parametrize(
    ("crop", "aspect", "remedy"),
    [(64, 1.2, "; use 1.29 or more, or larger crops"), (16, 2, "; use larger crops")],
)
def test_an_aspect_that_allows_no_other_shape_is_refused(tmp_path, crop, aspect, remedy):
    path = write_map(tmp_path / "0.png", 0, 128, 160)
    config = DataConfig(crop=crop, max_aspect=aspect)
    with pytest.raises(ConfigError, match=f"multiples of 8 px{remedy}"):
        CropSequence(FolderSource([path]), config, 3, 0, ratio=8)


def test_an_image_of_exactly_the_crop_is_used_whole(tmp_path):
    path = write_map(tmp_path / "exact.png", 1, CROP, CROP)
    assert where(sequence([path])[0][0])[:3] == (1, 0, 0)


def test_a_model_of_one_channel_gets_luminance(paths):
    crop = sequence(paths, channels=1)[0][0]
    assert crop.shape == (1, CROP, CROP)


@pytest.mark.parametrize(("size", "expected"), [(20, (20, 26)), (60, (60, 78))])
def test_the_short_side_is_resized_and_the_aspect_stays(paths, size, expected):
    image = load_image(paths[3])
    resized = resize_short_side(image, size)
    assert resized.shape == (3, *expected)
    assert resize_short_side(image.mT, size).shape == (3, *reversed(expected))
    assert resized.abs().max() <= 1
    assert abs(float(resized.mean() - image.mean())) < 0.01


# --- processes and resuming --------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "accumulation"), [(1, 3), (2, 1), (2, 3), (4, 2)])
def test_processes_share_out_exactly_the_positions_of_one(world, accumulation):
    per_process, steps = 2, 5
    passes = range(steps * accumulation)
    shares = [list(PositionSampler(per_process, passes, rank, world)) for rank in range(world)]
    alone = list(PositionSampler(per_process * world, passes))
    assert [list(chain(*(share[i] for share in shares))) for i in passes] == alone
    assert list(chain(*alone)) == list(range(steps * accumulation * per_process * world))


def test_accumulation_and_processes_leave_the_images_of_a_step_as_they_are(paths):
    """One process with 8, one with 2 passes of 4, two with 2 passes of 2: the same 8 crops a step."""
    steps = 3

    def crops_of_steps(batch_size, accumulation, world):
        config, items = run_config(batch_size, accumulation, steps), sequence(paths)
        shares = [list(training_batches(config, items, 0, rank, world)) for rank in range(world)]
        batches = [batch for passes in zip(*shares, strict=True) for batch in passes]
        return torch.cat([batch.pixel_values for batch in batches]).unflatten(0, (steps, 8))

    whole = crops_of_steps(8, 1, 1)
    assert torch.equal(crops_of_steps(4, 2, 1), whole)
    assert torch.equal(crops_of_steps(2, 2, 2), whole)


@pytest.mark.parametrize(("accumulation", "world"), [(1, 1), (2, 1), (2, 2)])
def test_a_resume_from_step_s_continues_with_the_batches_of_the_straight_run(paths, accumulation, world):
    config = run_config(3, accumulation, 6)
    for rank in range(world):
        straight = list(training_batches(config, sequence(paths), 0, rank, world))
        resumed = list(training_batches(config, sequence(paths), 4, rank, world))
        assert len(straight) == 6 * accumulation
        assert len(resumed) == 2 * accumulation
        assert all(same(a, b) for a, b in zip(straight[4 * accumulation :], resumed, strict=True))


# --- files that cannot be used -----------------------------------------------------------------------------


@pytest.fixture
def mixed(paths: list[Path]) -> list[Path]:
    """The good images, and three that are truncated, no image, and too small."""
    folder = paths[0].parent
    truncated = folder / "truncated.png"
    truncated.write_bytes(paths[0].read_bytes()[:-300])
    text = folder / "text.jpg"
    text.write_text("no picture")
    small = write_map(folder / "small.png", 8, 20, 60)
    return [truncated, *paths[:4], text, small, *paths[4:]]


@pytest.mark.parametrize("in_memory", [False, True])
def test_unusable_images_are_replaced_by_the_next_ones_and_reported_by_name(mixed, in_memory):
    items, count = sequence(mixed, in_memory=in_memory), len(mixed)
    bad = {path for path in mixed if path.name in ("truncated.png", "text.jpg", "small.png")}
    order = [mixed[index] for index in map(EpochOrder(0, 0, count).__getitem__, range(count))]
    reports = []
    for k in range(count):
        crop, position, skipped = items[k]
        ahead = order[k:] + order[:k]
        used = next(i for i, path in enumerate(ahead) if path not in bad)
        assert where(crop)[0] == int(ahead[used].stem)
        assert position == k
        assert [report.split(" ")[0] for report in skipped] == [str(path) for path in ahead[:used]]
        reports += skipped
    text = "\n".join(reports)
    assert "small.png of 60x20 px is smaller than data.crop=32" in text
    assert all(report.count(report.split(" ")[0]) == 1 for report in reports)  # named once
    assert all(str(path) in text for path in bad)
    assert all(len(report.partition(" ")[2]) > 20 for report in reports)  # a reason follows


def test_a_batch_stays_full_and_carries_the_names_of_what_it_passed_over(mixed):
    config = run_config(len(mixed), 1, 1)
    (batch,) = training_batches(config, sequence(mixed), 0, 0, 1)
    assert batch.pixel_values.shape == (len(mixed), 3, CROP, CROP)
    assert batch.positions.tolist() == list(range(len(mixed)))
    assert {Path(report.split(" ")[0]).name for report in batch.skipped} == {
        *("truncated.png", "text.jpg", "small.png")
    }


def test_an_image_that_is_too_small_is_used_where_it_is_resized_first(mixed):
    small = [path for path in mixed if path.name == "small.png"]
    assert sequence(small, short_side=32)[0][2] == []


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_error_says_so_where_no_image_can_be_used(mixed, in_memory):
    bad = [path for path in mixed if path.name in ("text.jpg", "small.png")]
    with pytest.raises(ImageError, match=r"none of the 2 training images can be used.*(text|small)\."):
        sequence(bad, in_memory=in_memory)[0]


# --- training and validation files -------------------------------------------------------------------------


def split_paths(config: DataConfig) -> tuple[list[Path], list[Path]]:
    train, val = ([Path(source.name(i)) for i in range(len(source))] for source in split_sources(config))
    return train, val


def many(folder: Path, count: int) -> list[Path]:
    """Files that are images by name; only their names matter here."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number:03d}.png").touch()
    return sorted(folder.iterdir())


@pytest.mark.parametrize(("count", "wanted"), [(2, 24), (3, 1), (10, 4), (24, 24), (50, 24), (100, 7)])
def test_the_hold_out_is_disjoint_complete_and_the_same_each_time(tmp_path, count, wanted):
    files = many(tmp_path / "images", count)
    config = DataConfig(train=str(tmp_path / "images"), val_images=wanted)
    train, held_out = split_paths(config)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == files
    assert len(held_out) == min(wanted, max(2, count // 10), count // 2)
    assert split_paths(config) == (train, held_out)


def test_the_hold_out_is_spread_over_the_folder(tmp_path):
    many(tmp_path / "images", 100)
    _, held_out = split_paths(DataConfig(train=str(tmp_path / "images"), val_images=10))
    assert [int(path.stem) for path in held_out] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]


def test_with_a_validation_folder_nothing_is_held_out(tmp_path):
    files, others = many(tmp_path / "images", 5), many(tmp_path / "others", 9)
    config = DataConfig(train=str(tmp_path / "images"), val=str(tmp_path / "others"), val_images=4)
    assert split_paths(config) == (files, [others[number] for number in (0, 2, 5, 8)])  # from all over it


def test_validation_images_below_the_training_folder_are_not_trained_on(tmp_path):
    files, below = many(tmp_path / "images", 5), many(tmp_path / "images" / "val", 3)
    config = DataConfig(train=str(tmp_path / "images"), val=f"{tmp_path}/images/../images/val", val_images=2)
    train, val = split_paths(config)
    assert [path.resolve() for path in val] == [below[0], below[2]]
    assert train == [*files, below[1]]
    with pytest.raises(ConfigError, match="all 3 images"):
        split_paths(DataConfig(train=str(tmp_path / "images/val"), val=str(tmp_path / "images/val")))


def test_folders_that_cannot_serve_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match=r"--set data\.train=FOLDER"):
        split_paths(DataConfig())
    many(tmp_path / "one", 1)
    with pytest.raises(ConfigError, match=r"set data\.val"):
        split_paths(DataConfig(train=str(tmp_path / "one")))
    with pytest.raises(ImageError, match="nowhere"):
        split_paths(DataConfig(train=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="no image in the folder"):
        split_paths(DataConfig(train=str(tmp_path / "empty")))


def test_validation_images_are_centre_crops_and_small_ones_whole(tmp_path, caplog):
    large = write_map(tmp_path / "large.png", 2, 40, 60)
    small = write_map(tmp_path / "small.png", 3, 20, 50)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        images = dict(validation_images(FolderSource([large, broken, small]), DataConfig(val_size=32), 3))
    assert list(images) == ["large.png", "small.png"]
    assert "broken.png" in caplog.text
    assert where(to_uint8(images["large.png"])) == (2, 4, 14, False)
    assert where(to_uint8(images["small.png"])) == (3, 0, 9, False)
    assert images["small.png"].shape == (3, 20, 32)
    with pytest.raises(ImageError, match="none of the 1 validation images"):
        validation_images(FolderSource([broken]), DataConfig(), 3)


# --- workers -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="POSIX descriptors")
def test_images_in_memory_are_sent_to_a_worker_in_few_descriptors(paths):
    """To one that is not forked: as tensors of their own they took one each, and 1,024 are usual."""
    many = [paths[number % COUNT] for number in range(200)]
    items = sequence(many, in_memory=True)
    before = len([*Path("/dev/fd").iterdir()])
    sent = ForkingPickler.dumps(items)
    assert len([*Path("/dev/fd").iterdir()]) - before < 10
    assert len(sent) < 50_000


def test_images_in_memory_come_back_from_buffers_of_any_size(monkeypatch):
    images = [torch.full((3, side, 5), side, dtype=torch.uint8) for side in (4, 9, 2, 30, 1)]
    monkeypatch.setattr(memory, "BLOCK", 200)  # one image is larger, others share
    kept = memory.ImageMemory([*images[:2], "no image", *images[2:]])
    assert len(kept) == 6
    assert len(kept.blocks) == 4
    assert kept[2] == "no image"
    for image, found in zip(images, [kept[0], kept[1], *(kept[index] for index in (3, 4, 5))], strict=True):
        assert torch.equal(image, found)


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_full_shared_memory_ends_the_run_naming_what_to_set(paths, monkeypatch):
    def small(worker: int) -> None:  # such as /dev/shm of a container, once it is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    monkeypatch.setattr(batches, "_leave_signals_to_the_main_process", small)
    with pytest.raises(LatentVAEError, match=r"shared memory.*--shm-size.*data.workers=2") as refused:
        list(training_batches(run_config(4, 1, 4, workers=2), sequence(paths), 0, 0, 1))
    assert "0.0 MB" in str(refused.value)


def test_a_batch_that_does_not_come_is_waited_for_with_open_eyes(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "LOOK_UP", 0.1)
    items, gate, looks = sequence(paths), tmp_path / "gate", []
    decode = items.decode

    def slow(index: int):
        while not gate.exists():
            time.sleep(0.01)
        return decode(index)

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            gate.touch()

    items.decode = slow
    loader = training_batches(run_config(3, 1, 2, workers=1), items, 0, 0, 1)
    loader.while_waiting = look
    found = list(loader)
    assert len(looks) >= 3
    alone = training_batches(run_config(3, 1, 2), sequence(paths), 0, 0, 1)
    assert all(same(a, b) for a, b in zip(alone, found, strict=True))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_worker_that_is_killed_ends_the_run_with_the_likely_reason(paths, monkeypatch):
    items = sequence(paths)
    items.decode = lambda index: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(LatentVAEError, match=r"a process that decodes images died.*data\.workers"):
        list(training_batches(run_config(3, 1, 2, workers=1), items, 0, 0, 1))
