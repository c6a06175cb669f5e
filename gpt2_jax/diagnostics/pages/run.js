'use strict';
/* The page of a run: report.collect's result. One slider, over the kept checkpoints, moves all. */

const CHECKPOINTS = data.checkpoints;
const PROBED = data.dynamics.steps;
const TOKENS = data.tokens.map((id) => data.vocabulary[id]);
const T = TOKENS.length, L = data.facts.layers, H = data.facts.heads;
const HEADS = data.heads.map((head) => head.head);
const KINDS = {
  previous: 'looks at the token before',
  duplicate: 'looks at the same token, earlier',
  induction: 'looks at what followed the same token (induction)',
  itself: 'looks at its own position',
  first: 'looks at the first position',
};
const state = { at: CHECKPOINTS.length - 1, token: Math.min(12, T - 1), layer: 0, head: 0 };
const looks = {};
const onMove = [];  // called when the slider, the token or the head moves

const step = () => CHECKPOINTS[state.at];
const pair = (p, s) => (p * (p + 1)) / 2 + s;
const headName = (layer, head) => `h_${layer}.attn.${head}`;

/* The attention weight of a head from position p to s, at the slider's checkpoint. */
function weight(layer, head, p, s) {
  if (s > p) return 0;
  const pairs = (T * (T + 1)) / 2;
  return (looks.pattern.values[((state.at * L + layer) * H + head) * pairs + pair(p, s)] / 255) ** 2;
}

function moveTo(wanted) {
  Object.assign(state, wanted);
  for (const move of onMove) move();
}

const nearest = (wanted) => CHECKPOINTS.reduce((best, value, i) =>
  (Math.abs(value - wanted) < Math.abs(CHECKPOINTS[best] - wanted) ? i : best), 0);

/* A chart over steps whose marker follows the slider; a click moves the slider. */
function chart(options) {
  const { node, mark } = lineChart({ xKind: state.xKind || 'linear', onPick: (x) => moveTo({ at: nearest(x) }), ...options });
  onMove.push(() => mark(step()));
  return node;
}

function heatOverProbes(options) {
  const heat = heatMap({ columns: PROBED, columnTicks: someIndices(PROBED, 8), onPick: (r, c) => moveTo({ at: nearest(PROBED[c]) }), ...options });
  onMove.push(() => heat.mark(indexOf(PROBED, step())));
  return heat;
}

// -- the head of the page

function heading() {
  const { summary, facts } = data, val = data.curves.val;
  const best = val.loss && val.loss.length ? Math.min(...val.loss) : null;
  const bestAt = best === null ? null : val.loss.lastIndexOf(best);
  main.append(
    el('header', {}, el('h1', {}, data.run.split('/').pop()), el('span', { class: 'lead' }, data.run), el('span', { class: 'spacer' }), themeButton()),
    el('p', {}, el('span', { class: `pill ${data.finished ? 'good' : 'plain'}` },
      data.finished ? `\u2713 finished: ${number(data.done)} steps` : `training: step ${number(data.done)} of ${number(data.steps)}`)),
    factList([
      ['best validation loss, nats per token', best === null ? null : best.toFixed(4)],
      ['at step', best === null ? null : number(val.step[bestAt])],
      ['bits per byte there', best === null ? null : val.bits_per_byte[bestAt].toFixed(4)],
      ['parameters', number(facts.parameters)],
      [`tokens per step`, number(facts.tokens_per_step)],
      ['tokens per second', summary?.tokens_per_second ? number(summary.tokens_per_second, 3) : null],
      ['seconds in all', summary ? number(summary.seconds_total, 3) : null],
      ['device', summary?.device ?? null],
    ]),
  );
}

// -- curves

