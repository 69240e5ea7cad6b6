// Pictures of one size that zoom and move together, error maps below them, and a table that sorts. gr.HTML
// runs this once and gives `element` (itself) and `watch`. Listeners sit on the component, so they outlive
// its pictures. Positions are in per cent of a window.
let zoom = 1, left = 0, top = 0, pointers = new Map(), gap = 0, moved = 0;
let sums = new Map(), order = null;  // of the errors by canvas; what is sorted by: column and direction
const DEEPEST = 16, CLICK = 4;  // page pixels for one of the picture; and that a finger may slip
const all = what => [...element.querySelectorAll(what)];
const pixel = () => {  // the zoom at which a picture's pixel is one of the page
  const image = element.querySelector('.lv-window img');
  return (image?.naturalWidth || 1) / (image?.clientWidth || 1);
};
const apply = () => {
  left = Math.min(0, Math.max(100 * (1 - zoom), left));
  top = Math.min(0, Math.max(100 * (1 - zoom), top));
  const large = zoom >= 2 * pixel();
  all('.lv-window').forEach(each => {
    each.classList.toggle('lv-deep', zoom > 1);
    each.classList.toggle('lv-large', large);
    each.firstElementChild.style.transform = `translate(${left}%, ${top}%) scale(${zoom})`;
  });
  const shown = element.querySelector('.lv-zoom output');
  if (shown) shown.textContent = zoom === 1 ? 'Whole' : `${Math.round(100 * zoom / pixel())} %`;
};
const scaleTo = (wanted, x = 50, y = 50) => {
  const next = Math.min(Math.max(1, DEEPEST * pixel()), Math.max(1, wanted));
  left = x - (x - left) * next / zoom;
  top = y - (y - top) * next / zoom;
  zoom = next;
  apply();
};
const place = (event, pane) => {
  const box = pane.getBoundingClientRect();
  return [100 * (event.clientX - box.left) / box.width, 100 * (event.clientY - box.top) / box.height];
};
const deeper = () => [pixel(), 4 * pixel()].find(each => each > 1.2 * zoom) ?? 1;  // after the last the whole
element.addEventListener('wheel', event => {
  const pane = event.target.closest('.lv-window');
  if (!pane || (zoom === 1 && event.deltaY > 0)) return;
  event.preventDefault();
  scaleTo(zoom * Math.exp(-event.deltaY / 400), ...place(event, pane));
}, { passive: false });
element.addEventListener('pointerdown', event => {
  const pane = event.target.closest('.lv-window');
  if (!pane) return;
  if (!pointers.size) moved = 0;
  pointers.set(event.pointerId, { pane, at: place(event, pane), x: event.clientX, y: event.clientY });
  if (zoom > 1 || pointers.size > 1) pane.setPointerCapture(event.pointerId);
});
element.addEventListener('pointermove', event => {
  const held = pointers.get(event.pointerId);
  if (!held) return;
  const before = held.at, now = held.at = place(event, held.pane);
  moved = Math.max(moved, Math.hypot(event.clientX - held.x, event.clientY - held.y));
  if (pointers.size > 1) {
    moved = CLICK + 1;  // however little: no click
    const [one, two] = [...pointers.values()].map(each => each.at);
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
  const pane = event.target.closest('.lv-window');
  if (pane && moved <= CLICK) scaleTo(deeper(), ...place(event, pane));
  const step = event.target.closest('button[data-step]')?.dataset.step;
  if (step) scaleTo({ 0: 1, '1:1': pixel() }[step] ?? zoom * Number(step));
  const title = event.target.closest('th');
  if (title) {
    const largest = title.getAttribute('aria-sort') === 'ascending';
    order = { column: title.cellIndex, name: largest ? 'descending' : 'ascending' };
    sort();
  }
});
element.addEventListener('keydown', event => {
  if (!event.target.closest('.lv-panes')) return;
  const ways = { ArrowLeft: [10, 0], ArrowRight: [-10, 0], ArrowUp: [0, 10], ArrowDown: [0, -10] }[event.key];
  const factor = { '+': 2, '=': 2, '-': 0.5 }[event.key];
  if (!factor && !(ways && zoom > 1)) return;
  event.preventDefault();
  if (factor) scaleTo(zoom * factor);
  else { left += ways[0]; top += ways[1]; apply(); }
});
const sort = () => {  // the pictures too; what has no figure comes last
  if (!order) return;
  const sign = order.name === 'ascending' ? 1 : -1;
  all('th').forEach(each =>
    each.setAttribute('aria-sort', each.cellIndex === order.column ? order.name : 'none'));
  const figure = row => row.cells[order.column].dataset.value;
  const rows = all('tbody tr').sort((one, two) => {
    const [a, b] = [figure(one), figure(two)];
    if (a === '' || b === '') return (a === '') - (b === '');
    return sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a === b ? 0 : Number(a) < Number(b) ? -1 : 1);
  });
  rows.forEach(each => {
    each.parentElement.append(each);
    const pane = all('.lv-pane').find(pane => pane.dataset.name === each.dataset.name);
    pane?.parentElement.append(pane);
  });
};
const pixelsOf = image => {
  const canvas = document.createElement('canvas');
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const drawing = canvas.getContext('2d', { willReadFrequently: true });
  drawing.drawImage(image, 0, 0);
  return drawing.getImageData(0, 0, canvas.width, canvas.height).data;
};
const measure = async () => {  // sums of the channels' errors, once for each picture
  sums = new Map();
  const [original, ...others] = all('.lv-window img');
  if (!original) return;
  const loaded = [original, ...others].map(each => each.decode().then(() => true, () => false));
  // another result may have come, or files have gone
  if ((await Promise.all(loaded)).includes(false) || !original.isConnected) return;
  const before = pixelsOf(original);
  for (const image of others) {
    const canvas = image.closest('.lv-pane').querySelector('canvas'), after = pixelsOf(image);
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    const found = new Uint16Array(before.length / 4);
    for (let at = 0, from = 0; at < found.length; at++, from += 4) {
      found[at] = Math.abs(before[from] - after[from]) + Math.abs(before[from + 1] - after[from + 1])
        + Math.abs(before[from + 2] - after[from + 2]);
    }
    sums.set(canvas, found);
  }
  paint();
};
const paint = () => {
  const hex = element.querySelector('.lv-panes')?.dataset.colours;
  if (!hex) return;
  const bytes = hex.match(/../g).map(each => parseInt(each, 16)), last = bytes.length / 3 - 1;
  const colours = new Uint32Array(last + 1).map((_, at) =>
    255 << 24 | bytes[3 * at + 2] << 16 | bytes[3 * at + 1] << 8 | bytes[3 * at]);
  const levels = Number(element.querySelector('.lv-zoom input').value);
  element.querySelector('.lv-zoom label b').textContent = `${levels} levels`;
  for (const [canvas, found] of sums) {
    const drawing = canvas.getContext('2d'), shown = drawing.createImageData(canvas.width, canvas.height);
    const words = new Uint32Array(shown.data.buffer);
    let beyond = 0;
    for (let at = 0; at < found.length; at++) {
      const out = found[at] > 3 * levels;
      beyond += out;
      words[at] = colours[out ? Math.min(found[at], last) : 0];
    }
    drawing.putImageData(shown, 0, 0);
    canvas.closest('.lv-pane').querySelector('.lv-under span').textContent =
      `${(100 * beyond / found.length).toFixed(1)} % beyond`;
  }
};
element.addEventListener('input', event => { if (event.target.closest('.lv-zoom')) paint(); });
const begin = () => { apply(); sort(); measure(); };
watch('value', begin);
begin();
