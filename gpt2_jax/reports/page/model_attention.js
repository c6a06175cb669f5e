// What is chosen, and the view of attention.

const state = {p: 0, layer: 0, head: 0, ablated: null, view: 'attention', score: 'previous', lens: 'logit', terms: 'centred'};

const explain = (...text) => el('p', {class: 'explain'}, ...text);
const quoted = text => el('span', {class: 'quoted'}, visible(text));
const room = () => Math.max(260, document.getElementById('view').clientWidth);

// The guess that the views are about.
const guessName = p => p === T - 1 ? `the most likely token (${visible(targetText(p))}), taken as if it were right` : `token ${p + 1}, ‘${visible(targetText(p))}’`;

const choice = (label, options, chosen, change) => select(label, Object.entries(options), chosen, change);

const missing = section => el('p', {class: 'explain'}, `This page was made without this part (--skip=${section}).`);

// Attention

const thumbnails = new Map();

// All heads in one picture, drawn once for each theme and size.
function headPictures(size) {
  const key = `${size} ${isDark()}`;
  if (!thumbnails.has(key)) {
    const image = new ImageData(size, size);
    const each = [];
    for (let layer = 0; layer < L; layer++) {
      for (let head = 0; head < H; head++) {
        for (let row = 0; row < size; row++) {
          for (let column = 0; column < size; column++) {
            // The largest weight of the patch, so that a thin diagonal stays in a small picture.
            let most = 0;
            const [p0, p1] = [Math.floor(row * T / size), Math.max(Math.floor(row * T / size) + 1, Math.floor((row + 1) * T / size))];
            const [s0, s1] = [Math.floor(column * T / size), Math.max(Math.floor(column * T / size) + 1, Math.floor((column + 1) * T / size))];
            for (let p = p0; p < p1; p++) for (let s = s0; s < s1; s++) most = Math.max(most, rootWeight(layer, head, p, s));
            const [r, g, b] = shade('sequential', most);
            image.data.set([r, g, b, 255], 4 * (row * size + column));
          }
        }
        const canvas = el('canvas', {width: size, height: size});
        canvas.getContext('2d').putImageData(image, 0, 0);
        each.push(canvas);
      }
    }
    thumbnails.clear();
    thumbnails.set(key, each);
  }
  return thumbnails.get(key);
}

// What the outlines of the heads can show: a number from 0 to 1 for each head, and its name.
function markings() {
  const found = {};
  for (const kind of Object.keys(LOOKS)) {
    found[`text ${kind}`] = {name: `in this text: ${LOOKS[kind].name}`, value: (l, h) => looksAt(kind, l, h), format: percent, alike: uniform.text};
  }
  for (const kind of Object.keys(SCORES)) {
    if (has(`score.${kind}`)) found[kind] = {name: `in random text: ${SCORES[kind]}`, value: (l, h) => at(`score.${kind}`, l, h), format: percent, alike: uniform.random};
  }
  if (has('ablation')) found.loss = {name: 'loss that it saves', value: (l, h) => mean(lossChanges(l, h)), format: x => `${signed(x)}\u00a0nats`, relative: true};
  return found;
}

const FRAMED = .15; // of 1, or of the largest value: what gets a frame

