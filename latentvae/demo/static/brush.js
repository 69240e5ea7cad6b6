// Paint a mask over a picture. gr.HTML runs this once and gives `element` (itself) and `watch`.
// The strokes are drawn in the accent; what is handed on is white on black, of the picture's own size.
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
