// Drawing: elements, colours, bars, tables, and heat maps on a canvas.

function el(tag, attributes = {}, ...children) {
  const svg = ['svg', 'path', 'line', 'text', 'circle', 'g'].includes(tag);
  const element = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, '');
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined));
  return element;
}

const isDark = () => document.documentElement.dataset.theme === 'dark';
const ink = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Scales of one hue, and two hues around the middle: blue and orange stay apart for every kind of
// colour vision, and lightness alone tells small from large.
const RAMPS = {
  light: {
    blue: ['#ffffff', '#d6e6f5', '#86bbe0', '#2c7fc0', '#08366f'],
    orange: ['#ffffff', '#fdebd3', '#fdc785', '#f08a2c', '#b84a00'],
    both: ['#0b4f9e', '#7fb4de', '#ffffff', '#fdba74', '#b84a00'],
  },
  dark: {
    blue: ['#10161e', '#15334f', '#1f6298', '#5aa7e6', '#e3f1ff'],
    orange: ['#10161e', '#3d2a14', '#7a4714', '#d07f25', '#ffd9a8'],
    both: ['#8cc6ff', '#245f96', '#131a23', '#8a4d12', '#ffb56b'],
  },
};

function parts(hex) {
  const n = parseInt(hex.slice(1), 16);
  return [n >> 16, (n >> 8) & 255, n & 255];
}

const rampCache = new Map();

// 256 colours of a ramp, as [red, green, blue].
function ramp(name) {
  const key = `${name} ${isDark()}`;
  if (!rampCache.has(key)) {
    const stops = RAMPS[isDark() ? 'dark' : 'light'][name].map(parts);
    rampCache.set(key, Array.from({length: 256}, (_, i) => {
      const x = i / 255 * (stops.length - 1);
      const low = Math.min(Math.floor(x), stops.length - 2);
      return [0, 1, 2].map(c => Math.round(stops[low][c] + (x - low) * (stops[low + 1][c] - stops[low][c])));
    }));
  }
  return rampCache.get(key);
}

const shade = (name, x) => ramp(name)[Math.max(0, Math.min(255, Math.round(255 * x)))];
const css = rgb => `rgb(${rgb.join(' ')})`;

// The style of a box of that colour, with text of a contrast of at least 4.5 (WCAG 2).
function boxStyle(name, x) {
  const rgb = shade(name, x);
  const [r, g, b] = rgb.map(c => c > 10 ? ((c / 255 + 0.055) / 1.055) ** 2.4 : c / 3295);
  const light = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return `background:${css(rgb)};color:${light > 0.18 ? '#000000' : '#ffffff'}`;
}

const diverging = (x, limit) => 0.5 + 0.5 * Math.max(-1, Math.min(1, x / (limit || 1)));
// The same by the square root, so that small values beside a large one have a colour.
const divergingRoot = (x, limit) => diverging(Math.sign(x) * Math.sqrt(Math.abs(x) / (limit || 1)), 1);

// A scale: the colours of a ramp between the numbers at its ends.
function scale(name, low, high) {
  const stops = RAMPS[isDark() ? 'dark' : 'light'][name];
  const box = el('span', {class: 'ramp', style: `background:linear-gradient(90deg,${stops.join(',')})`});
  return el('span', {class: 'scale'}, low, box, high);
}

// Rows of a label, a bar and a number. Bars start in the middle if there are negative values.
function bars(rows, {limit, format = x => number(x)} = {}) {
  const most = limit ?? Math.max(1e-30, ...rows.map(row => Math.abs(row.value)));
  const both = rows.some(row => row.value < 0);
  const box = el('div', {class: 'bars'});
  for (const row of rows) {
    const size = Math.min(1, Math.abs(row.value) / most) * (both ? 50 : 100);
    const start = !both ? 0 : row.value < 0 ? 50 - size : 50;
    const bar = el('i', {class: row.warm ?? row.value < 0 ? 'warm' : '', style: `left:${start}%;width:${size}%`});
    const label = row.choose
      ? el('button', {type: 'button', onclick: row.choose}, row.label)
      : el('span', {class: `label ${row.right ? 'right' : ''}`, title: row.label}, row.label);
    box.append(label, el('span', {class: 'bar', 'aria-hidden': 'true'}, bar),
      el('span', {class: `number ${row.right ? 'right' : ''}`}, format(row.value)));
  }
  return box;
}