function headGrid(width) {
  const marks = markings();
  const mark = marks[state.score] || Object.values(marks)[0];
  const values = Array.from({length: L * H}, (_, i) => mark.value(Math.floor(i / H), i % H));
  const most = mark.relative ? Math.max(1e-9, ...values) : 1;
  const left = 34, gap = L * H > 200 ? 2 : 5;
  const size = Math.max(9, Math.min(92, Math.floor((width - left) / H) - gap));
  const top = 16, step = size + gap;
  const pictures = headPictures(Math.min(size, 64));
  const canvas = sharpCanvas(left + H * step, top + L * step, context => {
    context.imageSmoothingEnabled = false;
    context.fillStyle = cssColor('--soft');
    context.font = '11px system-ui, "DejaVu Sans", sans-serif';
    context.textBaseline = 'middle';
    context.textAlign = 'center';
    const every = Math.ceil(14 / step);
    for (let head = 0; head < H; head += every) context.fillText(head, left + head * step + size / 2, 7);
    context.textAlign = 'right';
    for (let layer = 0; layer < L; layer += every) context.fillText(`h_${layer}`, left - 6, top + layer * step + size / 2);
    for (let i = 0; i < L * H; i++) {
      const [layer, head] = [Math.floor(i / H), i % H];
      const [x, y] = [left + head * step, top + layer * step];
      context.drawImage(pictures[i], x, y, size, size);
      context.strokeStyle = cssColor('--line');
      context.lineWidth = 1;
      context.strokeRect(x - .5, y - .5, size + 1, size + 1);
      const strength = Math.max(0, values[i]) / most;
      if (strength > FRAMED) {
        context.strokeStyle = cssColor('--mark');
        context.lineWidth = 1 + 3 * strength;
        context.strokeRect(x - 1, y - 1, size + 2, size + 2);
      }
      if (state.ablated && state.ablated.layer === layer && state.ablated.part === head) {
        context.strokeStyle = cssColor('--mark');
        context.lineWidth = 2;
        context.beginPath();
        context.moveTo(x, y); context.lineTo(x + size, y + size);
        context.moveTo(x + size, y); context.lineTo(x, y + size);
        context.stroke();
      }
      if (layer === state.layer && head === state.head) {
        context.strokeStyle = cssColor('--ink');
        context.lineWidth = 2;
        context.setLineDash([3, 2]);
        context.strokeRect(x - 1.5, y - 1.5, size + 3, size + 3);
        context.setLineDash([]);
      }
    }
  }, {class: 'point', id: 'heads', tabindex: 0, role: 'img', 'aria-label': `The attention patterns of ${L} layers with ${H} heads each. Strongest for ${mark.name}: ${strongest(values, mark, 3).map(one => one.label).join(', ')}`});
  const headOf = event => {
    const box = canvas.getBoundingClientRect();
    const scale = (left + H * step) / box.width;
    const head = Math.floor(((event.clientX - box.left) * scale - left) / step);
    const layer = Math.floor(((event.clientY - box.top) * scale - top) / step);
    return head >= 0 && head < H && layer >= 0 && layer < L ? [layer, head] : null;
  };
  canvas.addEventListener('mousemove', event => {
    const found = headOf(event);
    if (!found) return hideTip();
    tipAt(event, `${partName(...found)}\n${mark.name}: ${mark.format(mark.value(...found))}`);
  });
  canvas.addEventListener('mouseleave', hideTip);
  canvas.addEventListener('click', event => {
    const found = headOf(event);
    if (found) change({layer: found[0], head: found[1]});
  });
  return [el('div', {class: 'picture'}, canvas), mark, values, most * FRAMED];
}

function strongest(values, mark, count) {
  return values.map((value, i) => ({value, layer: Math.floor(i / H), head: i % H}))
    .sort((a, b) => b.value - a.value).slice(0, count)
    .map(one => ({...one, label: partName(one.layer, one.head), choose: () => change({layer: one.layer, head: one.head})}));
}

// The text with a line from a position to each that the head looks at; scrolled there if `follow`.
function textWithLines(query, follow) {
  const box = el('div', {class: 'lines', id: 'lines'});
  const spans = FACTS.shown.map((text, index) => {
    const w = weight(state.layer, state.head, query, index);
    const span = el('span', {class: `token ${index === query ? 'here' : ''}`, style: index <= query ? boxStyle('sequential', Math.sqrt(w)) : 'opacity:.45', 'data-at': index},
      visible(text).replace(/␣/g, ' '));
    span.addEventListener('mouseenter', () => box.replaceWith(textWithLines(index, false)));
    box.append(span);
    if (text.includes('\n')) box.append(el('br'));
    return span;
  });
  const lines = svg('svg', {'aria-hidden': 'true'});
  box.append(lines);
  requestAnimationFrame(() => {
    if (follow) box.parentElement.scrollTop = spans[query].offsetTop - 150;
    const frame = box.getBoundingClientRect();
    const middle = span => {
      const r = span.getClientRects()[0] || span.getBoundingClientRect();
      return [r.left + r.width / 2 - frame.left, r.top - frame.top, r.height];
    };
    const [x1, y1] = middle(spans[query]);
    for (let s = 0; s <= query; s++) {
      const w = weight(state.layer, state.head, query, s);
      if (w < .03) continue;
      const [x2, y2] = middle(spans[s]);
      const lift = Math.min(26, 8 + Math.abs(x2 - x1) / 8);
      const path = svg('path', {d: `M${x1},${y1 + 2} C${x1},${y1 - lift} ${x2},${y2 - lift} ${x2},${y2 + 2}`, fill: 'none', 'stroke-width': .6 + 4.5 * w, 'stroke-linecap': 'round'});
      path.style.stroke = cssColor('--mark');
      path.style.opacity = .3 + .7 * w;
      lines.append(path);
    }
  });
  return box;
}