function curvesSection() {
  const place = el('div', {}), moves = [];
  function draw(xKind) {
    // The markers of the curves that are drawn again must not stay.
    for (const move of moves) onMove.splice(onMove.indexOf(move), 1);
    moves.length = 0;
    const before = onMove.length;
    const { train, val } = data.curves;
    const references = ['unigram', 'bigram', 'trigram'].map((name) => ({ name: `${name}s reach`, y: data.baselines[name] }));
    const series = [];
    if (train.step) series.push({ name: 'training', x: train.step, y: train.loss, color: 'var(--c5)', width: 1.1 });
    if (val.step) series.push({ name: 'validation', x: val.step, y: val.loss, color: 'var(--c1)', width: 2.2 });
    const small = [['learning_rate', 'Learning rate', 'linear'], ['grad_norm', 'Gradient norm', 'log'], ['update_norm', 'Update norm', 'log'],
      ['param_norm', 'Weight norm', 'linear'], ['tokens_per_second', 'Tokens per second', 'linear']];
    replace(place,
      el('div', { class: 'card', id: 'loss' }, chart({ title: 'Loss, nats per token', series, references, xKind, height: 300 })),
      el('div', { class: 'grid', style: { marginTop: '14px' } }, small.filter(([key]) => train[key]).map(([key, title, yKind], i) =>
        el('div', { class: 'card' }, chart({ title, xKind, yKind, height: 150, series: [{ name: title, x: train.step, y: train[key], color: seriesColor(i) }] })))));
    moves.push(...onMove.slice(before));
    for (const move of moves) move();
  }
  main.append(section('Learning', `The dashed lines are what counting reaches: models that only know how often one, two or three tokens follow each other in the training text, on the same validation text. Guessing among all tokens alike costs ${data.baselines.uniform.toFixed(2)} nats. Click a curve to move the slider below.`,
    el('div', { class: 'row' }, segments('Steps', [['log1p', 'log steps'], ['linear', 'linear steps']], 'log1p', draw)), place));
  draw('log1p');
}

// -- the slider

function slider() {
  const label = el('b', { id: 'step' }), loss = el('span', { class: 'note', id: 'text-loss' });
  const range = el('input', {
    type: 'range', id: 'slider', min: 0, max: CHECKPOINTS.length - 1, step: 1, 'aria-label': 'Checkpoint',
    oninput: () => moveTo({ at: Number(range.value) }),
  });
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = '\u25b6 play'; };
  const play = el('button', {
    onclick: () => {
      if (timer) { stop(); return; }
      if (state.at === CHECKPOINTS.length - 1) moveTo({ at: 0 });
      play.textContent = '\u25a0 stop';
      timer = setInterval(() => (state.at === CHECKPOINTS.length - 1 ? stop() : moveTo({ at: state.at + 1 })), 600);
    },
  }, '\u25b6 play');
  onMove.push(() => {
    range.value = state.at;
    range.setAttribute('aria-valuetext', `step ${number(step())}`);
    label.textContent = `step ${number(step())}`;
    const mean = at(looks.loss, state.at).reduce((a, b) => a + b, 0) / (T - 1);
    loss.textContent = `${mean.toFixed(4)} nats on this text`;
  });
  main.append(el('div', { class: 'sticky' }, el('div', { class: 'row', style: { margin: 0 } },
    el('span', { class: 'note' }, 'checkpoint'), label, range, play, loss)));
}

// -- the text, and what each layer predicts

