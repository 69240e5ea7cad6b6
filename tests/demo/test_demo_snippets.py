"""Every "Show Python" runs as it is copied, and gives what the page gave."""

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import textured
from demo_server import tiny_export, tiny_peer
from PIL import Image

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """With a tiny model, and two pictures beside it."""
    from latentvae.demo import loaded_models, one_model, server
    from latentvae.demo.desk import Desk
    from latentvae.demo.guard import Limits

    folder = tmp_path_factory.mktemp("snippets")
    for seed, name in enumerate(("it's a photo.png", "other.png")):
        Image.fromarray(textured(61, 45, seed)).save(folder / name)
    model, peer = tiny_export(folder), tiny_peer(folder)
    with pytest.MonkeyPatch.context() as patch, server.workplace():
        patch.setattr(loaded_models, "bundled", list)
        patch.setattr(one_model, "_is_faster", lambda *_: False)
        made = Desk(loaded_models.Models([model, peer]), Limits())
        made.folder = folder
        yield made


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def close(found: str | Path, wanted: str | Path) -> bool:
    return bool(np.abs(pixels(found) - pixels(wanted)).max() <= 1)  # rounding to 8 bits


def test_copied_lines_give_what_the_page_gave(
    desk: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentvae.codec import rivals
    from latentvae.demo import compare, compress, fill, interpolate, odd, reconstruct, sample, snippets, vary

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
    codecs = [*rivals.WITHIN]
    for against in ([".lvae", *codecs, "tiny-model", "tiny-peer"], ["tiny-peer"]):
        capsys.readouterr()
        view, rows, *_ = both(compare.Compare, snippets.compare, photo, "tiny-model", against, 60)
        said = capsys.readouterr().out
        shown = dict(re.findall(r'<img alt="([^"]+)" draggable="false" src="gradio_api/file=([^"]+)"', view))
        for row in rows:
            assert f"{row['name']}: {row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}\n" in said
            written = f"{row['name']}: {row['bytes']} bytes, {row['how'].removesuffix(', its smallest')}\n"
            assert row["name"] not in codecs or written in said
            assert close(f"it's a photo.{row['name'].strip('.')}.png", unquote(shown[row["name"]]))
    values = (photo, other, "tiny-model", 3, "linear")
    animation, *_ = both(interpolate.Interpolate, snippets.interpolate, *values)
    with Image.open("it's a photo.interpolated.webp") as mine, Image.open(animation) as its:
        assert (mine.n_frames, its.n_frames) == (3, 4)  # the page's goes there and back
        mine.seek(1)
        its.seek(1)
        found = np.asarray(mine.convert("RGB"), dtype=int) - np.asarray(its.convert("RGB"), dtype=int)
        assert np.abs(found).mean() < 2
    photos = [(photo, None), (other, None)] * 3
    for prior in ("gaussian", "standard"):
        pictures, _ = both(sample.Sample, snippets.sample, photos, "tiny-model", prior, "64", 2, 1)
        assert all(close(f"draw {number}.png", file) for number, (file, _) in enumerate(pictures, 1))
    capsys.readouterr()
    *_, facts = both(odd.FindOdd, snippets.odd, photos, "tiny-model")
    scores = [line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines()]
    found = sorted((name, pytest.approx(float(score), abs=1e-3)) for name, score in scores)
    assert sorted((row["name"], row["score"]) for row in facts["images"]) == found
    white = np.zeros((45, 61), dtype=np.uint8)
    white[10:30, 20:30] = 255
    Image.fromarray(white).save("white.png")
    mask = f"data:image/png;base64,{base64.b64encode(Path('white.png').read_bytes()).decode()}"
    values = (photo, mask, "tiny-model", "project")
    *_, picture, kept = fill.FillIn(desk).run(*values)
    shutil.copy(kept, "it's a photo.mask.png")  # as it is downloaded
    exec(snippets.fill(*values), {})
    assert close("it's a photo.filled.png", picture)
    pictures, *_ = both(vary.Vary, snippets.vary, photo, "tiny-model", 20.0, 2, 1)
    assert all(close(f"copy {number}.png", file) for number, (file, _) in enumerate(pictures, 1))


def test_lines_name_the_copy_that_the_page_took(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentvae.demo import reconstruct, snippets
    from latentvae.demo.guard import Limits

    monkeypatch.chdir(desk.folder)
    monkeypatch.setattr(desk, "limits", Limits(copy_pixels=1500))
    photo = str(desk.folder / "other.png")
    copy = desk.copied(photo)
    exec(snippets.reconstruct(photo, "tiny-model", "mode", 0, side=copy.side), {})
    *_, (*_, picture, _) = reconstruct.Reconstruct(desk).run(copy.path, "tiny-model")
    assert pixels(picture).shape[0] < 45
    assert np.abs(pixels("other.reconstruction.png") - pixels(picture)).mean() < 1  # the copy has 8 bits
