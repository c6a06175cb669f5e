'use strict';
/* The lower half of the page of a run: over all probes, and what the run was. Built on run.js. */

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
  for (let t = 0; t < looks.probeLoss.shape[2]; t++) losses.push(PROBED.map((_, p) => viewAt(looks.probeLoss, p, 0)[t]));
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
  const width = dynamics.edges[1] - dynamics.edges[0], centers = Array.from({ length: dynamics.edges.length + 1 }, (_, i) => {
    const center = dynamics.edges[0] + (i - 0.5) * width;
    return Math.abs(center) < width / 100 ? 0 : center; // the edges are rounded
  });
  let kind = 'activation_bins', name = dynamics.activations.at(-2), follow = () => {};
  const holder = el('div', {}), picture = el('div', {}), chooser = el('span', {});
  onMove.push(() => follow());
  const counts = (probe) => viewAt(looks[kind], probe, kinds[kind][1].indexOf(name));
  function draw() {
    const values = centers.map((_, b) => PROBED.map((__, p) => Math.sqrt(counts(p)[centers.length - 1 - b] / 255)));
    const heat = heatMap({
      rows: centers.map((c) => number(c && -c, 2)), columns: PROBED, values, low: 0, high: 1, columnTicks: someIndices(PROBED, 8), rowHeight: 6, mostLabels: 11, label: `Distribution of ${name} over training`,
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

async function runPage() {
  heading();
  await painted();
  for (const [name, value] of Object.entries(data.looks)) looks[name] = name === 'samples' ? value : await unpack(value);
  for (const name of ['weight_bins', 'gradient_bins', 'activation_bins']) looks[name] = await unpack(data.dynamics[name]);
  looks.probeLoss = await unpack(data.dynamics.loss);
  const best = data.heads.findIndex((head) => head.kind !== null);
  if (best >= 0) Object.assign(state, { layer: Math.floor(best / H), head: best % H });
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
}
