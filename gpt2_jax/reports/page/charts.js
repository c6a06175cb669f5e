'use strict';
/* Charts: lines, heat maps, rows of tokens. Built on elements.js. */

addEventListener('scroll', hideTip, { passive: true });

const seriesColor = (i) => `var(--c${i % 7})`;

/* A function from values to [r, g, b]. Values that are not finite are grey. */
function colorScale(kind, low, high) {
  const span = high - low || 1;
  return (value) => (Number.isFinite(value) ? shade(kind, (value - low) / span) : [128, 128, 128]);
}

// -- axes

/* A number that fits beside a vertical axis: 10,000,000,000 is 1e10. */
const axisNumber = (x, digits = 3) => (Math.abs(x) < 1e6 ? number(x, digits) : x.toExponential(2).replace(/\.?0*e\+/, 'e').replace('-', '\u2212'));

/* The numbers beside an axis, with as few digits as tell them apart. */
function axisNumbers(ticks) {
  const labels = [3, 4, 5, 6].map((digits) => ticks.map((tick) => axisNumber(tick, digits)));
  return labels.find((names) => new Set(names).size === names.length) ?? labels.at(-1);
}

function logTicks(low, high, most) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const m of [1, 2, 5]) {
      const tick = m * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push([tick, m]);
    }
  }
  const whole = ticks.filter(([, m]) => m === 1);
  const chosen = ticks.length <= most ? ticks : whole.length ? whole : ticks;
  const every = Math.ceil(chosen.length / most);
  return chosen.filter((_, i) => i % every === 0).map(([tick]) => tick);
}

/* A range without two of 1, 2, 5, 10, .. has evenly spaced ticks, and a single value has one. */
function someTicks(low, high, most) {
  for (const ticks of [logTicks(low, high, most), niceTicks(low, high, most)]) if (ticks.length > 1) return ticks;
  return low === high ? [low] : [low, high];
}

/* Steps on a logarithmic axis are shown as 1 + step, so that step 0 has a place. */
function axis(low, high, kind) {
  if (kind === 'log') {
    const [a, b] = [Math.log(low), Math.log(high)];
    return { place: (v) => (Math.log(v) - a) / (b - a || 1), ticks: (n) => someTicks(low, high, n) };
  }
  if (kind === 'log1p') {
    const [a, b] = [Math.log1p(low), Math.log1p(high)];
    return {
      place: (v) => (Math.log1p(v) - a) / (b - a || 1),
      ticks: (n) => [...(low <= 0 ? [0] : []), ...logTicks(Math.max(low, 1), Math.max(high, 1), n - 1)],
    };
  }
  return { place: (v) => (v - low) / (high - low || 1), ticks: (n) => niceTicks(low, high, n) };
}

/* The points of a curve that differ on the screen: the lowest and the highest at each pixel across. */
function thin(points, X) {
  const kept = [];
  for (let i = 0; i < points.length;) {
    const pixel = Math.round(X(points[i][0]));
    let lowest = points[i], highest = points[i];
    for (; i < points.length && Math.round(X(points[i][0])) === pixel; i++) {
      if (points[i][1] < lowest[1]) lowest = points[i];
      if (points[i][1] > highest[1]) highest = points[i];
    }
    kept.push(...(lowest === highest ? [lowest] : lowest[0] < highest[0] ? [lowest, highest] : [highest, lowest]));
  }
  return kept;
}

// -- line charts

/* options: title, series [{name, x, y, color, dash, width}], references [{name, y}], xKind and yKind
   ('linear', 'log', 'log1p'), xLabel, height, format, onPick(x). Returns {node, mark(x)}. */
