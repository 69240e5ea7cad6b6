"""Encoding and training from addresses: the same as from files; what is missing or breaks is named."""

import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import pytest
import torch
from conftest import textured
from PIL import Image
from remote import Shaky, put, s3, shaky, upload  # noqa: F401  # fixtures
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from latentvae.base import addresses
from latentvae.base.addresses import Address, place
from latentvae.base.errors import ImageError, LatentVAEError, SourceError, StoreError
from latentvae.images.sources import open_source, root
from latentvae.store.dataset import LatentDataset
from latentvae.store.encoding import EncodeReport, encode_folder
from latentvae.store.format import read_entries, read_manifest, tensors_path
from latentvae.store.stream import LatentStream
from latentvae.store.verification import verify, verify_sources
from latentvae.training.config import DataConfig
from latentvae.training.data.crops import split_sources

COUNT = 4


def pictures() -> dict[str, bytes]:
    """Files of a data set: images, and captions beside them."""
    found = dict[str, bytes]()
    for number in range(COUNT):
        file = io.BytesIO()
        Image.fromarray(textured((24, 16)[number % 2], 16, number)).save(file, "PNG")
        found |= {f"{number}.png": file.getvalue(), f"{number}.txt": f"picture {number}".encode()}
    return found


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as packed:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            packed.addfile(header, io.BytesIO(data))
    return file.getvalue()


