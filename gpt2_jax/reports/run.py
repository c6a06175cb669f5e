"""The page of a run through its training.

Read from the run's folder, while it trains or later: its records, its probes and its kept
checkpoints, which are looked at through gpt2_jax.lens. A run without probes gets those of its kept
checkpoints, measured now.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax import config as config_lib
from gpt2_jax.diagnostics import ledger, ngrams, probes
from gpt2_jax.diagnostics.replay import Replay, setup_here
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.lens import flow as flow_lib
from gpt2_jax.model.params import count_params
from gpt2_jax.parallel.devices import allow_transfers
from gpt2_jax.reports import flow as flow_report
from gpt2_jax.reports import step as step_report
from gpt2_jax.reports.html import packed, write_page
from gpt2_jax.reports.over_time import (
    Notify,
    dynamics_for_page,
    dynamics_of,
    load_checkpoints,
    looks_of,
    text_tokens,
)
from gpt2_jax.terminal import counted
from gpt2_jax.workdir import history

# A head is called by its highest score if it is at least this, and became what it is at the first
# step from which the score stays above half of its last value.
HEAD_SCORE, BECAME = 0.25, 0.5
SPIKES, SPIKE_WINDOW = 6, 20  # steps worth opening; records before one that it is compared with


def write_run(
    folder: Path,
    out: Path,
    *,
    text: str | None = None,
    corpus: str | None = None,
    notify: Notify = print,
) -> str:
    """Writes the page of a run; returns a line that names it.

    `text` takes the probe text's place. `corpus` is as in ledger.open_run. Pages of opened steps
    that lie beside `out` as NAME_step_N.html are linked. Raises UserError.
    """
    data = collect(folder, text=text, corpus=corpus, notify=notify)
    data['opened'] = {
        int(path.stem.rpartition('_')[2]): path.name
        for path in sorted(out.parent.glob(f'{out.stem}_step_*.html'))
        if path.stem.rpartition('_')[2].isdecimal()
    }
    return write_page('run', f'{folder.name}: a training run', data, out)


def write_steps(
    folder: Path,
    out: Path,
    steps: list[str],
    *,
    corpus: str | None = None,
    notify: Notify = print,
) -> Iterator[str]:
    """Writes pages of opened updates where `write_run` links them; yields a line for each."""
    wrong = [step for step in steps if not step.isdecimal()]
    if wrong:
        raise UsageError(f'--steps has {wrong[0]!r}: expected numbers of updates')
    replay = Replay(folder, notify, corpus) if steps else None
    for step in map(int, steps):
        replay.check(step)
    for step in sorted(map(int, steps)):
        found = step_report.to_json(replay.run, replay.open(step))
        yield step_report.write(found, out.with_name(f'{out.stem}_step_{step}.html'))


@allow_transfers
def collect(
    folder: Path, *, text: str | None = None, corpus: str | None = None, notify: Notify = print
) -> dict[str, Any]:
    """Everything on the page of a run. Raises UserError if there is nothing to show yet."""
    run = ledger.open_run(folder, corpus)
    setup = setup_here(run.config, run)
    models = load_checkpoints(folder, notify)
    if not models:
        raise UserError(f'{folder} has no checkpoint yet: wait for the first, or keep more of them')
    tokens_T = text_tokens(run, setup, text)
    notify(f'looking into {counted(len(models), "checkpoints")}')
    dynamics = dynamics_of(run, setup, models, notify)
    looks = looks_of(run, models, tokens_T)
    ids = np.unique(
        np.concatenate([x.ravel() for x in (looks['top'], tokens_T, dynamics['tokens'])])
    )
    summary = history.read_summary(folder)
    config = config_lib.flatten(run.config)
    defaults = config_lib.flatten(config_lib.resolve(config_lib.default_config()))
    cfg = models[0].model.cfg
    return {
        'run': str(folder),
        'finished': summary is not None,
        'done': history.steps_done(folder),
        'steps': run.config.train.steps,
        'facts': {
            'parameters': count_params(setup.shapes.params),
            'tokens_per_step': setup.tokens_per_step,
            'flops_per_token': setup.flops_per_token,
            'train_tokens': len(run.dataset.train),
            'val_tokens': len(run.dataset.val),
            'corpus': run.dataset.name,
            'tokenizer': run.dataset.tokenizer.name,
            'layers': cfg.n_layer,
            'heads': cfg.n_head,
        },
        'summary': summary,
        'curves': curves(folder),
        'baselines': ngrams.baselines(run.dataset),
        'spikes': spikes(history.read_records(folder, 'train')),
        'config': [[key, str(value), str(defaults[key])] for key, value in config.items()],
        'vocabulary': dict(zip(ids.tolist(), run.token_bytes.texts(ids), strict=True)),
        'checkpoints': [model.step for model in models],
        'looks': {
            name: value if name == 'samples' else packed(value) for name, value in looks.items()
        },
        'tokens': tokens_T.tolist(),
        'dynamics': dynamics_for_page(dynamics),
        'heads': head_names(dynamics, looks, [model.step for model in models], cfg.n_head),
        'flow': _flow(setup),
    }


def curves(folder: Path) -> dict[str, dict[str, list]]:
    """The records of metrics.jsonl as columns: {'train': {'step': [..], 'loss': [..], ..}, ..}."""
    found = {}
    for split in ('train', 'val'):
        records = history.read_records(folder, split)
        names = list(records[0]) if records else []
        found[split] = {
            name: [record.get(name) for record in records] for name in names if name != 'split'
        }
    return found


def spikes(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The recorded steps whose loss or gradient norm is furthest above the records before them.

    In standard deviations of the last SPIKE_WINDOW records; at most SPIKES, the highest first.
    """
    found = {}
    for name in ('loss', 'grad_norm'):
        values = np.array([record.get(name, np.nan) for record in records], float)
        for i in range(SPIKE_WINDOW, len(values)):
            before = values[i - SPIKE_WINDOW : i]
            deviations = (values[i] - before.mean()) / max(before.std(), 1e-12)
            step = records[i]['step']
            if deviations > max(3, found.get(step, {'deviations': 0})['deviations']):
                found[step] = {'step': step, 'what': name, 'value': float(values[i])}
                found[step]['deviations'] = float(deviations)
    return sorted(found.values(), key=lambda spike: -spike['deviations'])[:SPIKES]


