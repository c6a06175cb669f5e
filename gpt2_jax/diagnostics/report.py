"""The pages of runs: one run through its training, or several compared.

Read from the run's folder, while it trains or later: its records, its probes and its kept
checkpoints, which are looked at through gpt2_jax.lens. A run without probes gets those of its kept
checkpoints, measured now.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax import config as config_lib
from gpt2_jax import lens
from gpt2_jax.architecture import GPT2Config
from gpt2_jax.diagnostics import ledger, probes
from gpt2_jax.diagnostics.page import packed, plain, write_page
from gpt2_jax.diagnostics.replay import Replay, setup_here, to_json
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.inference import ngrams
from gpt2_jax.inference.decoding import generate
from gpt2_jax.inference.sampling import Sampling
from gpt2_jax.inference.streaming import encode_prompt, stream_text
from gpt2_jax.lens import flow as flow_lib
from gpt2_jax.lens.readings import residual_stream, unembed
from gpt2_jax.model.params import count_params
from gpt2_jax.workdir import history, restore
from gpt2_jax.workdir.checksums import FOLDER, committed_steps

TEXT_TOKENS = 64  # of the text on the page
TOP = 3  # predictions shown for each layer and position
SAMPLE_TOKENS = 240
SAMPLING = Sampling(temperature=0.8)
PATTERN_BYTES = 8 << 20  # of all attention patterns on a page, before compression
# A head is called by its highest score if it is at least this, and became what it is at the first
# step from which the score stays above half of its last value.
HEAD_SCORE, BECAME = 0.25, 0.5
SPIKES = 6  # steps worth opening

Notify = Callable[[str], None]


def write_run(folder: Path, out: Path, *, text: str | None = None, notify: Notify = print) -> str:
    """Writes the page of a run; returns a line that names it. `text` takes the probe text's place.

    Pages of opened steps that lie beside `out` as NAME_step_N.html are linked. Raises UserError.
    """
    data = collect(folder, text=text, notify=notify)
    data['opened'] = {
        int(path.stem.rpartition('_')[2]): path.name
        for path in sorted(out.parent.glob(f'{out.stem}_step_*.html'))
        if path.stem.rpartition('_')[2].isdecimal()
    }
    return write_page('run', f'{folder.name}: a training run', data, out)


def write_steps(
    folder: Path, out: Path, steps: list[str], *, notify: Notify = print
) -> Iterator[str]:
    """Writes pages of opened updates where `write_run` links them; yields a line for each."""
    wrong = [step for step in steps if not step.isdecimal()]
    if wrong:
        raise UsageError(f'--steps has {wrong[0]!r}: expected numbers of updates')
    replay = Replay(folder, notify) if steps else None
    for step in sorted(map(int, steps)):
        found = to_json(replay.run, replay.open(step))
        page = out.with_name(f'{out.stem}_step_{step}.html')
        yield write_page('step', f'Step {step} of {folder.name}', found, page)


def write_comparison(
    folders: list[Path], out: Path, *, text: str | None = None, notify: Notify = print
) -> str:
    """Writes the page that compares runs; returns a line that names it. Raises UserError."""
    if len(folders) < 2:
        raise UsageError(f'compare needs two runs or more, and got {len(folders)}')
    names = _distinct_names(folders)
    found = [
        _summary_of(folder, name, text, notify) for folder, name in zip(folders, names, strict=True)
    ]
    settings = [config_lib.flatten(history.read_config(folder)) for folder in folders]
    differ = {
        key: [str(values[key]) for values in settings]
        for key in settings[0]
        if len({str(values[key]) for values in settings}) > 1
    }
    data = {'runs': found, 'settings': differ}
    return write_page('compare', f'{" and ".join(names)} compared', data, out)


def collect(folder: Path, *, text: str | None = None, notify: Notify = print) -> dict[str, Any]:
    """Everything on the page of a run. Raises UserError if there is nothing to show yet."""
    run = ledger.open_run(folder)
    setup = setup_here(run.config, run)
    models = _load_checkpoints(folder, notify)
    if not models:
        raise UserError(f'{folder} has no checkpoint yet: wait for the first, or keep more of them')
    tokens_T = text_tokens(run, setup, text)
    notify(f'looking into {len(models)} checkpoints')
    dynamics = _dynamics(run, setup, models, notify)
    looks = _looks(run, models, tokens_T)
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
        'dynamics': _for_page(dynamics),
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


def spikes(records: list[dict[str, Any]], window: int = 20) -> list[dict[str, Any]]:
    """The recorded steps whose loss or gradient norm is furthest above the records before them.

    In standard deviations of the last `window` records; at most SPIKES, the highest first.
    """
    found = {}
    for name in ('loss', 'grad_norm'):
        values = np.array([record.get(name, np.nan) for record in records], float)
        for i in range(window, len(values)):
            before = values[i - window : i]
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


def text_tokens(run: ledger.Run, setup, text: str | None) -> np.ndarray:
    """The tokens (T,) of the page's text: `text`, or the beginning of the validation text."""
    if text is None:
        return probes.probe_text(setup)[0][:TEXT_TOKENS]
    tokens_T = np.asarray(run.dataset.tokenizer.encode(text), np.int32)
    if not 2 <= len(tokens_T) <= setup.model.cfg.n_positions:
        raise UsageError(
            f'the text has {len(tokens_T)} tokens: expected 2 to {setup.model.cfg.n_positions}, the '
            'context of the model'
        )
    return tokens_T