def table(files: dict[str, bytes]) -> datasets.Dataset:
    images = [data for name, data in files.items() if name.endswith(".png")]
    rows = {
        "image": [{"bytes": data, "path": None} for data in images],
        "caption": [f"picture {number}" for number in range(len(images))],
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def parquet(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    table(files).to_parquet(file)
    return file.getvalue()


def saved(files: dict[str, bytes]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        table(files).save_to_disk(folder)
        return {f"saved/{path.name}": path.read_bytes() for path in Path(folder).iterdir()}


def everything() -> dict[str, bytes]:
    """The same pictures as a folder, as tars, as a table and as a list."""
    files = pictures()
    lines = [json.dumps({"file_name": f"folder/{n}.png", "caption": f"picture {n}"}) for n in range(COUNT)]
    halves = [{k: v for k, v in files.items() if int(k[0]) % 2 == half} for half in range(2)]
    return {
        **{f"folder/{name}": data for name, data in files.items()},
        **{f"tars/{number:03d}.tar": tar(half) for number, half in enumerate(halves)},
        "table.parquet": parquet(files),
        **saved(files),
        "list.jsonl": "\n".join(lines).encode(),
    }


def encode(vae: Any, sources: Any, store: Path, **options: Any) -> EncodeReport:
    return encode_folder(vae, sources, store, **{"shard_size": 3, "batch_size": 1, **options})


def by_content(store: Path) -> dict[str, tuple[Any, ...]]:
    found = {}
    for shard in read_manifest(store).shards:
        tensors = load_file(tensors_path(store, shard.name))
        for entry in read_entries(store, shard.name):
            found[entry.sha256] = tensors[entry.tensor][entry.offset].tolist(), entry.caption
    return found


def origins(store: Path) -> list[str]:
    return [
        entry.source for shard in read_manifest(store).shards for entry in read_entries(store, shard.name)
    ]


SPECS = ("folder", "tars", "tars/{000..001}.tar", "tars/*.tar", "table.parquet", "saved", "list.jsonl")


def test_every_form_at_an_address_gives_what_files_give(tiny_vae: Any, tmp_path: Path) -> None:
    at, files = put(everything(), "shaky://data"), tmp_path / "files"
    for name, data in pictures().items():
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_bytes(data)
    encode(tiny_vae, files, tmp_path / "wanted")
    for number, spec in enumerate(SPECS):
        store = tmp_path / f"store{number}"
        assert encode(tiny_vae, f"{at}/{spec}", store).images == COUNT, spec
        assert by_content(store) == by_content(tmp_path / "wanted"), spec
        assert all(origin.startswith("shaky://data/") for origin in origins(store))
        assert encode(tiny_vae, f"{at}/{spec}", store).encoded == 0
        assert verify_sources(store) == []


def test_a_change_at_an_address_is_noticed(tiny_vae: Any, tmp_path: Path) -> None:
    at = put(everything(), "shaky://data")
    encode(tiny_vae, f"{at}/folder", tmp_path / "store")
    put({"3.png": pictures()["0.png"]}, f"{at}/folder")
    assert encode(tiny_vae, f"{at}/folder", tmp_path / "store").encoded == 1


def test_training_reads_addresses(tmp_path: Path) -> None:
    at = put(everything(), "shaky://data")
    (tmp_path / "folder").mkdir()
    for name, data in pictures().items():
        (tmp_path / "folder" / name).write_bytes(data)
    files = open_source(tmp_path / "folder")
    for spec in ("folder", "tars/00{0,1}.tar", "list.jsonl"):
        source = open_source(f"{at}/{spec}")
        order = [0, 2, 1, 3] if "tars" in spec else range(COUNT)
        assert all(torch.equal(source.load(i), files.load(j)) for i, j in enumerate(order))
        assert source.name(0).startswith("shaky://data/")
    train, val = split_sources(DataConfig(train=f"{at}/tars/*.tar", val=f"{at}/tars/001.tar"))
    assert (len(train), len(val)) == (2, 2)  # what is measured is not trained on


def test_a_part_of_a_shard_is_all_that_an_image_costs() -> None:
    at = put(everything(), "shaky://data")
    source = open_source(f"{at}/tars/000.tar")
    Shaky.asked.clear()
    source.read(1)
    assert [path.removeprefix("shaky:/") for path in Shaky.asked] == ["/data/tars/000.tar"]


@pytest.mark.parametrize(("times", "images"), [(addresses.TRIES - 1, 2), (addresses.TRIES, 0)])
def test_a_connection_that_breaks_is_tried_again_and_then_named(
    tiny_vae: Any, tmp_path: Path, times: int, images: int
) -> None:
    at = put(everything(), "shaky://data")
    Shaky.breaks[".tar"] = times
    if images:
        assert encode(tiny_vae, f"{at}/tars/000.tar", tmp_path / "store").images == images
        return
    with pytest.raises(SourceError) as caught:
        encode(tiny_vae, f"{at}/tars/000.tar", tmp_path / "store")
    assert str(caught.value) == (
        "shaky://data/tars/000.tar cannot be read (connection reset by peer); it was tried 4 times. Check "
        "the connection, and run the same command again."
    )
    assert not (tmp_path / "store").exists()


def test_an_image_whose_connection_stays_broken_is_tried_by_the_next_run(
    tiny_vae: Any, tmp_path: Path
) -> None:
    at = put(everything(), "shaky://data")
    Shaky.breaks["folder/1.png"] = 1000
    report = encode(tiny_vae, f"{at}/folder", tmp_path / "store")
    assert report.images == COUNT - 1
    (failure,) = report.failures
    assert failure.reason.startswith("shaky://data/folder/1.png cannot be read (connection reset by peer)")
    Shaky.breaks.clear()
    assert encode(tiny_vae, f"{at}/folder", tmp_path / "store").failures == []


def test_what_is_not_there_is_named_as_it_was_typed(tiny_vae: Any, tmp_path: Path) -> None:
    whole = tar(pictures())
    files = {"cut.tar": whole[:900], "short.tar": whole[:300], "text.tar": b"no tar at all" * 100}
    at = put({**files, "texts/a.txt": b"x"}, "shaky://data")
    for spec, kind, message in (
        (f"{at}/none.tar", ImageError, r"^shaky://data/none\.tar does not exist\. Wanted: a folder"),
        (f"{at}/no/{{0..1}}.tar", ImageError, r"^shaky://data/no/0\.tar does not exist \(shaky://"),
        (f"{at}/cut.tar", ImageError, r"^shaky://data/cut\.tar cannot be listed \(unexpected end of data\)"),
        (
            f"{at}/short.tar",
            ImageError,
            r"^shaky://data/short\.tar cannot be listed \(truncated header\), but a",
        ),
        (f"{at}/text.tar", ImageError, r"^shaky://data/text\.tar cannot be listed \(invalid header\), but a"),
        (f"{at}/texts", ImageError, r"^no image in the folder shaky://data/texts\."),
        ("odd://data/a.tar", SourceError, r"^odd://data/a\.tar cannot be read: odd:// is no kind of address"),
    ):
        with pytest.raises(kind, match=message):
            encode(tiny_vae, spec, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_without_a_package_the_way_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(SourceError, match=r"shaky://b/x\.tar is read with .*`fsspec`.*\[remote\]"):
        open_source("shaky://b/x.tar")


@pytest.mark.parametrize(
    ("address", "module", "command"),
    [
        ("gs://b/x.tar", "gcsfs", "pip install gcsfs"),
        ("hf://datasets/u/n/x.tar", "huggingface_hub", "pip install huggingface_hub"),
        ("s3://b/x.tar", "s3fs", r"pip install .*\[remote\]"),
        ("az://b/x.tar", "adlfs", "pip install adlfs"),
    ],
)
def test_the_package_of_a_kind_of_address_is_named(
    monkeypatch: pytest.MonkeyPatch, address: str, module: str, command: str
) -> None:
    known = sys.modules["fsspec.registry"]  # fsspec.registry is what is in it
    monkeypatch.setattr(known, "_registry", {})
    monkeypatch.setattr(known, "registry", known._registry)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SourceError, match=rf"^{address} cannot be read: a package is missing .*: {command}"):
        open_source(address)


class ResourceNotFoundError(Exception):
    """As azure.core calls what it raises for a container that is not there."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("Must provide either a connection_string or account_name with credentials!!"),
            "there are no credentials .*: set AZURE_STORAGE_CONNECTION_STRING",
        ),
        (ResourceNotFoundError("long"), r"it does not exist"),
        (RuntimeError("failed to authenticate"), r"these credentials do not allow it .*: set AZURE_"),
    ],
)
@pytest.mark.parametrize("scheme", ["az", "abfs"])
def test_what_azure_refuses_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, scheme: str, error: Exception, said: str
) -> None:
    tries = list[str]()

    class Closed(Shaky):
        protocol = scheme

        @classmethod
        def refuse(cls, path: str) -> None:
            tries.append(path)
            raise error

        def exists(self, path: str, **kwargs: Any) -> bool:
            return True

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, scheme, Closed)
    with pytest.raises(SourceError, match=rf"^{scheme}://b/x\.jpg cannot be read: {said}"):
        place(f"{scheme}://b/x.jpg").read_bytes()
    assert len(tries) == 1


def test_an_address_has_what_a_path_has() -> None:
    one = place("s3://bucket/a/b.tar")
    assert isinstance(one, Address)
    assert (one.name, one.stem, one.suffix, str(one.parent)) == ("b.tar", "b", ".tar", "s3://bucket/a")
    assert [str(each) for each in one.parents] == ["s3://bucket/a", "s3://bucket"]
    assert one.is_relative_to(Address("s3://bucket/a"))
    assert not one.is_relative_to(Address("s3://bucket/aa"))
    assert not one.is_relative_to(Path("s3:"))
    assert one.relative_to(Address("s3://bucket")).as_posix() == "a/b.tar"
    assert Address("https://host/a/b.tar?download=1").name == "b.tar"
    assert root("shaky://bucket/a-{0..3}.tar") == Address("shaky://bucket")
    assert isinstance(place("c:/x"), Path)


def test_a_folder_called_like_a_scheme_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:/bucket").mkdir(parents=True)
    assert isinstance(place("s3://bucket"), Path)


def test_a_server_without_ranges_gives_images_and_no_parts_of_shards(tiny_vae: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(pictures()["0.png"])
    (tmp_path / "a.tar").write_bytes(tar(pictures()))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        assert encode(tiny_vae, f"{at}/a.png?size=large", tmp_path / "store").images == 1
        assert [entry.key for entry in read_entries(tmp_path / "store", "latents-00000")] == ["a.png"]
        failures = encode(tiny_vae, f"{at}/a.tar", tmp_path / "tar").failures
        assert len(failures) == COUNT
        assert all(f"{at}/a.tar can only be had whole" in failure.reason for failure in failures)
        with pytest.raises(ImageError, match=rf"^{at}/b\.tar does not exist"):
            encode(tiny_vae, f"{at}/b.tar", tmp_path / "other")
        server.shutdown()


@pytest.mark.slow
def test_s3(tiny_vae: Any, tmp_path: Path, s3: Callable[[], None]) -> None:  # noqa: F811
    """Against a server of S3 on this machine."""
    with pytest.raises(LatentVAEError, match=r"s3://b/tars cannot be read: there are no credentials .*AWS_"):
        encode(tiny_vae, "s3://b/tars", tmp_path / "store")
    s3()
    at = put(everything(), "s3://bucket")
    with pytest.raises(ImageError, match=r"s3://other/a\.tar does not exist \(there is no bucket 'other'\)"):
        encode(tiny_vae, "s3://other/a.tar", tmp_path / "store")
    with pytest.raises(ImageError, match=r"s3://bucket/none\.tar does not exist\. Wanted"):
        encode(tiny_vae, "s3://bucket/none.tar", tmp_path / "store")
    for number, spec in enumerate(SPECS):
        store = tmp_path / f"store{number}"
        assert encode(tiny_vae, f"{at}/{spec}", store).images == COUNT, spec
        assert by_content(store) == by_content(tmp_path / "store0"), spec
        assert encode(tiny_vae, f"{at}/{spec}", store).encoded == 0, spec
        assert all(origin.startswith("s3://bucket/") for origin in origins(store))
    upload(tmp_path / "store0", "s3://bucket/store")
    assert verify("s3://bucket/store") == []
    stream = LatentStream("s3://bucket/store", 1, cache=tmp_path / "cache")
    loader = DataLoader(stream, batch_size=None, num_workers=2)  # with connections of their own
    near = LatentDataset(tmp_path / "store0")
    for batch in loader:
        assert torch.equal(batch["latents"][0], near[int(batch["index"])]["latents"])
    with pytest.raises(StoreError, match=r"s3://bucket/none is no complete store: it has no store\.json"):
        LatentDataset("s3://bucket/none")
    with pytest.raises(StoreError, match=r"no complete store.* \(there is no bucket 'other'\)"):
        LatentDataset("s3://other/store")
