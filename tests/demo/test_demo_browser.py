"""The page in headless Chromium, as a visitor uses it."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import textured
from demo_server import close, free_port
from PIL import Image

pytest.importorskip("gradio")

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
AXE = "LATENTVAE_AXE"  # names axe.min.js of the package axe-core from npm
# a result of the open tab: pictures beyond those of the inputs
SHOWN = (
    "() => [...document.querySelectorAll('[role=tabpanel]')].some(panel => panel.offsetParent &&"
    " [...panel.querySelectorAll('img')].filter(image => image.naturalWidth > 0 &&"
    " image.offsetParent && !image.closest('.lv-side, #lv-painter')).length > 0)"
)
IDLE = "!document.querySelector('.lv-busy, .lv-stale')"
TABS = ("Reconstruct", "Compare", "Compress", "Interpolate", "Vary", "Find the odd one", "Fill in")
# what stands over or beside nothing else: a strip's buttons, and the links under a picture
CLEAR = {
    "Interpolate": "document.querySelector('#lv-frames .icon-button-wrapper').getBoundingClientRect().bottom"
    " <= document.querySelector('#lv-frames img').getBoundingClientRect().top",
    "Compare": "[...document.querySelectorAll('#lv-compare .lv-under')].every(each => new Set("
    "[...each.querySelectorAll('a')].map(link => Math.round(link.getBoundingClientRect().top))).size <= 1)",
}
PATIENCE = 90_000  # milliseconds: a busy machine is no failure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The demo as it is shipped, with its bundled model."""
    from latentvae.demo import server

    with server.workplace():
        page = server.start(port=free_port())
        yield page.local_url
        close(page)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        missing = f"needs {CHROMIUM}: apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield running
        running.close()


class Visit:
    """A page, and what its console said and which other servers it asked."""

    def __init__(self, browser: Any, url: str, width: int, height: int) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.errors: list[str] = []
        self.strangers: list[str] = []
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._note)
        self.page.goto(url)
        self.page.wait_for_selector("button[role=tab]:visible")

    def _note(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1", "http://localhost", "data:", "blob:")):
            self.strangers.append(request.url)

    def open(self, tab: str) -> None:
        self.page.wait_for_timeout(500)
        self.page.locator("button[role=tab]:visible").filter(has_text=tab).first.click()

    def figures(self) -> str:
        return str(self.page.locator("#lv-figures .lv-figures").inner_text())


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Visit]:
    made = Visit(browser, url, 1280, 900)
    yield made
    made.context.close()


