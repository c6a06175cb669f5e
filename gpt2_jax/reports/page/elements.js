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
    else if (name === 'style') Object.assign(node.style, value);
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
  if (Number.isInteger(x) && Math.abs(x) < 1e15) return x.toLocaleString('en');
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) return x.toExponential(2);
  return x.toLocaleString('en', { maximumSignificantDigits: digits });
}

const fixed = (x, digits = 4) => (x === null || x === undefined ? 'not finite' : x.toFixed(digits));

const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toPrecision(2)) + ' %';

/* What to show for a token: its own text, with whitespace made visible. */
function visible(token) {
  if (token === '') return '<end of text>';
  return token.replace(/\n/g, '\u21b5').replace(/\t/g, '\u2192').replace(/\r/g, '\u240d').replace(/^ +$/, (s) => '\u00b7'.repeat(s.length));
}

/* An array as page.py packs it: {type, shape, data}, gzip-compressed and in base64. */
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  const block = await new Response(stream).arrayBuffer();
  const kinds = { uint8: Uint8Array, float32: Float32Array, int32: Int32Array };
  return { shape: packed.shape, values: new kinds[packed.type](block) };
}

/* A view of an unpacked array at leading indices. */
function at(array, ...indices) {
  let size = array.values.length, offset = 0;
  for (let i = 0; i < indices.length; i++) {
    size /= array.shape[i];
    offset += indices[i] * size;
  }
  return array.values.subarray(offset, offset + size);
}

// -- theme

const themeListeners = [];
const systemDark = matchMedia('(prefers-color-scheme: dark)');
const isDark = () => document.documentElement.dataset.theme === 'dark';

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  for (const listener of themeListeners) listener();
}

function themeButton() {
  const button = el('button', {
    title: 'Light or dark',
    onclick: () => setTheme(isDark() ? 'light' : 'dark'),
  }, '\u25d0 theme');
  return button;
}

setTheme(systemDark.matches ? 'dark' : 'light');
systemDark.addEventListener('change', () => setTheme(systemDark.matches ? 'dark' : 'light'));

const cssColor = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const seriesColor = (i) => `var(--c${i % 7})`;

// -- colour scales: from the page's ground to one strong colour, or to two; safe for colour-blind eyes

const RAMPS = {
  sequential: {
    light: ['#ffffff', '#d5e4f1', '#8fbbdc', '#3d86bb', '#0f4f88', '#08264a'],
    dark: ['#1b1f23', '#1f3c5e', '#2f6a8f', '#6a9a80', '#c9bb58', '#ffea70'],
  },
  diverging: {
    light: ['#0b4f8a', '#5c9ccb', '#c4ddee', '#ffffff', '#f7cfae', '#e08a44', '#a14400'],
    dark: ['#8fd0ff', '#4a8fc4', '#28455d', '#1b1f23', '#5e3b20', '#c2702a', '#ffb877'],
  },
};

function mix(stops, t) {
  const place = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(place), stops.length - 2), f = place - i;
  const part = (hex, k) => parseInt(hex.slice(1 + 2 * k, 3 + 2 * k), 16);
  return [0, 1, 2].map((k) => Math.round(part(stops[i], k) * (1 - f) + part(stops[i + 1], k) * f));
}

/* A function from values to [r, g, b]. Values that are not finite are grey. */
function colorScale(kind, low, high) {
  const stops = RAMPS[kind][isDark() ? 'dark' : 'light'];
  const table = Array.from({ length: 256 }, (_, i) => mix(stops, i / 255));
  const span = high - low || 1;
  return (value) => (Number.isFinite(value)
    ? table[Math.round(Math.min(Math.max((value - low) / span, 0), 1) * 255)]
    : [128, 128, 128]);
}

const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? '#16181b' : '#f4f5f6');
const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

function scaleKey(kind, low, high, format = number) {
  const bar = el('i');
  const paint = () => {
    bar.style.background = `linear-gradient(90deg, ${RAMPS[kind][isDark() ? 'dark' : 'light'].join(',')})`;
  };
  themeListeners.push(paint);
  paint();
  return el('div', { class: 'scale' }, format(low), bar, format(high));
}

// -- the tooltip, one for the page, also announced to screen readers

const tip = el('div', { class: 'tip', hidden: '', role: 'status' });
document.body.append(tip);

function showTip(x, y, ...content) {
  replace(tip, ...content);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 16 + height > innerHeight ? Math.max(6, y - height - 12) : y + 16}px`;
}

const hideTip = () => { tip.hidden = true; };
addEventListener('scroll', hideTip, { passive: true });
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

function table(heads, rows) {
  return el('div', { class: 'scroll' }, el('table', {},
    el('thead', {}, el('tr', {}, heads.map((head) => el('th', {}, head)))),
    el('tbody', {}, rows.map((row) => el('tr', {}, row.map((cell) => el('td', {}, cell)))))));
}

/* A command to copy. */
function command(text) {
  const button = el('button', { onclick: () => navigator.clipboard?.writeText(text).then(() => { button.textContent = 'copied'; }) }, 'copy');
  return el('div', { class: 'row' }, el('pre', { class: 'code', style: { flex: '1' } }, text), button);
}

const section = (title, lead, ...content) =>
  append(el('section', {}, el('h2', {}, title), lead && el('p', { class: 'lead' }, lead)), content);

const main = document.querySelector('main');

/* Draws the page; body.dataset.ready says that it is complete. */
async function start(draw) {
  await draw();
  document.body.dataset.ready = 'yes';
}
