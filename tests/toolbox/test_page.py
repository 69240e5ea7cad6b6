"""The map as a page and as pictures: what is in the file, hostile names, and a browser that opens it."""

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentvae.base.errors import LatentVAEError
from latentvae.toolbox.atlas.page import FIRST, Card, colours, natural, picture_side, shrink, write_page
from latentvae.toolbox.atlas.scatter import draw_pictures, draw_scatter

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>&@DATA@.png"
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def cards(count: int = 12, picture: bool = True) -> list[Card]:
    """Images on a circle, each of one colour, every third without a label."""
    made = []
    for number in range(count):
        angle = 2 * np.pi * number / count
        colour = tuple(int(127 + 120 * np.cos(angle + shift)) for shift in (0, 2, 4))
        label = ("", "cat", "dog")[number % 3]
        drawn = Image.new("RGB", (64, 48), colour) if picture else None
        point = (float(np.cos(angle)), float(np.sin(angle)))
        near = [(number + 1) % count, (number - 1) % count]
        made.append(Card(f"photos/{number}.png", label, number % 2, point, drawn, near))
    return made


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    content: dict[str, Any] = json.loads(found[1])
    return content


def test_page_holds_keys_labels_clusters_and_points() -> None:
    some = cards()
    found = data_of(write_page(some, "Twelve", "by hand", [("NMI", "0.5", "0.4")]))
    assert found["title"] == "Twelve"
    assert found["figures"] == [["NMI", "0.5", "0.4"]]
    assert found["keys"] == [card.key for card in some]
    assert found["near"] == [list(card.neighbours) for card in some]
    label, cluster = found["groups"]["label"], found["groups"]["cluster"]
    assert [label["names"][number] for number in label["of"]] == [card.label or "no label" for card in some]
    assert label["counts"] == [4, 4, 4]
    assert label["colours"][:2] == list(FIRST[:2])
    assert label["colours"][2] is None
    assert cluster["of"] == [card.cluster for card in some]
    points = np.array([found["x"], found["y"]]).T
    assert points == pytest.approx(np.array([card.point for card in some]) / 2, abs=1e-5)
    assert found["span"] == pytest.approx([1, 1])


def test_pictures_are_in_the_file_at_the_places_it_says() -> None:
    some = cards()
    some[5] = Card("none", "", 0, (0, 0), None)
    found = data_of(write_page(some, "Twelve"))
    cells, (sheet,) = found["cells"], found["sheets"]
    assert sheet.startswith("data:image/webp;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(sheet.partition(",")[2])))
    assert found["sizes"] == [[0, 0] if number == 5 else [64, 48] for number in range(12)]
    for number, card in enumerate(some):
        if card.picture is not None:
            column, row = number % cells["columns"], number // cells["columns"]
            seen = image.getpixel((cells["side"] * column + 32, cells["side"] * row + 24))
            assert np.abs(np.subtract(seen, card.picture.getpixel((0, 0)))).max() <= 4


def test_many_pictures_take_several_sheets_and_less_room_each() -> None:
    some = [Card(str(number), "", 0, (number, 0), Image.new("RGB", (300, 200))) for number in range(450)]
    found = data_of(write_page(some, "many"))
    assert set(map(tuple, found["sizes"])) == {(96, 64)}
    assert found["cells"] == {"side": 96, "columns": 21, "per_sheet": 441}
    assert len(found["sheets"]) == 2
    sides = [picture_side(count) for count in (400, 401, 2001, 10_001)]
    assert sides == [192, 96, 64, 32]
    assert shrink(Image.new("L", (8, 8)), 96).size == (8, 8)  # never enlarged


def test_names_are_never_markup_and_nothing_comes_from_elsewhere() -> None:
    some = [*cards(3), Card(HOSTILE, HOSTILE, 0, (0, 0), None), Card("bad\udcff", "", 0, (1, 1), None)]
    page = write_page(some, HOSTILE, HOSTILE)
    plain = write_page(cards(3), "plain")
    for tag in ("<script", "</script", "<img", "<"):
        assert page.count(tag) == plain.count(tag), tag
    found = data_of(page)
    assert HOSTILE in found["keys"]
    assert found["title"] == HOSTILE
    page.encode("utf-8")
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page


def test_a_page_of_nothing_or_of_points_that_are_not_finite_is_refused() -> None:
    for wrong in ([], [Card("a", "", 0, (0, float("nan")), None)]):
        with pytest.raises(LatentVAEError, match="a page needs"):
            write_page(wrong, "x")


def test_labels_are_in_the_order_people_count() -> None:
    assert sorted(["10", "2", "b", "1a", "²", ""], key=natural) == ["", "1a", "2", "10", "b", "²"]


def test_colours_differ_and_stay_the_same() -> None:
    many = colours(40)
    assert len(set(many)) == 40
    assert all(re.fullmatch("#[0-9a-f]{6}", each) for each in many)
    assert colours(3) == many[:3]


def test_scatter_shows_every_group_in_its_colour() -> None:
    drawn = np.asarray(draw_scatter(cards(), r"a $\bad$ title", ("x", "y")))
    for colour in (*FIRST[:2], "#b5bac0"):
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(drawn.astype(int) - wanted).max(-1) <= 2).sum() > 100


