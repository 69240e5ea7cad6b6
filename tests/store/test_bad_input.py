"""`latentvae encode` given what it cannot take: what came, what to do, the exit code, and nothing is lost."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from conftest import textured
from PIL import Image
from pyarrow import parquet
from remote import Shaky, put, s3, shaky  # noqa: F401  # fixtures
from test_store_addresses import pictures, tar

from latentvae.base.addresses import Address
from latentvae.cli.main import main
from latentvae.store.verification import verify

Run = Callable[..., tuple[object, str]]


@pytest.fixture
def run(
    tiny_vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The command, in a folder with photos, of a model that is there; its exit code and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTVAE_CACHE", str(tmp_path / "cache"))
    tiny_vae.save_pretrained("model")
    Path("photos").mkdir()
    for number in range(3):
        Image.fromarray(textured(16, 16, number)).save(f"photos/{number}.png")

    def command(*words: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            main(["encode", *words, "--model", "model"])
        return ended.value.code or 0, capsys.readouterr().err

    return command


CASES = [
    (
        "shaky://data/cut.tar",
        "",
        r"data/cut\.tar cannot be listed \(unexpected end of data\).*fetch it",
    ),
    ("shaky://data/n.parquet", "", r"n\.parquet has no image column: image \(int64\).*--column of encode"),
    ("shaky://data/n.parquet", "--column image", r"'image' is of the type int64 in .*n\.parquet"),
    ("shaky://data/n.parquet", "--column no", r"'no' is not there in .*which has image \(int64\)"),
    ("shaky://data/x shaky://data/y", "", r"/x/0\.png and .*/y/0\.png would both have the key '0\.png'"),
    ("photos shaky://data/x/0.png", "", r"photos/0\.png and .*x/0\.png would both have the key '0\.png'"),
    ("odd://data/a.tar", "", r"odd:// is no kind of address that is known"),
    ("photos", "--part 2/2", r"part 2/2 came, which is out of range; wanted RANK/WORLD, counted from 0"),
    ("photos", "--part 0/0", r"part 0/0 came, which is out of range"),
    ("photos", "--part one", r"part 'one' came; wanted RANK/WORLD"),
    ("photos", "--engine ray --part 0/2", r"Ray divides the work itself"),
    ("photos", "--engine ray --ray-address 127.0.0.1:9", r"no Ray cluster at 127\.0\.0\.1:9 \("),
    ("photos", "--engine spark", r"'spark' is not one of"),
    (
        "photos",
        "--size 16",
        r"store was encoded with preprocessing as-is \(.*; preprocessing size 16 \(.*Give the same options",
    ),
]


@pytest.mark.parametrize("at", ["store", "shaky://bucket/store"])
def test_what_cannot_be_taken_leaves_the_store_as_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    assert run("photos", at)[0] == 0
    numbers, files = pyarrow.BufferOutputStream(), pictures()
    parquet.write_table(pyarrow.table({"image": [1, 2]}), numbers)
    bad = {"cut.tar": tar(files)[:900], "n.parquet": numbers.getvalue().to_pybytes()}
    put(bad | {"x/0.png": files["0.png"], "y/0.png": files["1.png"]}, "shaky://data")
    before = everything()
    for sources, options, message in CASES:
        code, said = run(*sources.split(), at, *options.split())
        assert (code, everything() == before) == (2, True), (sources, options, said)
        assert re.search(message, " ".join(said.replace("│", " ").split())), said
    monkeypatch.setitem(sys.modules, "ray", None)
    code, said = run("photos", at, "--engine", "ray")
    assert (code, everything()) == (2, before)
    assert re.search(r"--engine ray needs ray, which cannot be imported .*\[ray\]", said), said
    assert verify(at) == []


def test_a_path_in_a_table_that_leads_nowhere_is_named(run: Run) -> None:
    """As where a column of texts was named for that of images."""
    parquet.write_table(pyarrow.table({"image": ["photos/0.png", "a red car"]}), "n.parquet")
    code, said = run("n.parquet", "store", "--column", "image")
    assert code == 3
    assert re.search(r"n\.parquet\[1\] cannot be read: No such file or directory \(a red car\)", said), said
    assert verify("store") == []


def everything() -> dict[str, bytes]:
    """What lies in the folder, and what at addresses."""
    here = {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    return here | {name: file.getvalue() for name, file in Shaky.store.items()}


@pytest.mark.slow
def test_buckets_and_credentials_that_are_missing(run: Run, s3: Callable[[], None]) -> None:  # noqa: F811
    """Of sources and of the store, at a server of S3; and a store there is that of a folder."""
    missing = r"s3://bucket/\S* cannot be (read|written): there are no credentials .*set AWS_ACCESS_KEY_ID"
    for words in (("s3://bucket/photos", "store"), ("photos", "s3://bucket/store")):
        code, said = run(*words)
        assert code == 2, said
        assert re.search(missing, said), said
    s3()
    for words, wanted in (
        (("s3://none/photos", "store"), r"s3://none/photos does not exist \(there is no bucket 'none'\)"),
        (("s3://none/*.tar", "store"), r"s3://none/\*\.tar does not exist \(there is no bucket 'none'\)"),
        (("photos", "s3://none/store"), r"cannot be written.*there is no bucket 'none'\): check the address"),
    ):
        code, said = run(*words)
        assert code == 2, said
        assert re.search(wanted, said), said
    assert not Path("store").exists()
    for place in ("store", "s3://bucket/store"):
        assert run("photos", place, "--shard-size", "2")[0] == 0
    assert verify("s3://bucket/store") == []
    at = Address("s3://bucket/store")
    assert {name: (at / name).read_bytes() for name in at.sizes()} == {
        path.name: path.read_bytes() for path in Path("store").iterdir()
    }
