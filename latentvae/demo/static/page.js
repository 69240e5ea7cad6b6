// What gradio's parts lack: names for pictures, arrow keys on the divider, and pictures that stand still.
// PICTURES is written before this by the server: what each picture's element shows, by its id.
const calm = matchMedia('(prefers-reduced-motion: reduce)');
const pull = (handle, pixels) => {  // as a mouse would, because gradio's divider knows nothing else
  const box = handle.getBoundingClientRect();
  const fire = (target, type, x) => target.dispatchEvent(new MouseEvent(type, {
    bubbles: true, cancelable: true, view: window, clientX: x, clientY: box.top + box.height / 2 }));
  const from = box.left + box.width / 2;
  fire(handle, 'mousedown', from);
  fire(window, 'mousemove', from + pixels);
  fire(window, 'mouseup', from + pixels);
};
const share = handle => {  // of the picture that is left of the divider, in per cent
  const frame = handle.parentElement.getBoundingClientRect(), box = handle.getBoundingClientRect();
  return Math.round(100 * (box.left + box.width / 2 - frame.left) / (frame.width || 1));
};
const step = event => {
  const handle = event.target.closest?.('.lv-pair [data-testid=slider]');
  if (!handle) return;
  const wide = handle.parentElement.getBoundingClientRect().width;
  const jumps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10,
    Home: -100, End: 100 };
  if (!(event.key in jumps)) return;
  event.preventDefault();
  pull(handle, jumps[event.key] * wide / 50);
  setTimeout(() => handle.setAttribute('aria-valuenow', share(handle)), 100);
};
const name = () => {
  for (const [id, label] of Object.entries(PICTURES)) {
    const place = document.getElementById(id), sides = label.split(' and ');
    place?.querySelectorAll('img').forEach(image => {
      image.alt = sides.length < 2 ? label : sides[image.classList.contains('fixed') ? 1 : 0];
    });
    const handle = place?.querySelector('[data-testid=slider]:not([tabindex])');
    if (!handle) continue;
    const is = { tabindex: 0, role: 'slider', 'aria-label': `Divider between ${label}`, 'aria-valuemin': 0,
      'aria-valuemax': 100, 'aria-valuenow': share(handle) };
    Object.entries(is).forEach(each => handle.setAttribute(...each));
  }
  document.querySelectorAll('.lv-gallery .thumbnail-item').forEach(item => {
    const image = item.querySelector('img'), words = item.querySelector('.caption-label')?.textContent.trim();
    if (image && words) image.alt = words;
  });
  document.querySelectorAll('.lv-photo img').forEach(image => { image.alt = 'The picture that was chosen'; });
};
const still = event => {  // an animation's first frame, where the visitor asks for rest
  const image = event.target;
  if (!calm.matches || !image.closest?.('#lv-animation, #lv-copies') || image.src.startsWith('data:')) return;
  const copy = document.createElement('canvas');
  copy.width = image.naturalWidth; copy.height = image.naturalHeight;
  copy.getContext('2d').drawImage(image, 0, 0);
  image.src = copy.toDataURL('image/png');
};
document.addEventListener('keydown', step);
document.addEventListener('load', still, true);  // loading does not bubble
let waiting = 0;
const soon = () => { waiting ||= requestAnimationFrame(() => { waiting = 0; name(); }); };
// of the document: whether there is a body yet depends on how gradio writes the head
new MutationObserver(soon).observe(document.documentElement, { childList: true, subtree: true });
// One picture and one model for all tabs: what was made of others is veiled, and the open tab makes its own anew.
window.lvFollow = () => {
  document.querySelectorAll('.lv-results').forEach(each => each.classList.add('lv-stale'));
  const open = [...document.querySelectorAll('.lv-follow')].filter(
    each => each.closest('[role=tabpanel]')?.offsetParent);
  open.forEach(each => each.click());
};
window.lvUnveil = id => document.getElementById(id)?.closest('[role=tabpanel]')
  ?.querySelectorAll('.lv-results').forEach(each => each.classList.remove('lv-stale'));
