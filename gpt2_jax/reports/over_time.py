"""What the checkpoints of a run do with one text, and its probes, as the pages show them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt2_jax.diagnostics import ledger, probes
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.inference.sampling import TO_READ
from gpt2_jax.inference.streaming import continue_text
from gpt2_jax.lens.activations import capture
from gpt2_jax.lens.readings import residual_stream, unembed
from gpt2_jax.lens.report import packed_patterns
from gpt2_jax.lens.subject import load
from gpt2_jax.reports.html import packed, plain
from gpt2_jax.terminal import counted
from gpt2_jax.workdir import history, restore
from gpt2_jax.workdir.checksums import FOLDER, committed_steps

TEXT_TOKENS = 64  # of the text on the page
TOP = 3  # predictions shown for each layer and position
SAMPLE_TOKENS = 240
PATTERN_BYTES = 8 << 20  # of all attention patterns on a page, before compression

Notify = Callable[[str], None]


def text_tokens(run: ledger.Run, setup, text: str | None) -> np.ndarray:
    """The tokens (T,) of the page's text: `text`, or the beginning of the validation text.

    Raises UserError unless they are two or more, and fit into the context.
    """
    if setup.config.train.seq_len < 2:
        raise UserError(
            f'{run.folder} trained on single tokens (train.seq_len = 1): a page needs at least '
            'two, one to read and the next'
        )
    if text is None:
        return probes.probe_text(setup)[0][:TEXT_TOKENS]
    tokens_T = np.asarray(run.dataset.tokenizer.encode(text), np.int32)
    if not 2 <= len(tokens_T) <= setup.model.cfg.n_positions:
        raise UsageError(
            f'the text has {counted(len(tokens_T), "tokens")}: expected 2 to '
            f'{setup.model.cfg.n_positions}, the context of the model'
        )
    return tokens_T


def load_checkpoints(folder: Path, notify: Notify) -> list[restore.Restored]:
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
            found.append(load(folder, str(step)))
        except UserError as error:  # a running training removes old ones
            notify(f'left out: {error}')
    # One model for all, so that everything is compiled once.
    return [dataclasses.replace(model, model=found[0].model) for model in found]


def dynamics_of(run: ledger.Run, setup, models, notify: Notify) -> dict[str, np.ndarray]:
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


def looks_of(run: ledger.Run, models, tokens_T: np.ndarray) -> dict[str, Any]:
    """What each of C checkpoints does with the text.

    pattern (C, L, H, T (T + 1) / 2): see lens.report.packed_patterns. top, probability (C, L + 1,
    T, TOP): likeliest next tokens by the stream before the first block and after each. rank, right
    (C, L + 1, T - 1): of the next token; rank 0 is the likeliest. loss (C, T - 1). itself, first
    (C, L, H): see reports/run.py. samples: texts.
    """
    found: dict[str, list] = {
        name: []
        for name in ('pattern', 'top', 'probability', 'rank', 'right', 'loss', 'itself', 'first')
    }
    samples = []
    for loaded in models:
        subject = (loaded.model.cfg, jax.device_put(loaded.params))
        L = loaded.model.cfg.n_layer
        streams = residual_stream(loaded.model.cfg)
        taken = capture(subject, tokens_T, ['pattern', *streams])
        patterns = np.stack([taken[f'h_{i}.pattern'][0] for i in range(L)])
        found['pattern'].append(packed_patterns(loaded.model.cfg, taken))
        found['itself'].append(patterns.diagonal(axis1=2, axis2=3)[..., 1:].mean(-1))
        found['first'].append(patterns[:, :, 1:, 0].mean(-1))
        read = [_read_out(unembed(subject, taken[name])[0], tokens_T) for name in streams]
        for i, name in enumerate(('top', 'probability', 'rank', 'right')):
            found[name].append(np.stack([layer[i] for layer in read]))
        found['loss'].append(-np.log(np.maximum(found['right'][-1][-1], 1e-38)))
        samples.append(_sample(run, loaded, subject[1]))
    arrays = {name: np.stack(values) for name, values in found.items()}
    for name in ('probability', 'right', 'loss', 'itself', 'first'):
        arrays[name] = arrays[name].astype(np.float32)
    for name in ('top', 'rank'):
        arrays[name] = arrays[name].astype(np.int32)
    return arrays | {'samples': samples}


def _read_out(logits_TV: np.ndarray, tokens_T: np.ndarray):
    """(top, probability, rank, right) of one layer: see `looks_of`."""
    logits_TV = logits_TV.astype(np.float64)
    p_TV = np.exp(logits_TV - logits_TV.max(-1, keepdims=True))
    p_TV /= p_TV.sum(-1, keepdims=True)
    top = np.argsort(-p_TV, axis=-1, kind='stable')[:, :TOP]
    right_T1 = np.take_along_axis(p_TV[:-1], tokens_T[1:, None], -1)
    rank = (p_TV[:-1] > right_T1).sum(-1)
    return top, np.take_along_axis(p_TV, top, -1), rank, right_T1[:, 0]


def _sample(run: ledger.Run, loaded: restore.Restored, params) -> str:
    """What the model writes by itself, by the same draws at every checkpoint."""
    written = continue_text(
        loaded.model,
        params,
        run.dataset.tokenizer,
        prompt='',
        max_new_tokens=SAMPLE_TOKENS,
        seed=run.config.train.seed,
        sampling=TO_READ,
    )
    return ''.join(written)


def dynamics_for_page(dynamics: dict[str, np.ndarray]) -> dict[str, Any]:
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