def test_pictures_are_drawn_at_their_places_and_none_covers_another() -> None:
    some = cards()
    drawn = draw_pictures(some)
    assert drawn is not None
    pixels = np.asarray(drawn).astype(int)
    for card in some:
        assert card.picture is not None
        wanted = card.picture.getpixel((0, 0))
        rows, columns = np.nonzero((pixels == wanted).all(-1))
        assert len(rows) >= 64 * 48
        # y goes up in the map, down in a picture
        assert np.sign(np.round(columns.mean() - drawn.width / 2, -1)) == np.sign(np.round(card.point[0], 3))
        assert np.sign(np.round(drawn.height / 2 - rows.mean(), -1)) == np.sign(np.round(card.point[1], 3))
    close = [Card(card.key, "", 0, (number / 100, 0), card.picture) for number, card in enumerate(some)]
    crowded = draw_pictures([*close, Card("far", "", 0, (9, 0), None)])
    assert crowded is not None
    seen = [
        (np.asarray(crowded) == card.picture.getpixel((0, 0))).all(-1).sum() for card in some if card.picture
    ]
    assert seen == [128 * 96] + [0] * 11  # the first, enlarged twice; the others are dots
    assert draw_pictures(cards(picture=False)) is None


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium. Where the environment says CI, a missing one is a failure, not a skip."""
    api = pytest.importorskip("playwright.sync_api") if os.environ.get("CI") != "true" else None
    if api is None:
        import playwright.sync_api as api
    with api.sync_playwright() as play:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            found = play.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        except api.Error as error:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield found
        found.close()


def open_page(browser: Any, place: Path, some: list[Card], **options: Any) -> tuple[Any, list[str]]:
    """The page in a browser, and the list that its errors and requests go to."""
    place.write_text(write_page(some, HOSTILE, "about", [("NMI", "0.5", "0.4")]), encoding="utf-8")
    page = browser.new_page(**options)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request", lambda each: None if each.url.startswith(("data:", "file:")) else wrong.append(each.url)
    )
    page.goto(place.as_uri())
    wait(page, "sheets.every((sheet) => sheet.complete) && !queued")
    return page, wrong


def wait(page: Any, condition: str) -> None:
    """Until it holds. (Playwright's own waiting evaluates text in the page, which its policy forbids.)"""
    for _ in range(500):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"{condition} never came true")


def spot(page: Any, index: int) -> tuple[float, float]:
    x, y = page.evaluate(f"place({index})")
    box = page.locator("#plot").bounding_box()
    return box["x"] + x, box["y"] + y