function textSection() {
  const losses = () => [null, ...at(looks.loss, state.at)];
  const row = tokenRow({
    tokens: TOKENS, values: [null], low: 0, high: 6, onPick: (i) => moveTo({ token: Math.max(1, i) }),
    tell: (i) => [el('b', {}, JSON.stringify(TOKENS[i])), i === 0 ? el('div', { class: 'note' }, 'no loss: nothing comes before it')
      : tipTable([['loss', `${losses()[i].toFixed(4)} nats`], ['probability', percent(Math.exp(-losses()[i]))]])],
  });
  const layers = el('div', { id: 'layers' }), title = el('h3', {});
  onMove.push(() => {
    row.update(losses());
    row.choose(state.token);
    const p = state.token - 1;
    replace(title, 'What comes after ', el('span', { class: 'name' }, JSON.stringify(TOKENS.slice(Math.max(0, p - 11), p + 1).join(''))), '?');
    const top = at(looks.top, state.at), probability = at(looks.probability, state.at);
    const K = looks.top.shape[3];
    replace(layers, el('table', {},
      el('thead', {}, el('tr', {}, ['read after', 'it would write', `right: ${JSON.stringify(TOKENS[state.token])}`].map((head) => el('th', {}, head)))),
      el('tbody', {}, Array.from({ length: L + 1 }, (_, layer) => {
        const guesses = Array.from({ length: K }, (__, k) => {
          const i = (layer * T + p) * K + k;
          return [data.vocabulary[top[i]], probability[i]];
        });
        const right = at(looks.right, state.at, layer)[p], rank = at(looks.rank, state.at, layer)[p];
        return el('tr', {},
          el('td', { class: 'name' }, layer === 0 ? 'embedding' : `h_${layer - 1}`),
          el('td', {}, guesses.map(([token, probability_]) => el('span', { style: { display: 'inline-block', marginRight: '12px' } },
            el('span', { class: 'name', style: { fontWeight: token === TOKENS[state.token] ? 700 : 400 } }, JSON.stringify(token)), ` ${percent(probability_)}`))),
          el('td', { style: { minWidth: '110px' }, 'data-rank': rank }, `${percent(right)}, ${rank === 0 ? 'first' : `after ${number(rank)}`}`,
            el('div', { class: 'bar', style: { width: `${100 * right}%`, background: 'var(--c1)' } })));
      }))));
  });
  const sample = el('pre', { id: 'sample' });
  onMove.push(() => { sample.textContent = looks.samples[state.at]; });
  main.append(section('One text through training', 'The colour of a token is its loss at this checkpoint. Choose a token to see how its prediction forms: the residual stream read after each layer by the final LayerNorm and the output head.',
    scaleKey('sequential', 0, 6, (v) => `${v} nats`),
    el('div', { class: 'grid wide' },
      el('div', { class: 'card' }, el('h3', {}, 'The text'), row.node),
      el('div', { class: 'card scroll' }, title, layers)),
    el('div', { class: 'card', style: { marginTop: '14px' } }, el('h3', {}, 'What it writes by itself'), sample)));
}

// -- attention

