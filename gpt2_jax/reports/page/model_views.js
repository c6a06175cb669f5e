// The views. Each has a name, a key, and fill(panel), called whenever something was chosen.

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
  const spans = FACTS.tokens.map((id, index) => {
    const w = weight(state.layer, state.head, query, index);
    const span = el('span', {class: `token ${index === query ? 'here' : ''}`, style: index <= query ? boxStyle('sequential', Math.sqrt(w)) : 'opacity:.45', 'data-at': index},
      visible(tokenText(id)).replace(/␣/g, ' '));
    span.addEventListener('mouseenter', () => box.replaceWith(textWithLines(index, false)));
    box.append(span);
    if (/\n/.test(tokenText(id))) box.append(el('br'));
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
  const labels = FACTS.tokens.map(id => visible(tokenText(id)));
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

// Layers

function guess(id, probability, target) {
  const text = visible(tokenText(id));
  return el('span', {class: `guess ${id === target ? 'right' : ''}`, style: boxStyle('sequential', Math.sqrt(probability))}, el('b', {}, text), el('small', {}, percent(probability)));
}

function fillLayers(panel) {
  const {p} = state;
  const target = at('target', p);
  const lenses = {logit: 'logit lens', ...(has('jacobian.rank') ? {jacobian: 'Jacobian lens'} : {})};
  if (!(state.lens in lenses)) state.lens = 'logit';
  panel.append(el('h2', {}, 'The guess after each layer'),
    explain(`The logit lens reads the residual stream after a layer as if the model ended there. The Jacobian lens first carries it to the end by what the later layers do to it on average (over the first ${FACTS.firstTokens} tokens). The right token has a frame.`));
  const rows = LAYER_NAMES.map((name, layer) => {
    const cells = [el('b', {class: 'code'}, name)];
    for (const lens of Object.keys(lenses)) {
      const tops = Array.from({length: SHAPE[`${lens}.top`][2]}, (_, k) => [at(`${lens}.top`, layer, p, k), topProbability(lens, layer, p, k)]);
      cells.push(el('span', {}, tops.slice(0, WORDS ? 2 : 4).map(([id, probability]) => guess(id, probability, target))),
        el('span', {class: 'n'}, String(at(`${lens}.rank`, layer, p))));
      if (!WORDS) cells.push(percent(at(`${lens}.right`, layer, p))); // two lenses with words are wide enough
    }
    return cells;
  }).reverse();
  const columns = ['after', ...Object.values(lenses).flatMap(name => [name, 'rank', ...(WORDS ? [] : ['probability'])])];
  panel.append(table(columns, rows, {id: 'layers', class: WORDS ? 'words' : ''}), el('p', {class: 'soft'}, `rank${WORDS ? '' : ' and probability'} of ${guessName(p)}; the last layer on top`));
  panel.append(el('h3', {}, 'When does the model know? Rank of the right token'),
    el('div', {class: 'choices'}, choice('Read by:', lenses, state.lens, lens => change({lens})), scaleKey('sequential', 'rank 1', `${FACTS.vocabulary.toLocaleString('en')}, logarithmic`)));
  const most = Math.log(FACTS.vocabulary);
  const labels = Array.from({length: T}, (_, i) => visible(targetText(i)));
  const names = [...LAYER_NAMES].reverse();
  panel.append(heatMap({
    rows: names, columns: labels, width: room(), cellHeight: Math.max(5, Math.min(24, 420 / (L + 1))), kind: 'sequential',
    value: (r, c) => Math.log(at(`${state.lens}.rank`, L - r, c)) / most,
    about: (r, c) => `${guessName(c)}\nafter ${names[r]}: rank ${at(`${state.lens}.rank`, L - r, c)}, ${percent(at(`${state.lens}.right`, L - r, c))}`,
    choose: (r, c) => change({p: c}), here: {column: p},
    label: `Rank of the right token after each of ${L + 1} layers, at each of ${T} positions`,
  }));
  panel.append(asTable('Ranks, as a table', () => table(['token', ...LAYER_NAMES],
    labels.map((label, c) => [`${c + 1} ${label}`, ...LAYER_NAMES.map((_, layer) => String(at(`${state.lens}.rank`, layer, c)))]))));
}

// Attribution

function gridOfParts({cell, columns, width, current}) {
  const many = (H + 2) * 52 > width;
  const box = el('table', {class: `grid ${many ? 'many' : ''}`});
  const every = many ? Math.ceil(22 / 17) * 2 : 1;
  box.append(el('tr', {}, el('th'), columns.map((name, i) => el('th', {}, i % every === 0 || i === columns.length - 1 ? name : ''))));
  for (let layer = 0; layer < L; layer++) {
    box.append(el('tr', {}, el('th', {}, `h_${layer}`), columns.map((_, part) => {
      const {value, limit, warm, about, click} = cell(layer, part);
      const button = el('button', {type: 'button', style: boxStyle('diverging', divergingRoot(signed(value) === '0' ? 0 : warm ? value : -value, limit)), class: current(layer, part) ? 'here' : '', 'aria-label': about, onclick: click, 'data-part': partName(layer, part)}, signed(value));
      button.addEventListener('mousemove', event => tipAt(event, about));
      button.addEventListener('mouseleave', hideTip);
      return el('td', {}, button);
    })));
  }
  return el('div', {class: 'wide'}, box);
}

function fillAttribution(panel) {
  const {p, terms} = state;
  const of = (name, ...indices) => at(`attribution.${terms}.${name}`, ...indices);
  const layers = Array.from({length: L}, (_, i) => i);
  const heads = layer => Array.from({length: H}, (_, h) => of('heads', layer, h, p));
  const sum = values => values.reduce((a, b) => a + b, 0);
  const rows = [
    {label: 'token embedding', value: of('embed', p)},
    {label: 'position', value: of('pos_embed', p)},
    ...layers.flatMap(i => [{label: `h_${i}.attn`, value: sum(heads(i))}, {label: `h_${i}.mlp`, value: of('mlp', i, p)}]),
    {label: 'biases', value: of('bias', p)},
  ];
  const total = sum(rows.map(row => row.value));
  panel.append(el('h2', {}, `What speaks for ${guessName(p)}`),
    explain('The last residual stream is a sum of what each part of the model wrote into it, so the logit of a token is a sum with one term for each part. Blue speaks for the token, orange against it.'),
    explain('This is the direct effect only. A head that works through later MLPs shows almost nothing here; see Ablation for the whole effect.'),
    el('div', {class: 'choices'}, choice('Explain:', {centred: 'how far the logit is above the average logit', logit: 'the logit itself'}, terms, value => change({terms: value})),
      el('span', {id: 'attribution-sum'}, `all terms: ${signed(total)}`)));
  const limit = Math.max(...layers.flatMap(i => [...heads(i), of('mlp', i, p)]).map(Math.abs), 1e-9);
  panel.append(el('div', {class: 'side'},
    el('div', {class: 'grow'}, el('h3', {}, 'By part'), el('div', {id: 'terms'}, bars(rows, {format: signed}))),
    el('div', {class: 'grow'}, el('h3', {}, 'Largest neurons'), bars(
      Array.from({length: SHAPE[`attribution.${terms}.neuron`][1]}, (_, k) => {
        const id = of('neuron', p, k), width = FACTS.inner;
        return {label: `h_${Math.floor(id / width)}.mlp.${id % width}`, value: of('neuron_term', p, k)};
      }), {format: signed}))));
  panel.append(el('h3', {}, 'By head and MLP'), gridOfParts({
    columns: [...Array.from({length: H}, (_, h) => String(h)), 'MLP'], width: room(),
    cell: (layer, part) => {
      const value = part < H ? of('heads', layer, part, p) : of('mlp', layer, p);
      return {value, limit, about: `${partName(layer, part)}: ${signed(value)}`, click: () => part < H ? change({layer, head: part, view: 'attention'}) : toggleAblation(layer, part)};
    },
    current: (layer, part) => layer === state.layer && part === state.head,
  }), el('p', {class: 'legend'}, scaleKey('diverging', signed(limit), `${signed(-limit)}, by the square root`), 'Click a head to see where it looks.'));
}

// Ablation

function fillAblation(panel) {
  panel.append(el('h2', {}, 'Without one part'));
  if (!has('ablation')) return panel.append(missing('ablation'));
  panel.append(explain('Each cell is the whole text once more, with the output of one head or MLP replaced by zero: how much the mean loss rises. Click one and the text shows what happens to each token.'));
  const means = Array.from({length: L}, (_, l) => Array.from({length: H + 1}, (_, part) => mean(lossChanges(l, part))));
  const limit = Math.max(...means.flat().map(Math.abs));
  panel.append(gridOfParts({
    columns: [...Array.from({length: H}, (_, h) => String(h)), 'MLP'], width: room(),
    cell: (layer, part) => ({value: means[layer][part], limit, warm: true, about: `${partName(layer, part)}: mean loss ${signed(means[layer][part])}`, click: () => { change({...(part < H ? {layer, head: part} : {}), ablated: state.ablated && state.ablated.layer === layer && state.ablated.part === part ? null : {layer, part}}); }}),
    current: (layer, part) => state.ablated && state.ablated.layer === layer && state.ablated.part === part,
  }));
  panel.append(el('p', {class: 'legend'}, scaleKey('diverging', signed(-limit), `${signed(limit)} nats, by the square root`), 'Orange: the loss rises, so the part helps. Blue: it falls.'));
  const all = means.flatMap((row, layer) => row.map((value, part) => ({label: partName(layer, part), value, warm: value > 0, choose: () => change({ablated: {layer, part}})}))).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  panel.append(el('h3', {}, 'Largest changes of the mean loss'), el('div', {id: 'ablations'}, bars(all.slice(0, 10), {format: signed})));
  if (state.ablated) {
    const {layer, part} = state.ablated;
    const hurt = Array.from({length: T - 1}, (_, p) => ({label: `${p + 1} ${visible(targetText(p))}`, value: at('ablation', layer, part, p), warm: at('ablation', layer, part, p) > 0, choose: () => change({p})})).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    panel.append(el('h3', {}, `Tokens that change most without ${partName(layer, part)}`), bars(hurt.slice(0, 10), {format: signed}));
    panel.append(asTable('All tokens, as a table', () => table(['token', 'loss', 'without', 'change'], Array.from({length: T - 1}, (_, p) => [`${p + 1} ${visible(targetText(p))}`, at('loss', p), at('loss', p) + at('ablation', layer, part, p), signed(at('ablation', layer, part, p))]))));
  }
}

// The backward pass

const KINDS = {
  'ln_1/scale': 'ln_1 scale', 'ln_1/bias': 'ln_1 bias', 'attn/c_attn/kernel': 'attn q k v', 'attn/c_attn/bias': 'attn q k v bias',
  'attn/c_proj/kernel': 'attn output', 'attn/c_proj/bias': 'attn output bias', 'ln_2/scale': 'ln_2 scale', 'ln_2/bias': 'ln_2 bias',
  'mlp/c_fc/kernel': 'mlp in', 'mlp/c_fc/bias': 'mlp in bias', 'mlp/c_proj/kernel': 'mlp out', 'mlp/c_proj/bias': 'mlp out bias',
};

function fillBackward(panel) {
  const {p} = state;
  panel.append(el('h2', {}, `The gradient of the loss of ${guessName(p)}`));
  if (!has('gradient.resid')) return panel.append(missing('backward'));
  panel.append(explain('The backward pass starts from the loss of this one guess and goes down through the layers. A cell is the norm of the gradient in the residual stream: how much a small change at that layer and position would move the loss. It can reach only earlier positions, and it reaches them through attention.'));
  const names = [...LAYER_NAMES].reverse();
  const labels = FACTS.tokens.map(id => visible(tokenText(id)));
  let most = 0;
  for (let layer = 0; layer <= L; layer++) for (let s = 0; s <= p; s++) most = Math.max(most, at('gradient.resid', layer, pair(p, s)));
  const decades = 4;
  panel.append(heatMap({
    rows: names, columns: labels, width: room(), cellHeight: Math.max(5, Math.min(26, 440 / (L + 1))), kind: 'warm',
    value: (r, s) => { const g = gradientNorm(L - r, p, s); return g > 0 ? Math.max(0, 1 + Math.log10(g / most) / decades) : 0; },
    about: (r, s) => s > p ? `position ${s} comes later: no gradient` : `after ${names[r]}, position ${s} ‘${labels[s]}’: ${number(gradientNorm(L - r, p, s))}`,
    choose: (r, s) => change({p: s}), here: {column: p},
    label: `Norm of the gradient after each of ${L + 1} layers at each position; it is largest, ${number(most)}, near position ${p}`,
  }), scaleKey('warm', number(most / 10 ** decades), `${number(most)}, logarithmic`));
  panel.append(asTable('As a table', () => table(['position', ...LAYER_NAMES], Array.from({length: p + 1}, (_, s) => [`${s} ${labels[s]}`, ...LAYER_NAMES.map((_, layer) => number(gradientNorm(layer, p, s)))]))));

  panel.append(el('h3', {}, 'The gradient in every parameter'), explain('The norm of the gradient of this loss in each array of parameters: what this one guess would teach the model.'));
  const leaf = name => FACTS.leaves.indexOf(name);
  const kinds = Object.keys(KINDS).filter(kind => leaf(`h_0/${kind}`) >= 0);
  const value = name => at('gradient.params', p, leaf(name));
  const largest = Math.max(...FACTS.leaves.map(value), 1e-30);
  const scaled = g => g > 0 ? Math.max(0, 1 + Math.log10(g / largest) / 3) : 0;
  if (kinds.length) panel.append(heatMap({
    rows: kinds.map(kind => KINDS[kind]), columns: LAYER_NAMES.slice(1), width: Math.min(room(), 130 + 44 * L), cellHeight: 22, kind: 'warm',
    value: (r, layer) => scaled(value(`h_${layer}/${kinds[r]}`)),
    about: (r, layer) => `h_${layer}/${kinds[r]}\ngradient ${number(value(`h_${layer}/${kinds[r]}`))}, parameter ${number(FACTS.leafNorms[leaf(`h_${layer}/${kinds[r]}`)])}`,
    label: 'Norm of the gradient in the parameters of each layer',
  }), scaleKey('warm', number(largest / 1000), `${number(largest)}, logarithmic`));
  const ends = FACTS.leaves.filter(name => !/^h_\d/.test(name));
  panel.append(el('h3', {}, 'Outside the layers'), bars(ends.map(name => ({label: name, value: value(name), warm: true})), {limit: largest}));
  panel.append(asTable('All parameters, as a table', () => table(['parameter', 'gradient', 'its own norm', 'ratio'],
    FACTS.leaves.map((name, i) => [name, number(value(name)), number(FACTS.leafNorms[i]), number(value(name) / FACTS.leafNorms[i])]))));
}

// Norms

function fillNorms(panel) {
  const {p} = state;
  const series = (name, label, colour, from) => {
    const rows = SHAPE[`norm.${name}`][0];
    const here = Array.from({length: rows}, (_, l) => at(`norm.${name}`, l, p));
    const average = Array.from({length: rows}, (_, l) => mean(Array.from({length: T}, (_, t) => at(`norm.${name}`, l, t))));
    return [{name: label, colour, values: here, from}, {colour, values: average, from, dashed: true}];
  };
  panel.append(el('h2', {}, `How large the numbers are at position ${p}`),
    explain('The residual stream after each layer, and what attention and the MLP of that layer add to it: the norm at the position before the chosen token, and its mean over the text (dashed).'));
  const lines = [...series('resid', 'residual stream', cssColor('--ink'), 0)];
  if (L) lines.push(...series('attn', 'attention', cssColor('--accent'), 1), ...series('mlp', 'MLP', cssColor('--mark'), 1));
  panel.append(el('div', {id: 'norms'}, lineChart({series: lines, names: LAYER_NAMES, width: Math.min(room(), 860), label: `Norms after each layer: the residual stream grows from ${number(lines[0].values[0])} to ${number(lines[0].values[L])}`})));
  panel.append(asTable('As a table', () => table(['after', 'residual stream', 'attention', 'MLP'], LAYER_NAMES.map((name, layer) => [name, at('norm.resid', layer, p), layer ? at('norm.attn', layer - 1, p) : '', layer ? at('norm.mlp', layer - 1, p) : '']))));
  panel.append(el('h3', {}, 'The residual stream at every position'));
  const names = [...LAYER_NAMES].reverse();
  const most = Math.max(...ARRAYS['norm.resid']);
  panel.append(heatMap({
    rows: names, columns: FACTS.tokens.map(id => visible(tokenText(id))), width: room(), cellHeight: Math.max(5, Math.min(24, 400 / (L + 1))),
    value: (r, c) => at('norm.resid', L - r, c) / most,
    about: (r, c) => `after ${names[r]}, position ${c} ‘${visible(textAt(c))}’: ${number(at('norm.resid', L - r, c))}`,
    choose: (r, c) => change({p: c}), here: {column: p}, label: 'Norm of the residual stream after each layer at each position',
  }), scaleKey('sequential', 'norm 0', number(most)));
}

// Curvature and shapes

function fillCurvature(panel) {
  panel.append(el('h2', {}, 'Curvature of the loss'));
  if (!FACTS.curvature) return panel.append(missing('curvature'));
  panel.append(explain(`How sharply the loss of this text (its first ${FACTS.firstTokens} tokens) bends around the parameters: the largest and the smallest eigenvalue of its second derivatives, in all parameters${Object.keys(FACTS.curvature).length > 1 ? ' and in each part by itself' : ''}. Steps of gradient descent above 2 / largest overshoot along that direction; a negative smallest one means a saddle.`));
  const rows = Object.entries(FACTS.curvature);
  panel.append(el('h3', {}, 'Largest'), el('div', {id: 'curvature'}, bars(rows.map(([label, ends]) => ({label: label === 'all' ? 'whole model' : label, value: ends.top})))),
    el('h3', {}, 'Smallest'), bars(rows.map(([label, ends]) => ({label: label === 'all' ? 'whole model' : label, value: ends.bottom}))));
  panel.append(asTable('As a table', () => table(['part', 'largest', 'smallest', 'products'], rows.map(([label, ends]) => [label, ends.top, ends.bottom, String(ends.products)]))));
}

function fillShapes(panel) {
  panel.append(el('h2', {}, 'Every operation of a step'));
  if (!FACTS.shapes) return panel.append(missing('shapes'));
  panel.append(explain('What runs in a training step, in order, read off the traced program: the shape of each result, the parameters that are used there for the first time, and the FLOPs.'),
    document.createRange().createContextualFragment(FACTS.shapes));
}

const VIEWS = {
  attention: ['Attention', fillAttention],
  layers: ['Layers', fillLayers],
  attribution: ['Attribution', fillAttribution],
  ablation: ['Ablation', fillAblation],
  backward: ['Backward', fillBackward],
  norms: ['Norms', fillNorms],
  curvature: ['Curvature', fillCurvature],
  shapes: ['Shapes', fillShapes],
};
