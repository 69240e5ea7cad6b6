"""A store that is written to an address: the bytes of one in a folder, whatever is killed or refused."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import textured
from PIL import Image
from remote import Shaky, put, shaky, upload  # noqa: F401  # a fixture

from latentvae.base.addresses import Address
from latentvae.base.errors import SourceError, StoreError
from latentvae.cli.main import main
from latentvae.store import remote
from latentvae.store.encoding import EncodeReport, Workload, encode_folder, finish_store
from latentvae.store.parts import Part
from latentvae.store.remote import Remote
from latentvae.store.verification import verify, verify_sources

AT = "shaky://bucket/store"
COUNT = 5


@pytest.fixture(autouse=True)
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where stores at addresses are made."""
    monkeypatch.setenv("LATENTVAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(COUNT):
        Image.fromarray(textured((24, 16)[number % 2], 16, number)).save(tmp_path / f"photos/{number}.png")
    return tmp_path / "photos"


def encode(vae: Any, sources: Any, store: Any, **options: Any) -> EncodeReport:
    return encode_folder(vae, sources, store, **{"shard_size": 2, "batch_size": 1, **options})


def there() -> dict[str, bytes]:
    """What lies at the address."""
    found = {name.partition("bucket/store/")[2]: file.getvalue() for name, file in Shaky.store.items()}
    return {name: data for name, data in found.items() if name}


def files(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir() if path.is_file()}


def one_more(photos: Path, name: str) -> None:
    Image.fromarray(textured(16, 16, 40 + len(name))).save(photos / name)


def test_a_store_at_an_address_is_that_in_a_folder_and_grows_like_it(
    tiny_vae: Any, photos: Path, tmp_path: Path
) -> None:
    report = encode(tiny_vae, photos, AT)
    assert (report.images, report.encoded, report.missing) == (COUNT, COUNT, {})
    encode(tiny_vae, photos, tmp_path / "near")
    assert there() == files(tmp_path / "near")
    assert verify(AT) == verify_sources(AT) == []
    written = len(Shaky.asked)
    assert encode(tiny_vae, photos, AT + "/").encoded == 0
    assert not any(path.endswith(".safetensors") for path in Shaky.asked[written:])  # nothing to be fetched
    one_more(photos, "1a.png")  # all shards but the first are other ones
    assert encode(tiny_vae, photos, AT).encoded == 1
    encode(tiny_vae, photos, tmp_path / "near")
    assert there() == files(tmp_path / "near")
    for name in ("1a.png", "3.png", "4.png"):
        (photos / name).unlink()
    assert encode(tiny_vae, photos, AT, prune=True).images == 3
    encode(tiny_vae, photos, tmp_path / "near", prune=True)
    assert there() == files(tmp_path / "near")


def test_another_machine_goes_on_with_what_is_there(
    tiny_vae: Any, photos: Path, tmp_path: Path, working: Path
) -> None:
    encode(tiny_vae, photos, AT)
    shutil.rmtree(working)
    (photos / "0.png").unlink()  # its moments are at the address alone
    one_more(photos, "5.png")
    assert encode(tiny_vae, photos, AT).encoded == 1
    assert verify(AT) == []
    near = upload_back(tmp_path / "copy")
    assert encode(tiny_vae, photos, near).encoded == 0
    # and a folder here that is behind is not taken for the store
    kept = tmp_path / "kept"
    shutil.copytree(working, kept)
    one_more(photos, "6.png")
    encode(tiny_vae, photos, AT)
    shutil.rmtree(working)
    shutil.copytree(kept, working)
    assert encode(tiny_vae, photos, AT).encoded == 0
    assert verify(AT) == []


def upload_back(folder: Path) -> Path:
    folder.mkdir()
    for name, data in there().items():
        (folder / name).write_bytes(data)
    return folder


def test_a_store_that_was_deleted_there_is_begun_anew(tiny_vae: Any, photos: Path) -> None:
    encode(tiny_vae, photos, AT)
    Address(AT).ask(lambda store, path: store.rm(path, recursive=True))
    (photos / "0.png").unlink()
    report = encode(tiny_vae, photos, AT, flips=True)  # with other options
    assert (report.images, report.encoded) == (COUNT - 1, COUNT - 1)
    assert verify(AT) == []


class Killed(BaseException):
    """As if the process had ended."""


def killed(*_: Any) -> None:
    raise Killed


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_is_killed_at_any_change_goes_on(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Of a new store, and of one that is brought up to date: read as it was until the copies begin."""
    before = {}
    if again:
        encode(tiny_vae, photos, AT)
        before = there()
        one_more(photos, "1a.png")
    encode(tiny_vae, photos, tmp_path / "near")
    changes, kept = dict.fromkeys(("write_bytes", "put", "copy_to", "unlink"), 0), dict(Shaky.store)
    left = [0]

    def counted(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def change(self: Address, *values: Any) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            changes[name] += 1
            real(self, *values)

        return change

    monkeypatch.setattr(remote, "AT_ONCE", 1)
    for name in changes:
        monkeypatch.setattr(Address, name, counted(name, getattr(Address, name)))
    last, done = 0, False
    while not done:
        Shaky.store.clear()
        Shaky.store.update(kept)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        left[0] = last
        try:
            encode(tiny_vae, photos, AT)
            done = True
        except Killed:
            now = there()
            copied = ".run/finished.json" in now or now.get("store.json") != before.get("store.json")
            assert copied or {name: now.get(name) for name in before} == before
        left[0] = 1000
        assert encode(tiny_vae, photos, AT).images == COUNT + again
        assert there() == files(tmp_path / "near")
        last += 3
    assert min(changes.values()) > 0


def test_what_is_damaged_there_is_mended(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    encode(tiny_vae, photos, AT)
    good = there()
    Address(f"{AT}/latents-00001.safetensors").unlink()
    put({"latents-00000.jsonl": good["latents-00000.jsonl"] + b"x"}, AT)
    assert len(verify(AT)) == 2
    assert encode(tiny_vae, photos, AT).encoded == 0  # all is in the folder here
    assert there() == good
    data = good["latents-00000.safetensors"]
    put({"latents-00000.safetensors": data[:-1] + bytes([data[-1] ^ 1])}, AT)
    encode(tiny_vae, photos, AT, rehash=True)
    assert there() == good
    put({"latents-00000.safetensors": data[:-1] + bytes([data[-1] ^ 1])}, AT)
    shutil.rmtree(tmp_path / "cache")
    assert encode(tiny_vae, photos, AT).encoded == 2  # nowhere else
    assert there() == good


def test_what_cannot_be_is_refused_and_nothing_changes(
    tiny_vae: Any, photos: Path, tmp_path: Path, working: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(tiny_vae, photos, AT)
    before = there()
    with pytest.raises(StoreError, match=rf"^{AT} was encoded with flips False; flips True came\. Give"):
        encode(tiny_vae, photos, AT, flips=True)
    with pytest.raises(StoreError, match=r"part 0/2 came for the address .*--engine ray"):
        encode(tiny_vae, photos, AT, workload=Workload(part=Part(0, 2)))
    with pytest.raises(StoreError, match=r"^shaky://bucket is a folder of other files \(store and so on\)"):
        encode(tiny_vae, photos, "shaky://bucket")
    assert there() == before
    assert verify(AT) == []
    with pytest.raises(StoreError, match="is an address"):
        finish_store(photos, AT)
    with pytest.raises(
        SourceError, match=r"^http://127\.0\.0\.1:9/s/\.run/begun cannot be written: http:// is"
    ):
        encode(tiny_vae, photos, "http://127.0.0.1:9/s")
    one_more(photos, "5.png")
    real = Remote.push

    def pushed(self: Remote) -> None:  # another machine was faster
        monkeypatch.setattr(Remote, "push", real)
        monkeypatch.setenv("LATENTVAE_CACHE", str(tmp_path / "other"))
        encode(tiny_vae, photos, AT)
        real(self)

    monkeypatch.setattr(Remote, "push", pushed)
    with pytest.raises(StoreError, match="was written by another run since this one began"):
        encode(tiny_vae, photos, AT)
    assert before.keys() <= there().keys()
    assert verify(AT) == []
    monkeypatch.setenv("LATENTVAE_CACHE", str(working))
    assert encode(tiny_vae, photos, AT).images == COUNT + 1
    with Remote(Address(AT)).locked(), pytest.raises(StoreError, match="by another process of this machine"):
        encode(tiny_vae, photos, AT)


@pytest.mark.parametrize("broken", [2, 1000])
def test_a_connection_that_breaks_holds_up_no_encoding(
    tiny_vae: Any, photos: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    left, real = [broken], Address.put

    def put_later(self: Address, file: Path) -> None:
        if left[0]:
            left[0] -= 1
            raise SourceError(f"{self} cannot be written (broken pipe)")
        real(self, file)

    monkeypatch.setattr(Address, "put", put_later)
    if broken == 2:
        assert encode(tiny_vae, photos, AT).encoded == COUNT
    else:
        with pytest.raises(SourceError, match=r"bucket/store/\.run/\w+ cannot be written \(broken pipe\)"):
            encode(tiny_vae, photos, AT)
        left[0] = 0
        assert encode(tiny_vae, photos, AT).encoded == 0  # all was done
    assert verify(AT) == []


def test_other_options_for_what_was_not_finished_name_the_folder(
    tiny_vae: Any, photos: Path, working: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Remote, "upload", killed)
    with pytest.raises(Killed):
        encode(tiny_vae, photos, AT)
    monkeypatch.undo()
    monkeypatch.setenv("LATENTVAE_CACHE", str(working))
    with pytest.raises(StoreError, match=rf"{AT} was encoded with flips.* lies in {working}/stores/.*delete"):
        encode(tiny_vae, photos, AT, flips=True)
    assert encode(tiny_vae, photos, AT).images == COUNT


def test_the_store_and_its_preview_are_no_images_of_the_sources(
    tiny_vae: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line."""
    upload(photos, "shaky://bucket/images")
    tiny_vae.save_pretrained(tmp_path / "model")
    words = ["encode", "shaky://bucket", AT, "-m", str(tmp_path / "model"), "--preview"]
    for encoded in (COUNT, 0):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code
        assert f"{COUNT} images in {AT}; {encoded} files done now" in capsys.readouterr().out
    with Image.open(io.BytesIO(there()["preview.png"])) as sheet:
        assert sheet.width > 16
