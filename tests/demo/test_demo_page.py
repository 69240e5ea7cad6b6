"""What the page does besides endpoints: errors in their panel, copies of large pictures, models in turn."""

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import textured
from PIL import Image

import latentvae
from latentvae.base.errors import ImageError, LatentVAEError, ModelError

pytest.importorskip("gradio")


def test_the_page_remembers_its_inputs_only_when_all_of_it_was_shown() -> None:
    from latentvae.demo.on_page import on_page

    def run(photo: str, broken: bool) -> Iterator[tuple[str, str | None]]:
        yield "the picture", None
        if broken:
            raise LatentVAEError("disk full: delete something.")
        yield "the picture", "the figures"

    live = on_page(run, 2, [None, ""])
    part, whole = live(None, "a.png", False)
    assert not isinstance(part[0], str)
    assert (part[3:], whole[3:]) == (("the picture", None), ("the picture", "the figures"))
    (again,) = live(whole[0], "a.png", False)
    assert "the picture" not in again
    (pressed,) = list(on_page(run, 2, [None, ""], always=True)(whole[0], "a.png", False))[1:]
    assert "the figures" in pressed


def test_an_error_is_said_once_and_takes_the_figures_with_it() -> None:
    from latentvae.demo.on_page import on_page

    asked = []

    def run(photo: str) -> tuple[str, str]:
        asked.append(photo)
        raise LatentVAEError("that is <no> picture: choose another.")

    live = on_page(run, 1, [None, ""])
    ((seen, message, full, *results),) = live(None, "bad.png")
    assert message.value == '<p role="alert">That is &lt;no&gt; picture: choose another.</p>'
    assert message.visible
    assert not full.visible
    assert results == [None, ""]  # the picture's before
    ((_, twice, *_),) = live(seen, "bad.png")  # browsers report an upload twice
    assert asked == ["bad.png"]
    assert not hasattr(twice, "visible")
    ((_, none, _, *cleared),) = live(seen, None)
    assert (none.visible, cleared, asked) == (False, [None, ""], ["bad.png"])


def test_examples_are_small_pictures_of_several_kinds() -> None:
    from latentvae.demo.desk import EXAMPLES

    assert 6 <= len(EXAMPLES) <= 8
    assert sum(path.stat().st_size for path in EXAMPLES.values()) < 600_000
    for path in EXAMPLES.values():
        channels, height, width = latentvae.load_image(path).shape
        assert channels == 3
        assert 256 <= max(height, width) <= 512
    said = (EXAMPLES["Cat"].parent / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in said for path in EXAMPLES.values())


def test_a_phones_photograph_is_worked_on_as_a_copy(model: Path, tmp_path: Path) -> None:
    from latentvae.demo import loaded_models, server
    from latentvae.demo.desk import Desk
    from latentvae.demo.guard import Limits

    large = tmp_path / "IMG_1.jpg"
    Image.new("RGB", (400, 300)).save(large, exif=Image.Exif())
    with pytest.MonkeyPatch.context() as patch, server.workplace():
        patch.setattr(loaded_models, "bundled", list)
        models = loaded_models.Models([model])
        desk = Desk(models, Limits(pixels=50_000, photo_pixels=120_000, copy_pixels=30_000))
        copy = desk.copied(str(large))
        assert copy.path is not None
        with Image.open(copy.path) as found:
            assert found.size == (200, 150)
        assert Path(copy.path).stem == "IMG_1"
        assert "400 x 300" in copy.words
        assert "200 x 150" in copy.words
        assert copy.larger == 0  # more than this server takes
        assert "too large" in copy.words
        assert desk.copied(str(large)).path == copy.path
        Path(copy.path).unlink()  # swept
        again = desk.copied(str(large)).path
        assert again is not None
        assert Path(again).is_file()
        roomy = Desk(models, Limits(pixels=120_000, copy_pixels=30_000)).copied(str(large))
        assert roomy.larger == pytest.approx(4)
        assert desk.copied(roomy.path).path == roomy.path  # small enough already
        assert desk.read_small(str(large)).image.shape[-1] <= 384
        with pytest.raises(ImageError, match="at most 50000") as caught:
            desk.read(str(large))
        assert "max_pixels" not in str(caught.value)  # which a visitor cannot raise


def test_the_page_shows_the_lines_of_its_result() -> None:
    from latentvae.demo.on_page import on_page

    def lines(photo: str, side: int) -> str:
        return f"load({photo!r}, {side})"

    live = on_page(lambda photo: (photo,), 1, [None], snippets=[lines])
    ((_, _, _, *shown),) = live(None, "a.png")
    assert shown == ["load('a.png', 0)", "a.png"]
    ((_, _, _, *cleared),) = live(None, None)
    assert cleared == ["", None]


def test_without_a_picture_the_handler_says_so_not_its_lines() -> None:
    from latentvae.demo.on_page import on_page

    def run(photo: str | None) -> tuple[str]:
        raise LatentVAEError("there is no picture yet: upload one.")

    ((_, message, *_),) = on_page(run, 1, [None], always=True, snippets=[lambda photo: Path(photo).name])(
        None, None
    )
    assert "There is no picture yet" in message.value


