"""Everything that the page about a model at work on a text shows: reports/model.py writes it.

At each position the model guesses the next token. That token is the position's target; at the last
position, which no token follows, the target is the likeliest one.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.errors import UsageError
from gpt2_jax.lens import flow as flow_lib
from gpt2_jax.lens.activations import capture
from gpt2_jax.lens.hessian import curvature
from gpt2_jax.lens.interventions import ablate
from gpt2_jax.lens.readings import (
    default_targets,
    direct_terms,
    head_scores,
    jacobian_lens,
    repeated_half,
    residual_stream,
    transport,
    unembed,
)
from gpt2_jax.lens.subject import (
    Subject,
    as_subject,
    as_tokens,
    run,
    token_text,
    token_texts,
)
from gpt2_jax.model.params import count_params
from gpt2_jax.parallel.partition import named_leaves

# What can be left out of a page; each costs many passes of the model.
SECTIONS = ('jacobian', 'ablation', 'backward', 'curvature', 'shapes')
TOP = 6  # predictions kept for each layer and position
NEURONS = 12  # kept for each position
FIRST_TOKENS = 64  # of the text, for its average Jacobian and its curvature: many passes each
LEVELS = 255  # of a weight in `packed_patterns`; page/run.js has this number too
# Larger models get the curvature of the whole model alone: each layer costs as much again.
MAX_BY_LAYER = 20_000_000


class Report(NamedTuple):
    """What is on a page: facts for people as JSON, and arrays by name."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]
    flow: flow_lib.Flow | None


