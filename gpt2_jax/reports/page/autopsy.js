'use strict';
/* The page of an update that went wrong: the result of reports/autopsy.py's to_json. */

const PARTS = ['before', 'gradient', 'after'];
const isBad = (summary) => summary.n_bad > 0;

function heading() {
  const { culprit, metrics } = data;
  append(main, [
    el('header', {}, el('h1', {}, `Step ${number(data.step)}, examined`),
      el('span', { class: 'lead' }, data.run), el('span', { class: 'spacer' }), themeButton()),
    el('div', { id: 'said' }, data.said.map((sentence) => el('p', {}, sentence))),
    culprit && factList([
      ['phase', culprit.phase], ['first in', culprit.name], ['value', culprit.value],
      ['head', culprit.head], ['row of the batch', culprit.row], ['position', culprit.position],
    ]),
    factList(Object.entries(metrics).map(([name, x]) => [name.replace('_', ' '), metric(name, x)])),
    el('p', { class: 'note' },
      `Computed again from checkpoint ${number(data.checkpoint)}, with the batch and the dropout masks of this step.`),
  ]);
}

function leadUpSection() {
  const steps = [...data.before, { step: data.step, ...data.metrics }];
  const x = steps.map((one) => one.step);
  const chart = (key, title) => el('div', { class: 'card' }, lineChart({
    title, yKind: key === 'loss' ? 'linear' : 'log', height: 170,
    series: [{ name: title, x, y: steps.map((one) => one[key]) }],
  }).node);
  main.append(section('What led there', 'The updates before it. A value that is not finite has no point.',
    el('div', { class: 'grid' },
      chart('loss', 'Loss'), chart('grad_norm', 'Gradient norm'), chart('update_norm', 'Update norm'),
      chart('param_norm', 'Weight norm'), chart('learning_rate', 'Learning rate'))));
}

function activationsSection() {
  const names = Object.keys(data.activations);
  const rms = (summaries) => names.map((name) => summaries[name].rms || null);
  const x = names.map((_, i) => i);
  const first = data.culprit && names.indexOf(data.culprit.name);
  const { node, mark } = lineChart({
    title: 'rms of the finite elements, in the order of the forward pass', xLabel: 'activation',
    yKind: 'log', height: 240, series: [
      { name: 'activation', x, y: rms(data.activations) }, { name: 'its gradient', x, y: rms(data.gradients) }],
  });
  if (first >= 0) mark(first);
  const cell = (summary) => el('span', { class: isBad(summary) ? 'pill bad' : '' },
    isBad(summary) ? `${number(summary.n_bad)} not finite` : number(summary.rms));
  main.append(section('Activations and their gradients', 'From the embeddings to the logits.',
    el('div', { class: 'card' }, node),
    el('div', { class: 'card', style: { marginTop: '14px' } }, table(
      ['', 'activation', 'rms', 'largest', 'gradient, rms', 'gradient, largest'],
      names.map((name, i) => {
        const forward = data.activations[name], backward = data.gradients[name];
        return [String(i), el('span', { class: 'name', 'data-bad': isBad(forward) ? 'forward' : isBad(backward) ? 'backward' : null }, name),
          cell(forward), number(forward.largest), cell(backward), number(backward.largest)];
      })))));
}

function parametersSection() {
  const cell = (summary) => (isBad(summary)
    ? el('span', { class: 'pill bad' }, `${number(summary.n_bad)} not finite`) : number(summary.rms));
  main.append(section('Parameters', 'The rms of each array before the update, of its gradient, and after.',
    el('div', { class: 'card' }, table(['array', ...PARTS],
      Object.entries(data.parameters).map(([name, summaries]) =>
        [el('span', { class: 'name' }, name), ...summaries.map(cell)])))));
}

function rowsSection() {
  const { culprit, passage } = data;
  main.append(section('What it read', 'The rows of the batch, the row in question first. The colour of a token is its loss before the update.',
    scaleKey('sequential', 0, 6, (v) => `${v} nats`),
    el('div', { class: 'grid wide', style: { margin: '10px 0' } }, data.rows.map((row) => {
      const { node, choose } = tokenRow({
        tokens: row.tokens, values: [null, ...row.losses], low: 0, high: 6,
        tell: (i) => [el('b', {}, JSON.stringify(row.tokens[i])), i > 0 && el('div', {}, `${fixed(row.losses[i - 1])} nats`)],
      });
      if (culprit && culprit.row === row.row && culprit.position !== null) choose(culprit.position);
      else if (!culprit && passage && passage.row === row.row) choose(passage.start + 1);
      return el('div', { class: 'card', 'data-row': row.row },
        el('div', { class: 'row', style: { margin: '0 0 4px' } }, el('b', {}, `row ${row.row}`),
          el('span', { class: 'spacer' }), el('span', { class: 'note' }, `${fixed(row.mean)} nats`)),
        el('div', { class: 'note name' }, row.place), node);
    }))));
}

function autopsyPage() {
  heading();
  leadUpSection();
  rowsSection();
  activationsSection();
  parametersSection();
}
