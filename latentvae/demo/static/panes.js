// Zoom and move all pictures together. gr.HTML runs this once and gives `element` (itself) and `watch`.
// Listeners sit on the component, so they outlive its pictures. Positions are in per cent of a window.
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
