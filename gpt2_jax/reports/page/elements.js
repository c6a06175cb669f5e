'use strict';
/* Plain building blocks of the pages: elements, numbers, colours, the tooltip, controls. Nothing is
   loaded, and text from a run is only ever set as text. */

const data = JSON.parse(document.getElementById('data').textContent);

// -- elements

function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'style' && typeof value === 'object') Object.assign(node.style, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  return node;
}

const el = (tag, attributes = {}, ...children) =>
  append(set(document.createElement(tag), attributes), children);
const svg = (tag, attributes = {}, ...children) =>
  append(set(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes), children);

function replace(node, ...children) {
  node.replaceChildren();
  return append(node, children);
}

// -- numbers and texts

function number(x, digits = 4) {
  if (x === null || x === undefined || Number.isNaN(x)) return 'none';
  if (!Number.isFinite(x)) return String(x);
  if (x < 0) return `\u2212${number(-x, digits)}`;
  if (Number.isInteger(x) && Math.abs(x) < 1e15) return x.toLocaleString('en');
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) return x.toExponential(2);
  return x.toLocaleString('en', { maximumSignificantDigits: digits });
}

/* About `count` round numbers between low and high. */
function niceTicks(low, high, count) {
  const span = high - low || 1, raw = span / count;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 2.5, 5, 10].find((m) => unit * m >= raw);
  const ticks = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) ticks.push(Math.abs(t) < step * 1e-9 ? 0 : t);
  return ticks;
}

const fixed = (x, digits = 4) => (x === null || x === undefined ? 'not finite'
  : Math.abs(x) < 1e5 ? x.toFixed(digits).replace('-', '\u2212') : number(x));

/* A metric of an update, in the same format on all pages. */
const metric = (name, x) => (x === null || x === undefined ? 'not finite'
  : number(x, { loss: 6, learning_rate: 4 }[name] ?? 5));

const percent = (p) => `${p >= 0.0995 ? (100 * p).toFixed(0) : p >= 1e-4 ? (100 * p).toPrecision(2) : '<\u00a00.01'}\u00a0%`;

/* A token with signs for whitespace, so that it can be seen. */
const visible = (token) => (token === '' ? '<end of text>'
  : token.replace(/\n/g, '\u23ce').replace(/\t/g, '\u21e5').replace(/\r/g, '\u240d').replace(/ /g, '\u2423'));

/* An array as html.py packs it: {type, shape, data}, gzip-compressed and in base64. */
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  const block = await new Response(stream).arrayBuffer();
  const kinds = { uint8: Uint8Array, float32: Float32Array, int32: Int32Array, bfloat16: Uint16Array };
  let values = new kinds[packed.type](block);
  // A bfloat16 is the upper half of a float32.
  if (packed.type === 'bfloat16') values = new Float32Array(Uint32Array.from(values, (half) => half << 16).buffer);
  return { shape: packed.shape, values };
}

/* A view of an unpacked array at leading indices. */
function viewAt(array, ...indices) {
  let size = array.values.length, offset = 0;
  for (let i = 0; i < indices.length; i++) {
    size /= array.shape[i];
    offset += indices[i] * size;
  }
  return array.values.subarray(offset, offset + size);
}

// -- theme, and colour scales: from the page's ground to one strong colour, or to two; safe for
// colour-blind eyes, and lightness alone tells small from large

const RAMPS = {
  sequential: {
    light: ['#ffffff', '#d5e4f1', '#8fbbdc', '#3d86bb', '#0f4f88', '#08264a'],
    dark: ['#1b1f23', '#1f3c5e', '#2f6a8f', '#6a9a80', '#c9bb58', '#ffea70'],
  },
  warm: {
    light: ['#ffffff', '#fdebd3', '#fdc785', '#f08a2c', '#b84a00'],
    dark: ['#1b1f23', '#3d2a14', '#7a4714', '#d07f25', '#ffd9a8'],
  },
  diverging: {
    light: ['#0b4f8a', '#5c9ccb', '#c4ddee', '#ffffff', '#f7cfae', '#e08a44', '#a14400'],
    dark: ['#8fd0ff', '#4a8fc4', '#28455d', '#1b1f23', '#5e3b20', '#c2702a', '#ffb877'],
  },
};

const ramps = {}; // by kind, of the present theme: 256 colours [r, g, b]
const themeListeners = [];
const systemDark = matchMedia('(prefers-color-scheme: dark)');
const root = document.documentElement;
const isDark = () => root.dataset.theme === 'dark';

function setTheme(theme) {
  root.dataset.theme = theme;
  for (const [kind, { [theme]: stops }] of Object.entries(RAMPS)) {
    ramps[kind] = Array.from({ length: 256 }, (_, i) => mix(stops, i / 255));
    root.style.setProperty(`--${kind}`, stops.join(','));
  }
  for (const listener of themeListeners) listener();
}