function headsSection() {
  const small = [], gallery = el('div', { class: 'heads', style: { gridTemplateColumns: `auto repeat(${H}, minmax(24px, 1fr))` } });
  for (let layer = 0; layer < L; layer++) {
    gallery.append(el('div', { class: 'label', style: { alignSelf: 'center' } }, `h_${layer}`));
    for (let head = 0; head < H; head++) {
      const canvas = el('canvas', { width: T, height: T });
      const button = el('button', { title: headName(layer, head), 'aria-label': `head ${headName(layer, head)}`, 'data-head': headName(layer, head), onclick: () => moveTo({ layer, head }) }, canvas);
      small.push({ layer, head, canvas, button });
      gallery.append(button);
    }
  }
  const positions = TOKENS.map((token, i) => `${i} ${visible(token)}`);
  const rowsOf = (layer, head) => Array.from({ length: T }, (_, p) => Array.from({ length: T }, (__, s) => Math.sqrt(weight(layer, head, p, s))));
  const large = heatMap({
    rows: positions, columns: TOKENS, values: rowsOf(0, 0), square: true, mostLabels: T > 40 ? 20 : T, columnName: 'to',
    label: 'Attention of the chosen head: from each position (rows) to the positions before it (columns)',
    tell: (p, s) => (s > p ? 'not visible from here' : `${percent(weight(state.layer, state.head, p, s))} of the attention`),
    onPick: (p) => moveTo({ token: Math.min(p + 1, T - 1) }),
  });
  const from = tokenRow({ tokens: TOKENS, values: [], low: 0, high: 1, tell: (i) => [el('b', {}, JSON.stringify(TOKENS[i])), el('div', {}, percent(weight(state.layer, state.head, state.token - 1, i)))] });
  const distances = Array.from({ length: Math.min(T, 16) }, (_, d) => d), profile = el('div', { style: { marginTop: '14px' } });
  const byDistance = (layer, head) => distances.map((d) => {
    let sum = 0;
    for (let p = d; p < T; p++) sum += weight(layer, head, p, p - d);
    return sum / (T - d);
  });
  const title = el('h3', { id: 'head' }), about = el('p', { class: 'note', id: 'about-head' }), fromTitle = el('h3', {});
  function paintSmall() {
    const color = colorScale('sequential', 0, 1);
    for (const { layer, head, canvas } of small) {
      const context = canvas.getContext('2d'), image = context.createImageData(T, T);
      for (let p = 0; p < T; p++) {
        for (let s = 0; s < T; s++) {
          const [r, g, b] = color(Math.sqrt(weight(layer, head, p, s))), i = 4 * (p * T + s);
          image.data[i] = r; image.data[i + 1] = g; image.data[i + 2] = b; image.data[i + 3] = 255;
        }
      }
      context.putImageData(image, 0, 0);
    }
  }
  themeListeners.push(paintSmall);
  let painted = -1;
  onMove.push(() => {
    const { layer, head } = state, p = state.token - 1;
    if (painted !== state.at) { painted = state.at; paintSmall(); }
    for (const item of small) item.button.setAttribute('aria-pressed', item.layer === layer && item.head === head);
    title.textContent = headName(layer, head);
    about.textContent = tellHead(data.heads[layer * H + head]);
    large.update(rowsOf(layer, head));
    large.choose(p, null);
    replace(fromTitle, 'Where position ', number(p), ', ', el('span', { class: 'name' }, JSON.stringify(TOKENS[p])), ', looks');
    from.update(TOKENS.map((_, s) => (s > p ? null : Math.sqrt(weight(layer, head, p, s)))));
    from.choose(p);
    replace(profile, lineChart({ title: `How far back ${headName(layer, head)} looks`, xLabel: 'tokens back', height: 190, format: percent, series: [{ name: 'mean attention weight', x: distances, y: byDistance(layer, head) }] }).node);
  });
  main.append(section('Attention', 'Every head on this text: rows are the positions that look, columns what they look at. Choose a head.',
    el('div', { class: 'grid wide' },
      el('div', { class: 'card' }, gallery, profile),
      el('div', { class: 'card' }, title, about, large.node, el('div', { style: { marginTop: '10px' } }, fromTitle, from.node)))));
}

function tellHead({ kind, step: since, before, scores }) {
  const list = Object.entries(scores).map(([name, value]) => `${name} ${value.toFixed(2)}`).join(', ');
  return kind === null ? `In the end none of the kinds below. Scores: ${list}.` : `In the end it ${KINDS[kind]}, since step ${number(since)}${before === null ? '' : ` (not yet at ${number(before)})`}. Scores: ${list}.`;
}

// -- heads and layers over time

function overTimeSection() {
  const measures = { previous: 'to the token before', duplicate: 'to the same token, earlier', induction: 'to what followed it (induction)', entropy: 'entropy, nats' };
  let measure = 'previous';
  const key = el('div', {}), holder = el('div', { id: 'heads-over-time' });
  const flat = (name) => HEADS.map((_, i) => data.dynamics[name].map((probe) => probe[Math.floor(i / H)][i % H]));
  function draw() {
    const values = flat(measure), high = measure === 'entropy' ? Math.max(...values.flat()) : 1;
    const heat = heatMap({
      rows: HEADS, columns: PROBED, values, low: 0, high, columnTicks: someIndices(PROBED, 8), label: `${measure} of each head over training`, rowHeight: L * H > 48 ? 7 : 15,
      mostLabels: 48, onPick: (r, c) => moveTo({ layer: Math.floor(r / H), head: r % H, at: nearest(PROBED[c]) }),
    });
    replace(holder, heat.node);
    replace(key, scaleKey('sequential', 0, high));
    follow = () => { heat.mark(indexOf(PROBED, step())); heat.choose(state.layer * H + state.head, null); };
    follow();
  }
  let follow = () => {};
  onMove.push(() => follow());
  draw();
  const named = data.heads.filter((head) => head.kind !== null);
  const list = named.length
    ? table(['head', 'what it does', 'score', 'since step'], named.map((head) => [el('span', { class: 'name' }, head.head), KINDS[head.kind], head.scores[head.kind].toFixed(2), head.before === null ? number(head.step) : `${number(head.step)} (not yet at ${number(head.before)})`]))
    : el('p', { class: 'note' }, 'No head has a score of 0.25 or more.');
  main.append(section('Which head became what, and when', 'Previous, duplicate and induction are mean attention weights on random tokens that are repeated once, where nothing but the repetition can be known. A head is called by its highest score in the end, if that is at least 0.25, since the step from which the score stays above half of its last value.',
    el('div', { class: 'row' }, segments('Score', Object.entries(measures), measure, (value) => { measure = value; draw(); }), key),
    el('div', { class: 'grid wide' }, el('div', { class: 'card' }, holder), el('div', { class: 'card' }, list))));
}

