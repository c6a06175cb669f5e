// Drawing: bars, and heat maps on a canvas.

// The style of a box of that colour of a scale.
function boxStyle(kind, x) {
  const rgb = shade(kind, x);
  return `background:${css(rgb)};color:${inkOn(rgb)}`;
}

const diverging = (x, limit) => 0.5 + 0.5 * Math.max(-1, Math.min(1, x / (limit || 1)));
// The same by the square root, so that small values beside a large one have a colour.
const divergingRoot = (x, limit) => diverging(Math.sign(x) * Math.sqrt(Math.abs(x) / (limit || 1)), 1);

// Rows of a label, a bar and a number. Bars start in the middle if there are negative values.
function bars(rows, {limit, format = x => number(x, 3)} = {}) {
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

// The same numbers as text, made when somebody opens it.
function asTable(summary, make) {
  const details = el('details', {class: 'alt'}, el('summary', {}, summary));
  details.addEventListener('toggle', () => {
    if (details.open && details.childElementCount === 1) details.append(make());
  });
  return details;
}

const tipAt = (event, ...content) => showTip(event.clientX, event.clientY, ...content);

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

// An image of rows x columns pixels: value(row, column) in 0 to 1, in the colours of a scale.
function pixels(rows, columns, value, kind) {
  const image = new ImageData(columns, rows);
  for (let row = 0, i = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, i += 4) {
      const [r, g, b] = shade(kind, value(row, column));
      image.data.set([r, g, b, 255], i);
    }
  }
  const canvas = el('canvas', {width: columns, height: rows});
  canvas.getContext('2d').putImageData(image, 0, 0);
  return canvas;
}

// A heat map with names of rows and columns where they fit.
//   rows, columns   names;   value(r, c) in 0 to 1;   about(r, c) the text of a cell;   choose(r, c)
//   here            {row, column} to mark, a row up to a column `until`;   kind, width, label (for those who do not see it)
function heatMap({rows, columns, value, about, choose, here = {}, kind = 'sequential', width, cellHeight, label}) {
  const left = Math.min(90, 10 + 7.5 * Math.max(...rows.map(row => row.length)));
  const cellWidth = Math.max(3, Math.min(44, (width - left) / columns.length));
  const height = cellHeight ?? Math.max(3, Math.min(26, cellWidth));
  const top = 20, everyColumn = Math.ceil(8 / cellWidth);
  const total = [left + cellWidth * columns.length + 2, top + height * rows.length + 2];
  const image = pixels(rows.length, columns.length, value, kind);
  const canvas = sharpCanvas(...total, context => {
    context.imageSmoothingEnabled = false;
    context.drawImage(image, left, top, cellWidth * columns.length, height * rows.length);
    context.fillStyle = cssColor('--soft');
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
      if (c % everyColumn === 0) context.fillText([...(column.length > fits ? column.replace(/^␣/, '') : column)].slice(0, fits).join(''), left + (c + .5) * cellWidth, top - 9);
    });
    context.strokeStyle = cssColor('--ink');
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
    if (cell && about(...cell)) tipAt(event, about(...cell));
    else hideTip();
  });
  canvas.addEventListener('mouseleave', hideTip);
  canvas.addEventListener('click', event => {
    const cell = cellOf(event);
    if (cell && choose) choose(...cell);
  });
  return el('div', {class: 'picture'}, canvas);
}

// Lines over an axis of layers: series [{name, colour, values, from, dashed}], the names
// of those that have one above.
function lineChart({series, names, width, label}) {
  const height = 260, left = 46, right = 24, top = 10, bottom = 28;
  const all = series.flatMap(one => one.values).filter(Number.isFinite);
  const high = Math.max(...all), low = Math.min(0, ...all);
  const x = i => left + (width - left - right) * (names.length > 1 ? i / (names.length - 1) : 0.5);
  const y = value => top + (height - top - bottom) * (1 - (value - low) / (high - low || 1));
  const chart = svg('svg', {class: 'chart', width, height, role: 'img', 'aria-label': label, viewBox: `0 0 ${width} ${height}`});
  for (const value of niceTicks(low, high, 4)) {
    chart.append(svg('line', {class: 'axis', x1: left, x2: width - right, y1: y(value), y2: y(value)}),
      svg('text', {x: left - 8, y: y(value) + 4, 'text-anchor': 'end'}, number(value, 3)));
  }
  const every = Math.ceil(names.length / Math.max(1, Math.floor((width - left) / 46)));
  names.forEach((name, i) => {
    if (i % every) return;
    chart.append(svg('line', {class: 'axis', x1: x(i), x2: x(i), y1: height - bottom, y2: height - bottom + 5}),
      svg('text', {x: x(i), y: height - 8, 'text-anchor': 'middle'}, name));
  });
  for (const one of series) {
    const points = one.values.map((value, i) => [x(i + one.from), y(value)]);
    chart.append(svg('path', {d: `M${points.join('L')}`, fill: 'none', stroke: one.colour, 'stroke-width': one.dashed ? 1.5 : 2.5, 'stroke-dasharray': one.dashed ? '4 4' : 'none'}));
    if (!one.dashed) points.forEach(([cx, cy]) => chart.append(svg('circle', {cx, cy, r: 3, fill: one.colour})));
  }
  const keys = series.filter(one => one.name).map(one => el('span', {}, el('i', {class: 'key', style: {borderColor: one.colour}}), one.name));
  return el('div', {}, el('p', {class: 'legend'}, keys), el('div', {class: 'picture'}, chart));
}
