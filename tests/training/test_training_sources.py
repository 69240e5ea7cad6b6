"""Folders, datasets and shards are one and the same to training: every image once, and bad ones by name."""

import io
import logging
import pickle
import subprocess
import sys
import tarfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from remote import Shaky, put, shaky, upload  # noqa: F401  # a fixture

import latentvae
from latentvae.base import addresses
from latentvae.base.errors import ConfigError, ImageError, SourceError
from latentvae.images import tars as shards
from latentvae.images.reading import load_image
from latentvae.images.sources import ImageSource, expand_braces, open_source, root
from latentvae.images.tables import image_column
from latentvae.images.tars import TarSource
from latentvae.images.tensors import to_uint8
from latentvae.training import validation
from latentvae.training.config import Config, DataConfig
from latentvae.training.data.batches import CropBatch, training_batches
from latentvae.training.data.crops import CropSequence, split_sources, validation_images
from latentvae.training.data.sources import hold_out

COUNT, SIDE = 12, 32
KINDS = ("folder", "tars", "braces", "saved", "split", "parquet", "parquets")


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of regular files, as `tar` and WebDataset write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def write_table(images: list[bytes | None], column: str = "image") -> "datasets.Dataset":
    """What Hugging Face datasets of images look like: an Image feature, and other columns."""
    rows = {"label": list(range(len(images))), column: [{"bytes": data, "path": None} for data in images]}
    return datasets.Dataset.from_dict(rows).cast_column(column, datasets.Image())


def write_images(folder: Path) -> list[Path]:
    """Twelve images of exactly one crop, so that an item is its image: turned JPEG, alpha, 16-bit PNG."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(COUNT):
        image = Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        if number % 4 == 0:
            image.save(folder / f"{number:02d}.jpg", exif=_orientation(6))
        elif number % 4 == 1:
            image.convert("RGBA").save(folder / f"{number:02d}.webp", lossless=True)
        elif number % 4 == 2:
            image.save(folder / f"{number:02d}.bmp")
        else:
            grey = random.integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
            Image.fromarray(grey).save(folder / f"{number:02d}.png")
    return sorted(folder.iterdir())


def _orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The same images, in the same order, in every form that training takes. Do not write here."""
    place = tmp_path_factory.mktemp("kinds")
    paths = write_images(place / "folder")
    data = [path.read_bytes() for path in paths]
    for number in range(3):
        shard = {f"./{path.name}": path.read_bytes() for path in paths[number::3]}
        texts = {f"./{path.stem}.txt": b"a caption" for path in paths[number::3]}
        write_tar(place / "tars" / f"{number:03d}.tar", {**shard, **texts})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        datasets.disable_progress_bars()
        write_table(data).save_to_disk(place / "saved")
        datasets.DatasetDict({"train": write_table(data)}).save_to_disk(place / "split")
        write_table(data, "picture").to_parquet(place / "one[1].parquet")
        for number in range(2):
            (place / "many").mkdir(exist_ok=True)
            write_table(data[number * 7 : number * 7 + 7]).to_parquet(place / "many" / f"{number}.parquet")
        specs = {"parquet": "one[1].parquet", "parquets": "many", "braces": "tars/{000..002}.tar"}
        yield {kind: str(place / specs.get(kind, kind)) for kind in KINDS}
        datasets.enable_progress_bars()