function lineChart(options) {
  const { title, references = [], xKind = 'linear', yKind = 'linear', xLabel = 'step', height = 210, format = number } = options;
  const series = options.series.map((s, i) => ({
    color: seriesColor(i), dash: null, width: 1.8, ...s, shown: true,
    points: s.x.map((x, j) => [x, s.y[j]]).filter(([, y]) => y !== null && Number.isFinite(y) && (yKind !== 'log' || y > 0)),
  })).filter((s) => s.points.length);
  const picture = svg('svg', { role: 'img', tabindex: 0, height });
  const legend = el('div', { class: 'legend' });
  const node = el('div', { class: 'chart' }, title && el('h3', {}, title), legend,
    series.length ? picture : el('p', { class: 'note' }, 'no value to show'));
  let marked = null, cursor = null, layout = null;

  for (const s of series) {
    if (series.length === 1 && !references.length) break;
    const button = el('button', {
      'aria-pressed': 'true',
      onclick: () => {
        s.shown = !s.shown;
        button.setAttribute('aria-pressed', s.shown);
        draw();
      },
    }, el('span', { class: 'swatch', style: { borderColor: s.color, borderTopStyle: s.dash ? 'dashed' : 'solid' } }), s.name);
    legend.append(button);
  }

  function draw() {
    const width = Math.max(node.clientWidth, 240), left = 52, right = 10, top = 8, bottom = 34;
    const shown = series.filter((s) => s.shown);
    const xs = shown.flatMap((s) => [s.points[0][0], s.points.at(-1)[0]]);
    let ys = shown.flatMap((s) => s.points.map((p) => p[1]));
    let low = Infinity, high = -Infinity;
    for (const y of ys.concat(references.map((r) => r.y))) { low = Math.min(low, y); high = Math.max(high, y); }
    replace(picture);
    set(picture, { viewBox: `0 0 ${width} ${height}`, 'aria-label': describe(shown) });
    if (!xs.length || !Number.isFinite(low)) { layout = null; return; }
    if (yKind !== 'log') { const pad = (high - low || Math.abs(high) || 1) * 0.05; low -= pad; high += pad; }
    const xAxis = axis(Math.min(...xs), Math.max(...xs), xKind), yAxis = axis(low, high, yKind);
    const X = (x) => left + xAxis.place(x) * (width - left - right);
    const Y = (y) => height - bottom - yAxis.place(y) * (height - top - bottom);
    const yTicks = yAxis.ticks(5), yLabels = axisNumbers(yTicks);
    for (const [i, tick] of yTicks.entries()) {
      picture.append(svg('line', { class: 'axis', x1: left, x2: width - right, y1: Y(tick), y2: Y(tick) }),
        svg('text', { x: left - 7, y: Y(tick) + 4, 'text-anchor': 'end' }, yLabels[i]));
    }
    for (const tick of xAxis.ticks(Math.max(3, Math.floor(width / 90)))) {
      picture.append(svg('line', { class: 'axis', x1: X(tick), x2: X(tick), y1: top, y2: height - bottom }),
        svg('text', { x: X(tick), y: height - bottom + 15, 'text-anchor': 'middle' }, number(tick, 3)));
    }
    picture.append(svg('text', { x: width - right, y: height - 4, 'text-anchor': 'end' }, xLabel));
    const named = []; // heights with the name of a line: names would cover one another
    for (const r of references) {
      const y = Y(r.y);
      picture.append(svg('line', { x1: left, x2: width - right, y1: y, y2: y, stroke: 'var(--faint)', 'stroke-dasharray': '5 4' }));
      if (named.some((other) => Math.abs(other - y) < 12)) continue;
      picture.append(svg('text', { x: left + 6, y: y - 4, 'data-reference': r.name }, `${r.name} ${format(r.y)}`));
      named.push(y);
    }
    for (const s of shown) {
      const path = thin(s.points, X).map(([x, y], i) => `${i ? 'L' : 'M'}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join('');
      picture.append(svg('path', { class: 'curve', d: path, stroke: s.color, 'stroke-width': s.width, 'stroke-dasharray': s.dash || '' }));
      if (s.points.length < 40) {
        for (const [x, y] of s.points) picture.append(svg('circle', { cx: X(x), cy: Y(y), r: 2.2, fill: s.color }));
      }
    }
    cursor = svg('line', { class: 'cursor', y1: top, y2: height - bottom, visibility: 'hidden' });
    picture.append(cursor);
    const places = [...new Set(shown.flatMap((s) => s.points.map((p) => p[0])))].sort((a, b) => a - b);
    layout = { X, Y, width, top, bottom, left, right, shown, places };
    drawMark();
  }

  function describe(shown) {
    const parts = shown.map((s) => `${s.name} from ${format(s.points[0][1])} at ${number(s.points[0][0])} to ${format(s.points.at(-1)[1])} at ${number(s.points.at(-1)[0])}`);
    return `${title || 'Chart'}: ${parts.join('; ')}${references.map((r) => `; ${r.name} ${format(r.y)}`).join('')}`;
  }

  function drawMark() {
    picture.querySelector('.marker')?.remove();
    if (marked === null || !layout) return;
    const x = layout.X(marked);
    if (x >= layout.left - 1 && x <= layout.width - layout.right + 1) {
      picture.append(svg('line', { class: 'marker', x1: x, x2: x, y1: layout.top, y2: height - layout.bottom }));
    }
  }

  let current = null;
  function point(place, clientX, clientY) {
    current = place;
    const x = layout.X(place);
    set(cursor, { x1: x, x2: x, visibility: 'visible' });
    const rows = layout.shown.map((s) => {
      const near = s.points.reduce((a, b) => (Math.abs(b[0] - place) < Math.abs(a[0] - place) ? b : a));
      return [s.name, format(near[1]) + (near[0] === place ? '' : ` (${number(near[0])})`), s.color];
    });
    showTip(clientX, clientY, el('b', {}, `${xLabel} ${number(place)}`), tipTable(rows));
  }

  picture.addEventListener('pointermove', (event) => {
    if (!layout) return;
    const box = picture.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * layout.width;
    point(layout.places.reduce((a, b) => (Math.abs(layout.X(b) - x) < Math.abs(layout.X(a) - x) ? b : a)), event.clientX, event.clientY);
  });
  const leave = () => { hideTip(); if (cursor) set(cursor, { visibility: 'hidden' }); };
  picture.addEventListener('pointerleave', leave);
  picture.addEventListener('blur', leave);
  picture.addEventListener('click', () => { if (options.onPick && current !== null) options.onPick(current); });
  picture.addEventListener('keydown', (event) => {
    if (!layout) return;
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
    if (event.key === 'Enter' && options.onPick && current !== null) options.onPick(current);
    if (!step) return;
    event.preventDefault();
    const i = Math.max(0, layout.places.indexOf(current));
    const place = layout.places[Math.min(Math.max(i + step, 0), layout.places.length - 1)];
    const box = picture.getBoundingClientRect();
    point(place, box.left + (layout.X(place) / layout.width) * box.width, box.top + 20);
  });
  new ResizeObserver(draw).observe(node);
  return { node, mark: (x) => { marked = x; drawMark(); } };
}

// -- heat maps

/* options: rows (labels), columns (labels or numbers), values [row][column], kind, low, high, format,
   rowHeight, square, columnName, columnTicks (indices), label(row, column), onPick(row, column).
   Returns {node, mark(columns' index, a fraction allowed), choose(row, column), update(values)}. */
function heatMap(options) {
  const { rows, columns, kind = 'sequential', low = 0, high = 1, format = number, rowHeight = 14, columnName = 'step' } = options;
  let values = options.values;
  const canvas = el('canvas', { width: columns.length, height: rows.length, role: 'img', tabindex: 0, 'aria-label': options.label || '' });
  canvas.style.height = options.square ? 'auto' : `${rows.length * rowHeight}px`;
  if (options.square) canvas.style.aspectRatio = `${columns.length} / ${rows.length}`;
  const line = el('div', { class: 'line', hidden: '' }), box = el('div', { class: 'box', hidden: '' });
  const field = el('div', { class: 'field' }, canvas, line, box);
  const labels = el('div', { class: 'labels' });
  const most = options.mostLabels || rows.length, every = Math.ceil(rows.length / most);
  labels.style.gridTemplateRows = `repeat(${rows.length}, minmax(0, 1fr))`;
  rows.forEach((row, i) => labels.append(el('span', {}, i % every === 0 ? String(row) : '')));
  const ticks = el('div', { class: 'ticks' });
  for (const i of options.columnTicks || []) {
    ticks.append(el('span', { style: { left: `${(100 * (i + 0.5)) / columns.length}%` } }, number(columns[i])));
  }
  const longest = rows.map(String).reduce((a, b) => (b.length > a.length ? b : a), '');
  const node = el('div', { class: 'heat' }, el('div', { class: 'side', 'aria-hidden': 'true' }, el('b', {}, longest), labels), field, ticks);

  function paint() {
    const context = canvas.getContext('2d'), image = context.createImageData(columns.length, rows.length);
    const color = colorScale(kind, low, high);
    for (let r = 0; r < rows.length; r++) {
      for (let c = 0; c < columns.length; c++) {
        const [red, green, blue] = color(values[r][c]), p = 4 * (r * columns.length + c);
        image.data[p] = red; image.data[p + 1] = green; image.data[p + 2] = blue; image.data[p + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
  }
  themeListeners.push(paint);
  paint();

  let row = 0, column = 0;
  function tell(x, y) {
    showTip(x, y, el('b', {}, `${rows[row]}, ${columnName} ${visible(String(columns[column]))}`),
      el('div', {}, options.tell ? options.tell(row, column) : format(values[row][column])));
  }
  function locate(event) {
    const area = canvas.getBoundingClientRect();
    column = Math.min(Math.floor(((event.clientX - area.left) / area.width) * columns.length), columns.length - 1);
    row = Math.min(Math.floor(((event.clientY - area.top) / area.height) * rows.length), rows.length - 1);
    column = Math.max(column, 0); row = Math.max(row, 0);
  }
  canvas.addEventListener('pointermove', (event) => { locate(event); tell(event.clientX, event.clientY); });
  canvas.addEventListener('pointerleave', hideTip);
  canvas.addEventListener('blur', hideTip);
  canvas.addEventListener('click', (event) => { locate(event); options.onPick?.(row, column); });
  canvas.addEventListener('keydown', (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === 'Enter') options.onPick?.(row, column);
    if (!move) return;
    event.preventDefault();
    row = Math.min(Math.max(row + move[0], 0), rows.length - 1);
    column = Math.min(Math.max(column + move[1], 0), columns.length - 1);
    const area = canvas.getBoundingClientRect();
    choose(row, column);
    tell(area.left + ((column + 0.5) / columns.length) * area.width, area.top + ((row + 0.5) / rows.length) * area.height);
  });
  function choose(r, c) {
    box.hidden = false;
    Object.assign(box.style, {
      left: c === null ? '0' : `${(100 * c) / columns.length}%`, width: c === null ? '100%' : `${100 / columns.length}%`,
      top: `${(100 * r) / rows.length}%`, height: `${100 / rows.length}%`,
    });
  }
  return {
    node, choose,
    mark: (place) => { line.hidden = false; line.style.left = `calc(${(100 * (place + 0.5)) / columns.length}% - 1px)`; },
    update: (next) => { values = next; paint(); },
  };
}

/* Where a step lies among sorted steps, as an index with a fraction, for heatMap.mark. */
function indexOf(steps, step) {
  for (let i = 0; i < steps.length; i++) {
    if (steps[i] === step) return i;
    if (steps[i] > step) return i ? i - 1 + (step - steps[i - 1]) / (steps[i] - steps[i - 1]) : 0;
  }
  return steps.length - 1;
}

/* About `count` indices of `steps` to label, the first and the last among them. */
function someIndices(steps, count) {
  const every = Math.max(1, Math.ceil((steps.length - 1) / count));
  const chosen = steps.map((_, i) => i).filter((i) => i % every === 0);
  return chosen;
}

// -- rows of tokens

/* options: tokens, values (one for each token; null: none), kind, low, high, tell(i) -> content,
   onPick(i). Returns {node, update(values, kind, low, high), choose(i)}. */
function tokenRow(options) {
  const node = el('div', { class: 'tokens' });
  let { values, kind = 'sequential', low = 0, high = 1 } = options;
  const spans = options.tokens.map((token, i) => {
    // A space within a token is a space; a token of spaces has a sign to point at.
    const shown = /^ +$/.test(token) ? '\u00b7'.repeat(token.length) : visible(token).replaceAll('\u2423', ' ');
    const span = el('span', options.onPick ? { tabindex: 0, role: 'button' } : {}, shown);
    if (token.endsWith('\n')) span.append(document.createTextNode('\n'));
    if (options.tell) {
      span.addEventListener('pointerenter', (event) => showTip(event.clientX, event.clientY, options.tell(i)));
      span.addEventListener('pointerleave', hideTip);
      span.addEventListener('focus', () => { const b = span.getBoundingClientRect(); showTip(b.left, b.bottom - 10, options.tell(i)); });
      span.addEventListener('blur', hideTip);
    }
    if (options.onPick) {
      span.addEventListener('click', () => options.onPick(i));
      span.addEventListener('keydown', (event) => {
        if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); options.onPick(i); }
        const next = { ArrowLeft: spans[i - 1], ArrowRight: spans[i + 1] }[event.key];
        if (next) { event.preventDefault(); next.focus(); }
      });
    }
    return span;
  });
  append(node, spans);
  function paint() {
    const color = colorScale(kind, low, high);
    spans.forEach((span, i) => {
      const value = values[i], ground = value === null || value === undefined ? null : color(value);
      span.style.background = ground ? css(ground) : 'none';
      span.style.color = ground ? inkOn(ground) : 'var(--faint)';
    });
  }
  themeListeners.push(paint);
  paint();
  return {
    node,
    update: (next, nextKind = kind, nextLow = low, nextHigh = high) => {
      values = next; kind = nextKind; low = nextLow; high = nextHigh;
      paint();
    },
    choose: (chosen) => spans.forEach((span, i) => span.classList.toggle('chosen', i === chosen)),
  };
}
