"""Captions beside images: encodings, and names that differ as systems have them."""

import json
import unicodedata
from pathlib import Path

import pytest

from latentvae.base.errors import StoreError
from latentvae.images import captions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    captions.forget()
    for name in ("a.jpg", "b.PNG", "café.png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def caption(image: Path) -> str:
    found, notes = captions.read_caption(image, image.parent)
    assert not notes
    return (found or {}).get("caption", "")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_are_read_in_the_encoding_that_they_state(folder: Path, encoding: str) -> None:
    (folder / "a.txt").write_text("ein Mädchen, 猫\n", encoding=encoding)
    (folder / "b.json").write_text('{"caption": "девочка"}', encoding=encoding)
    assert caption(folder / "a.jpg") == "ein Mädchen, 猫"
    assert caption(folder / "b.PNG") == "девочка"


@pytest.mark.parametrize("text", ["un café crème", "“quoted” naïve"])
def test_western_texts_are_read_and_it_is_said(folder: Path, text: str) -> None:
    (folder / "a.txt").write_bytes(text.encode("windows-1252"))
    assert captions.read_caption(folder / "a.jpg", folder) == (
        {"caption": text},
        [f"caption a.txt {captions.GUESSED}"],
    )


@pytest.mark.parametrize("encoding", ["windows-1251", "utf-16-le", "shift_jis"])
def test_what_could_be_anything_is_left_out_and_said(folder: Path, encoding: str) -> None:
    text = {"windows-1251": "девочка", "utf-16-le": "a girl", "shift_jis": "猫が座っている"}[encoding]
    (folder / "a.txt").write_bytes(text.encode(encoding))
    found, (note,) = captions.read_caption(folder / "a.jpg", folder)
    assert found is None
    assert note.startswith("caption a.txt left out: ")
    assert "save it as UTF-8" in note


def test_names_may_differ_in_case_and_unicode_form(folder: Path) -> None:
    (folder / "A.TXT").write_text("one")
    (folder / "b.Txt").write_text("two")
    (folder / unicodedata.normalize("NFD", "café.txt")).write_text("three")
    assert [caption(folder / name) for name in ("a.jpg", "b.PNG", "café.png")] == ["one", "two", "three"]
    assert captions.unclaimed([folder / name for name in ("a.jpg", "b.PNG", "café.png")], [folder] * 3) == []


def test_the_exact_name_wins_and_no_image_takes_anothers_caption(folder: Path) -> None:
    (folder / "A.jpg").write_bytes(b"")
    if (folder / "A.jpg").samefile(folder / "a.jpg"):
        pytest.skip("this file system does not tell a.jpg from A.jpg")
    (folder / "a.txt").write_text("small")
    assert (caption(folder / "a.jpg"), caption(folder / "A.jpg")) == ("small", "")
    (folder / "A.txt").write_text("large")
    captions.forget()
    assert (caption(folder / "a.jpg"), caption(folder / "A.jpg")) == ("small", "large")
    (folder / "B.txt").write_text("one of two that might be meant")
    (folder / "b.TXT").write_text("own")
    captions.forget()
    assert caption(folder / "b.PNG") == "own"


def write(path: Path, *names: str, encoding: str = "utf-8") -> None:
    lines = [json.dumps({"file_name": name, "text": f"é {name}"}, ensure_ascii=False) for name in names]
    path.write_text("\n".join(lines), encoding=encoding)


def test_lines_of_metadata_name_images_in_any_form(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "c.jpg").write_bytes(b"")
    (folder / "metadata.txt").write_text("about them")
    images = [folder / name for name in ("a.jpg", "b.PNG", "café.png", "sub/c.jpg")]
    names = ["./a.jpg", "B.png", unicodedata.normalize("NFD", "café.png"), "sub\\c.jpg"]
    write(folder / "metadata.jsonl", *names, "gone.jpg")
    for image, name in zip(images, names, strict=True):
        assert captions.read_caption(image, folder) == ({"text": f"é {name}"}, [])
    assert captions.unclaimed(images, [folder] * 4) == [
        f"{folder / 'metadata.jsonl'}: 1 of its lines, the first of 'gone.jpg'",
        str(folder / "metadata.txt"),
    ]


def test_a_line_is_its_own_images_alone(folder: Path) -> None:
    (folder / "A.jpg").write_bytes(b"")
    if (folder / "A.jpg").samefile(folder / "a.jpg"):
        pytest.skip("this file system does not tell a.jpg from A.jpg")
    write(folder / "metadata.jsonl", "./A.jpg")
    assert captions.read_caption(folder / "a.jpg", folder) == (None, [])
    assert captions.read_caption(folder / "A.jpg", folder) == ({"text": "é ./A.jpg"}, [])


def test_metadata_in_other_encodings(folder: Path) -> None:
    write(folder / "metadata.jsonl", "a.jpg", encoding="utf-16")
    assert captions.read_caption(folder / "a.jpg", folder) == ({"text": "é a.jpg"}, [])
    captions.forget()
    write(folder / "metadata.jsonl", "a.jpg", encoding="windows-1252")
    assert captions.read_caption(folder / "a.jpg", folder) == (
        {"text": "é a.jpg"},
        [f"caption metadata.jsonl {captions.GUESSED}"],
    )
    captions.forget()
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "\x81"}')
    with pytest.raises(StoreError, match="save it as UTF-8"):
        captions.read_caption(folder / "a.jpg", folder)
