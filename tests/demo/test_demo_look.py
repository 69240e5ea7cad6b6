"""What everybody can read and reach: contrasts of the theme, names of pictures, keys, rest."""

import re

import pytest

pytest.importorskip("gradio")
from latentvae.demo.theme import make_theme
from latentvae.demo.widgets import static

LEAST = 4.5  # of WCAG 2.2, 1.4.3, for words of any size
PLACES = ("body-background-fill", "block-background-fill", "input-background-fill")
WORDS = (
    "body-text-color",
    "body-text-color-subdued",
    "block-label-text-color",
    "block-title-text-color",
    "block-info-text-color",
    "input-placeholder-color",
    "link-text-color",
    "link-text-color-hover",
    "link-text-color-visited",
    "color-accent",  # the open tab's name, and the page's
)
BUTTONS = ("button-primary", "button-secondary")


def variables(dark: bool) -> dict[str, str]:
    """Every variable of the theme's style sheet."""
    light, _, rest = make_theme()._get_theme_css().partition(":root.dark")
    found = dict(re.findall(r"--([\w-]+): ([^;]+);", light))
    return found | dict(re.findall(r"--([\w-]+): ([^;]+);", rest)) if dark else found


def luminance(colours: dict[str, str], name: str) -> float:
    """Relative luminance by WCAG 2.2."""
    value = colours[name]
    while (named := re.fullmatch(r"var\(--([\w-]+)\)", value)) is not None:
        value = colours[named[1]]
    value = {"white": "#ffffff", "black": "#000000"}.get(value, value)
    assert re.fullmatch("#[0-9a-f]{6}", value), (name, value)
    parts = [int(value[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_from_what_is_behind_them(dark: bool) -> None:
    colours = variables(dark)
    pairs = [(word, place) for word in WORDS for place in PLACES]
    pairs += [(f"{name}-text-color", f"{name}-background-fill") for name in BUTTONS]
    pairs += [(f"{name}-text-color-hover", f"{name}-background-fill-hover") for name in BUTTONS]
    for word, place in pairs:
        low, high = sorted(luminance(colours, name) for name in (word, place))
        contrast = (high + 0.05) / (low + 0.05)
        assert contrast >= LEAST, (word, place, round(contrast, 2))


def test_nothing_fades_words_after_all() -> None:
    assert not re.findall(r"footer\s*{[^}]*opacity", static("page.css"))


def test_motion_stops_where_rest_is_asked_for() -> None:
    rest = static("page.css").partition("prefers-reduced-motion: reduce")[2]
    assert "animation-duration: 0.01ms !important" in rest
    assert "transition-duration: 0.01ms !important" in rest
    assert "prefers-reduced-motion: reduce" in static("page.js")  # animated pictures show their first frame