def test_the_page_shows_copies_and_offers_full_size() -> None:
    from latentvae.demo.on_page import Copied, on_page

    def run(photo: str) -> tuple[str]:
        return (photo,)

    def shrink(values: list[Any]) -> Copied:
        values[0] = "copy.png"
        return Copied("copy.png", "a copy.", 1e7)

    ((_, message, full, photo),) = on_page(run, 1, [None], shrink=shrink)(None, "large.jpg")
    assert photo == "copy.png"
    assert message.value == '<p role="status">a copy.</p>'
    assert full.visible
    assert re.fullmatch(r"Full size, about \d+ (s|minutes)", full.value)
    ((_, message, full, photo),) = on_page(run, 1, [None], always=True)(None, "large.jpg")
    assert (photo, message.visible, full.visible) == ("large.jpg", False, False)


def test_models_named_at_the_start_load_first_and_precisions_are_chosen_when_the_page_is_up(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentvae.demo import loaded_models, one_model

    said: list[str] = []
    with pytest.raises(ModelError, match="nowhere"):
        loaded_models.Models(["nowhere"], say=said.append)
    assert said == ["loading nowhere"]  # and none of the bundled ones before it
    tried = []
    monkeypatch.setattr(loaded_models, "bundled", list)
    monkeypatch.setattr(one_model, "_is_faster", lambda swift, *_: tried.append(swift.dtype) or True)
    models = loaded_models.Models([model, model])
    assert tried == []
    assert "pictures in" not in models.summary("tiny-model")
    with models.use("tiny-model") as chosen:
        assert chosen.swift is chosen.exact  # whoever comes first does not wait for a trial
    models.warm_up()
    models.warm_up()
    assert tried == [torch.bfloat16] * 2  # each once
    with models.use("tiny-model") as chosen:
        assert chosen.swift.dtype == torch.bfloat16
    assert "pictures in bf16" in models.summary("tiny-model")


def test_bundled_models_load_once_when_they_are_first_needed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentvae.demo import loaded_models
    from latentvae.models import shipped

    monkeypatch.setattr(shipped, "WEIGHTS_DIR", model.parent)
    said: list[str] = []
    models = loaded_models.Models(say=said.append)
    assert (models.names, models.loaded, said) == (["tiny-model"], False, [])
    threads = [threading.Thread(target=models.ready) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (models.loaded, said) == (True, ["loading tiny-model"])
    with models.use("tiny-model") as chosen:
        assert chosen.channels == 3


def test_the_scale_of_error_maps_is_that_of_what_draws_them() -> None:
    from latentvae.demo import reconstruct
    from latentvae.images import drawing

    assert reconstruct.ERROR_WHITE == drawing.ERROR_WHITE


def test_a_preview_comes_before_what_is_waited_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentvae.demo import loaded_models, reconstruct, server
    from latentvae.demo.desk import Desk
    from latentvae.demo.guard import Limits

    monkeypatch.setattr(loaded_models, "bundled", list)
    monkeypatch.setattr(reconstruct, "PREVIEW_ABOVE", 48 * 64)
    monkeypatch.setattr(reconstruct, "PREVIEW_SIDE", 32)
    with server.workplace() as files:
        tab = reconstruct.Reconstruct(Desk(loaded_models.Models([model]), Limits(copy_pixels=64 * 64)))

        def widths(width: int, height: int) -> list[int]:
            """Of the pictures that come, one after the other."""
            Image.fromarray(textured(width, height, 1)).save(files / "a.png")
            parts = list(tab.recall(str(files / "a.png"), "tiny-model"))
            assert all(None in part for part in parts[:-1])
            return [Image.open(part[0][1]).width for part in parts]

        assert widths(64, 48) == [32, 64, 64]
        assert widths(60, 48) == [60, 60]
        assert widths(64, 72) == [64, 64]  # full size, before which there was a better one


def test_the_example_is_computed_once_for_all(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentvae.demo import loaded_models, server
    from latentvae.demo.desk import Desk
    from latentvae.demo.guard import Limits
    from latentvae.demo.reconstruct import Reconstruct

    monkeypatch.setattr(loaded_models, "bundled", list)
    with server.workplace() as files:
        tab = Reconstruct(Desk(loaded_models.Models([model]), Limits()))
        runs = []
        made = files / "made.png"

        def run(*values: Any) -> Iterator[tuple[Any, ...]]:
            runs.append(values)
            made.write_bytes(b"")
            yield ((str(made), str(made)), None, None, "", None, None, None)
            yield ((str(made), str(made)), str(made), [(str(made), "")], "", {}, str(made), str(made))

        monkeypatch.setattr(tab, "run", run)
        tab._example = "example.png"
        first = list(tab.recall("example.png", "tiny-model"))
        assert len(first) == 1
        os.utime(made, (1, 1))
        assert list(tab.recall("example.png", "tiny-model")) == first
        assert made.stat().st_mtime > 1  # so that the sweeper leaves it
        assert len(runs) == 1
        made.unlink()
        list(tab.recall("example.png", "tiny-model"))
        assert len(runs) == 2
        assert len(list(tab.recall("other.png", "tiny-model"))) == 2
