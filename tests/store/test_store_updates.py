"""Stores that are brought up to date: they end as ones made anew, and only what has changed is encoded."""

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import textured
from PIL import Image

import latentvae
from latentvae.base.errors import StoreError
from latentvae.store import format as layout
from latentvae.store.encoding import EncodeReport, Workload, encode_folder, finish_store
from latentvae.store.journal import Journal
from latentvae.store.parts import parse
from latentvae.store.verification import verify

SIZES = (24, 16), (30, 16), (16, 16)


class Killed(BaseException):
    """Ends a run as a kill does: what would tidy up does not know it."""


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(textured(*SIZES[seed % 3], seed)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures of three sizes: four shards of three."""
    for number in range(12):
        save(tmp_path / "photos" / f"{number:02d}.png", number)
    return tmp_path / "photos"


def encode(vae: Any, photos: Path, store: Path, part: str | None = None, **options: Any) -> EncodeReport:
    work = Workload(threads=1, workers=1, part=parse(part) if part else None)
    settings = {"shard_size": 3, "batch_size": 2, **options}
    return encode_folder(vae, photos, store, workload=work, **settings)


def content(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def anew(vae: Any, photos: Path, **options: Any) -> dict[str, bytes]:
    """A store of the same photos made from nothing."""
    folder = photos.parent / f"anew-{random.randrange(1 << 40)}"
    encode(vae, photos, folder, **options)
    return content(folder)


@contextmanager
def counted(vae: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images the model is given, batch by batch: those that are not the zeros of a filled one."""
    seen, real = list[int](), type(vae).encode

    def encode(self: Any, images: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(int(images.flatten(1).any(1).sum()))
        return real(self, images, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(type(vae), "encode", encode)
        yield seen


def test_what_is_unchanged_is_carried_over(tiny_vae: Any, photos: Path, monkeypatch: Any) -> None:
    """Other content and size, new in the middle, gone: all shards are others, five images encoded."""
    store = photos.parent / "store"
    encode(tiny_vae, photos, store, flips=True)
    for name, seed in (("01", 50), ("07", 51), ("03-new", 52), ("00-new", 53), ("99", 54)):
        save(photos / f"{name}.png", seed)
    (photos / "05.png").unlink()
    with counted(tiny_vae, monkeypatch) as seen:
        report = encode(tiny_vae, photos, store, flips=True, prune=True)
    assert (report.images, report.encoded, sum(seen)) == (14, 5, 10)  # mirror images too
    assert content(store) == anew(tiny_vae, photos, flips=True)
    assert verify(store) == []


def test_moments_do_not_depend_on_what_shares_a_batch(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    shapes, real = list[torch.Size](), type(tiny_vae).encode
    monkeypatch.setattr(
        type(tiny_vae), "encode", lambda self, x, *a, **o: (shapes.append(x.shape), real(self, x, *a, **o))[1]
    )
    encode(tiny_vae, photos, tmp_path / "all", batch_size=3, shard_size=12)
    encode(tiny_vae, photos / "04.png", tmp_path / "one", batch_size=3)
    assert {shape[0] for shape in shapes} == {3}  # filled up
    rows = []
    for store in (tmp_path / "all", tmp_path / "one"):
        (entry,) = layout.read_entries(store, "latents-00000", "04.png")
        rows += layout.read_rows(store, "latents-00000", [entry])
    assert torch.equal(rows[0].moments, rows[1].moments)


def test_a_cpu_takes_one_image_at_a_time_unless_asked(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    encode(tiny_vae, photos, tmp_path / "store", batch_size=None)
    assert layout.read_manifest(tmp_path / "store").batch_size == 1
    encode(tiny_vae, photos, tmp_path / "asked", batch_size=3)
    assert encode(tiny_vae, photos, tmp_path / "asked", batch_size=None).encoded == 0  # as the store has it


def test_the_store_is_as_it_was_until_the_new_one_is_whole(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Killed after each shard: the old store is read on, and nothing that was written is encoded again."""
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    before, write, encoded = content(store), Journal.write, 0
    save(photos / "00-new.png", 60)  # moves an image from each shard to the next

    def killed(journal: Journal, *args: Any) -> Any:
        write(journal, *args)
        raise Killed

    for _ in range(5):
        with monkeypatch.context() as patched, counted(tiny_vae, patched) as seen:
            patched.setattr(Journal, "write", killed)
            with pytest.raises(Killed):
                encode(tiny_vae, photos, store)
        encoded += sum(seen)
        assert {name: data for name, data in content(store).items() if name in before} == before
        assert len(latentvae.LatentDataset(store)) == 12
    assert encode(tiny_vae, photos, store).encoded == 0
    assert encoded == 1
    assert content(store) == anew(tiny_vae, photos)


def test_killed_while_files_get_their_places(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """At every single step: the next run of any kind goes on from there, and encodes nothing."""
    for number in range(5, 12):
        (photos / f"{number:02d}.png").unlink()
    encode(tiny_vae, photos, tmp_path / "old")
    (photos / "02.png").unlink()
    (photos / "04.png").unlink()
    save(photos / "01.png", 70)
    wanted, step, done = anew(tiny_vae, photos), 0, False
    while not done:
        store = shutil.copytree(tmp_path / "old", tmp_path / f"store-{step}")
        with monkeypatch.context() as patched:
            _kill_after(step, store / ".run" / "finished.json", patched)
            try:
                encode(tiny_vae, photos, store, prune=True)
                done = True
            except Killed:
                step += 1
        report = encode(tiny_vae, photos, store, prune=True)
        assert (report.images, report.encoded) == (3, 0), step
        assert content(store) == wanted, step
        assert verify(store) == []
    assert step > 6, "there was little to interrupt"


def _kill_after(steps: int, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill whoever names or deletes one more file than `steps` once the list of moves is there."""
    left = steps
    for name, real in [(name, getattr(Path, name)) for name in ("replace", "unlink", "rename")]:

        def killing(path: Path, *args: Any, _real: Any = real, **options: Any) -> Any:
            nonlocal left
            if begun.exists():
                left -= 1
                if left < 0:
                    raise Killed
            return _real(path, *args, **options)

        monkeypatch.setattr(Path, name, killing)


def _add(photos: Path, chance: random.Random) -> None:
    save(photos / f"{chance.randrange(100):02d}-{chance.randrange(100)}.png", chance.randrange(1000))


def _change(photos: Path, chance: random.Random) -> None:
    save(chance.choice(sorted(photos.glob("*.png"))), chance.randrange(1000, 9999))


def _remove(photos: Path, chance: random.Random) -> None:
    chance.choice(sorted(photos.glob("*.png"))[1:]).unlink()


def _break(photos: Path, chance: random.Random) -> None:
    chance.choice(sorted(photos.glob("*.png"))).write_bytes(bytes([chance.randrange(256)]) * 9)


CHANGES: list[Callable[[Path, random.Random], None]] = [_add, _add, _change, _change, _remove, _break]


@pytest.mark.parametrize("seed", range(2))
def test_any_history_ends_as_a_store_made_anew(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: Any, seed: int
) -> None:
    """Photos come, change, break and go, also between a kill and the run after it, in one or in parts."""
    chance, store, write = random.Random(seed), tmp_path / "store", Journal.write
    for _ in range(3):
        for _ in range(chance.randrange(3)):  # runs that are killed, each about other photos
            left = chance.randrange(3)

            def killed(journal: Journal, *args: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return write(journal, *args)

            for _ in range(chance.randrange(4)):
                chance.choice(CHANGES)(photos, chance)
            with monkeypatch.context() as patched:
                patched.setattr(Journal, "write", killed)
                with suppress(Killed):
                    encode(tiny_vae, photos, store, prune=True)
        for _ in range(chance.randrange(4)):
            chance.choice(CHANGES)(photos, chance)
        world = chance.randrange(1, 4)
        ranks = chance.sample(range(world), world)
        reports = [encode(tiny_vae, photos, store, f"{rank}/{world}", prune=True) for rank in ranks]
        assert reports[-1].missing == {}
        assert content(store) == anew(tiny_vae, photos)
        assert verify(store) == []


def test_an_update_whose_images_move_is_whole_when_its_last_part_is(
    tiny_vae: Any, photos: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    before = (store / "store.json").read_bytes()
    save(photos / "00-new.png", 80)
    assert encode(tiny_vae, photos, store, "1/2").missing == {"0/2": 3}
    assert (store / "store.json").read_bytes() == before
    assert len(latentvae.LatentDataset(store)) == 12
    with pytest.raises(StoreError, match=r"--part 0/2 \(3\)"):
        finish_store(photos, store)
    report = encode(tiny_vae, photos, store, "0/2")
    assert (report.encoded, report.images, report.missing) == (1, 13, {})
    assert content(store) == anew(tiny_vae, photos)


def test_what_is_gone_moves_on_and_is_not_lost(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    """Moments of images whose files are gone move between shards; damaged there, the run is refused."""
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    wanted = anew(tiny_vae, photos)
    (photos / "04.png").rename(tmp_path / "04.png")
    save(photos / "00-new.png", 80)
    assert encode(tiny_vae, photos, store).vanished == ["04.png"]
    damaged = bytearray((store / "latents-00001.safetensors").read_bytes())
    damaged[-1] ^= 1
    (store / "latents-00001.safetensors").write_bytes(damaged)
    before = content(store)
    save(photos / "00-more.png", 81)  # part of what was damaged belongs into another shard now
    with pytest.raises(
        StoreError, match=r"latents-00001.safetensors .* cannot be encoded again \('04.png'\)"
    ):
        encode(tiny_vae, photos, store)
    assert content(store) == before
    (tmp_path / "04.png").rename(photos / "04.png")
    for name in ("00-new", "00-more"):
        (photos / f"{name}.png").unlink()
    report = encode(tiny_vae, photos, store, prune=True)
    assert (report.encoded, report.dropped) == (3, ["00-new.png"])
    assert report.repaired == ["latents-00001.safetensors does not match its sha256"]
    assert content(store) == wanted


def test_lists_alone_are_written_where_times_alone_changed(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Also on a disk without links, where the moments are copied."""
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    for refuse in (False, True):
        for path in photos.iterdir():
            path.write_bytes(path.read_bytes())
        with monkeypatch.context() as patched:
            patched.setattr("latentvae.store.format.save_file", None)  # no tensors are written
            if refuse:
                patched.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links")))
            assert encode(tiny_vae, photos, store).encoded == 0
        assert content(store) == anew(tiny_vae, photos)