def _load_checkpoints(folder: Path, notify: Notify) -> list[restore.Restored]:
    """The kept checkpoints that can be read, at most as many as fit on a page."""
    steps = committed_steps(folder / FOLDER)
    if not steps:
        return []
    config = history.read_config(folder).model
    pairs = TEXT_TOKENS * (TEXT_TOKENS + 1) // 2
    most = max(3, min(40, PATTERN_BYTES // (config.n_layer * config.n_head * pairs)))
    if len(steps) > most:  # evenly over the list: with checkpoint.keep = 'log' over a log scale
        chosen = np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))
        notify(f'{len(steps)} checkpoints: showing {len(chosen)} of them')
        steps = [steps[i] for i in chosen]
    found = []
    for step in steps:
        try:
            found.append(restore.load(folder, str(step)))
        except UserError as error:  # a running training removes old ones
            notify(f'left out: {error}')
    # One model for all, so that everything is compiled once.
    return [dataclasses.replace(model, model=found[0].model) for model in found]


def _dynamics(run: ledger.Run, setup, models, notify: Notify) -> dict[str, np.ndarray]:
    """The arrays of the run's probes; without probes, those of the checkpoints."""
    recorded = history.read_probes(run.folder)
    if recorded is not None:
        return recorded
    notify('no probes: measuring the checkpoints (train.probe records more, during training)')
    measure = probes.Measure(setup)
    rows = [measure(model.params) for model in models]
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    unknown = np.full(arrays['weight'].shape, np.nan)
    steps = np.array([model.step for model in models])
    return measure.constants() | arrays | {'steps': steps, 'update': unknown, 'ratio': unknown}


def _looks(run: ledger.Run, models, tokens_T: np.ndarray) -> dict[str, Any]:
    """What each of C checkpoints does with the text.

    pattern (C, L, H, T (T + 1) / 2) uint8, the weights below the diagonal, row by row: a byte b
    stands for (b / 255)^2. top, probability (C, L + 1, T, TOP): likeliest next tokens by the stream
    before the first block and after each. rank, right (C, L + 1, T - 1): of the next token; rank 0
    is the likeliest. loss (C, T - 1). itself, first (C, L, H): see `head_names`. samples: texts.
    """
    T = len(tokens_T)
    below = np.tril_indices(T)
    found: dict[str, list] = {
        name: []
        for name in ('pattern', 'top', 'probability', 'rank', 'right', 'loss', 'itself', 'first')
    }
    samples = []
    for loaded in models:
        subject = (loaded.model.cfg, jax.device_put(loaded.params))
        L = loaded.model.cfg.n_layer
        streams = residual_stream(loaded.model.cfg)
        taken = lens.capture(subject, tokens_T, ['pattern', *streams])
        patterns = np.stack([taken[f'h_{i}.pattern'][0] for i in range(L)])
        root = np.sqrt(patterns[:, :, below[0], below[1]])
        found['pattern'].append(np.round(255 * root).astype(np.uint8))
        found['itself'].append(patterns.diagonal(axis1=2, axis2=3)[..., 1:].mean(-1))
        found['first'].append(patterns[:, :, 1:, 0].mean(-1))
        read = [_read_out(unembed(subject, taken[name])[0], tokens_T) for name in streams]
        for name, values in zip(('top', 'probability', 'rank', 'right'), zip(*read), strict=True):
            found[name].append(np.stack(values))
        found['loss'].append(-np.log(np.maximum(found['right'][-1][-1], 1e-38)))
        samples.append(_sample(run, loaded, subject[1]))
    arrays = {name: np.stack(values) for name, values in found.items()}
    for name in ('probability', 'right', 'loss', 'itself', 'first'):
        arrays[name] = arrays[name].astype(np.float32)
    for name in ('top', 'rank'):
        arrays[name] = arrays[name].astype(np.int32)
    return arrays | {'samples': samples}


