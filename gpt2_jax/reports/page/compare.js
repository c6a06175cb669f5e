'use strict';
/* Several runs side by side: what reports/compare.py collects. */

const RUNS = data.runs, COLORS = ['var(--c0)', 'var(--c1)', 'var(--c2)', 'var(--c3)', 'var(--c4)', 'var(--c5)', 'var(--c6)'];
const color = (i) => COLORS[i % COLORS.length];
const named = (i) => [el('span', { class: 'swatch', style: { borderColor: color(i) } }), RUNS[i].name];
const same = (values) => values.every((value) => value === values[0]);
const best = (run) => (run.curves.val.loss?.length ? Math.min(...run.curves.val.loss) : null);
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

function heading() {
  append(main, [
    el('header', {}, el('h1', {}, 'Runs compared'), el('span', { class: 'spacer' }), themeButton()),
    el('div', { class: 'card scroll' }, el('table', { id: 'summary' },
      el('thead', {}, el('tr', {}, ['run', 'best validation loss', 'bits per byte', 'steps', 'parameters', 'tokens per second', 'seconds', 'device'].map((head) => el('th', {}, head)))),
      el('tbody', {}, RUNS.map((run, i) => {
        const loss = best(run), at = loss === null ? -1 : run.curves.val.loss.lastIndexOf(loss);
        const lowest = RUNS.every((other) => best(other) === null || best(other) >= loss);
        return el('tr', {}, el('td', {}, named(i)),
          el('td', { style: { fontWeight: lowest ? 700 : 400 } }, loss === null ? '' : loss.toFixed(4)),
          el('td', {}, at < 0 ? '' : run.curves.val.bits_per_byte[at].toFixed(4)),
          el('td', {}, `${number(run.done)} of ${number(run.steps)}`), el('td', {}, number(run.parameters)),
          el('td', {}, run.summary ? number(run.summary.tokens_per_second, 3) : ''), el('td', {}, run.summary ? number(run.summary.seconds_total, 3) : ''),
          el('td', {}, run.summary?.device ?? ''));
      })))),
    same(RUNS.map((run) => run.sha256)) ? null : el('p', { class: 'note' }, 'The runs have different texts or tokenizers: losses per token are not comparable, bits per byte are if the text is the same.'),
  ]);
}

function curvesSection() {
  const place = el('div', {});
  const measures = [['loss', 'Loss, nats per token', 'linear'], ['grad_norm', 'Gradient norm', 'log'], ['learning_rate', 'Learning rate', 'linear'], ['update_norm', 'Update norm', 'log'], ['param_norm', 'Weight norm', 'linear']];
  function draw(xKind) {
    const references = same(RUNS.map((run) => run.sha256)) ? ['bigram', 'trigram'].map((name) => ({ name: `${name}s reach`, y: RUNS[0].baselines[name] })) : [];
    const val = RUNS.map((run, i) => ({ name: run.name, x: run.curves.val.step || [], y: run.curves.val.loss || [], color: color(i), width: 2.2 }));
    replace(place,
      el('div', { class: 'card', id: 'loss' }, lineChart({ title: 'Validation loss, nats per token', xKind, series: val, references, height: 290 }).node),
      el('div', { class: 'grid', style: { marginTop: '14px' } }, measures.map(([key, title, yKind]) => el('div', { class: 'card' }, lineChart({
        title: key === 'loss' ? 'Training loss' : title, xKind, yKind, height: 170,
        series: RUNS.map((run, i) => ({ name: run.name, x: run.curves.train.step || [], y: run.curves.train[key] || [], color: color(i), width: 1.3 })),
      }).node))));
  }
  main.append(section('Learning', null, el('div', { class: 'row' }, segments('Steps', [['log1p', 'log steps'], ['linear', 'linear steps']], 'log1p', draw)), place));
  draw('log1p');
}

function settingsSection() {
  const rows = Object.entries(data.settings);
  main.append(section('Settings that differ', null, el('div', { class: 'card scroll' }, rows.length
    ? table(['setting', ...RUNS.map((_, i) => named(i))], rows.map(([key, values]) => [el('span', { class: 'name' }, key), ...values]))
    : el('p', { class: 'note' }, 'None: every setting is the same.'))));
}

function textSection() {
  const alike = RUNS.every((run) => JSON.stringify(run.tokens) === JSON.stringify(RUNS[0].tokens));
  let other = null;  // the run whose losses are subtracted; null: none
  const list = el('div', { class: 'grid wide' }), key = el('span', {});
  function draw() {
    replace(key, other === null ? scaleKey('sequential', 0, 6, (v) => `${v} nats`) : scaleKey('diverging', -2, 2, (v) => `${v > 0 ? '+' : ''}${v} nats`));
    replace(list, RUNS.map((run, i) => {
      const difference = run.loss.map((loss, t) => (other === null ? loss : loss - RUNS[other].loss[t]));
      return el('div', { class: 'card', 'data-run': i }, el('h3', {}, named(i)),
        el('p', { class: 'note' }, `step ${number(run.step)}: ${mean(run.loss).toFixed(4)} nats per token, ${(mean(run.loss) / Math.LN2 / run.bytes_per_token).toFixed(4)} bits per byte`),
        tokenRow({
          tokens: run.tokens, values: [null, ...difference], ...(other === null ? { kind: 'sequential', low: 0, high: 6 } : { kind: 'diverging', low: -2, high: 2 }),
          tell: (t) => [el('b', {}, JSON.stringify(run.tokens[t])), t === 0 ? el('div', { class: 'note' }, 'no loss: nothing comes before it') : tipTable([
            ...(alike ? RUNS.map((one, j) => [one.name, `${one.loss[t - 1].toFixed(4)} nats`, color(j)]) : [[run.name, `${run.loss[t - 1].toFixed(4)} nats`, color(i)]]),
            ['it would have written', `${JSON.stringify(run.likeliest[t - 1])} ${percent(run.probability[t - 1])}`]])],
        }).node);
    }));
  }
  draw();
  const choices = [['', 'loss'], ...RUNS.map((run, i) => [String(i), `loss minus ${run.name}`])];
  main.append(section('One text under each', 'Each run at its best checkpoint. Blue to orange is better to worse than the run that is subtracted.',
    el('div', { class: 'row' }, alike ? segments('Colour of tokens', choices, '', (value) => { other = value === '' ? null : Number(value); draw(); }) : null, key), list));
  if (alike) {
    const x = RUNS[0].loss.map((_, t) => t + 1);
    main.append(el('div', { class: 'card', style: { marginTop: '14px' } }, lineChart({ title: 'Loss of each token of the text', xLabel: 'position', height: 200, series: RUNS.map((run, i) => ({ name: run.name, x, y: run.loss, color: color(i), width: 1.4 })) }).node));
  }
}

