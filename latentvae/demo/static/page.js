// What gradio's parts lack: names for pictures, arrow keys on the divider, and pictures that stand still.
// Written before this by the server: PICTURES, what each picture's element shows, by its id; and MODELS, of
// which the first one is chosen at first.
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
    if (words) item.setAttribute('aria-label', words);
  });
  // gradio's own: a name that may not be there, one that is not what is read, and a button in a button
  document.querySelectorAll('.empty[aria-label]:not([role])').forEach(each => each.setAttribute('role', 'img'));
  document.querySelectorAll('button.upload-container[aria-label]').forEach(
    each => each.textContent.trim() && each.removeAttribute('aria-label'));
  document.querySelectorAll('button.icon-button:not([role]) .upload-container').forEach(each => {
    each.setAttribute('aria-label', 'Add pictures');
    const outer = each.closest('.icon-button');
    outer.setAttribute('role', 'group');
    outer.tabIndex = -1;
  });
  // on a phone a strip scrolls, and so does code, which arrow keys must be able to do too
  document.querySelectorAll('.lv-strip .image-frame, .cm-scroller').forEach(each => { each.tabIndex = 0; });
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
const SLOW = 2000;  // milliseconds after which Stop is offered
const isBusy = panel => !!panel.querySelector('.lv-bar [data-testid=status-tracker]:not(.hide)');
const first = panel => panel.querySelector('.lv-pair img')?.src;  // which tells a picture from the one before
const begin = panel => { panel.before = first(panel); panel.classList.remove('lv-fresh'); };
const work = () => document.querySelectorAll('.lv-results').forEach(panel => {
  const busy = isBusy(panel);
  if (busy !== panel.classList.contains('lv-busy')) {
    begin(panel);
    panel.classList.toggle('lv-busy', busy);
    panel.setAttribute('aria-busy', busy);
    clearTimeout(panel.slow);
    panel.classList.remove('lv-slow');
    if (busy) panel.slow = setTimeout(() => panel.classList.add('lv-slow'), SLOW);
  }
  if (busy && first(panel) && first(panel) !== panel.before) {  // a first part of what is being made
    panel.classList.add('lv-fresh');
    panel.classList.remove('lv-stale');
  }
});
document.addEventListener('keydown', step);
document.addEventListener('load', still, true);  // loading does not bubble
// A chosen file that the browser cannot draw, such as a phone's HEIC, which our own reader may well know.
const seen = event => event.target.closest?.('.lv-photo .image-frame')?.classList.toggle(
  'lv-unseen', event.type === 'error');
['load', 'error'].forEach(type => document.addEventListener(type, seen, true));
let waiting = 0;
const soon = () => { waiting ||= requestAnimationFrame(() => { waiting = 0; name(); work(); }); };
// of the document: whether there is a body yet depends on how gradio writes the head
new MutationObserver(soon).observe(document.documentElement,
  { childList: true, subtree: true, attributeFilter: ['class', 'src'] });
// One picture and one model for all tabs: what was made of others is veiled, and the open tab makes its own anew.
window.lvFollow = () => {
  document.querySelectorAll('.lv-results').forEach(each => { begin(each); each.classList.add('lv-stale'); });
  const open = [...document.querySelectorAll('.lv-follow')].filter(
    each => each.closest('[role=tabpanel]')?.offsetParent);
  open.forEach(each => each.click());
};
// not what was stopped, nor what the next one is being made of
window.lvUnveil = id => setTimeout(() => document.getElementById(id)?.closest('[role=tabpanel]')
  ?.querySelectorAll('.lv-results').forEach(each => {
    if (!isBusy(each) && !each.querySelector('.lv-stopped')) each.classList.remove('lv-stale');
  }), 50);
// The open tab and the model stand in the address, as #tab=compare&model=f8c4-small.
const place = () => new URLSearchParams(location.hash.slice(1));
const tabs = () => [...document.querySelectorAll('button[role=tab][id^=lv-tab-]')].filter(
  each => each.offsetParent);
const nameOf = button => button.id.slice('lv-tab-'.length).replace(/-button$/, '');
window.lvNote = changes => {
  const now = place();
  Object.entries(changes).forEach(each => now.set(...each));
  const first = { tab: tabs().length ? nameOf(tabs()[0]) : '', model: MODELS[0] };
  for (const [key, value] of Object.entries(first)) if (now.get(key) === value) now.delete(key);
  const hash = `${now}` && `#${now}`;
  if (hash !== location.hash) history.pushState(null, '', hash || location.pathname + location.search);
};
const openTab = () => {
  const open = tabs(), wanted = place().get('tab');
  const button = open.find(each => nameOf(each) === wanted) ?? open[0];
  if (button && button.getAttribute('aria-selected') !== 'true') button.click();
};
window.lvModel = shown => {  // what the address says, where there is such a model
  setTimeout(openTab);
  const wanted = place().get('model') ?? MODELS[0];
  return MODELS.includes(wanted) ? wanted : shown;
};
document.addEventListener('click', event => {
  const button = event.isTrusted && event.target.closest?.('button[role=tab][id^=lv-tab-]');
  if (button) lvNote({ tab: nameOf(button) });
});
window.addEventListener('popstate', () => document.getElementById('lv-again')?.click());