function mix(stops, t) {
  const place = t * (stops.length - 1);
  const i = Math.min(Math.floor(place), stops.length - 2), f = place - i;
  const channel = (hex, k) => parseInt(hex.slice(1 + 2 * k, 3 + 2 * k), 16);
  return [0, 1, 2].map((k) => Math.round(channel(stops[i], k) * (1 - f) + channel(stops[i + 1], k) * f));
}

const themeButton = () => el('button', {
  title: 'Light or dark',
  onclick: () => setTheme(isDark() ? 'light' : 'dark'),
}, '\u25d0 theme');

setTheme(systemDark.matches ? 'dark' : 'light');
systemDark.addEventListener('change', () => setTheme(systemDark.matches ? 'dark' : 'light'));

const cssColor = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

/* The colour of x, 0 to 1, as [r, g, b]. */
const shade = (kind, x) => ramps[kind][Math.round(Math.min(Math.max(x, 0), 1) * 255)];

/* Black or white text on a colour: the one with a contrast of at least 4.5 (WCAG 2). */
function inkOn(rgb) {
  const [r, g, b] = rgb.map((c) => (c > 10 ? ((c / 255 + 0.055) / 1.055) ** 2.4 : c / 3295));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? '#000000' : '#ffffff';
}

/* The colours of a scale between its ends, numbers or texts. */
function scaleKey(kind, low, high, format = number) {
  const [first, last] = [low, high].map((end) => (typeof end === 'number' ? format(end) : end));
  const colours = el('i', { style: { background: `linear-gradient(90deg, var(--${kind}))` } });
  return el('span', { class: 'scale' }, first, colours, last);
}

// -- the tooltip, one for the page, also announced to screen readers

const tip = el('div', { id: 'tip', class: 'tip', hidden: '', role: 'status' });
document.body.append(tip);

function showTip(x, y, ...content) {
  replace(tip, ...content);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 16 + height > innerHeight ? Math.max(6, y - height - 12) : y + 16}px`;
}

const hideTip = () => { tip.hidden = true; };
addEventListener('keydown', (event) => { if (event.key === 'Escape') hideTip(); });

const tipTable = (rows) =>
  el('table', {}, rows.map(([name, value, color]) =>
    el('tr', {},
      el('td', {}, color && el('span', { class: 'swatch', style: { borderColor: color } }), name),
      el('td', { class: 'number' }, value))));

// -- controls

/* Buttons of which one is pressed. choices: [value, name] pairs. */
function segments(label, choices, chosen, onChange) {
  const buttons = choices.map(([value, name]) => el('button', {
    'aria-pressed': value === chosen,
    onclick: (event) => {
      for (const button of buttons) button.setAttribute('aria-pressed', button === event.currentTarget);
      onChange(value);
    },
  }, name));
  return el('div', { class: 'segments', role: 'group', 'aria-label': label }, buttons);
}

const select = (label, choices, chosen, onChange) =>
  el('label', { class: 'note' }, label, ' ',
    el('select', { onchange: (event) => onChange(event.target.value) },
      choices.map(([value, name]) => el('option', { value, selected: value === chosen }, name))));

function factList(facts) {
  return el('div', { class: 'facts' }, facts.filter(([, value]) => value !== null && value !== undefined)
    .map(([name, value]) => el('div', { class: 'fact' }, el('b', {}, value), el('span', {}, name))));
}

function table(heads, rows, attributes = {}) {
  const cell = (x) => (typeof x === 'number' ? el('td', { class: 'number' }, number(x)) : el('td', {}, x));
  return el('div', { class: 'scroll' }, el('table', attributes,
    el('thead', {}, el('tr', {}, heads.map((head) => el('th', {}, head)))),
    el('tbody', {}, rows.map((row) => el('tr', {}, row.map(cell))))));
}

/* A command to copy. */
function command(text) {
  const button = el('button', { onclick: () => navigator.clipboard?.writeText(text).then(() => { button.textContent = 'copied'; }) }, 'copy');
  return el('div', { class: 'row' }, el('pre', { class: 'code', style: { flex: '1' } }, text), button);
}

const section = (title, lead, ...content) =>
  append(el('section', {}, el('h2', {}, title), lead && el('p', { class: 'lead' }, lead)), content);

const main = document.querySelector('main');

/* Lets the browser show what is drawn so far, before longer work. */
const painted = () => new Promise((resolve) => { requestAnimationFrame(() => setTimeout(resolve)); });

/* Draws the page; body.dataset.ready says that it is complete. A frame whose document is open
   holds back the load event, which a headless browser waits for before it takes a picture. */
async function start(draw) {
  const frame = el('iframe', { hidden: '' });
  document.body.append(frame);
  frame.contentDocument?.open();
  try {
    await draw();
    document.body.dataset.ready = 'yes';
  } finally {
    frame.remove();
  }
}