def test_a_visit(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    # the example's reconstruction is there before anything is asked for
    example = visit.figures()
    assert re.search(r"\d+\.\d+ dB", example)

    # an upload gives other figures
    Image.fromarray(textured(512, 384, 3)).save(tmp_path / "holiday photo.png")
    page.locator(".lv-photo:visible button[aria-label='Remove Image']").first.click()
    start = time.perf_counter()
    page.locator(".lv-photo:visible input[type=file]").first.set_input_files(tmp_path / "holiday photo.png")
    page.wait_for_function(
        "before => { const now = document.querySelector('#lv-figures .lv-figures')?.innerText;"
        " return now && now !== before && now.includes('dB'); }",
        arg=example,
    )
    print(f"first picture after {time.perf_counter() - start:.2f} s")

    # the slider moves, and shows more of the reconstruction
    covered = "document.querySelector('#lv-slider img.fixed').style.clipPath"
    assert "50%" in page.evaluate(covered)
    page.wait_for_timeout(500)
    handle = page.locator("#lv-slider [data-testid=slider]").bounding_box()
    frame = page.locator("#lv-slider").bounding_box()
    middle = frame["y"] + frame["height"] / 2
    page.mouse.move(handle["x"] + handle["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(frame["x"] + frame["width"] / 4, middle, steps=8)
    page.mouse.up()
    cut = re.search(r"([\d.]+)%\)", page.evaluate(covered))
    assert cut is not None
    assert float(cut[1]) < 40
    assert page.locator("#lv-slider img.fixed").get_attribute("alt") == "Reconstruction"
    page.locator("#lv-slider [data-testid=slider]").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    moved = re.search(r"([\d.]+)%\)", page.evaluate(covered))
    assert moved is not None
    assert float(moved[1]) > float(cut[1])

    # latents are taken home, and come back as the same picture
    with page.expect_download() as waiting:
        page.locator("#lv-latents-file").click()
    waiting.value.save_as(tmp_path / waiting.value.suggested_filename)
    assert waiting.value.suggested_filename == "holiday photo.latents.safetensors"
    visit.open("Compress")
    page.locator("#lv-open input[type=file]").set_input_files(tmp_path / waiting.value.suggested_filename)
    page.wait_for_selector("#lv-opened img:visible")
    page.wait_for_function("document.querySelector('#lv-opened img').naturalWidth === 512")
    assert "512 x 384" in page.locator("#lv-opened-about").inner_text()
    assert visit.errors == []
    assert visit.strangers == []


def test_a_large_picture_is_previewed_in_full_light(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    visit.figures()
    Image.fromarray(textured(1800, 1350, 3)).save(tmp_path / "large.jpg")
    page.locator(".lv-photo:visible button[aria-label='Remove Image']").first.click()
    page.locator(".lv-photo:visible input[type=file]").first.set_input_files(tmp_path / "large.jpg")
    dimmed = "getComputedStyle(document.querySelector('#lv-slider').closest('.lv-results > *')).opacity"
    page.wait_for_function(
        "document.querySelector('#lv-figures').innerText.includes('preview of 640 x 480') &&"
        f" document.querySelector('.lv-busy') && {dimmed} === '1'"
    )
    page.get_by_text("has 1800 x 1350 pixels; this is of a copy of 1632 x 1224").wait_for()
    page.wait_for_function(IDLE)
    assert page.evaluate("document.querySelector('#lv-slider img').naturalWidth") == 1600
    assert re.search(r"Full size, about \d+ (s|minutes) and [\d.]+ GB", page.inner_text("body"))
    assert visit.errors == []


def test_an_example_is_taken_and_its_result_follows(visit: Visit) -> None:
    page = visit.page
    before = visit.figures()
    shown = "document.querySelector('.lv-photo img').src"
    cat = page.evaluate(shown)
    thumbnails = page.locator(".lv-examples button img")
    assert thumbnails.count() == 8
    assert all(thumbnails.nth(place).evaluate("image => image.naturalWidth > 100") for place in range(8))
    page.get_by_role("button", name="Text").click()
    page.wait_for_function("before => document.querySelector('.lv-photo img').src !== before", arg=cat)
    page.wait_for_function(
        "before => { const now = document.querySelector('#lv-figures .lv-figures')?.innerText;"
        " return now && now !== before && now.includes('dB'); }",
        arg=before,
    )
    assert page.evaluate("document.querySelector('#lv-slider img').naturalWidth") == 480
    assert visit.errors == []


def test_a_wrong_file_is_said_on_the_page(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("I am no picture")
    visit.page.locator(".lv-photo:visible button[aria-label='Remove Image']").first.click()
    visit.page.locator(".lv-photo:visible input[type=file]").first.set_input_files(tmp_path / "text.png")
    said = visit.page.get_by_text("no image by its content")
    said.first.wait_for()
    assert "text.png" in said.first.inner_text()
    visit.page.wait_for_timeout(2000)
    assert said.count() == 1  # in the panel, and nowhere else
    assert not visit.page.locator("#lv-figures .lv-figures").count()  # the picture's before


def test_a_file_that_the_browser_cannot_draw_is_no_broken_picture(visit: Visit, tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    page, before = visit.page, visit.figures()
    heif.from_pillow(Image.fromarray(textured(256, 192, 3))).save(tmp_path / "phone.heic")
    page.locator(".lv-photo:visible button[aria-label='Remove Image']").first.click()
    page.locator(".lv-photo:visible input[type=file]").first.set_input_files(tmp_path / "phone.heic")
    frame = page.locator(".lv-photo:visible .image-frame").first
    page.wait_for_function(
        "before => { const now = document.querySelector('#lv-figures .lv-figures')?.innerText;"
        " return now && now !== before && now.includes('dB'); }",
        arg=before,
    )
    said = "frame => getComputedStyle(frame, '::after').content"
    assert "cannot show" in frame.evaluate(said)
    assert frame.locator("img").evaluate("image => getComputedStyle(image).opacity") == "0"
    page.get_by_role("button", name="Text").click()
    page.wait_for_function("document.querySelector('.lv-photo img').naturalWidth > 0")
    assert "cannot show" not in frame.evaluate(said)
    assert visit.errors == []


def test_lines_of_a_result_take_the_room_they_need(visit: Visit) -> None:
    page = visit.page
    visit.open("Compress")
    page.wait_for_function(SHOWN)
    page.get_by_text("Show Python").locator("visible=true").first.click()
    page.locator(".cm-content:visible").first.wait_for()
    page.wait_for_timeout(500)
    spare = page.locator(".cm-editor:visible").evaluate_all(
        "each => each.map(one => one.offsetHeight - one.querySelector('.cm-content').offsetHeight)"
    )
    assert len(spare) == 2
    assert max(spare) < 20, spare  # pixels: a line


def test_what_takes_long_can_be_stopped_and_what_was_shown_stays(
    visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentvae.demo import one_model

    page = visit.page
    visit.figures()
    shown = "document.querySelector('#lv-slider img').src"
    before, decode = page.evaluate(shown), one_model.decode

    def endless(*_: Any) -> None:
        while True:
            torch.nn.Identity()(torch.zeros(1))
            time.sleep(0.02)

    monkeypatch.setattr(one_model, "decode", endless)
    page.get_by_role("button", name="Night").click()
    stop = page.locator(".lv-stop:visible")
    stop.wait_for()  # after two seconds
    assert page.evaluate(shown) == before
    dimmed = "getComputedStyle(document.querySelector('#lv-slider').closest('.lv-results > *')).opacity"
    assert float(page.evaluate(dimmed)) < 0.5
    stop.click()
    page.get_by_text("Stopped.").wait_for()
    page.wait_for_function("!document.querySelector('.lv-busy')")
    assert page.evaluate(shown) == before
    assert float(page.evaluate(dimmed)) < 0.5  # it is of another picture than the one above

    # what is asked for meanwhile does not wait either
    page.get_by_role("button", name="Text").click()
    page.wait_for_selector(".lv-busy")
    monkeypatch.setattr(one_model, "decode", decode)
    page.get_by_role("button", name="Grass").click()
    page.wait_for_function("!document.querySelector('.lv-busy, .lv-stale')")
    assert page.evaluate(shown) != before
    assert not page.get_by_text("Stopped.").count()
    assert visit.errors == []


def test_tab_and_model_stand_in_the_address(visit: Visit, browser: Any, url: str) -> None:
    page = visit.page
    open_tab = "document.querySelector('button[role=tab][aria-selected=true]').innerText"
    visit.figures()
    assert page.evaluate("location.hash") == ""
    visit.open("Compress")
    page.wait_for_function("location.hash === '#tab=compress'")
    page.go_back()
    page.wait_for_function(f"{open_tab} === 'Reconstruct'")
    assert visit.errors == []
    kept = Visit(browser, f"{url}#tab=compress&model=sd-small", 1280, 900)
    kept.page.wait_for_function(f"{open_tab} === 'Compress'")
    kept.page.wait_for_function("document.querySelector('#lv-model input').value === 'sd-small'")
    assert kept.errors == []
    kept.context.close()


def test_painting_and_zooming(visit: Visit) -> None:
    page = visit.page
    visit.open("Fill in")
    page.wait_for_selector("#lv-painter canvas")
    page.wait_for_function("document.querySelector('#lv-mask textarea')?.value.length > 100")
    before = page.locator("#lv-mask textarea").input_value()
    box = page.locator("#lv-painter canvas").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 90, steps=5)
    page.mouse.up()
    after = page.locator("#lv-mask textarea").input_value()
    assert after != before
    page.get_by_role("button", name="Undo").click()
    assert page.locator("#lv-mask textarea").input_value() != after
    page.get_by_role("button", name="Clear").click()
    assert page.locator("#lv-mask textarea").input_value() == ""

    assert visit.errors == []


@pytest.fixture
def compared(visit: Visit) -> Visit:
    """With the tab Compare open, and its result there."""
    visit.open("Compare")
    visit.page.locator("#lv-compare .lv-window img").first.wait_for()
    visit.page.wait_for_function(IDLE)
    # the error maps are drawn when all pictures have come
    visit.page.wait_for_function(
        "document.querySelectorAll('#lv-compare canvas').length &&"
        " [...document.querySelectorAll('#lv-compare canvas')].every(each => each.width > 300)"
    )
    return visit


def test_pictures_are_compared_whole_and_by_their_pixels(compared: Visit) -> None:
    page = compared.page
    panes = page.locator("#lv-compare .lv-window img")
    shown = page.locator("#lv-compare .lv-window > *")  # error maps too
    ways = panes.count() - 1
    assert shown.count() == 2 * ways + 1

    def turns() -> set[str]:
        return {shown.nth(each).evaluate("each => each.style.transform") for each in range(shown.count())}

    def scale() -> float:
        (turn,) = turns()  # all alike
        return float(re.search(r"scale\(([\d.]+)\)", turn)[1])  # type: ignore[index]

    assert turns() == {"translate(0%, 0%) scale(1)"}  # whole
    wide = panes.first.evaluate("image => image.naturalWidth / image.clientWidth")
    box = panes.nth(1).bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    assert scale() == pytest.approx(wide, abs=0.01)  # pixel for pixel
    (turn,) = turns()
    across = float(re.search(r"translate\((-?[\d.]+)%", turn)[1])  # type: ignore[index]
    assert across == pytest.approx(25 * (1 - wide), abs=1)  # what was clicked stays where it is
    page.mouse.wheel(0, -400)
    assert scale() > 1.5 * wide
    page.get_by_role("button", name="The whole picture").click()
    assert scale() == 1
    page.locator("#lv-compare .lv-panes").focus()
    page.keyboard.press("+")
    assert scale() == 2

    page.set_viewport_size({"width": 960, "height": 900})  # columns as narrow as those of six ways
    assert page.evaluate(CLEAR["Compare"])
    for place in ("#lv-table-file", "#lv-compare .lv-under a >> nth=1"):
        with page.expect_download() as waiting:
            page.locator(place).click()
        assert Path(waiting.value.path()).stat().st_size > 100
    assert compared.errors == []
    assert compared.strangers == []


def test_errors_within_the_tolerance_are_black_and_the_table_sorts(compared: Visit) -> None:
    page = compared.page
    # what is within the tolerance is black, and the rest is counted: beyond half the scale all are bright
    canvas = page.locator("#lv-compare canvas").first
    lit = (
        "canvas => { let lit = 0;"
        " const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        " for (let at = 0; at < data.length; at += 4) lit += data[at + 1] > 40;"
        " return 100 * lit / (canvas.width * canvas.height); }"
    )
    beyond = page.locator("#lv-compare .lv-under span")
    before, shares = canvas.evaluate(lit), beyond.all_inner_texts()
    page.locator("#lv-compare .lv-zoom input").fill("16")
    after = canvas.evaluate(lit)
    assert 0 < after < before
    now = [float(words.split()[0]) for words in beyond.all_inner_texts() if words]
    assert len(now) == page.locator("#lv-compare canvas").count()
    assert now[0] == pytest.approx(after, abs=0.051)
    assert all(
        share < float(words.split()[0]) for share, words in zip(now, filter(None, shares), strict=True)
    )

    # the table sorts, and the pictures with it
    names = page.locator("#lv-compare tbody td:first-child")
    titles = page.locator("#lv-compare figcaption b")
    page.get_by_role("button", name="PSNR").click()
    first = names.all_inner_texts()
    assert titles.all_inner_texts() == ["Original", *first]
    psnr = page.locator("#lv-compare td:nth-child(5)")
    found = psnr.evaluate_all("cells => cells.map(each => Number(each.dataset.value))")
    assert found == sorted(found)
    page.get_by_role("button", name="PSNR").click()
    assert names.all_inner_texts() == first[::-1] == titles.all_inner_texts()[1:]
    assert compared.errors == []


@pytest.mark.parametrize("width", [390, 1280])
def test_every_tab_fits_and_shows_a_result(browser: Any, url: str, width: int) -> None:
    visit = Visit(browser, url, width, 844)
    for tab in TABS:
        visit.open(tab)
        visit.page.wait_for_function(SHOWN)
        wide = visit.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, (tab, wide)
        if tab in CLEAR:
            visit.page.wait_for_function(IDLE)
            visit.page.wait_for_function(CLEAR[tab])
    assert visit.errors == []
    assert visit.strangers == []
    visit.context.close()


@pytest.fixture(scope="module")
def axe() -> str:
    place = Path(os.environ.get(AXE, "axe.min.js"))
    if not place.is_file():
        missing = f"needs axe-core: npm pack axe-core@4, unpack it, and name its axe.min.js in ${AXE}"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    return place.read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(browser: Any, url: str, axe: str, width: int, theme: str) -> None:
    visit = Visit(browser, f"{url}?__theme={theme}", width, 844)
    for tab in TABS:
        visit.open(tab)
        visit.page.wait_for_function(SHOWN)
        visit.page.evaluate(axe)
        settled = False
        while not settled:  # dimmed words are hard to read, and meant to be; a busy machine begins late
            visit.page.wait_for_timeout(500)
            visit.page.wait_for_function(IDLE)
            found = visit.page.evaluate("axe.run().then(found => found.violations)")
            settled = visit.page.evaluate(IDLE)
        bad = [
            (each["impact"], each["id"], node["html"])
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]
        assert not bad, (tab, bad[:5])
    visit.context.close()
