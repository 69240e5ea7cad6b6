"""Where the drawn pictures put what, and what their colours mean."""

from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from latentvae.base.errors import ImageError
from latentvae.images import drawing
from latentvae.images.drawing import colour_error, comparison, error_map, grid, sheet
from latentvae.images.saving import to_pil
from latentvae.images.tensors import from_uint8

FIGURES = {"PSNR": "27.41 dB", "SSIM": "0.872", "LPIPS (alex)": "0.041", "rate": "0.31 bpp (KL bound)"}
RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(height: int, width: int, colour: tuple[int, ...]) -> torch.Tensor:
    return from_uint8(torch.tensor(colour, dtype=torch.uint8).reshape(-1, 1, 1).repeat(1, height, width))


def box_of(picture: Image.Image, colour: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a colour, which must fill its box."""
    same = (np.asarray(picture) == colour).all(-1)
    rows, columns = np.flatnonzero(same.any(1)), np.flatnonzero(same.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert same[box[1] : box[3], box[0] : box[2]].all()
    return tuple(map(int, box))


@pytest.fixture
def written(monkeypatch) -> list[tuple[str, tuple[float, ...]]]:
    """Every text that is drawn, with its box; drawing outside of the canvas fails at once."""
    texts = []
    draw_text = ImageDraw.ImageDraw.text

    def text(self, place, words, *, font, anchor, fill):
        box = self.textbbox(place, words, font=font, anchor=anchor)
        width, height = self.im.size
        assert box[0] >= 0, words
        assert box[1] >= 0, words
        assert box[2] <= width, words
        assert box[3] <= height, words
        texts.append((words, box))
        draw_text(self, place, words, font=font, anchor=anchor, fill=fill)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def words(written) -> list[str]:
    return [one for one, _ in written]


@pytest.mark.parametrize("size", [(512, 768), (768, 512), (321, 481), (1200, 1200)])
def test_three_panels_of_the_same_size_stand_side_by_side(size):
    picture = comparison(plain(*size, RED), plain(*size, BLUE), FIGURES, "a.png")
    left, middle = box_of(picture, RED), box_of(picture, BLUE)
    assert (left[3] - left[1], left[2] - left[0]) == size
    assert (middle[3] - middle[1], middle[2] - middle[0]) == size
    assert left[1] == middle[1]
    gap = middle[0] - left[2]
    assert 0 < gap < size[1] // 8
    assert picture.width == left[0] + 3 * size[1] + 2 * gap + left[0]  # margins are equal


def test_the_third_panel_is_the_error_on_a_fixed_scale():
    original = plain(400, 600, (100, 100, 100))
    worse = original.clone()
    worse[:, :200] += 16 / 127.5  # the upper half by 16 of 255
    picture = comparison(original, worse, {}, "a.png")
    middle = tuple(int(v) for v in colour_error(np.array([[16.0]]))[0, 0])
    assert middle == (181, 54, 122)
    same = (np.asarray(picture) == middle).all(-1)
    left, width = box_of_panel(same), 600
    assert same[left[1] : left[1] + 200, left[0] : left[0] + width].all()
    below = np.asarray(picture)[left[1] + 200 : left[1] + 400, left[0] : left[0] + width]
    assert (below == (0, 0, 4)).all()


def box_of_panel(same: np.ndarray) -> tuple[int, int]:
    """Left and top of the rows that are nearly full of a colour: the colour bar has it too, but is small."""
    rows = np.flatnonzero(same.sum(1) > 300)
    columns = np.flatnonzero(same.sum(0) > 150)
    return int(columns[0]), int(rows[0])


def test_error_is_the_mean_over_channels_of_8_bit_values_and_32_is_white():
    error = error_map(to_pil(plain(2, 3, (0, 100, 200))), to_pil(plain(2, 3, (6, 88, 200))))
    assert error.shape == (2, 3)
    assert error.tolist() == [[6.0] * 3] * 2
    drawn = colour_error(np.array([[0.0, 32, 255, 8]]))
    assert drawn[0].tolist() == [[0, 0, 4], [255, 255, 255], [255, 255, 255], [79, 18, 123]]
    brightness = colour_error(np.linspace(0, 32, 65)[None]).astype(int)[0] @ (299, 587, 114)
    assert (np.diff(brightness) > 0).all()  # a larger error is always brighter


def test_a_tiny_image_is_enlarged_by_whole_pixels_and_says_so(written):
    samples = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    samples[:, 0, 0] = torch.tensor(RED)
    image = from_uint8(samples)
    picture = np.asarray(comparison(image, image, FIGURES, "tiny.png"))
    left, top = box_of(Image.fromarray(picture[:, : picture.shape[1] // 3]), RED)[:2]
    shown = picture[top : top + 320, left : left + 320].reshape(8, 40, 8, 40, 3)
    assert (shown == samples.permute(1, 2, 0).numpy()[:, None, :, None]).all()
    assert "8 x 8 px, shown x 40" in words(written)


@pytest.mark.parametrize(("size", "shown", "caption"), [
    ((2400, 3400), (847, 1200), "3400 x 2400 px, shown at 35.3 %"),
    ((3000, 1000), (1200, 400), "1000 x 3000 px, shown at 40 %"),
])  # fmt: skip
def test_a_huge_image_is_shrunk_and_says_by_how_much(written, size, shown, caption):
    image = plain(*size, RED)
    picture = comparison(image, image, FIGURES, "huge.png")
    assert caption in words(written)
    left, top, right, bottom = box_of(picture.crop((0, 0, picture.width // 3, picture.height)), RED)
    assert (bottom - top, right - left) == shown


def test_error_is_averaged_before_it_is_coloured():
    original, worse = plain(2400, 2400, (100,)), plain(2400, 2400, (100,))
    worse[:, ::2] += 32 / 127.5  # every other row: 32 and 0 average to 16
    picture = np.asarray(comparison(original, worse, {}, "a.png"))
    assert ((picture == (181, 54, 122)).all(-1).sum()) >= 1200 * 1200


@pytest.mark.parametrize("size", [(8, 8), (60, 20), (20, 600), (600, 20), (512, 768), (1500, 1500)])
@pytest.mark.parametrize("count", [0, 1, 4, 17])
def test_no_text_touches_another_or_the_panels(written, size, count):
    figures = {f"figure {i}": "1.234 dB" for i in range(count)}
    picture = comparison(plain(*size, RED), plain(*size, RED), figures, "Großes Foto, " * 40 + ".png")
    assert len(written) == 1 + 2 * 3 + 2 * count
    panel = box_of(picture.crop((0, 0, picture.width // 3, picture.height)), RED)
    assert all(box[3] <= panel[1] for _, box in written[:7])  # title and captions
    assert all(box[1] >= panel[3] for _, box in written[7:])
    for (_, a), (_, b) in combinations([one for one in written if one[0]], 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_captions_start_at_the_left_edge_of_their_panels(written):
    picture = comparison(plain(300, 500, RED), plain(300, 500, BLUE), FIGURES, "a.png")
    places = dict(written)
    assert abs(places["Original"][0] - box_of(picture, RED)[0]) <= 3  # glyphs have a bearing
    assert abs(places["Reconstruction"][0] - box_of(picture, BLUE)[0]) <= 3
    assert places["Error"][0] > box_of(picture, BLUE)[2]
    assert "mean of channels, black = 0, white = 32/255" in places
    assert set(FIGURES) | set(FIGURES.values()) <= set(places)


def test_a_long_title_loses_its_middle(written):
    name = "beginning" + "x" * 500 + "end.png"
    comparison(plain(8, 8, RED), plain(8, 8, RED), {}, name)
    title = next(one for one in words(written) if one.startswith("beginning"))
    assert title.endswith("end.png")
    assert "…" in title
    assert len(title) < 200


def test_letters_that_no_font_has_become_plain_and_never_a_box(written, monkeypatch):
    monkeypatch.setattr(drawing, "SYSTEM_FONTS", ())
    comparison(plain(8, 8, RED), plain(8, 8, RED), {}, "Café\n 日本\udcff.png")
    assert "Cafe ???.png" in words(written)


def test_comparison_refuses_other_shapes_and_nan():
    with pytest.raises(
        ImageError, match=r"\(3, 8, 8\), the reconstruction \(3, 8, 16\): crop the padding off"
    ):
        comparison(plain(8, 8, RED), plain(8, 16, RED), {}, "a")
    with pytest.raises(ImageError, match="NaN"):
        comparison(plain(8, 8, RED), plain(8, 8, RED) * float("nan"), {}, "a")


def test_grid_places_every_image_under_its_title(written):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 250, (2, 3, 3, 130, 150), generator=generator, dtype=torch.uint8)
    picture = np.asarray(grid([list(from_uint8(row)) for row in samples], ["original", "mode", "EMA"]))
    top = picture.shape[0] - 24 - 2 * 130 - 8
    for i, row in enumerate(samples):
        for j, image in enumerate(row):
            y, x = top + i * (130 + 8), 24 + j * (150 + 8)
            assert (picture[y : y + 130, x : x + 150] == image.permute(1, 2, 0).numpy()).all()
    assert picture.shape[1] == 2 * 24 + 3 * 150 + 2 * 8
    assert (picture[:, 24 + 150 : 24 + 150 + 8] == 255).all()
    for j, (title, box) in enumerate(written):
        assert title == ("original", "mode", "EMA")[j]
        assert abs(box[0] - (24 + j * 158)) <= 3
        assert box[3] <= top


def test_a_sheet_is_about_as_wide_as_high_and_white_where_no_image_is_left():
    picture = sheet([plain(128, 128, RED)] * 5)
    assert picture.width == 24 + 3 * 128 + 2 * 8 + 24
    pixels = np.asarray(picture)
    assert (pixels == RED).all(-1).sum() == 5 * 128 * 128
    assert (pixels[picture.height - 24 - 128 :, 24 + 2 * 136 :] == 255).all()


def test_grid_enlarges_small_cells_and_shrinks_large_ones():
    small, large = plain(32, 32, RED), plain(1024, 2048, BLUE)
    picture = grid([[small, large], [small, large]], ["a", "b"])
    assert picture.width == 24 + 128 + 8 + 512 + 24
    assert box_of(picture.crop((0, 0, 160, 250)), RED)[2] == 24 + 128
    with pytest.raises(ImageError, match=r"rows of \[2, 1\] images came for 2 column titles"):
        grid([[small, small], [small]], ["a", "b"])
    with pytest.raises(ImageError, match="rows of"):
        grid([], [])