function layersSection() {
  const { dynamics } = data, layers = ['embedding', ...Array.from({ length: L }, (_, i) => `h_${i}`)];
  const color = (i, n) => `color-mix(in oklab, var(--c1) ${Math.round((100 * i) / Math.max(1, n - 1))}%, var(--c0))`;
  const lines = (names, values) => names.map((name, i) => ({ name, x: PROBED, y: values.map((probe) => probe[i]), color: color(i, names.length) }));
  const losses = [];
  const rows = looks.probeLoss.shape[1];
  for (let t = 0; t < looks.probeLoss.shape[2]; t++) losses.push(PROBED.map((_, p) => at(looks.probeLoss, p, 0)[t]));
  const first = dynamics.tokens[0].slice(1).map((id, i) => `${i + 1} ${visible(data.vocabulary[id])}`);
  const tokens = heatOverProbes({ rows: first, values: losses, low: 0, high: 6, rowHeight: 11, label: 'Loss of each probe token over training', mostLabels: first.length > 70 ? 35 : first.length });
  main.append(section('Layers and tokens over time', `Measured on the probe text: ${rows} rows of ${dynamics.tokens[0].length} tokens from the beginning of the validation text.`,
    el('div', { class: 'grid wide' },
      el('div', { class: 'card' }, chart({ title: 'Right tokens ranked first, read after each layer', xKind: 'log1p', series: lines(layers, dynamics.first), format: percent })),
      el('div', { class: 'card' }, chart({ title: 'Tokens ranked before the right one, mean', xKind: 'log1p', yKind: 'log', series: lines(layers, dynamics.rank.map((probe) => probe.map((x) => x + 0.01))) })),
      el('div', { class: 'card' }, chart({ title: 'Largest curvature of the loss', xKind: 'log1p', yKind: 'log', series: [{ name: 'curvature', x: PROBED, y: dynamics.curvature }] })),
      el('div', { class: 'card' }, chart({ title: 'MLP units that never fire', xKind: 'log1p', series: lines(layers.slice(1), dynamics.dead), format: percent }))),
    el('div', { class: 'card', style: { marginTop: '14px' } }, el('h3', {}, 'Loss of each token of the probe text'), scaleKey('sequential', 0, 6, (v) => `${v} nats`), tokens.node)));
}