def _read_out(logits_TV: np.ndarray, tokens_T: np.ndarray):
    """(top, probability, rank, right) of one layer: see `_looks`."""
    logits_TV = logits_TV.astype(np.float64)
    p_TV = np.exp(logits_TV - logits_TV.max(-1, keepdims=True))
    p_TV /= p_TV.sum(-1, keepdims=True)
    top = np.argsort(-p_TV, axis=-1, kind='stable')[:, :TOP]
    right_T1 = np.take_along_axis(p_TV[:-1], tokens_T[1:, None], -1)
    rank = (p_TV[:-1] > right_T1).sum(-1)
    return top, np.take_along_axis(p_TV, top, -1), rank, right_T1[:, 0]


def _sample(run: ledger.Run, loaded: restore.Restored, params) -> str:
    """What the model writes by itself, by the same draws at every checkpoint."""
    tokenizer = run.dataset.tokenizer
    chunks = generate(
        loaded.model,
        params,
        encode_prompt(tokenizer, ''),
        max_new_tokens=SAMPLE_TOKENS,
        seed=run.config.train.seed,
        sampling=SAMPLING,
        notify=lambda text: None,
    )
    return ''.join(stream_text(chunks, tokenizer))


def _for_page(dynamics: dict[str, np.ndarray]) -> dict[str, Any]:
    """The probes as the page needs them: means by layer in place of every token, bytes for bins."""
    names = ('entropy', *probes.SCORES, 'dead', 'rms', 'kurtosis', 'curvature')
    norms = ('weight', 'gradient', 'update', 'ratio')
    bins = ('weight_bins', 'gradient_bins', 'activation_bins')
    found = {name: plain(dynamics[name], 4) for name in (*names, *norms)}
    for name in bins:
        largest = np.maximum(dynamics[name].max(-1, keepdims=True), 1)
        found[name] = packed(np.round(255 * dynamics[name] / largest).astype(np.uint8))
    return found | {
        'steps': dynamics['steps'].tolist(),
        'tensors': dynamics['tensors'].tolist(),
        'sizes': dynamics['sizes'].tolist(),
        'activations': dynamics['activations'].tolist(),
        'edges': plain(dynamics['edges'], 5),
        'tokens': dynamics['tokens'].tolist(),
        'loss': packed(dynamics['loss'].astype(np.float32)),
        'rank': plain(dynamics['rank'].mean((2, 3)), 4),
        'first': plain((dynamics['rank'] == 0).mean((2, 3)), 4),
    }


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
        for section in flow_lib.sections(flow)
    ]


def _summary_of(folder: Path, name: str, text: str | None, notify: Notify) -> dict[str, Any]:
    """One run on the page that compares: curves, and its best checkpoint on the text."""
    run = ledger.open_run(folder)
    setup = setup_here(run.config, run)
    loaded = restore.load(folder, 'best')
    notify(f'{name}: step {loaded.step:,}')
    tokens_T = text_tokens(run, setup, text)
    looks = _looks(run, [loaded], tokens_T)
    dynamics = _for_page(_dynamics(run, setup, [loaded], lambda text: None))
    cfg: GPT2Config = loaded.model.cfg
    return {
        'name': name,
        'run': str(folder),
        'step': loaded.step,
        'done': history.steps_done(folder),
        'steps': run.config.train.steps,
        'summary': history.read_summary(folder),
        'curves': curves(folder),
        'baselines': ngrams.baselines(run.dataset),
        'corpus': run.dataset.name,
        'sha256': run.dataset.sha256,
        'tokenizer': run.dataset.tokenizer.name,
        'parameters': count_params(setup.shapes.params),
        'layers': cfg.n_layer,
        'bytes_per_token': plain(np.array(run.dataset.tokenizer.byte_lengths[tokens_T[1:]].mean())),
        'tokens': run.token_bytes.texts(tokens_T),
        'loss': plain(looks['loss'][0], 5),
        'likeliest': run.token_bytes.texts(looks['top'][0, -1, :, 0]),
        'probability': plain(looks['probability'][0, -1, :, 0], 4),
        'sample': looks['samples'][0],
        'dynamics': dynamics,
    }


def _distinct_names(folders: list[Path]) -> list[str]:
    """The last part of each path, or as many parts as tell them apart."""
    for n in itertools.count(1):
        names = ['/'.join(folder.absolute().parts[-n:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
        if n > 20:
            raise UsageError('compare needs different runs, and one was given twice')
