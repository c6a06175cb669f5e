'use strict';
/* The page of one update: the result of reports/step.py's to_json. */

const MEASURES = {
  before: { name: 'loss before', kind: 'sequential', low: 0, high: 6, of: (row) => row.before },
  after: { name: 'loss after', kind: 'sequential', low: 0, high: 6, of: (row) => row.after },
  change: {
    name: 'change', kind: 'diverging', low: -0.5, high: 0.5,
    of: (row) => row.after.map((after, i) => after - row.before[i]),
  },
};
const ORDERS = {
  worst: ['highest loss first', (a, b) => b.before_mean - a.before_mean],
  gained: ['largest gain first', (a, b) => a.after_mean - a.before_mean - (b.after_mean - b.before_mean)],
  row: ['as in the batch', (a, b) => a.row - b.row],
};
const FIRST_ROWS = 12;

function heading() {
  const tokens = data.rows.length * data.rows[0].before.length;
  const exact = data.difference === 0;
  const kind = data.difference === null ? 'plain' : data.difference <= 1e-3 ? 'good' : 'bad';
  const { loss, grad_norm: gradient, learning_rate: rate, update_norm: update, param_norm: weights } = data.replayed;
  const after = data.rows.reduce((sum, row) => sum + row.after_mean, 0) / data.rows.length;
  main.append(
    el('header', {}, el('h1', {}, `Step ${number(data.step)}`), el('span', { class: 'lead' }, data.run), el('span', { class: 'spacer' }), themeButton()),
    el('p', {}, el('span', { class: `pill ${kind}`, id: 'verdict' }, exact ? '\u2713 ' : '', data.verdict)),
    factList([
      ['loss, nats per token', metric('loss', loss)],
      ['loss of these rows after the update', number(after, 6)],
      ['learning rate', metric('learning_rate', rate)],
      ['gradient norm, before clipping', metric('grad_norm', gradient)],
      ['update norm', metric('update_norm', update)],
      ['weight norm, after', metric('param_norm', weights)],
      [`rows of ${number(data.rows[0].before.length)} tokens`, number(data.rows.length)],
    ]),
    el('p', { class: 'note' }, `Update number ${number(data.step)} of the run, computed again from checkpoint ${number(data.checkpoint)}: ${number(tokens)} targets.`),
  );
  if (data.recorded) {
    main.append(el('details', {}, el('summary', {}, 'Recorded and replayed metrics, all digits'),
      table(['metric', 'recorded', 'replayed'], Object.entries(data.replayed).map(([name, value]) => [name, String(data.recorded[name]), String(value)]))));
  }
}

function rowsSection() {
  let measure = 'before', order = 'worst', shown = FIRST_ROWS;
  const list = el('div', { class: 'grid wide', style: { margin: '10px 0' } }), key = el('span', {}), more = el('button', { onclick: () => { shown = data.rows.length; draw(); } });
  function draw() {
    const { kind, low, high, of } = MEASURES[measure];
    const rows = [...data.rows].sort(ORDERS[order][1]);
    replace(key, scaleKey(kind, low, high, (v) => `${v > 0 && kind === 'diverging' ? '+' : ''}${v} nats`));
    replace(list, rows.slice(0, shown).map((row) => el('div', { class: 'card', 'data-row': row.row },
      el('div', { class: 'row', style: { margin: '0 0 4px' } },
        el('b', {}, `row ${row.row}`),
        el('span', { class: 'spacer' }),
        el('span', { class: 'note' }, `${fixed(row.before_mean)} \u2192 ${fixed(row.after_mean)} nats`)),
      el('div', { class: 'note name' }, row.place),
      tokenRow({
        tokens: row.tokens, values: [null, ...of(row)], kind, low, high,
        tell: (i) => [el('b', {}, JSON.stringify(row.tokens[i])), i === 0
          ? el('div', { class: 'note' }, 'the first token has no loss: nothing comes before it')
          : tipTable([
            ['before', `${fixed(row.before[i - 1])} nats, ${percent(Math.exp(-row.before[i - 1]))}`],
            ['after', `${fixed(row.after[i - 1])} nats, ${percent(Math.exp(-row.after[i - 1]))}`],
            ['change', fixed(row.after[i - 1] - row.before[i - 1])],
            ['token', number(row.token + i)],
          ])],
      }).node)));
    more.textContent = `show all ${data.rows.length} rows`;
    more.hidden = shown >= data.rows.length;
  }
  draw();
  main.append(section('What it read', 'The rows of this batch. The colour of a token is the loss of predicting it; blue to orange is better to worse after the update.',
    el('div', { class: 'row' },
      segments('Colour of tokens', Object.entries(MEASURES).map(([value, m]) => [value, m.name]), measure, (value) => { measure = value; draw(); }),
      select('Order', Object.entries(ORDERS).map(([value, [name]]) => [value, name]), order, (value) => { order = value; draw(); }),
      key),
    list, more));
}