// A table; cells that are numbers go to the right.
function table(columns, rows, attributes = {}) {
  const cell = (tag, value) => {
    if (typeof value === 'number') return el(tag, {class: 'n'}, number(value));
    return el(tag, typeof value === 'string' && value.length > 30 ? {class: 'text'} : {}, value);
  };
  return el('div', {class: 'wide'}, el('table', attributes,
    el('thead', {}, el('tr', {}, columns.map(name => el('th', {}, name)))),
    el('tbody', {}, rows.map(row => el('tr', {}, row.map(value => cell('td', value)))))));
}

// The same numbers as text, made when somebody opens it.
function asTable(summary, make) {
  const details = el('details', {class: 'alt'}, el('summary', {}, summary));
  details.addEventListener('toggle', () => {
    if (details.open && details.childElementCount === 1) details.append(make());
  });
  return details;
}

const tip = document.getElementById('tip');
function showTip(event, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const {width, height} = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - width - 8);
  const below = event.clientY + 18;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${below + height > innerHeight ? Math.max(4, event.clientY - height - 12) : below}px`;
}
const hideTip = () => { tip.hidden = true; };

// A canvas with sharp lines on any screen; draw(context) is called with sizes in CSS pixels.
function sharpCanvas(width, height, draw, attributes = {}) {
  const canvas = el('canvas', attributes);
  const dots = window.devicePixelRatio || 1;
  canvas.width = Math.ceil(width * dots);
  canvas.height = Math.ceil(height * dots);
  canvas.style.width = `${width}px`;
  canvas.style.aspectRatio = `${width} / ${height}`;
  const context = canvas.getContext('2d');
  context.scale(dots, dots);
  draw(context);
  return canvas;
}

// An image of rows x columns pixels: value(row, column) in 0 to 1, in the colours of a ramp.
function pixels(rows, columns, value, name) {
  const image = new ImageData(columns, rows);
  const colours = ramp(name);
  for (let row = 0, i = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, i += 4) {
      const [r, g, b] = colours[Math.max(0, Math.min(255, Math.round(255 * value(row, column))))];
      image.data.set([r, g, b, 255], i);
    }
  }
  const canvas = el('canvas', {width: columns, height: rows});
  canvas.getContext('2d').putImageData(image, 0, 0);
  return canvas;
}

// A heat map with names of rows and columns where they fit.
//   rows, columns   names;   value(r, c) in 0 to 1;   about(r, c) the text of a cell;   choose(r, c)
//   here            {row, column} to mark, a row up to a column `until`;   ramp, width, label (for those who do not see it)
function heatMap({rows, columns, value, about, choose, here = {}, ramp: name = 'blue', width, cellHeight, label}) {
  const left = Math.min(90, 10 + 7.5 * Math.max(...rows.map(row => row.length)));
  const cellWidth = Math.max(3, Math.min(44, (width - left) / columns.length));
  const height = cellHeight ?? Math.max(3, Math.min(26, cellWidth));
  const top = 20, everyColumn = Math.ceil(8 / cellWidth);
  const total = [left + cellWidth * columns.length + 2, top + height * rows.length + 2];
  const image = pixels(rows.length, columns.length, value, name);
  const canvas = sharpCanvas(...total, context => {
    context.imageSmoothingEnabled = false;
    context.drawImage(image, left, top, cellWidth * columns.length, height * rows.length);
    context.fillStyle = ink('--soft');
    context.textBaseline = 'middle';
    context.font = '11px system-ui, "DejaVu Sans", sans-serif';
    context.textAlign = 'right';
    const everyRow = Math.ceil(11 / height);
    rows.forEach((row, r) => {
      if (r % everyRow === 0) context.fillText(row, left - 5, top + (r + .5) * height);
    });
    context.textAlign = 'center';
    context.font = '11px ui-monospace, "DejaVu Sans Mono", monospace';
    columns.forEach((column, c) => {
      const fits = Math.max(1, Math.floor(everyColumn * cellWidth / 6.8));
      if (c % everyColumn === 0) context.fillText(column.slice(0, fits), left + (c + .5) * cellWidth, top - 9);
    });
    context.strokeStyle = ink('--ink');
    context.lineWidth = 1.5;
    if (here.column !== undefined && here.column >= 0) {
      context.strokeRect(left + here.column * cellWidth, top, cellWidth, height * rows.length);
    }
    if (here.row !== undefined && here.row >= 0) {
      context.strokeRect(left, top + here.row * height, cellWidth * (here.until ?? columns.length), height);
    }
  }, {role: 'img', 'aria-label': label, class: 'point'});
  const cellOf = event => {
    const box = canvas.getBoundingClientRect();
    const scale = total[0] / box.width;
    const c = Math.floor(((event.clientX - box.left) * scale - left) / cellWidth);
    const r = Math.floor(((event.clientY - box.top) * scale - top) / height);
    return c >= 0 && c < columns.length && r >= 0 && r < rows.length ? [r, c] : null;
  };
  canvas.addEventListener('mousemove', event => {
    const cell = cellOf(event);
    if (cell && about(...cell)) showTip(event, about(...cell));
    else hideTip();
  });
  canvas.addEventListener('mouseleave', hideTip);
  canvas.addEventListener('click', event => {
    const cell = cellOf(event);
    if (cell && choose) choose(...cell);
  });
  return el('div', {class: 'picture'}, canvas);
}

// About four round numbers from 0, or from `low` below it, up to `high`.
function ticks(low, high) {
  const rough = (high - low || 1) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
  const first = Math.ceil(low / step), count = Math.floor(high / step) - first + 1;
  return Array.from({length: count}, (_, i) => (first + i) * step);
}

// Lines over an axis of layers: series [{name, colour, values, from, dashed}], the names
// of those that have one above.
function lineChart({series, names, width, label}) {
  const height = 260, left = 46, right = 24, top = 10, bottom = 28;
  const all = series.flatMap(one => one.values).filter(Number.isFinite);
  const high = Math.max(...all), low = Math.min(0, ...all);
  const x = i => left + (width - left - right) * (names.length > 1 ? i / (names.length - 1) : 0.5);
  const y = value => top + (height - top - bottom) * (1 - (value - low) / (high - low || 1));
  const chart = el('svg', {class: 'chart', width, height, role: 'img', 'aria-label': label, viewBox: `0 0 ${width} ${height}`});
  for (const value of ticks(low, high)) {
    chart.append(el('line', {class: 'axis', x1: left, x2: width - right, y1: y(value), y2: y(value)}),
      el('text', {x: left - 8, y: y(value) + 4, 'text-anchor': 'end'}, String(Number(value.toPrecision(3))).replace('-', '−')));
  }
  const every = Math.ceil(names.length / Math.max(1, Math.floor((width - left) / 46)));
  names.forEach((name, i) => {
    if (i % every) return;
    chart.append(el('line', {class: 'axis', x1: x(i), x2: x(i), y1: height - bottom, y2: height - bottom + 5}),
      el('text', {x: x(i), y: height - 8, 'text-anchor': 'middle'}, name));
  });
  for (const one of series) {
    const points = one.values.map((value, i) => [x(i + one.from), y(value)]);
    chart.append(el('path', {d: `M${points.join('L')}`, fill: 'none', stroke: one.colour, 'stroke-width': one.dashed ? 1.5 : 2.5, 'stroke-dasharray': one.dashed ? '4 4' : 'none'}));
    if (!one.dashed) points.forEach(([cx, cy]) => chart.append(el('circle', {cx, cy, r: 3, fill: one.colour})));
  }
  const keys = series.filter(one => one.name).map(one => el('span', {class: 'scale'}, el('i', {class: 'key', style: `border-top:3px solid ${one.colour}`}), one.name));
  return el('div', {}, el('p', {class: 'legend'}, keys), el('div', {class: 'picture'}, chart));
}
