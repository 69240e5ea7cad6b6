"""Colours that tell groups apart on white and on black."""

import colorsys

# of middle lightness, neighbours far apart in hue; blue and orange first, which all eyes tell apart
FIRST = (
    *("#3b7dd8", "#e8743b", "#2aa876", "#c9438f", "#d9a521", "#8d62d9"),
    *("#19a5b8", "#d14b4b", "#7a9a2c", "#a0705a", "#6f7f95", "#e58bb5"),
)
GOLDEN = 0.61803398875  # of a turn: each new hue falls into the largest gap


def colours(count: int) -> list[str]:
    """`count` colours as #rrggbb, the first ones always the same."""
    more = (
        colorsys.hls_to_rgb(GOLDEN * number % 1, 0.45 + 0.12 * (number % 3), 0.55)
        for number in range(count - len(FIRST))
    )
    made = ["#" + "".join(f"{round(255 * part):02x}" for part in parts) for parts in more]
    return [*FIRST[:count], *made]