function normsSection() {
  const { dynamics } = data;
  const measures = {
    ratio: ['update / weight', 'tensors'], weight: ['weight norm', 'tensors'], gradient: ['gradient norm', 'tensors'], update: ['update norm', 'tensors'],
    rms: ['scale of activations', 'activations'], kurtosis: ['kurtosis of activations', 'activations'],
  };
  let measure = 'ratio', follow = () => {};
  const holder = el('div', {}), key = el('div', {});
  onMove.push(() => follow());
  function draw() {
    const rows = dynamics[measures[measure][1]];
    const values = rows.map((_, i) => dynamics[measure].map((probe) => (probe[i] > 0 ? Math.log10(probe[i]) : NaN)));
    const known = values.flat().filter(Number.isFinite);
    if (!known.length) { replace(holder, el('p', { class: 'note' }, 'Not recorded: this run had no probes.')); follow = () => {}; return; }
    // A few extreme values must not hide the others.
    known.sort((a, b) => a - b);
    const low = known[Math.floor(known.length * 0.02)], high = known[Math.floor((known.length - 1) * 0.98)];
    const heat = heatMap({
      rows, columns: PROBED, values, low, high, columnTicks: someIndices(PROBED, 8), rowHeight: rows.length > 60 ? 8 : 15, mostLabels: 60, label: `${measures[measure][0]} over training`,
      tell: (r, c) => number(dynamics[measure][c][r]), onPick: (r, c) => moveTo({ at: nearest(PROBED[c]) }),
    });
    replace(holder, heat.node);
    replace(key, scaleKey('sequential', low, high, (v) => number(10 ** v, 2)));
    follow = () => heat.mark(indexOf(PROBED, step()));
    follow();
  }
  draw();
  main.append(section('Norms', 'Colours on a logarithmic scale. The gradient is of the probe text; the update is the one that led to the step.',
    el('div', { class: 'row' }, segments('Measure', Object.entries(measures).map(([value, [name]]) => [value, name]), measure, (value) => { measure = value; draw(); }), key),
    el('div', { class: 'card' }, holder)));
}

function distributionsSection() {
  const { dynamics } = data;
  const kinds = { weight_bins: ['weights', dynamics.tensors], gradient_bins: ['gradients', dynamics.tensors], activation_bins: ['activations', dynamics.activations] };
  const width = dynamics.edges[1] - dynamics.edges[0], centers = Array.from({ length: dynamics.edges.length + 1 }, (_, i) => dynamics.edges[0] + (i - 0.5) * width);
  let kind = 'activation_bins', name = dynamics.activations.at(-2), follow = () => {};
  const holder = el('div', {}), picture = el('div', {}), chooser = el('span', {});
  onMove.push(() => follow());
  const counts = (probe) => at(looks[kind], probe, kinds[kind][1].indexOf(name));
  function draw() {
    const values = centers.map((_, b) => PROBED.map((__, p) => Math.sqrt(counts(p)[centers.length - 1 - b] / 255)));
    const heat = heatMap({
      rows: centers.map((c) => number(-c, 2)), columns: PROBED, values, low: 0, high: 1, columnTicks: someIndices(PROBED, 8), rowHeight: 6, mostLabels: 11, label: `Distribution of ${name} over training`,
      tell: (r, c) => `${percent(counts(c)[centers.length - 1 - r] / 255)} of the highest bin`, onPick: (r, c) => moveTo({ at: nearest(PROBED[c]) }),
    });
    const histogram = el('div', {});
    replace(holder, heat.node);
    replace(picture, histogram);
    follow = () => {
      const place = Math.round(indexOf(PROBED, step()));
      heat.mark(indexOf(PROBED, step()));
      replace(histogram, lineChart({ title: `at step ${number(PROBED[place])}`, xLabel: 'in units of the rms', height: 230, series: [{ name, x: centers, y: [...counts(place)].map((c) => c / 255) }] }).node);
    };
    follow();
  }
  function choose() {
    const names = kinds[kind][1];
    if (!names.includes(name)) [name] = names;
    replace(chooser, select('of', names.map((value) => [value, value]), name, (value) => { name = value; draw(); }));
    draw();
  }
  choose();
  main.append(section('Distributions', 'Histograms in units of the rms of the elements, so that shape and not scale is compared; the outermost bins hold everything beyond. Norms and scales are above.',
    el('div', { class: 'row' }, segments('Kind', Object.entries(kinds).map(([value, [label]]) => [value, label]), kind, (value) => { kind = value; choose(); }), chooser),
    el('div', { class: 'grid wide' }, el('div', { class: 'card' }, holder), el('div', { class: 'card' }, picture))));
}

// -- steps to open, and what the run was

