// The other views. Each has a name, a key, and fill(panel), called whenever something was chosen.

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
  const rows = guesses => LAYER_NAMES.map((name, layer) => {
    const cells = [el('b', {class: 'code'}, name)];
    for (const lens of Object.keys(lenses)) {
      const tops = Array.from({length: SHAPE[`${lens}.top`][2]}, (_, k) => [at(`${lens}.top`, layer, p, k), topProbability(lens, layer, p, k)]);
      cells.push(el('span', {}, tops.slice(0, guesses).map(([id, probability]) => guess(id, probability, target))),
        el('span', {class: 'n'}, String(at(`${lens}.rank`, layer, p))));
      if (!WORDS) cells.push(percent(at(`${lens}.right`, layer, p))); // two lenses with words are wide enough
    }
    return cells;
  }).reverse();
  const columns = ['after', ...Object.values(lenses).flatMap(name => [name, 'rank', ...(WORDS ? [] : ['probability'])])];
  // As many guesses as fit, but at least two.
  let guesses = WORDS ? 2 : 4;
  const draw = () => panel.appendChild(table(columns, rows(guesses), {id: 'layers', class: WORDS ? 'words' : ''}));
  for (let box = draw(); guesses > 2 && box.scrollWidth > box.clientWidth; box = draw()) {
    box.remove();
    guesses--;
  }
  panel.append(el('p', {class: 'soft'}, `rank${WORDS ? '' : ' and probability'} of ${guessName(p)}; the last layer on top`));
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
  const labels = FACTS.shown.map(visible);
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
    rows: names, columns: FACTS.shown.map(visible), width: room(), cellHeight: Math.max(5, Math.min(24, 400 / (L + 1))),
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
