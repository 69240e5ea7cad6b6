"""Every "Show Python" runs as it is copied, and gives what the page gave."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import textured
from demo_server import tiny_export
from PIL import Image

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """With a tiny model, and two pictures beside it."""
    from latentvae.demo import loaded_models, server
    from latentvae.demo.desk import Desk
    from latentvae.demo.guard import Limits

    folder = tmp_path_factory.mktemp("snippets")
    for seed, name in enumerate(("it's a photo.png", "other.png")):
        Image.fromarray(textured(61, 45, seed)).save(folder / name)
    model = tiny_export(folder)
    with pytest.MonkeyPatch.context() as patch, server.workplace():
        patch.setattr(loaded_models, "bundled", list)
        patch.setattr(loaded_models, "_is_faster", lambda *_: False)
        made = Desk(loaded_models.Models([model]), Limits())
        made.folder = folder
        yield made


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def close(found: str | Path, wanted: str | Path) -> bool:
    return bool(np.abs(pixels(found) - pixels(wanted)).max() <= 1)  # rounding to 8 bits


def test_copied_lines_give_what_the_page_gave(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentvae.demo import compress, interpolate, reconstruct, snippets, vary

    photo, other = (str(desk.folder / name) for name in ("it's a photo.png", "other.png"))
    monkeypatch.chdir(desk.folder)

    def both(tab: Any, snippet: Any, *values: Any) -> tuple[Any, ...]:
        lines = snippet(*values)
        assert str(desk.folder) not in lines
        exec(compile(lines, "copied", "exec"), {})  # as it was copied
        result = tab(desk).run(*values)
        return list(result)[-1] if isinstance(result, Iterator) else result

    for latents in ("mode", "sample"):
        values = (photo, "tiny-model", latents, 3)
        *_, picture, _ = both(reconstruct.Reconstruct, snippets.reconstruct, *values)
        assert close("it's a photo.reconstruction.png", picture)
    *_, file = both(compress.Compress, snippets.compress, photo, "tiny-model", 60)
    assert Path("it's a photo.lvae").read_bytes() == Path(file).read_bytes()
    values = (photo, other, "tiny-model", 3, "linear")
    animation, *_ = both(interpolate.Interpolate, snippets.interpolate, *values)
    with Image.open("it's a photo.interpolated.webp") as mine, Image.open(animation) as its:
        assert (mine.n_frames, its.n_frames) == (3, 4)  # the page's goes there and back
        mine.seek(1)
        its.seek(1)
        found = np.asarray(mine.convert("RGB"), dtype=int) - np.asarray(its.convert("RGB"), dtype=int)
        assert np.abs(found).mean() < 2
    pictures, *_ = both(vary.Vary, snippets.vary, photo, "tiny-model", 20.0, 2, 1)
    assert all(close(f"copy {number}.png", file) for number, (file, _) in enumerate(pictures, 1))