def config(workers: int = 0, batch_size: int = 3, passes: int = COUNT // 3) -> Config:
    return Config(
        data={"crop": SIDE, "workers": workers, "horizontal_flip": False},
        train={"batch_size": batch_size, "max_steps": passes},
        optim={"warmup_steps": 0},
    )


def batches(source: ImageSource, config: Config, rank: int = 0, world: int = 1) -> list[CropBatch]:
    sequence = CropSequence(source, config.data, 3, seed=0)
    return list(training_batches(config, sequence, 0, rank, world))


def pictures(found: list[CropBatch]) -> list[bytes]:
    """The images in the order in which they came, as what can be sorted and compared bit by bit."""
    return [crop.numpy().tobytes() for batch in found for crop in batch.pixel_values]


# --- every kind is the folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_epoch_has_the_folders_images_bitwise_each_once(kinds, kind):
    folder, source = open_source(kinds["folder"]), open_source(kinds[kind])
    assert type(source).__name__ == {"f": "Folder", "t": "Tar", "b": "Tar"}.get(kind[0], "Dataset") + "Source"
    images = pictures(batches(source, config()))
    assert len(set(images)) == len(images) == COUNT == len(source)
    assert sorted(images) == sorted(pictures(batches(folder, config())))
    if source.name(1).partition("[")[2]:  # rows in the order of the files: the same run altogether
        assert images == pictures(batches(folder, config()))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_what_load_image_makes_of_its_file(kinds, kind, channels):
    source = open_source(kinds[kind])
    files = sorted(Path(kinds["folder"]).iterdir())
    found = [source.load(index, channels) for index in range(COUNT)]
    in_order = files if "tar" not in kind and kind != "braces" else [*files[::3], *files[1::3], *files[2::3]]
    assert all(torch.equal(a, load_image(b, channels=channels)) for a, b in zip(found, in_order, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_share_an_epoch_without_a_repeat_or_a_gap(kinds, kind):
    source = open_source(kinds[kind])
    shares = [pictures(batches(source, config(passes=2), rank, 2)) for rank in range(2)]
    assert [len(share) for share in shares] == [COUNT // 2, COUNT // 2]
    assert not set(shares[0]) & set(shares[1])
    assert sorted(shares[0] + shares[1]) == sorted(pictures(batches(source, config())))


@pytest.mark.parametrize("kind", ["tars", "saved", "parquets"])
def test_worker_processes_change_nothing(kinds, kind):
    alone, helped = (batches(open_source(kinds[kind]), config(workers, passes=6)) for workers in (0, 2))
    assert pictures(alone) == pictures(helped)
    assert len(pictures(alone)) == 18  # into the second epoch


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_can_be_sent_to_a_worker_that_was_not_forked(kinds, kind):
    source = open_source(kinds[kind])
    sent = pickle.loads(pickle.dumps(hold_out(source, 2)[0]))
    assert len(sent) == COUNT - 2
    assert torch.equal(sent.load(0), source.load(1))
    assert sent.name(0) == source.name(1)


@pytest.mark.parametrize("kind", KINDS)
def test_names_say_the_file_and_the_place_in_it_and_tell_all_images_apart(kinds, kind):
    source, place = open_source(kinds[kind]), Path(kinds["folder"]).parent
    seventh = {
        **{"folder": "folder/07.png", "tars": "tars/001.tar:./10.bmp", "braces": "tars/001.tar:./10.bmp"},
        **{"saved": "saved[7]", "split": "split/train[7]", "parquet": "one[1].parquet[7]"},
        **{"parquets": "many/1.parquet[0]"},
    }
    assert source.name(7) == str(place / seventh[kind])
    for tell in (source.name, source.place):
        assert len({tell(index) for index in range(COUNT)}) == COUNT


def test_images_in_memory_are_the_same(kinds):
    for kind in ("tars", "parquet"):
        eager = config()
        eager.data.in_memory = True
        source = open_source(kinds[kind])
        assert pictures(batches(source, eager)) == pictures(batches(source, config()))


# --- training and validation -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_held_out_by_number(kinds, kind):
    source = open_source(kinds[kind])
    train, val = split_sources(DataConfig(train=kinds[kind], val_images=2))
    assert [val.name(index) for index in range(len(val))] == [source.name(index) for index in (0, 11)]
    names = {part.name(index) for part in (train, val) for index in range(len(part))}
    assert len(train) == COUNT - 2
    assert names == {source.name(index) for index in range(COUNT)}
    shown = validation_images(val, DataConfig(val_size=16), 3)
    assert [image.shape for _, image in shown] == [(3, 16, 16)] * 2
    assert shown[1][0] == Path(source.name(11)).name


@pytest.mark.parametrize(
    ("train", "val", "left"),
    [
        ("tars", "tars/001.tar", 8),
        ("tars/{000..002}.tar", "tars/{001,002}.tar", 4),
        ("many", "many/../many/1.parquet", 7),
        ("folder", "folder/03.png", 11),
        ("tars/{000..001}.tar", "tars/002.tar", 8),
        ("folder", "saved", 12),
    ],
)
def test_what_is_measured_is_not_trained_on_however_it_is_named(kinds, train, val, left):
    place = Path(kinds["folder"]).parent
    one, other = split_sources(DataConfig(train=f"{place}/{train}", val=f"{place}/{val}"))
    assert len(one) == left
    places = {other.place(index) for index in range(len(other))}
    assert not places & {one.place(index) for index in range(len(one))}


def test_measuring_all_that_is_trained_on_is_refused(kinds):
    for kind in ("tars", "saved", "parquet"):
        with pytest.raises(ConfigError, match=r"all 12 images of data\.train are also in data\.val"):
            split_sources(DataConfig(train=kinds[kind], val=kinds[kind]))


def test_validation_and_latent_statistics_read_any_source(kinds, monkeypatch, tiny_vae):
    monkeypatch.setattr(validation, "_load_lpips", lambda config: (None, "not here"))
    monkeypatch.setattr(validation, "STATISTICS_IMAGES", 4)
    run = Config(data={"train": kinds["tars"], "val_images": 2, "val_size": SIDE, "crop": SIDE})
    seen = validation.Validation(run, *split_sources(run.data), 3)
    assert [name for batch in seen.batches for name, _ in batch] == ["00.jpg", "11.png"]
    statistics = validation.training_statistics(tiny_vae, seen.train, run.data)
    assert (len(seen.train), statistics.image_count) == (10, 4)


# --- bad images --------------------------------------------------------------------------------------------


def test_a_damaged_member_is_passed_over_counted_and_named(tmp_path, kinds):
    good = {path.name: path.read_bytes() for path in sorted(Path(kinds["folder"]).iterdir())[:5]}
    shard = write_tar(
        tmp_path / "000.tar", {**good, "bad.jpg": good["00.jpg"][:200], "text.png": b"no picture"}
    )
    for workers in (0, 1):
        found = batches(open_source(shard), config(workers, batch_size=7, passes=1))
        assert len(found[0].pixel_values) == 7
        assert set(pictures(found)) == {image.numpy().tobytes() for image in _uint8_images(good)}
        names = {report.split(" ")[0] for report in found[0].skipped}
        assert names == {f"{shard}:bad.jpg", f"{shard}:text.png"}
        assert any("no image by its content" in report for report in found[0].skipped)


def _uint8_images(files: dict[str, bytes]) -> list[torch.Tensor]:
    return [to_uint8(load_image(data)) for data in files.values()]


def test_a_damaged_or_empty_row_is_passed_over_and_named(tmp_path, kinds, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    good = Path(kinds["folder"], "02.bmp").read_bytes()
    write_table([good, good[:500], None, good]).to_parquet(tmp_path / "a.parquet")
    (found,) = batches(open_source(tmp_path / "a.parquet"), config(batch_size=4, passes=1))
    file = tmp_path / "a.parquet"
    assert {report.split(" ")[0] for report in found.skipped} == {f"{file}[1]", f"{file}[2]"}
    assert any(
        "is empty, but an image was wanted in the column 'image'" in report for report in found.skipped
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_dies_ends_the_run_with_its_name_and_no_stack_trace(tmp_path, kinds, workers):
    shard = write_tar(tmp_path / "a.tar", {"a.png": Path(kinds["folder"], "03.png").read_bytes()})
    source = TarSource([shard])
    for damage, reason in (
        (lambda: shard.write_bytes(shard.read_bytes()[:600]), "is shorter than"),
        (shard.unlink, "can no longer be read (No such file or directory)"),
    ):
        damage()
        with pytest.raises(SourceError) as caught:
            batches(source, config(workers))
        assert str(caught.value).startswith(f"{shard} {reason}")
        assert "Traceback" not in str(caught.value)


# --- shards one after the other ----------------------------------------------------------------------------


def by_shards(source: ImageSource, at_once: int, seed: int = 0) -> CropSequence:
    data = config().data.model_copy(update={"shuffle_shards": at_once})
    return CropSequence(source, data, 3, seed)


@pytest.fixture
def shards_of_5(tmp_path: Path, kinds: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Sixty images, of twelve that differ, in twelve shards."""
    monkeypatch.setenv("LATENTVAE_CACHE", str(tmp_path / "cache"))
    data = [path.read_bytes() for path in sorted(Path(kinds["folder"]).iterdir())]
    for shard in range(12):
        members = {f"{shard}-{number}.png": data[(5 * shard + number) % COUNT] for number in range(5)}
        write_tar(tmp_path / "shards" / f"{shard:02d}.tar", members)
    return str(tmp_path / "shards")


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_some_shards_at_a_time_have_their_images_shuffled_together(shards_of_5: str, held_out: bool) -> None:
    source: ImageSource = open_source(shards_of_5)
    if held_out:
        source = hold_out(source, 6)[0]
    sequence, count = by_shards(source, 3), len(source)
    epochs = []
    for epoch in range(3):
        order = sequence.order(epoch, 0)
        visited = [order[place] for place in range(count)]
        assert sorted(visited) == list(range(count))
        shard = [source.name(index).rpartition("/")[2][:2] for index in visited]
        drawn = [*dict.fromkeys(shard)]
        turns = [set(drawn[start : start + 3]) for start in range(0, 12, 3)]
        of_turn = [next(i for i, turn in enumerate(turns) if each in turn) for each in shard]
        assert of_turn == sorted(of_turn)
        assert shard != sorted(shard, key=drawn.index)  # and not one shard after the other
        epochs.append(tuple(visited))
    assert len(set(epochs)) == 3
    assert by_shards(source, 12).order(0, 0)[0] != by_shards(source, 12, seed=1).order(0, 0)[0]


def test_batches_by_shards_are_the_same_from_any_step_and_in_any_process(shards_of_5: str) -> None:
    source, steps = open_source(shards_of_5), 24  # of three images: more than an epoch
    runs = {
        workers: pictures(
            list(training_batches(config(workers, 3, steps), by_shards(source, 2), first, 0, 1))
        )
        for workers, first in ((0, 0), (2, 5))
    }
    assert runs[2] == runs[0][15:]
    shares = [
        list(training_batches(config(0, 1, steps), by_shards(source, 2), 0, rank, 3)) for rank in range(3)
    ]
    assert [picture for step in zip(*map(pictures, shares), strict=True) for picture in step] == runs[0]


def test_shards_at_addresses_are_fetched_whole_once_by_all_processes(
    shards_of_5: str, tmp_path: Path
) -> None:
    at = upload(Path(shards_of_5), "shaky://data/shards")
    near, far = open_source(shards_of_5), open_source(f"{at}/*.tar")
    wanted = pictures(list(training_batches(config(0, 5, 12), by_shards(near, 2), 0, 0, 1)))
    Shaky.asked.clear()
    for _ in range(2):  # a process, and another one, or a later epoch
        sequence = by_shards(far, 2)
        assert pictures(list(training_batches(config(0, 5, 12), sequence, 0, 0, 1))) == wanted
        for thread in threading.enumerate():
            if thread.name == "fetch shards":
                thread.join(60)
    assert sorted(Shaky.asked) == [f"{at}/{shard:02d}.tar" for shard in range(12)]
    assert len([*(tmp_path / "cache").glob("*.tar")]) == 12
    Shaky.asked.clear()
    far.load(0)  # as validation does
    assert len(Shaky.asked) == 1


def test_a_shard_that_is_written_again_is_fetched_again(shards_of_5: str) -> None:
    at = upload(Path(shards_of_5), "shaky://data/shards")
    first = by_shards(open_source(f"{at}/00.tar"), 1).image(0)
    put({"00.tar": Path(shards_of_5, "01.tar").read_bytes()}, at)
    addresses.forget()
    assert not torch.equal(by_shards(open_source(f"{at}/00.tar"), 1).image(0), first)


def test_only_shards_are_read_so(kinds: dict[str, str]) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.shuffle_shards is of \.tar shards, and data\.train is a Folder"
    ):
        split_sources(DataConfig(train=kinds["folder"], shuffle_shards=1))


@pytest.mark.slow
def test_a_run_that_fails_ends_though_its_workers_ignore_signals(tmp_path, kinds):
    shard = write_tar(tmp_path / "a.tar", {"a.png": Path(kinds["folder"], "03.png").read_bytes()})
    lines = f"""
        from latentvae.training.config import Config
        from latentvae.training.data.batches import training_batches
        from latentvae.training.data.crops import CropSequence
        from latentvae.images.sources import open_source
        config = Config(data={{"crop": {SIDE}}}, train={{"batch_size": 3, "max_steps": 200}})
        sequence = CropSequence(open_source({str(shard)!r}), config.data, 3, 0)
        batches = iter(training_batches(config, sequence, 0, 0, 1))
        try:
            next(batches)
            raise ValueError
        except ValueError as error:
            kept = error  # as a debugger, a logger or a cycle keeps it, and with it all frames
    """
    command = [sys.executable, "-c", textwrap.dedent(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_dataset_that_dies_ends_the_run_with_its_name(kinds, monkeypatch):
    source = open_source(kinds["saved"])

    def fail(self, index):
        raise OSError("stale file handle")

    monkeypatch.setattr(type(source.rows), "__getitem__", fail)
    with pytest.raises(SourceError, match=r"saved\[\d+\] can no longer be read \(stale file handle\)"):
        batches(source, config())


def test_rows_may_name_files_instead_of_holding_them(tmp_path, kinds):
    files = sorted(Path(kinds["folder"]).iterdir())[:3]
    rows = datasets.Dataset.from_dict({"image": [str(file) for file in files]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "typed")
    rows.rename_column("image", "file").save_to_disk(tmp_path / "plain")
    for source in (open_source(tmp_path / "typed"), open_source(tmp_path / "plain", "file")):
        assert all(torch.equal(source.load(i), load_image(file)) for i, file in enumerate(files))


# --- shards ------------------------------------------------------------------------------------------------


def test_listing_a_shard_reads_headers_only(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "a.tar", {f"{number}.png": bytes(3_000_000) for number in range(4)})
    read = []

    class Counted(io.FileIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(tarfile, "bltn_open", Counted)
    assert len(shards.list_members(shard).images) == 4
    assert 4 * 512 <= sum(read) < 10_000


def test_members_that_are_no_images_are_left_out_and_odd_names_are_kept(tmp_path, kinds):
    data = Path(kinds["folder"], "03.png").read_bytes()
    names = ["a.png", f"{'long' * 60}/{'name' * 30}.JPG", "日本 é/b.v1.webp", "a.gif"]
    shard = write_tar(
        tmp_path / "a.tar", {"c.json": b"{}", "._a.png": b"x", "d": b"y"} | dict.fromkeys(names, data)
    )
    with tarfile.open(shard, "a") as tar:
        for kind, name in (
            (tarfile.DIRTYPE, "folder.png"),
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.LNKTYPE, "h.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            tar.addfile(member)
    source = TarSource([shard])
    assert [source.name(index) for index in range(len(source))] == [f"{shard}:{name}" for name in names]
    assert all(torch.equal(source.load(index), load_image(data)) for index in range(4))


def test_webdataset_samples_of_several_images_are_told_and_can_be_chosen_from(tmp_path, kinds, caplog):
    data = Path(kinds["folder"], "03.png").read_bytes()
    members = {f"{number}.{end}": data for number in range(3) for end in ("jpg", "mask.png", "cls")}
    shard = write_tar(tmp_path / "a.tar", members)
    with caplog.at_level(logging.WARNING):
        assert len(open_source(shard)) == 6
        assert "0.jpg and 0.mask.png belong to one sample; both are taken" in caplog.text
        caplog.clear()
        source = open_source(shard, "mask.png")
    assert [source.name(index)[-10:] for index in range(3)] == [f"{number}.mask.png" for number in range(3)]
    assert not caplog.records
    with pytest.raises(
        ImageError, match=r"no image in .*a\.tar: members with the extension 'exr' \(data\.column of training"
    ):
        open_source(shard, "exr")


def test_damaged_shards_are_refused_before_the_run(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {f"{number}.png": bytes(2000) for number in range(4)}).read_bytes()
    assert len(TarSource([tmp_path / "a.tar"])) == 4
    header = 512 + 2048  # of the second member
    for name, data in {
        "cut": whole[: header + 700],
        "cut-header": whole[: header + 100],
        "torn": whole[:header] + b"\7" * 512 + whole[header + 512 :],
        "text": b"no tar at all" * 100,
        "empty": b"",
    }.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(
            ImageError, match=rf"{name}\.tar cannot be listed \(.*uncompressed tar was wanted"
        ):
            open_source(tmp_path / f"{name}.tar")


def test_a_tar_without_end_marker_is_whole(tmp_path):
    shard = write_tar(tmp_path / "a.tar", {"0.png": bytes(1024)})
    shard.write_bytes(shard.read_bytes()[: 512 + 1024])
    assert len(TarSource([shard])) == 1


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s/{000..003}.tar", ["s/000.tar", "s/001.tar", "s/002.tar", "s/003.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..011}", ["008", "009", "010", "011"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{one}.tar", ["{one}.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_are_spelled_out_as_a_shell_does(pattern, expected):
    assert expand_braces(pattern) == expected


def test_the_root_of_a_pattern_is_the_folder_before_the_braces(tmp_path):
    assert root(tmp_path / "s" / "a-{0..3}.tar") == tmp_path / "s"
    assert root(tmp_path / "{a,b}" / "0.tar") == tmp_path
    assert root(tmp_path) == tmp_path


def test_a_folder_whose_name_has_braces_is_no_pattern(tmp_path, kinds):
    write_tar(tmp_path / "{0..1}" / "a.tar", {"a.png": Path(kinds["folder"], "03.png").read_bytes()})
    assert len(open_source(tmp_path / "{0..1}")) == 1


# --- which column ------------------------------------------------------------------------------------------


def test_the_image_column_is_found_by_type_or_named():
    image, number, data = datasets.Image(), datasets.Value("int64"), datasets.Value("binary")
    struct = {"bytes": data, "path": datasets.Value("string")}
    assert image_column({"x": number, "photo": image}, None, "d") == "photo"
    assert image_column({"x": number, "photo": struct}, None, "d") == "photo"
    assert image_column({"mask": image, "image": image}, None, "d") == "image"
    assert image_column({"image": data, "x": data}, None, "d") == "image"
    assert image_column({"mask": image, "image": image}, "mask", "d") == "mask"
    assert image_column({"x": data}, "x", "d") == "x"
    for features, wanted, message in (
        ({"x": number, "y": data}, None, r"d has no image column: x \(int64\), y \(binary\)\. Name"),
        (
            {"a": image, "b": image, "x": number},
            None,
            r"d has several image columns: a \(image\), b \(image\)\. Name",
        ),
        ({"a": image}, "c", r"the column 'c' is not there in d, which has a \(image\)"),
        ({"x": number}, "x", r"the column 'x' is of the type int64 in d"),
    ):
        with pytest.raises(ConfigError, match=message):
            image_column(features, wanted, "d")


@pytest.mark.parametrize("large", [False, True])
def test_parquet_that_datasets_did_not_write_is_read(tmp_path, kinds, monkeypatch, large):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = Path(kinds["folder"], "03.png").read_bytes()
    kind = pyarrow.large_binary() if large else pyarrow.binary()
    cell = {"bytes": data, "path": "03.png"}
    parquet.write_table(pyarrow.table({"image": pyarrow.array([data], kind)}), tmp_path / "bytes.parquet")
    parquet.write_table(pyarrow.table({"x": [1], "photo": [cell]}), tmp_path / "struct.parquet")
    for name in ("bytes", "struct"):
        assert torch.equal(open_source(tmp_path / f"{name}.parquet").load(0), load_image(data))


# --- what cannot be opened ---------------------------------------------------------------------------------


def test_what_cannot_be_opened_is_named_with_what_was_wanted(tmp_path, kinds, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    image = Path(kinds["folder"], "03.png").read_bytes()
    write_tar(tmp_path / "s/000.tar", {"a.png": image})
    write_tar(tmp_path / "text.tar", {"a.txt": b"x"})
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/preview.png").write_bytes(image)
    write_tar(tmp_path / "mixed/000.tar", {"a.png": image})
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no PAR1")
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(tmp_path / "numbers.parquet")
    empty = pyarrow.table({"image": pyarrow.array([], pyarrow.binary())})
    parquet.write_table(empty, tmp_path / "none.parquet")
    table = write_table([image])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text("{")
    for spec, kind, message in (
        ("gone", ImageError, r"gone does not exist\. Wanted: a folder of images, \.tar shards"),
        ("s/{000..002}.tar", ImageError, r"s/001\.tar does not exist \(.*s/\{000\.\.002\}\.tar\)"),
        ("text.tar", ImageError, r"no image in .*text\.tar: members \.png .* were wanted"),
        ("mixed", ConfigError, r"mixed holds 1 \.tar files and 1 image files: which"),
        ("a.tar.gz", ImageError, r"a\.tar\.gz ends in '\.gz'.*unpack other archives"),
        ("bad.parquet", ImageError, r"bad\.parquet cannot be read as parquet: "),
        ("numbers.parquet", ConfigError, r"numbers\.parquet has no image column: x \(int64\)"),
        ("none.parquet", ImageError, r"none\.parquet has no row"),
        ("splits", ConfigError, r"splits holds the splits train, test: name one, for example .*splits/train"),
        ("saved", ImageError, r"saved cannot be opened as a saved dataset: "),
        ("x" * 300, ImageError, r"cannot be read \(File name too long\)"),
    ):
        with pytest.raises(kind, match=message):
            open_source(tmp_path / spec)


def test_without_the_package_datasets_the_way_to_install_it_is_named(kinds, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(open_source(kinds["tars"])) == COUNT  # needs nothing
    for kind in ("saved", "split", "parquet"):
        with pytest.raises(
            ConfigError, match=r"`datasets`, which is missing: pip install -e \".*\[train\]\""
        ):
            open_source(kinds[kind])


@pytest.mark.parametrize(
    ("total", "asked", "held"), [(5, 24, 2), (3, 24, 1), (48, 24, 4), (2, 1, 1), (12, 3, 2), (300, 24, 24)]
)
def test_at_most_a_tenth_is_held_out(total, asked, held):
    class Numbers:
        def __len__(self):
            return total

    rest, val = hold_out(Numbers(), asked)
    assert (len(rest), len(val)) == (total - held, held)
    assert len(set(val.indices)) == held
    assert val.indices[-1] == (total - 1 if held > 1 else 0)  # from all over it


def test_latent_statistics_are_of_images_from_the_whole_folder(monkeypatch):
    class Numbers:
        def __len__(self):
            return 399

    taken = []
    monkeypatch.setattr(
        validation, "validation_images", lambda source, *_: taken.append(source.indices) or []
    )
    monkeypatch.setattr(validation, "compute_latent_statistics", lambda *_: None)
    validation.training_statistics(latentvae.build("tiny"), Numbers(), DataConfig())
    assert len(taken[0]) == validation.STATISTICS_IMAGES
    assert taken[0][-1] == 398
