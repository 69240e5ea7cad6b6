"""How the page looks: paper, ink, one accent, system fonts (nothing is fetched), light and dark."""

import gradio as gr

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Cascadia Mono", "Menlo", "Liberation Mono", "monospace")

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

# What the sides of a page's sliders show, by their element's id.
SIDES = {
    "lv-slider": ("Original", "Reconstruction"),
    "lv-compress-slider": ("Original", "From the file"),
    "lv-filled": ("With its hole", "Filled in"),
}

CSS = """
.gradio-container { max-width: 1240px !important; width: 100% !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
.lv-head { padding: 14px 2px 2px; }
.lv-head h1 { font-size: 30px; letter-spacing: -0.03em; font-weight: 650; margin: 0; line-height: 1.15; }
.lv-head h1 i { font-style: normal; color: var(--color-accent); }
.lv-head p { margin: 4px 0 0; color: var(--body-text-color-subdued); font-size: 15px; }
.lv-model-line { color: var(--body-text-color-subdued); font-size: 13px; padding: 2px; }
.lv-side { gap: 12px !important; }
.lv-quiet { box-shadow: none !important; }
.lv-figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(116px, 1fr)); gap: 1px;
  background: var(--border-color-primary); border: 1px solid var(--border-color-primary);
  border-radius: 12px; overflow: hidden; }
.lv-figure { background: var(--block-background-fill); padding: 12px 14px; display: flex;
  flex-direction: column; min-width: 0; }
.lv-figure b { font-size: 21px; font-weight: 600; letter-spacing: -0.02em; line-height: 1.2;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.lv-figure span { font-size: 13px; font-weight: 550; margin-top: 2px; }
.lv-figure small { font-size: 12px; line-height: 1.35; color: var(--body-text-color-subdued); }
.lv-note { color: var(--body-text-color-subdued); font-size: 13px; line-height: 1.5; margin: 6px 2px 0; }
.lv-part { font-size: 17px; font-weight: 600; margin: 22px 2px 0 !important; }
.lv-caption { font-size: 14px; font-weight: 550; margin: 8px 2px -6px; }
.block > label[data-testid="block-label"] { background: var(--block-background-fill) !important;
  border-radius: 0 0 8px 0 !important; padding: 3px 9px !important; opacity: 0.94; z-index: 2; }
.lv-gallery .grid-wrap { max-height: none !important; min-height: 0 !important; height: auto !important; }
.lv-gallery .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important;
  height: auto !important; align-content: start; grid-auto-rows: auto !important;
  grid-template-rows: none !important; padding-top: 24px !important; }
.lv-gallery .gallery-item, .lv-gallery .thumbnail-item { width: 100% !important; height: auto !important;
  aspect-ratio: auto !important; min-width: 0; }
.lv-gallery .thumbnail-item img { height: auto !important; width: 100% !important; }
.lv-gallery .caption-label { font-size: 12px; max-width: 100%; }
.lv-strip img { object-fit: contain; }
#lv-animation img, #lv-copies img { width: 100%; height: 100%; object-fit: contain; }
.lv-pair::before, .lv-pair::after { position: absolute; bottom: 12px; z-index: 60; padding: 3px 10px;
  border-radius: 99px; font-size: 13px; color: white; background: rgb(20 20 18 / 62%); pointer-events: none; }
.lv-pair::before { left: 12px; }
.lv-pair::after { right: 12px; }
.dark .lv-head h1 i { color: var(--primary-400); }
footer { opacity: 0.7; }
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  .lv-head h1 { font-size: 25px; }
  .lv-gallery.lv-shown .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  #lv-animation, #lv-copies { height: auto !important; }
  .lv-strip .image-container, .lv-strip .image-frame { overflow-x: auto; justify-content: flex-start; }
  .lv-strip img { width: 1100px !important; max-width: none !important; }
  .lv-figures { grid-template-columns: repeat(2, 1fr); }
  .lv-figure:last-child:nth-child(odd) { grid-column: span 2; }
  .lv-downloads { gap: 8px !important; }
}
"""
CSS += "".join(
    f'#{name}::before {{ content: "{left}"; }} #{name}::after {{ content: "{right}"; }}\n'
    for name, (left, right) in SIDES.items()
)


def make_theme() -> gr.themes.Base:
    """The theme; what is said once holds in light and dark, where gradio's own dark value is not better."""
    return gr.themes.Base(
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
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_border_color="*neutral_200",
        button_border_width="1px",
        input_background_fill="white",
        input_background_fill_dark="*neutral_800",
        slider_color="*primary_500",
        color_accent="*primary_600",
    )
