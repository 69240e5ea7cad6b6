"""A brush in the browser: strokes over a picture, handed on as a mask in a hidden text field."""

from PIL import Image

from latentvae.demo.panes import encode_png

MASK_ID = "lv-mask"

CSS = """
.lv-canvas { position: relative; border-radius: 12px; overflow: hidden; max-width: 720px; margin: 0 auto;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); }
.lv-canvas img { display: block; width: 100%; margin: 0 !important; user-select: none; }
.lv-canvas canvas { position: absolute; inset: 0; width: 100%; height: 100%; touch-action: none;
  cursor: crosshair; opacity: 0.85; }
.lv-empty { padding: 60px 20px; text-align: center; color: var(--body-text-color-subdued); }
.lv-brush { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; font-size: 14px;
  margin: 0 auto 10px; max-width: 720px; }
.lv-brush label { display: flex; gap: 8px; align-items: center; }
.lv-brush input { accent-color: var(--color-accent); }
.lv-brush button { height: 36px; padding: 0 14px; font-size: 14px !important; font-weight: 500 !important;
  border-radius: 8px; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill);
  color: var(--body-text-color); }
"""

# The strokes are drawn in the accent; what is handed on is white on black, of the picture's own size.
SCRIPT = """
const COLOUR = '#ff5d73';
let strokes = [], pen = null, base = null;
const field = () => document.querySelector('#lv-mask textarea, #lv-mask input');
const canvas = () => element.querySelector('canvas');
const line = (pencil, stroke, colour) => {
  pencil.strokeStyle = pencil.fillStyle = colour;
  pencil.lineWidth = stroke.width;
  pencil.lineCap = pencil.lineJoin = 'round';
  pencil.beginPath();
  stroke.points.forEach(([x, y], i) => i ? pencil.lineTo(x, y) : pencil.moveTo(x, y));
  if (stroke.points.length === 1) pencil.lineTo(stroke.points[0][0] + 0.1, stroke.points[0][1]);
  pencil.stroke();
};
const tint = (picture, colour) => {
  const copy = document.createElement('canvas');
  copy.width = picture.width; copy.height = picture.height;
  const pencil = copy.getContext('2d');
  pencil.drawImage(picture, 0, 0);
  const dots = pencil.getImageData(0, 0, copy.width, copy.height);
  for (let i = 0; i < dots.data.length; i += 4) dots.data[i + 3] = dots.data[i] > 127 ? 255 : 0;
  pencil.putImageData(dots, 0, 0);
  pencil.globalCompositeOperation = 'source-in';
  pencil.fillStyle = colour;
  pencil.fillRect(0, 0, copy.width, copy.height);
  return copy;
};
const redraw = () => {
  const view = canvas();
  if (!view) return;
  const pencil = view.getContext('2d');
  pencil.clearRect(0, 0, view.width, view.height);
  if (base) pencil.drawImage(tint(base, COLOUR), 0, 0, view.width, view.height);
  strokes.forEach(stroke => line(pencil, stroke, COLOUR));
};
const hand = () => {
  const view = canvas(), target = field();
  if (!view || !target) return;
  let text = '';
  if (base || strokes.length) {
    const mask = document.createElement('canvas');
    mask.width = view.width; mask.height = view.height;
    const pencil = mask.getContext('2d');
    pencil.fillStyle = '#000';
    pencil.fillRect(0, 0, mask.width, mask.height);
    if (base) pencil.drawImage(tint(base, '#fff'), 0, 0, mask.width, mask.height);
    strokes.forEach(stroke => line(pencil, stroke, '#fff'));
    text = mask.toDataURL('image/png');
  }
  target.value = text;
  target.dispatchEvent(new Event('input', { bubbles: true }));
};
const place = event => {
  const view = canvas(), box = view.getBoundingClientRect();
  return [(event.clientX - box.left) * view.width / box.width,
          (event.clientY - box.top) * view.height / box.height];
};
element.addEventListener('pointerdown', event => {
  if (event.target !== canvas()) return;
  event.target.setPointerCapture(event.pointerId);
  const size = Number(element.querySelector('input[type=range]').value) / 100;
  pen = { width: size * canvas().width, points: [place(event)] };
  strokes.push(pen);
  redraw();
});
element.addEventListener('pointermove', event => {
  if (!pen) return;
  pen.points.push(place(event));
  redraw();
});
const lift = () => { if (pen) { pen = null; hand(); } };
['pointerup', 'pointercancel'].forEach(name => element.addEventListener(name, lift));
element.addEventListener('click', event => {
  const act = event.target.closest('button[data-act]')?.dataset.act;
  if (!act) return;
  if (act === 'undo' && strokes.length) strokes.pop(); else { strokes = []; base = null; }
  redraw();
  hand();
});
watch('value', () => { strokes = []; base = null; pen = null; hand(); });
const begin = tries => {
  const text = field()?.value;
  if (text) {
    const picture = new Image();
    picture.onload = () => { base = picture; redraw(); };
    picture.src = text;
  } else if (tries > 0) setTimeout(() => begin(tries - 1), 100);
};
begin(30);
"""


def draw(picture: Image.Image | None) -> str:
    """The brush over a picture, as HTML."""
    if picture is None:
        return '<div class="lv-canvas"><div class="lv-empty">Choose a picture to paint on.</div></div>'
    return (
        '<div class="lv-brush"><b>Paint over what is missing</b><label>Brush '
        '<input type="range" min="1" max="15" value="4" aria-label="Width of the brush"></label>'
        '<button type="button" data-act="undo">Undo</button>'
        '<button type="button" data-act="clear">Clear</button></div>'
        f'<div class="lv-canvas"><img alt="The picture to paint on" draggable="false" '
        f'src="data:image/png;base64,{encode_png(picture)}">'
        f'<canvas width="{picture.width}" height="{picture.height}"></canvas></div>'
    )