def head_names(
    dynamics: dict[str, np.ndarray], looks: dict[str, Any], steps: list[int], n_head: int
) -> list[dict[str, Any]]:
    """What each head is at the end, and since which step: see HEAD_SCORE and BECAME.

    `before` is the last step at which it was not yet so. previous, duplicate and induction are the
    probes' scores, on random repeated tokens; itself and
    first are mean attention weights on the page's text, to the query's own and to the first
    position.
    """
    series = {name: (dynamics['steps'], dynamics[name]) for name in probes.SCORES}
    series |= {name: (np.array(steps), looks[name]) for name in ('itself', 'first')}
    found = []
    for i in range(looks['itself'].shape[1]):
        for head in range(n_head):
            last = {name: float(values[-1, i, head]) for name, (_, values) in series.items()}
            kind = max(last, key=last.get)
            entry = {'head': f'h_{i}.attn.{head}', 'kind': None, 'scores': last}
            if last[kind] >= HEAD_SCORE:
                at, values = series[kind]
                above = values[:, i, head] >= BECAME * last[kind]
                since = len(above) - int(np.argmin(above[::-1])) if not above.all() else 0
                before = int(at[since - 1]) if since else None
                entry |= {'kind': kind, 'step': int(at[since]), 'before': before}
            found.append(entry)
    return found


def _flow(setup) -> list[dict[str, Any]]:
    """The shape flow of one update, by place in the model."""
    cfg = dataclasses.replace(setup.model.cfg, kernels='xla', attention='xla')
    train = setup.config.train
    flow = flow_lib.shape_flow(
        cfg,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        grad_accum_steps=train.grad_accum_steps,
    )
    return [
        {
            'phase': section.phase,
            'title': section.title,
            'layers': section.layers,
            'flops': section.total('flops'),
            'bytes': section.total('n_bytes'),
            'parameters': section.total('n_params'),
        }
        for section in flow_report.sections(flow)
    ]
