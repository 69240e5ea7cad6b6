"""Files and folders are written whole or not at all, and never over what is somebody else's."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from latentvae.base.errors import ImageError, LatentVAEError, StoreError
from latentvae.base.files import (
    check_file,
    check_folder,
    make_folder,
    partial_path,
    put_in_place,
    staged_file,
    whole_file,
    whole_folder,
)


def fail(writing: AbstractContextManager[Path], failure: BaseException) -> None:
    with writing as partial:
        (partial / "half" if partial.is_dir() else partial).write_text("half")
        raise failure


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_fails_halfway_leaves_what_was_there(
    tmp_path: Path, failure: BaseException, durable: bool
) -> None:
    path = tmp_path / "a{b}.txt"  # braces are for templates, not for paths
    path.write_text("old")
    with pytest.raises((ImageError, KeyboardInterrupt), match=r"a\{b\}.txt: No space left on device$|^$"):
        fail(whole_file(path, ImageError, "{path}: {reason}", durable=durable), failure)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a{b}.txt", "old")]
    with whole_file(path, durable=durable) as partial:
        partial.write_text("new")
        partial.chmod(0o600)  # as safetensors leaves it
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a{b}.txt", "new")]
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_names_as_long_as_a_system_takes_can_be_written(tmp_path: Path) -> None:
    with whole_file(tmp_path / ("x" * 251 + ".png")) as partial:
        partial.write_text("picture")
    assert [len(one.name) for one in tmp_path.iterdir()] == [255]


def test_a_staged_file_waits_for_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with staged_file(path, StoreError) as partial:
        partial.write_text("whole")
    assert partial == partial_path(path)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [(".file.partial", "whole")]


def test_what_a_kill_left_of_a_durable_file_lends_it_no_permissions(tmp_path: Path) -> None:
    path = tmp_path / "file"
    partial_path(path).write_text("half")
    partial_path(path).chmod(0o400)
    with whole_file(path, durable=True) as partial:
        partial.write_text("whole")
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_permissions_are_left_alone_where_they_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some mounts refuse every change of them."""

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    with whole_file(tmp_path / "file") as partial:
        partial.write_text("whole")
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "model.safetensors").touch()
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["file", "folder", "model.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few people make links")
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    with whole_file(link) as partial:
        partial.write_text("new")
    assert (real.read_text(), link.read_text(), link.is_symlink()) == ("old", "new", False)


def test_a_kill_between_two_renames_costs_no_folder(tmp_path: Path) -> None:
    final, old = tmp_path / "folder", tmp_path / ".folder.old"
    old.mkdir()
    (old / "earlier").touch()
    with pytest.raises(FileNotFoundError):  # the next run fails too
        put_in_place(tmp_path / "nothing", final)
    assert [one.name for one in final.iterdir()] == ["earlier"]
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "new").touch()
    put_in_place(tmp_path / "partial", final)
    assert [one.name for one in tmp_path.rglob("*")] == ["folder", "new"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for text in ("old", "new"):
        with whole_folder(folder) as partial:
            (partial / text).touch()
    with pytest.raises(StoreError, match="cannot be written"):
        fail(whole_folder(folder, StoreError), OSError(5, "Input/output error"))
    assert [one.name for one in tmp_path.rglob("*")] == ["folder", "new"]


def test_what_is_somebody_elses_is_refused(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    check_file(file)
    check_folder(folder, "prior")
    file.touch()
    folder.mkdir()
    check_file(file, overwrite=True)
    check_file(file, "table", lambda path: path == file)
    check_folder(folder, "prior", "prior.json")
    with pytest.raises(ImageError, match="file is already there"):
        check_file(file, error=ImageError)
    with pytest.raises(LatentVAEError, match="is no table"):
        check_file(file, "table", lambda path: False)
    with pytest.raises(LatentVAEError, match="wanted the name of a file"):
        check_file(folder, overwrite=True)
    with pytest.raises(LatentVAEError, match="wanted a folder to write the prior to"):
        check_folder(file, "prior")
    (folder / "b").touch()
    with pytest.raises(LatentVAEError, match=r"no earlier prior\. Choose another --output\.$"):
        check_folder(folder, "prior", "prior.json", instead="Choose another --output")
    with pytest.raises(LatentVAEError, match="holds other things, such as b,"):
        check_folder(folder, "prior", only=["a"])
    with pytest.raises(LatentVAEError, match="'b' beside an earlier prior"):
        check_folder(folder, "prior", "b", only=["a"])
    check_folder(folder, "prior", "b", only=["b"])
    with pytest.raises(LatentVAEError, match="holds an earlier prior"):
        check_folder(folder, "prior", "b", overwrite=False)


def test_threads_make_one_folder_at_once(tmp_path: Path) -> None:
    """As pictures that are decoded side by side do: none finds the other's trial gone."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: make_folder(tmp_path / "a"), range(2000)))
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_folder_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot be written to \(Not a directory\)"):
        make_folder(tmp_path / "file" / "b", StoreError)