function fillAttention(panel) {
  if (!L) return panel.append(explain('This model has no layers, and so no attention.'));
  const width = room();
  const wide = width > 760;
  const marks = markings();
  if (!(state.score in marks)) state.score = Object.keys(marks)[0];
  const gridWidth = wide ? Math.floor(Math.min(width * .46, Math.max(220, H * 92))) : width;
  const [grid, mark, values, framed] = headGrid(gridWidth);
  const {layer, head, p} = state;
  panel.append(
    el('h2', {}, 'Where each head looks'),
    explain('A row is a position, a column an earlier one that it can look at; the stronger the colour, the larger the weight. Each row sums to 1. ',
      'Frames mark the heads that look most at what you choose:'),
    el('div', {class: 'choices'}, choice('Frames:', Object.fromEntries(Object.entries(marks).map(([key, one]) => [key, one.name])), state.score, score => change({score}))));
  const best = strongest(values, mark, Math.min(5, L * H));
  panel.append(el('p', {class: 'soft', id: 'frames'},
    best[0].value > framed ? `Orange: above ${mark.format(framed)}. ` : `No head of this model does this (best: ${mark.format(best[0].value)}). `,
    'Dashed: the head you chose.', mark.alike ? ` Uniform attention would give ${percent(mark.alike)}.` : '',
    state.score in SCORES ? ` Random text: ${FACTS.repeated} random tokens, then the same again, so that only position and repetition count.` : ''));
  const left = el('div', {}, grid, el('h3', {}, `Strongest: ${mark.name}`),
    el('div', {id: 'strongest'}, bars(best, {limit: mark.relative ? undefined : 1, format: mark.format})));

  const large = Math.min(wide ? width - gridWidth - 26 : width, 560);
  const labels = FACTS.shown.map(visible);
  const map = heatMap({
    rows: labels, columns: labels, width: large, cellHeight: undefined,
    value: (q, s) => rootWeight(layer, head, q, s),
    about: (q, s) => s > q ? null : `from ${q} ‘${labels[q]}’ to ${s} ‘${labels[s]}’: ${percent(weight(layer, head, q, s))}`,
    choose: q => change({p: q}),
    here: {row: p, until: p + 1},
    label: `The attention pattern of ${partName(layer, head)}: ${T} positions`,
  });
  const top = Array.from({length: p + 1}, (_, s) => ({label: `${s} ${labels[s]}`, value: weight(layer, head, p, s)}))
    .sort((a, b) => b.value - a.value).slice(0, 6);
  const facts = [
    ...Object.keys(LOOKS).map(kind => [`looks at ${LOOKS[kind].name}, in this text`, percent(looksAt(kind, layer, head))]),
    ...Object.keys(SCORES).filter(kind => has(`score.${kind}`)).map(kind => [`looks at ${SCORES[kind]}, in random text repeated once`, percent(at(`score.${kind}`, layer, head))]),
  ];
  if (has('ablation')) facts.push(['mean loss without it', meanWithout({layer, part: head})]);
  const right = el('div', {},
    el('h3', {style: 'margin-top:0', id: 'head-name'}, `Head ${partName(layer, head)} `, ablateButton(layer, head)),
    el('div', {class: 'text'}, textWithLines(p, true)),
    el('p', {class: 'soft'}, 'Lines: from the marked position to what it looks at. Move over the text to see other positions.'),
    scaleKey('sequential', 'weight 0', '1, by its square root'), map);
  panel.append(el('div', wide ? {class: 'fixed', style: `grid-template-columns:${gridWidth}px minmax(0,1fr)`} : {}, left, right));
  panel.append(el('div', {class: 'side'},
    el('div', {class: 'grow'}, el('h3', {}, `From position ${p} ‘${labels[p]}’, where ${p === T - 1 ? 'the token after the text' : `token ${p + 1} ‘${labels[p + 1]}’`} is guessed`), el('div', {id: 'weights'}, bars(top, {limit: 1, format: percent}))),
    el('div', {class: 'grow'}, el('h3', {}, 'This head in numbers'), table(['', ''], facts, {id: 'head-facts'}))));
  panel.append(asTable('All weights from this position, as a table', () => table(['position', 'token', 'weight'],
    Array.from({length: p + 1}, (_, s) => [String(s), labels[s], percent(weight(layer, head, p, s))]))));
  panel.append(asTable('All heads, as a table', () => table(['head', ...Object.values(marks).map(one => one.name)],
    values.map((_, i) => [partName(Math.floor(i / H), i % H), ...Object.values(marks).map(one => one.format(one.value(Math.floor(i / H), i % H)))]))));
}

function ablateButton(layer, part) {
  if (!has('ablation')) return null;
  const on = state.ablated && state.ablated.layer === layer && state.ablated.part === part;
  return el('span', {}, el('button', {type: 'button', id: 'ablate', 'aria-pressed': String(Boolean(on)), title: 'See every loss without it (a)', onclick: () => toggleAblation(layer, part)}, on ? 'put it back' : 'ablate'),
    el('small', {id: 'ablate-result'}, on ? ` ${meanWithout(state.ablated)}` : ''));
}

function toggleAblation(layer, part) {
  const on = state.ablated && state.ablated.layer === layer && state.ablated.part === part;
  change({ablated: on ? null : {layer, part}});
}
