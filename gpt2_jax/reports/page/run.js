'use strict';
/* The page of a run: the result of reports/run.py's collect. One slider, over the kept checkpoints, moves all. */

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
      data.finished ? `\u2713 finished: ${number(data.done)} ${data.done === 1 ? 'step' : 'steps'}` : `not finished: step ${number(data.done)} of ${number(data.steps)}`)),
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
      ['param_norm', 'Weight norm', 'linear'], ['tokens_per_second', 'Tokens per second', 'log']];
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
    const mean = viewAt(looks.loss, state.at).reduce((a, b) => a + b, 0) / (T - 1);
    loss.textContent = `${mean.toFixed(4)} nats on this text`;
  });
  main.append(el('div', { class: 'sticky' }, el('div', { class: 'row', style: { margin: 0 } },
    el('span', { class: 'note' }, 'checkpoint'), label, range, play, loss)));
}

// -- the text, and what each layer predicts

function textSection() {
  const losses = () => [null, ...viewAt(looks.loss, state.at)];
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
    const top = viewAt(looks.top, state.at), probability = viewAt(looks.probability, state.at);
    const K = looks.top.shape[3];
    replace(layers, el('table', {},
      el('thead', {}, el('tr', {}, ['read after', 'it would write', `right: ${JSON.stringify(TOKENS[state.token])}`].map((head) => el('th', {}, head)))),
      el('tbody', {}, Array.from({ length: L + 1 }, (_, layer) => {
        const guesses = Array.from({ length: K }, (__, k) => {
          const i = (layer * T + p) * K + k;
          return [data.vocabulary[top[i]], probability[i]];
        });
        const right = viewAt(looks.right, state.at, layer)[p], rank = viewAt(looks.rank, state.at, layer)[p];
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