function tensorsSection() {
  const columns = [['name', 'tensor'], ['weight', 'weight norm'], ['gradient', 'gradient norm'], ['update', 'update norm'], ['ratio', 'update / weight']];
  let by = 'name', down = false;
  const body = el('tbody');
  const largest = Object.fromEntries(columns.slice(1).map(([key]) => [key, Math.max(...data.tensors.map((t) => t[key] || 0))]));
  function draw() {
    const rows = data.tensors.map((t, i) => ({ ...t, i }));
    rows.sort((a, b) => (by === 'name' ? a.i - b.i : (a[by] || 0) - (b[by] || 0)) * (down ? -1 : 1));
    replace(body, rows.map((tensor) => el('tr', {},
      el('td', { class: 'name' }, tensor.name, el('div', { class: 'note' }, tensor.shape.join(' \u00d7 '))),
      columns.slice(1).map(([key], i) => el('td', { style: { minWidth: '92px' } },
        number(tensor[key]),
        el('div', { class: 'bar', style: { width: `${(100 * (tensor[key] || 0)) / (largest[key] || 1)}%`, background: seriesColor(i) } }))))));
  }
  const head = el('tr', {}, columns.map(([key, name]) => el('th', {}, el('button', {
    onclick: () => { down = by === key ? !down : key !== 'name'; by = key; draw(); },
  }, name))));
  draw();
  main.append(section('What it changed', 'Euclidean norms of each parameter array, the weights before the update and the gradient before clipping. Click a heading to sort.',
    el('div', { class: 'card scroll' }, el('table', {}, el('thead', {}, head), body))));
}

function positionsSection() {
  const T = data.rows[0].before.length, mean = (key, t) => data.rows.reduce((sum, row) => sum + row[key][t], 0) / data.rows.length;
  const x = Array.from({ length: T }, (_, t) => t + 1);
  const losses = (key) => data.rows.flatMap((row) => row[key]);
  const high = Math.ceil(Math.max(...losses('before')) + 0.5), bins = 40, edges = Array.from({ length: bins }, (_, i) => ((i + 0.5) * high) / bins);
  const count = (key) => {
    const counts = new Array(bins).fill(0);
    for (const loss of losses(key)) counts[Math.min(Math.floor((loss / high) * bins), bins - 1)] += 1;
    return counts;
  };
  main.append(section('Where the loss lies', null, el('div', { class: 'grid wide' },
    el('div', { class: 'card' }, lineChart({
      title: 'Mean loss by position in the row', xLabel: 'position', series: [
        { name: 'before', x, y: x.map((_, t) => mean('before', t)) }, { name: 'after', x, y: x.map((_, t) => mean('after', t)) }],
    }).node),
    el('div', { class: 'card' }, lineChart({
      title: 'Tokens by their loss', xLabel: 'nats', series: [
        { name: 'before', x: edges, y: count('before') }, { name: 'after', x: edges, y: count('after') }],
    }).node))));
}

function stepPage() {
  heading();
  rowsSection();
  tensorsSection();
  positionsSection();
}