function stepsSection() {
  const open = (n) => (data.opened[n] ? el('a', { href: data.opened[n] }, `step ${number(n)}`) : `step ${number(n)}`);
  const rows = data.spikes.map((spike) => [open(spike.step), `${spike.what} ${number(spike.value)}`, `${spike.deviations.toFixed(1)} deviations above the ${spike.what === 'loss' ? 'losses' : 'norms'} before`]);
  const opened = Object.keys(data.opened).map(Number);
  const phrase = TOKENS.join('').split(/[\n']/).reduce((a, b) => (b.length > a.length ? b : a), '').trim().split(' ').slice(0, 2).join(' ');
  main.append(section('Steps worth opening', 'The recorded steps that stand out most from those before them.',
    el('div', { class: 'card' },
      rows.length ? table(['step', 'value', ''], rows) : el('p', { class: 'note' }, 'None stands out by more than three deviations.'),
      opened.length ? el('p', {}, 'Opened: ', opened.map((n, i) => [i ? ', ' : '', open(n)])) : null,
      el('p', { class: 'note' }, 'Every row of a step, with the loss of each token before and after the update; and every step that trained on a text:'),
      command(`python scripts/steps.py show --workdir=${data.run} --step=${data.spikes[0]?.step ?? data.done} --out=step.html`),
      command(`python scripts/steps.py find --workdir=${data.run} --text='${phrase}'`))));
}

function configurationSection() {
  const { facts } = data, changed = data.config.filter(([, value, standard]) => value !== standard);
  const cost = facts.flops_per_token * facts.tokens_per_step;
  const most = Math.max(...data.flow.map((part) => part.flops));
  main.append(section('What it was', null,
    factList([
      ['corpus', facts.corpus], ['training tokens', number(facts.train_tokens)], ['validation tokens', number(facts.val_tokens)], ['tokenizer', facts.tokenizer],
      ['model FLOPs per step', cost.toExponential(2)], ['in all', (cost * data.steps).toExponential(2)],
      ['jax', data.summary?.jax_version ?? null], ['SHA-256 of the text', data.summary?.corpus.sha256.slice(0, 12) ?? null],
    ]),
    el('div', { class: 'grid wide' },
      el('div', { class: 'card' }, el('h3', {}, 'Settings that are not the defaults'),
        table(['setting', 'value', 'default'], changed.map((row) => [el('span', { class: 'name' }, row[0]), row[1], row[2]])),
        el('details', {}, el('summary', {}, 'all settings'), table(['setting', 'value', 'default'], data.config.map((row) => [el('span', { class: 'name' }, row[0]), row[1], row[2]])))),
      el('div', { class: 'card scroll' }, el('h3', {}, 'Where the arithmetic of a step goes'),
        el('table', {},
          el('thead', {}, el('tr', {}, ['place', 'blocks', 'FLOPs', 'parameters'].map((head) => el('th', {}, head)))),
          el('tbody', {}, data.flow.map((part) => el('tr', {},
            el('td', { class: 'name' }, `${part.phase}: ${part.title}`), el('td', {}, number(part.layers)),
            el('td', { style: { minWidth: '90px' } }, number(part.flops, 3), el('div', { class: 'bar', style: { width: `${(100 * part.flops) / most}%` } })),
            el('td', {}, part.parameters ? number(part.parameters) : '')))))))));
}

start(async () => {
  for (const [name, value] of Object.entries(data.looks)) looks[name] = name === 'samples' ? value : await unpack(value);
  for (const name of ['weight_bins', 'gradient_bins', 'activation_bins']) looks[name] = await unpack(data.dynamics[name]);
  looks.probeLoss = await unpack(data.dynamics.loss);
  const best = data.heads.findIndex((head) => head.kind !== null);
  if (best >= 0) Object.assign(state, { layer: Math.floor(best / H), head: best % H });
  heading();
  curvesSection();
  slider();
  textSection();
  headsSection();
  overTimeSection();
  layersSection();
  normsSection();
  distributionsSection();
  stepsSection();
  configurationSection();
  moveTo({});
});
