"""Several pictures of one place, zoomed and moved together."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

CSS = """
.lv-panes { display: grid; gap: 0 10px; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.lv-pane figcaption { font-size: 13px; line-height: 1.4; margin: 0 2px; }
.lv-pane figcaption b { display: block; font-size: 15px; font-weight: 600; }
.lv-pane figcaption span { color: var(--body-text-color-subdued); }
.lv-pane { margin: 0 0 10px; min-width: 0; display: grid; grid-template-rows: subgrid; grid-row: span 2;
  gap: 6px; }
.lv-window { overflow: hidden; aspect-ratio: 1; border-radius: 10px; cursor: grab; touch-action: pan-y;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); }
.lv-window.lv-deep { touch-action: none; }
.lv-window:active { cursor: grabbing; }
.lv-window img { width: 100%; height: 100%; display: block; transform-origin: 0 0; margin: 0 !important;
  object-fit: fill; max-width: none; user-select: none; image-rendering: pixelated; pointer-events: none; }
.lv-zoom { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 4px 0 0; font-size: 13px;
  color: var(--body-text-color-subdued); }
.lv-zoom button { min-width: 40px; height: 36px; border-radius: 8px; cursor: pointer;
  font-size: 15px !important;
  border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill);
  color: var(--body-text-color); }
@media (max-width: 640px) { .lv-panes { grid-template-columns: repeat(2, 1fr); } }
"""

# Listeners sit on the component, so they outlive its pictures. Positions are in per cent of a window.
SCRIPT = """
let zoom = 1, left = 0, top = 0, pointers = new Map(), gap = 0;
const MOST = 12;
const apply = () => {
  left = Math.min(0, Math.max(100 * (1 - zoom), left));
  top = Math.min(0, Math.max(100 * (1 - zoom), top));
  element.querySelectorAll('.lv-window').forEach(w => w.classList.toggle('lv-deep', zoom > 1));
  element.querySelectorAll('.lv-window img').forEach(image => {
    image.style.transform = `translate(${left}%, ${top}%) scale(${zoom})`;
  });
  const shown = element.querySelector('.lv-zoom output');
  if (shown) shown.textContent = `${zoom.toFixed(1)} times`;
};
const scaleTo = (wanted, x, y) => {
  const next = Math.min(MOST, Math.max(1, wanted));
  left = x - (x - left) * next / zoom;
  top = y - (y - top) * next / zoom;
  zoom = next;
  apply();
};
const place = (event, pane) => {
  const box = pane.getBoundingClientRect();
  return [100 * (event.clientX - box.left) / box.width, 100 * (event.clientY - box.top) / box.height];
};
element.addEventListener('wheel', event => {
  const pane = event.target.closest('.lv-window');
  if (!pane || (zoom === 1 && event.deltaY > 0)) return;
  event.preventDefault();
  scaleTo(zoom * Math.exp(-event.deltaY / 400), ...place(event, pane));
}, { passive: false });
element.addEventListener('pointerdown', event => {
  const pane = event.target.closest('.lv-window');
  if (!pane) return;
  pointers.set(event.pointerId, place(event, pane));
  if (zoom > 1 || pointers.size > 1) pane.setPointerCapture(event.pointerId);
});
element.addEventListener('pointermove', event => {
  const before = pointers.get(event.pointerId);
  const pane = event.target.closest('.lv-window');
  if (!before || !pane) return;
  const now = place(event, pane);
  pointers.set(event.pointerId, now);
  if (pointers.size > 1) {
    const [one, two] = [...pointers.values()];
    const wide = Math.hypot(one[0] - two[0], one[1] - two[1]);
    if (gap) scaleTo(zoom * wide / gap, (one[0] + two[0]) / 2, (one[1] + two[1]) / 2);
    gap = wide;
  } else if (zoom > 1) {
    left += now[0] - before[0];
    top += now[1] - before[1];
    apply();
  }
});
const release = event => { pointers.delete(event.pointerId); gap = 0; };
['pointerup', 'pointercancel'].forEach(name => element.addEventListener(name, release));
element.addEventListener('click', event => {
  const step = event.target.closest('button[data-step]')?.dataset.step;
  if (step) scaleTo(step === '0' ? 1 : zoom * Number(step), 50, 50);
});
watch('value', apply);
"""


@dataclass(frozen=True)
class Pane:
    """A picture with what is said of it."""

    title: str
    caption: str
    picture: Image.Image


def draw(panes: Sequence[Pane]) -> str:
    """The panes as HTML, each picture in it as PNG."""
    figures = "".join(
        f'<figure class="lv-pane"><figcaption><b>{html.escape(each.title)}</b>'
        f"<span>{html.escape(each.caption)}</span></figcaption>"
        f'<div class="lv-window"><img alt="{html.escape(each.title)}" draggable="false" '
        f'src="data:image/png;base64,{encode_png(each.picture)}"></div></figure>'
        for each in panes
    )
    buttons = (
        '<button data-step="0.5" aria-label="Zoom out" type="button">&minus;</button>'
        '<button data-step="2" aria-label="Zoom in" type="button">+</button>'
        '<button data-step="0" aria-label="Whole crop" type="button">1:1</button>'
    )
    return (
        f'<div class="lv-panes">{figures}</div><div class="lv-zoom">{buttons}<output>1.0 times</output>'
        "<span>Wheel or pinch to zoom, drag to move: all panes follow.</span></div>"
    )


def encode_png(picture: Image.Image) -> str:
    """A picture as PNG in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