@pytest.mark.slow
def test_hovering_shows_the_image_its_name_label_and_cluster(browser: Any, tmp_path: Path) -> None:
    some = [*cards(), Card(HOSTILE, "", 0, (0.0, 0.0), None)]
    page, wrong = open_page(browser, tmp_path / "page.html", some, viewport={"width": 1200, "height": 760})
    assert page.locator("#tip").is_hidden()
    page.mouse.move(*spot(page, 1))
    assert page.locator("#tip .key").inner_text() == "photos/1.png"
    assert page.locator("#tip .about").inner_text() == "cat \u00b7 cluster 1"
    middle = "[...document.querySelector('#tip canvas').getContext('2d').getImageData(80, 60, 1, 1).data]"
    assert some[1].picture is not None
    assert np.abs(np.subtract(page.evaluate(middle)[:3], some[1].picture.getpixel((0, 0)))).max() <= 6
    page.mouse.move(*spot(page, 12))
    assert page.locator("#tip .key").inner_text() == HOSTILE
    assert page.locator("#tip .about").inner_text() == "no label \u00b7 cluster 0"
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.evaluate("window.hacked") is None
    page.mouse.move(3, 3)
    assert page.locator("#tip").is_hidden()
    assert wrong == []


@pytest.mark.slow
def test_the_legend_hides_groups_and_a_click_shows_neighbours(browser: Any, tmp_path: Path) -> None:
    page, wrong = open_page(
        browser, tmp_path / "page.html", cards(), viewport={"width": 1200, "height": 760}, color_scheme="dark"
    )
    cat = page.get_by_role("button", name="cat 4")
    cat.click()
    assert cat.get_attribute("aria-pressed") == "false"
    page.mouse.move(*spot(page, 1))  # a cat, now hidden
    assert page.locator("#tip").is_hidden()
    page.mouse.move(*spot(page, 2))  # a dog
    assert page.locator("#tip .key").inner_text() == "photos/2.png"
    cat.click()
    page.mouse.click(*spot(page, 1))
    assert page.locator("#card .key").inner_text() == "photos/1.png"
    near = [page.locator("#near button").nth(number).get_attribute("title") for number in range(2)]
    assert [each.splitlines()[0] for each in near] == ["photos/2.png", "photos/0.png"]
    page.get_by_role("button", name="Clusters").click()
    assert page.locator("#legend button").count() == 2
    page.get_by_role("button", name="Pictures").click()
    before = page.evaluate("place(0)")
    page.mouse.move(*spot(page, 3))
    page.mouse.wheel(0, -400)
    wait(page, "view.scale > 1.5")
    page.get_by_role("button", name="Show all").click()
    assert page.evaluate("place(0)") == before
    page.get_by_label("Find by name").fill("11.PNG")
    assert page.evaluate("[...Array(count).keys()].filter(shown)") == [11]
    assert wrong == []


@pytest.mark.slow
def test_a_phone_shows_it_all_without_scrolling_sideways(browser: Any, tmp_path: Path) -> None:
    options = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    page, wrong = open_page(browser, tmp_path / "page.html", cards(), **options)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.touchscreen.tap(*spot(page, 4))
    assert page.locator("#card .key").inner_text() == "photos/4.png"
    assert page.locator("#tip .key").inner_text() == "photos/4.png"
    assert wrong == []


@pytest.mark.slow
def test_thousands_of_images_are_drawn_in_time(browser: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    picture = Image.new("RGB", (64, 64), (200, 90, 60))
    some = [
        Card(f"{number}.png", str(number % 30), number % 12, (float(x), float(y)), picture)
        for number, (x, y) in enumerate(random.normal(size=(8000, 2)))
    ]
    page, wrong = open_page(browser, tmp_path / "page.html", some, viewport={"width": 1200, "height": 760})
    assert page.locator("#legend button").count() == 30
    for _ in ("Dots", "Pictures"):
        taken = page.evaluate(
            "(() => { const start = performance.now(); draw(); return performance.now() - start })()"
        )
        assert taken < 1000, f"one frame took {taken:.0f} ms"
        page.get_by_role("button", name="Pictures").click()
    assert wrong == []