async function distributionsSection() {
  const kinds = { weight_bins: ['weights', 'tensors'], gradient_bins: ['gradients', 'tensors'], activation_bins: ['activations', 'activations'] };
  const unpacked = [];
  for (const run of RUNS) unpacked.push(Object.fromEntries(await Promise.all(Object.keys(kinds).map(async (kind) => [kind, await unpack(run.dynamics[kind])]))));
  const edges = RUNS[0].dynamics.edges, width = edges[1] - edges[0], centers = Array.from({ length: edges.length + 1 }, (_, i) => edges[0] + (i - 0.5) * width);
  let kind = 'activation_bins', name = null;
  const chooser = el('span', {}), picture = el('div', {}), sizes = el('div', {});
  const namesOf = (run) => run.dynamics[kinds[kind][1]];
  // A parameter's rms follows from its norm.
  const scale = (run, at_) => {
    const { dynamics } = run, last = dynamics.steps.length - 1;
    if (kind === 'activation_bins') return dynamics.rms[last][at_];
    return dynamics[kind === 'weight_bins' ? 'weight' : 'gradient'][last][at_] / Math.sqrt(dynamics.sizes[at_]);
  };
  function draw() {
    const series = RUNS.map((run, i) => {
      const place = namesOf(run).indexOf(name);
      return place < 0 ? null : { name: run.name, x: centers, y: [...viewAt(unpacked[i][kind], run.dynamics.steps.length - 1, place)].map((c) => c / 255), color: color(i), rms: scale(run, place) };
    }).filter(Boolean);
    replace(picture, lineChart({ title: `${name}: distribution`, xLabel: 'in units of the rms', height: 240, series }).node);
    replace(sizes, table(['run', 'rms of the elements'], series.map((s) => [s.name, number(s.rms)])));
  }
  function choose() {
    const names = [...new Set(RUNS.flatMap(namesOf))];
    const shared = names.filter((one) => RUNS.every((run) => namesOf(run).includes(one)));
    if (!names.includes(name)) name = (shared.length ? shared : names).at(kind === 'activation_bins' ? -2 : 0);
    replace(chooser, select('of', names.map((value) => [value, value]), name, (value) => { name = value; draw(); }));
    draw();
  }
  choose();
  main.append(section('Distributions', 'The last that each run recorded: the probe of its last step, or of its best checkpoint if it had no probes.',
    el('div', { class: 'row' }, segments('Kind', Object.entries(kinds).map(([value, [label]]) => [value, label]), kind, (value) => { kind = value; choose(); }), chooser),
    el('div', { class: 'grid wide' }, el('div', { class: 'card' }, picture), el('div', { class: 'card' }, sizes))));
}

function headsSection() {
  const names = { previous: 'to the token before', duplicate: 'to the same token, earlier', induction: 'to what followed it (induction)', entropy: 'entropy, nats' };
  let measure = 'previous';
  const list = el('div', { class: 'grid' }), key = el('span', {});
  function draw() {
    const all = RUNS.map((run) => run.dynamics[measure].at(-1)), high = measure === 'entropy' ? Math.max(...all.flat(2)) : 1;
    replace(list, RUNS.map((run, i) => el('div', { class: 'card' }, el('h3', {}, named(i)), heatMap({
      rows: all[i].map((_, layer) => `h_${layer}`), columns: all[i][0].map((_, head) => head), values: all[i], low: 0, high, rowHeight: 24, columnName: 'head', columnTicks: all[i][0].map((_, h) => h), label: `${measure} of each head of ${run.name}`,
    }).node)));
    replace(key, scaleKey('sequential', 0, high));
  }
  draw();
  main.append(section('Heads', 'Scores on random tokens that are repeated once, at the last step of each run.',
    el('div', { class: 'row' }, segments('Score', Object.entries(names), measure, (value) => { measure = value; draw(); }), key), list));
}

function samplesSection() {
  main.append(section('What each writes by itself', 'The same draws, at the best checkpoint of each.',
    el('div', { class: 'grid wide' }, RUNS.map((run, i) => el('div', { class: 'card' }, el('h3', {}, named(i)), el('pre', {}, run.sample))))));
}

async function comparePage() {
  heading();
  await painted();
  curvesSection();
  settingsSection();
  textSection();
  samplesSection();
  headsSection();
  await distributionsSection();
}
