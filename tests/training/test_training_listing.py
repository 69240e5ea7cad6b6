"""Listings of folders, shared tables, and orders that are computed."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from latentvae.base.errors import ConfigError
from latentvae.images.kinds import SUFFIXES
from latentvae.images.listing import ARCHIVES, FileTable, list_files, scan
from latentvae.images.sources import open_source
from latentvae.training.data import crops, listing
from latentvae.training.data.crops import EpochOrder
from latentvae.training.data.listing import scan_together, shuffled
from latentvae.training.data.sources import Rest, hold_out


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Names that sort otherwise as parts than as whole paths, links, hidden files, archives, no UTF-8."""
    root = tmp_path / "images"
    for name in (
        *("b/2.png", "b/1.JPG", "b-c/3.png", "b.png", "a/x/y/4.tif", "a/x.png", "a/x-1.png", "note.txt"),
        *("a/.hidden.png", ".cache/5.png", "é/ü.png", "shards/0.tar", "folder.png/6.png", "z/7.parquet"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "8.png").touch()
    if os.name != "nt":
        (root / "link").symlink_to(tmp_path / "elsewhere")
        (root / "twice").symlink_to(tmp_path / "elsewhere")
        (root / "loop").symlink_to(root / "a")
        (root / "up").symlink_to(tmp_path)
        (root / "one.png").symlink_to(root / "b.png")
        (root / "dead.png").symlink_to(root / "nothing")
        (root / "circle").symlink_to(root / "circle")
        (root / "circle.png").symlink_to(root / "circle.png")
        (root / os.fsdecode(b"\xff.png")).touch()
    return root


def test_a_folder_is_listed_as_whole_paths_sort(tree):
    found = scan(tree)
    expected = list_files(tree, (*SUFFIXES, *ARCHIVES))
    assert [*found.images] == [path for path in expected if path.suffix.lower() in SUFFIXES]
    assert found.archives == [path for path in expected if path.suffix.lower() in ARCHIVES]
    assert len(found.images) >= 9
    assert found.images[-1] == [*found.images][-1]
    with pytest.raises(IndexError):
        found.images[len(found.images)]


def test_a_folder_that_cannot_be_read_is_no_shorter_listing(tree, monkeypatch):
    scandir = os.scandir

    def locked(folder: str):
        if folder.endswith("/b"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(PermissionError):
        scan(tree)


def test_a_table_takes_some_thirty_bytes_a_file(tmp_path):
    for number in range(500):
        (tmp_path / f"n01440764_{number:05d}.JPEG").touch()
    table = open_source(tmp_path).paths
    assert isinstance(table, FileTable)
    taken = table.names.nbytes + table.ends.nbytes + table.folder_of.nbytes
    assert taken / len(table) < 34  # as Path objects: above 200 each
    train, _ = hold_out(open_source(tmp_path), 24)
    assert train.indices.without.nbytes < 300


def together(monkeypatch, machines: list[Path]) -> list:
    """What two processes on each machine get, as threads; each machine has its own folder."""
    world = 2 * len(machines)
    meeting, slots, own = threading.Barrier(world), [[]] * world, threading.local()

    def gather_object(values):
        slots[own.state.process_index] = values
        meeting.wait(30)
        found = [*chain.from_iterable(slots)]
        meeting.wait(30)
        return found

    def process(rank: int):
        own.state = SimpleNamespace(
            num_processes=world,
            process_index=rank,
            local_process_index=rank % 2,
            is_local_main_process=rank % 2 == 0,
        )
        try:
            return scan_together(machines[rank // 2])
        except (OSError, ConfigError) as error:
            return error

    monkeypatch.setattr(listing, "PartialState", lambda: own.state)
    monkeypatch.setattr(listing, "gather_object", gather_object)
    with ThreadPoolExecutor(world) as pool:
        return [*pool.map(process, range(world))]


def test_one_process_of_a_machine_lists_and_the_others_map_its_table(tree, monkeypatch, tmp_path):
    monkeypatch.setattr(listing.tempfile, "tempdir", str(tmp_path))
    scanned = []
    monkeypatch.setattr(listing, "scan", lambda root: scanned.append(root) or scan(root))
    before = sorted(tmp_path.iterdir())
    found = together(monkeypatch, [tree])
    assert scanned == [tree]
    assert [*found[0].images] == [*found[1].images] == [*scan(tree).images]
    assert found[0].archives == found[1].archives == scan(tree).archives
    assert isinstance(found[1].images.names.base, np.memmap) or isinstance(found[1].images.names, np.memmap)
    assert sorted(tmp_path.iterdir()) == before  # nothing temporary stays


def test_machines_that_see_different_files_are_refused_everywhere(tree, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / f"{name}.png").touch()
    found = together(monkeypatch, [tmp_path / "one" / "images", tmp_path / "two" / "images"])
    assert all(isinstance(each, ConfigError) and "different files" in str(each) for each in found)
    found = together(monkeypatch, [tmp_path / "nowhere"])
    assert all(isinstance(each, FileNotFoundError) for each in found)


def test_the_rest_is_what_is_left(tmp_path):
    for count, without in ((10, [0, 1, 5, 9]), (3, []), (5, [4]), (4, [0, 1, 2])):
        rest = Rest(count, np.array(without, dtype=np.int64))
        expected = [number for number in range(count) if number not in without]
        assert [rest[place] for place in range(len(rest))] == [*rest] == expected


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000])
def test_a_computed_order_visits_every_image_once(monkeypatch, count):
    monkeypatch.setattr(crops, "LISTED", 0)
    orders = [[EpochOrder(0, epoch, count)[place] for place in range(count)] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == [*range(count)]
    assert count < 64 or sum(a == b for a, b in zip(*orders, strict=True)) < 10


def test_a_computed_order_looks_random():
    keys = tuple(np.random.default_rng(0).integers(0, 2**63, listing.ROUNDS).tolist())
    count = 10_000_000
    order = np.array([shuffled(place, count, keys) for place in range(4000)])
    assert len(set(order)) == 4000
    assert abs(order.mean() / count - 0.5) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06  # 4 deviations of what chance gives
    assert abs(np.corrcoef(np.arange(4000), order)[0, 1]) < 0.06


def test_small_sets_keep_their_order():
    order = np.random.default_rng((3, 1, 100)).permutation(100)
    assert [EpochOrder(3, 1, 100)[place] for place in range(100)] == order.tolist()


def test_a_table_comes_back_from_disk(tree, tmp_path):
    table = scan(tree).images
    (tmp_path / "saved").mkdir()
    table.save(tmp_path / "saved")
    loaded = FileTable.load(tmp_path / "saved")
    assert [*loaded] == [*table]
    assert loaded.digest == table.digest
    assert json.loads((tmp_path / "saved" / "folders.json").read_text()) == table.folders