def collect(
    source,
    text,
    *,
    title: str = 'GPT-2',
    path: str = '',
    prompt_tokens: int | None = None,
    skip: Collection[str] = (),
    make_step: flow_lib.MakeStep = flow_lib.plain_step,
    step_size: tuple[int, int, int] | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> Report:
    """Everything that the page shows of a model on one text of at least two tokens.

    `path` is shown when the pointer is on the title. The first `prompt_tokens` tokens are given,
    the others the model's own; by default all are given. `skip` names SECTIONS to leave out. The
    shape flow is of `make_step` at `step_size`, which is (batch_size, seq_len, grad_accum_steps).
    `notify` gets a line for each part, with its time. Raises UsageError for an unknown section,
    else as `capture`.
    """
    if unknown := set(skip) - set(SECTIONS):
        raise UsageError(f'no section {sorted(unknown)[0]!r}: expected {", ".join(SECTIONS)}')
    subject = as_subject(source)
    cfg = subject.cfg
    tokens_BT = as_tokens(subject, text, least=2)[:1]
    T = tokens_BT.shape[1]
    part, arrays = functools.partial(_timed, notify), {}

    with part('activations'):
        taken = capture(subject, tokens_BT)
        targets_T = default_targets(tokens_BT, taken['logits'])[0]
        losses_T = _losses(taken['logits'], targets_T)
        arrays |= {'loss': losses_T, 'target': targets_T.astype(np.uint32)}
        arrays |= _named('norm', _norms(cfg, taken))
        arrays['pattern'] = packed_patterns(cfg, taken)
    with part('logit lens'):
        stream = [taken[name] for name in residual_stream(cfg)]
        arrays |= _named('logit', _read_out(subject, stream, targets_T))
    if 'jacobian' not in skip:
        with part('jacobian'):
            carried = map(transport, stream, jacobian_lens(subject, tokens_BT[:, :FIRST_TOKENS]))
            arrays |= _named('jacobian', _read_out(subject, carried, targets_T))
    with part('attribution'):
        for kind, terms in _attributions(subject, taken, targets_T).items():
            arrays |= _named(f'attribution.{kind}', terms)
    if 'ablation' not in skip:
        with part('ablation'):
            arrays['ablation'] = _ablations(subject, tokens_BT, targets_T, losses_T)
    if 'backward' not in skip:
        with part('backward'):
            arrays |= _named('gradient', _gradients(subject, tokens_BT, targets_T))
    with part('head scores'):
        arrays |= _scores(subject)
    ends = None
    if 'curvature' not in skip:
        with part('curvature'):
            ends = curvature(
                subject,
                tokens_BT[:, :FIRST_TOKENS],
                by_layer=count_params(subject.params) <= MAX_BY_LAYER,
                most=30,
                tolerance=1e-2,
            )
    flow = None
    if 'shapes' not in skip:
        with part('shapes'):
            rows, length, accum = step_size or (1, T, 1)
            flow = flow_lib.shape_flow(
                cfg,
                batch_size=rows,
                seq_len=length,
                grad_accum_steps=accum,
                make_step=make_step,
            )
    facts = {
        'title': title,
        'path': path,
        **_model_facts(subject),
        'tokens': tokens_BT[0].tolist(),
        'prompt': T if prompt_tokens is None else prompt_tokens,
        'curvature': ends and {name: end._asdict() for name, end in ends.items()},
        'firstTokens': min(T, FIRST_TOKENS),
        'repeated': repeated_half(cfg),
        'levels': LEVELS,
        'skipped': sorted(skip),
    }
    shown = {*facts['tokens'], *targets_T.tolist()}
    shown.update(*(arrays[name].ravel().tolist() for name in arrays if '.top' in name))
    facts['text'] = {int(token): token_text(subject, int(token)) for token in sorted(shown)}
    # A sign to point at for each token of a character but its last.
    facts['shown'] = [text or '‥' for text in token_texts(subject, tokens_BT[0])]
    return Report(facts, arrays, flow)


def _model_facts(subject: Subject) -> dict[str, Any]:
    """What the page says of the model itself, whatever the text."""
    cfg = subject.cfg
    return {
        'layers': cfg.n_layer,
        'heads': cfg.n_head,
        'width': cfg.n_embd,
        'inner': cfg.d_ff,
        'context': cfg.n_positions,
        'vocabulary': cfg.vocab_size,
        'parameters': count_params(subject.params),
        'tokenizer': subject.tokenizer.name if subject.tokenizer else 'none',
        'leaves': list(named_leaves(subject.params)),
        'leafNorms': [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(subject.params)],
    }


@contextlib.contextmanager
def _timed(notify: Callable[[str], None], part: str) -> Iterator[None]:
    """Reports the time that a part of the page took."""
    began = time.monotonic()
    yield
    notify(f'{part}: {time.monotonic() - began:.1f} s')


def _named(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f'{prefix}.{name}': array for name, array in arrays.items()}


def _losses(logits_BTV, targets_T) -> np.ndarray:
    log_probs_TV = jax.nn.log_softmax(logits_BTV[0], axis=-1)
    return -np.asarray(log_probs_TV)[np.arange(len(targets_T)), targets_T]


def _norms(cfg, taken) -> dict[str, np.ndarray]:
    """Norms of what runs through the residual stream: resid (L + 1, T), attn and mlp (L, T)."""

    def norm(names):
        return np.array([np.linalg.norm(taken[name][0], axis=-1) for name in names], np.float32)

    layers = range(cfg.n_layer)
    return {
        'resid': norm(residual_stream(cfg)),
        'attn': norm(f'h_{i}.attn_out' for i in layers),
        'mlp': norm(f'h_{i}.mlp_out' for i in layers),
    }


def packed_patterns(cfg, taken) -> np.ndarray:
    """The weights below the diagonal of captured patterns, row by row: uint8 (L, H, T (T + 1) / 2).

    A byte b stands for (b / LEVELS)^2: small weights, of which there are many, are kept finer.
    """
    rows = []
    for i in range(cfg.n_layer):
        pattern_HTS = taken[f'h_{i}.pattern'][0]
        below = np.tril_indices(pattern_HTS.shape[-1])
        weights = pattern_HTS[:, below[0], below[1]]
        rows.append(np.round(np.sqrt(weights) * LEVELS).astype(np.uint8))
    return np.array(rows)


def _read_out(subject: Subject, stream, targets_T) -> dict[str, np.ndarray]:
    """What each layer predicts: likeliest tokens `top`, `prob` (L + 1, T, TOP), and of the target
    its `rank`, counted from 1, and its probability `right` (L + 1, T)."""
    n_top = min(TOP, subject.cfg.vocab_size)
    rows: dict[str, list] = {'top': [], 'prob': [], 'rank': [], 'right': []}
    for x_BTD in stream:
        probs_TV = np.asarray(jax.nn.softmax(unembed(subject, x_BTD)[0], axis=-1))
        top_TK = np.argpartition(-probs_TV, n_top - 1, axis=-1)[:, :n_top]
        order = np.argsort(-np.take_along_axis(probs_TV, top_TK, -1), axis=-1)
        top_TK = np.take_along_axis(top_TK, order, -1)
        right_T = probs_TV[np.arange(len(targets_T)), targets_T]
        rows['top'].append(top_TK.astype(np.uint32))
        rows['prob'].append(np.take_along_axis(probs_TV, top_TK, -1))
        rows['rank'].append((probs_TV > right_T[:, None]).sum(-1).astype(np.uint32) + 1)
        rows['right'].append(right_T)
    return {name: np.array(values) for name, values in rows.items()}


def _attributions(subject: Subject, taken, targets_T) -> dict[str, dict[str, np.ndarray]]:
    """The terms of the target's logit, and of how far it is above the mean of all logits."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), subject.params)
    wte_VD = params['wte']['embedding']
    directions = {
        'logit': wte_VD[targets_T],
        'centred': wte_VD[targets_T] - wte_VD.mean(0),
    }
    return {
        kind: _summed_terms(subject.cfg, direct_terms(subject.cfg, params, taken, direction[None]))
        for kind, direction in directions.items()
    }


def _summed_terms(cfg, terms) -> dict[str, np.ndarray]:
    """Terms by part: embed, pos_embed, bias (T,), heads (L, H, T), mlp (L, T), some neurons."""
    layers = range(cfg.n_layer)
    T = terms['embed'].shape[1]
    biases = [term[0] for name, term in terms.items() if name.endswith('bias')]
    found = {
        'embed': terms['embed'][0],
        'pos_embed': terms['pos_embed'][0],
        'bias': sum(biases, np.zeros(T)),
        'heads': np.array([terms[f'h_{i}.attn'][0].T for i in layers]),
        'mlp': np.array([terms[f'h_{i}.mlp'][0].sum(-1) for i in layers]),
    }
    neurons_TN = np.concatenate([terms[f'h_{i}.mlp'][0] for i in layers], -1)
    largest = np.argsort(-np.abs(neurons_TN), axis=-1)[:, :NEURONS]
    found['neuron'] = largest.astype(np.uint32)  # layer x F + number
    found['neuron_term'] = np.take_along_axis(neurons_TN, largest, -1)
    return found


def _target_losses(last: int, logits_BTV, tokens_BT):
    """The loss of each position's target, with `last` as the target of the last one: (T,)."""
    targets_T = jnp.append(tokens_BT[0, 1:], last)
    log_probs_TV = jax.nn.log_softmax(logits_BTV[0], axis=-1)
    return -jnp.take_along_axis(log_probs_TV, targets_T[:, None], -1)[:, 0]


def _ablations(subject: Subject, tokens_BT, targets_T, losses_T) -> np.ndarray:
    """The change of each position's loss without a head or an MLP: (L, H + 1, T)."""
    cfg = subject.cfg
    sites = [
        f'h_{i}.{part}'
        for i in range(cfg.n_layer)
        for part in [*(f'attn.{head}' for head in range(cfg.n_head)), 'mlp']
    ]
    measure = functools.partial(_target_losses, int(targets_T[-1]))
    changed = ablate(subject, tokens_BT, sites, measure=measure)
    change = np.array([changed[site] - losses_T for site in sites])
    return change.reshape(cfg.n_layer, cfg.n_head + 1, -1)


@functools.lru_cache(maxsize=4)
def _differentiating(cfg):
    """The compiled function (params, tokens_BT, last) -> norms of each position's gradients.

    resid (T, L + 1, T): by the position of the loss, the layer, and where in the residual stream;
    params (T, number of leaves).
    """
    names = residual_stream(cfg)

    def norms(params, tokens_BT, last):
        def losses(added, params):
            def tap(name, x):
                return x + added[name] if name in added else x

            return _target_losses(last, run(cfg, params, tokens_BT, tap), tokens_BT)

        T = tokens_BT.shape[1]
        zero_BTD = jnp.zeros((1, T, cfg.n_embd), cfg.stream_dtype)
        _, pull_back = jax.vjp(losses, dict.fromkeys(names, zero_BTD), params)

        def of_one(position):
            chosen_T = (jnp.arange(T) == position).astype(jnp.float32)
            added, leaves = pull_back(chosen_T)
            stream = [
                jnp.linalg.norm(added[name][0].astype(jnp.float32), axis=-1) for name in names
            ]
            sizes = [jnp.sqrt(jnp.square(leaf).sum()) for leaf in jax.tree.leaves(leaves)]
            return jnp.stack(stream), jnp.stack(sizes)

        return jax.lax.map(of_one, jnp.arange(T))

    return jax.jit(norms)


def _gradients(subject: Subject, tokens_BT, targets_T) -> dict[str, np.ndarray]:
    """Norms of the gradient of each position's loss: `resid`, packed, and `params` (T, leaves).

    resid holds (L + 1) values for each pair of a loss's position and a position before or at it.
    """
    last = int(targets_T[-1])
    resid_TLT, params = _differentiating(subject.cfg)(subject.params, tokens_BT, last)
    losses_at, stream_at = np.tril_indices(tokens_BT.shape[1])
    return {
        'resid': np.asarray(resid_TLT).transpose(1, 0, 2)[:, losses_at, stream_at],
        'params': np.asarray(params),
    }


def _scores(subject: Subject) -> dict[str, np.ndarray]:
    if repeated_half(subject.cfg) < 2:
        return {}
    return {f'score.{name}': s for name, s in head_scores(subject)._asdict().items()}
