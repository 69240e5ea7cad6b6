"""How the page looks: paper, ink, one accent, system fonts (nothing is fetched), light and dark.

What a theme of gradio cannot say is in static/page.css.
"""

import gradio as gr

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Cascadia Mono", "Menlo", "Liberation Mono", "monospace")

# Eleven shades each, from 50 to 950, as gradio counts them
ACCENT = gr.themes.Color(
    *("#eef7f4", "#d5ece5", "#aedacd", "#7fc2b0", "#50a590", "#2f8874"),
    *("#216e5e", "#1c584c", "#19473e", "#163b34", "#0b211d"),
    name="accent",
)
PAPER = gr.themes.Color(
    *("#faf9f7", "#f3f1ed", "#e6e3dd", "#d2cec6", "#a39e94", "#767167"),
    *("#5a564e", "#44413b", "#2b2925", "#1d1c19", "#131210"),
    name="paper",
)


def make_theme() -> gr.themes.Base:
    """The theme; what is said once holds in light and dark, where gradio's own dark value is not better."""
    theme = gr.themes.Base(
        primary_hue=ACCENT,
        secondary_hue=ACCENT,
        neutral_hue=PAPER,
        radius_size=gr.themes.sizes.radius_lg,
        font=SANS,
        font_mono=MONO,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_800",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="*neutral_600",
        block_label_text_weight="500",
        block_title_text_color="*neutral_700",
        block_title_text_weight="500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_border_color="*neutral_200",
        button_border_width="1px",
        input_background_fill="white",
        input_background_fill_dark="*neutral_800",
        slider_color="*primary_500",
        color_accent="*primary_600",
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        link_text_color_visited="*secondary_700",
        link_text_color_dark="*secondary_300",
        link_text_color_hover_dark="*secondary_200",
        link_text_color_visited_dark="*secondary_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
    # of words, too: the open tab's; gradio has no argument for it
    theme.color_accent_dark = "*primary_300"  # type: ignore[attr-defined]
    return theme
