"""A store in parts: in any order they make the bytes of one run, and what is missing is named."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from conftest import textured
from PIL import Image

import latentvae
from latentvae.base.errors import StoreError
from latentvae.base.files import partial_path
from latentvae.cli.main import main
from latentvae.store.encoding import EncodeReport, Workload, encode_folder, finish_store
from latentvae.store.journal import locked
from latentvae.store.parts import WHOLE, Part, of_environment, parse
from latentvae.store.verification import verify

ENVIRONMENT = ("RANK", "WORLD_SIZE", *(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP")))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven pictures: four shards of two."""
    for number in range(7):
        save(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(textured((24, 16)[seed % 2], 16, seed)).save(path)


def encode(vae: Any, photos: Path, store: Path, part: str | None = None, **options: Any) -> EncodeReport:
    work = Workload(part=parse(part) if part else None)
    return encode_folder(vae, photos, store, shard_size=2, batch_size=2, workload=work, **options)


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.fixture
def clean(tiny_vae: Any, photos: Path, tmp_path: Path) -> dict[str, bytes]:
    """The store of one run."""
    encode(tiny_vae, photos, tmp_path / "clean")
    return content(tmp_path / "clean")


@pytest.mark.parametrize("order", [*permutations(range(2)), (2, 0, 1), (4, 3, 2, 1, 0)])
def test_parts_in_any_order_make_the_store_of_one_run(
    tiny_vae: Any, photos: Path, tmp_path: Path, clean: dict[str, bytes], order: tuple[int, ...]
) -> None:
    world, store, encoded = len(order), tmp_path / "store", 0
    for rank in order:
        assert not (store / "store.json").exists()
        report = encode(tiny_vae, photos, store, f"{rank}/{world}")
        encoded += report.encoded
        assert f"{rank}/{world}" not in report.missing
    assert (report.missing, report.others, report.images, encoded) == ({}, [], 7, 7)
    assert content(store) == clean
    assert encode(tiny_vae, photos, store, "0/2").encoded == 0
    assert content(store) == clean


def test_the_missing_parts_are_named_and_nothing_is_finished_without_them(
    tiny_vae: Any, photos: Path, tmp_path: Path, clean: dict[str, bytes]
) -> None:
    store = tmp_path / "store"
    with pytest.raises(StoreError, match=r"no part of .* has been encoded"):
        finish_store(photos, store)
    assert encode(tiny_vae, photos, store, "1/3").missing == {"0/3": 2, "2/3": 1}
    encode(tiny_vae, photos, store, "2/3")
    with pytest.raises(StoreError, match=r"not whole: 2 shards of it are still .*: --part 0/3 \(2\)\. Run"):
        finish_store(photos, store)
    assert not (store / "store.json").exists()
    with locked(store, Part(1, 3)):  # which is at it again
        report = encode(tiny_vae, photos, store, "0/3")
        assert report.missing == {}
        assert [name.partition(" as ")[2] for name in report.others] == ["part 1 of 3"]
        assert not (store / "store.json").exists()
        with pytest.raises(StoreError, match=r"still being written by process .* as part 1 of 3"):
            finish_store(photos, store)
    assert finish_store(photos, store).images == 7
    assert content(store) == clean
    assert finish_store(photos, store).images == 7  # again does no harm


def test_what_another_part_puts_in_place_is_no_damage(
    tiny_vae: Any, photos: Path, tmp_path: Path, clean: dict[str, bytes]
) -> None:
    """An index without its name yet, as others look at it, and as the part goes on that was killed then."""
    store = tmp_path / "store"
    encode(tiny_vae, photos, store, "1/3")
    (index,) = store.glob(".run/*/latents-00001.jsonl")
    index.rename(partial_path(index))
    with locked(store, Part(1, 3)):
        assert encode(tiny_vae, photos, store, "0/3").repaired == []
        assert encode(tiny_vae, photos, store, "2/3").missing == {"1/3": 1}
    assert not (store / "store.json").exists()
    assert encode(tiny_vae, photos, store, "1/3").encoded == 0
    assert content(store) == clean


def test_an_update_in_parts_ends_as_one_in_one(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    store, alone = tmp_path / "store", tmp_path / "alone"
    for folder in (store, alone):
        encode(tiny_vae, photos, folder)
    save(photos / "2.png", 31)  # in the second shard
    save(photos / "1-new.png", 32)
    (photos / "6.png").unlink()
    encode(tiny_vae, photos, alone)
    assert [encode(tiny_vae, photos, store, f"{rank}/2").encoded for rank in range(2)] == [1, 1]
    assert content(store) == content(alone)
    for folder in (store, alone):
        parts = [None] if folder == alone else ["1/2", "0/2"]
        reports = [encode(tiny_vae, photos, folder, part, prune=True) for part in parts]
        assert reports[-1].images == 7
    assert content(store) == content(alone)
    assert verify(store) == []


def test_parts_at_once_see_the_same_files_or_are_refused(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, photos, store, "0/3")
    with locked(store, Part(0, 3)):
        save(photos / "8.png", 8)
        with pytest.raises(
            StoreError, match=r"part 0 of 3 began with 7 images, and here are 8: parts that run"
        ):
            encode(tiny_vae, photos, store, "1/3")
    for part in ("1/3", "2/3", "0/3"):  # none is at it: what is finished stays, and the rest is divided
        report = encode(tiny_vae, photos, store, part)
    assert (report.images, report.missing) == (8, {})
    assert verify(store) == []


@pytest.mark.parametrize("text", ["3/3", "0/0", "1", "-1/2", "a/b", "1/2/3", ""])
def test_parts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(StoreError, match=r"counted from 0: of four parts 0/4, 1/4, 2/4 and 3/4"):
        parse(text)


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({}, WHOLE),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Part(3, 8)),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}, Part(2, 4)),
        (
            {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"},
            Part(3, 4),
        ),
        (
            {
                f"SLURM_ARRAY_TASK_{name}": number
                for name, number in zip(("ID", "COUNT", "MIN", "STEP"), ("14", "3", "10", "2"), strict=True)
            },
            Part(2, 3),
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"},
            Part(0, 2),
        ),
        ({"RANK": "2", "WORLD_SIZE": "2"}, None),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"}, None),
        ({"RANK": "x", "WORLD_SIZE": "2"}, None),
    ],
)
def test_launchers_say_which_part_a_process_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], part: Part | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if part is None:
        with pytest.raises(StoreError, match="in the environment"):
            of_environment()
    else:
        assert of_environment() == part


def test_the_command_line_says_what_is_left_to_do(
    tiny_vae: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_vae.save_pretrained(tmp_path / "model")
    common = ["encode", str(photos), str(tmp_path / "store")]

    def run(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*common, *arguments])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    model = ("-m", str(tmp_path / "model"), "--shard-size", "2")
    code, out, _ = run(*model, "--part", "1/2")
    assert (code or 0) == 0
    assert "part 1/2: 3 images in" in out
    assert "store.json is not written yet: 2 shards of it are still to be encoded: --part 0/2 (2)." in out
    code, _, err = run("--finish")
    assert code == 2
    assert "--part 0/2 (2)" in err
    code, _, err = run(*model, "--part", "2/2")
    assert code == 2
    assert "part 2/2 came, which is out of range" in err
    with pytest.raises(SystemExit) as ended:
        main(["info", str(tmp_path / "store")])
    assert ended.value.code == 2
    assert "store is no complete store: it has no store.json" in capsys.readouterr().err
    code, out, _ = run(*model, "--part", "0/2")
    assert (code or 0) == 0
    assert "not written" not in out
    assert "7 images in" in run("--finish")[1]
    assert len(latentvae.LatentDataset(tmp_path / "store")) == 7
