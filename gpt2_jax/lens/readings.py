"""What activations say: losses, the prediction after each layer, attribution, scores of heads.

Addresses are those of sites.py, texts and models those of subject.py; numpy out, the batch first.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.lens.activations import capture, capturing
from gpt2_jax.lens.subject import (
    Subject,
    as_numpy,
    as_subject,
    as_tokens,
    check_whole,
    next_token_losses,
    run,
)
from gpt2_jax.model.gpt2 import GPT2, LayerNorm
from gpt2_jax.parallel.devices import allow_transfers

# Rows of a Jacobian that are computed at once: each is a backward pass with activations of its own.
JACOBIAN_ROWS = 32
REPEATED_TOKENS = 128  # at most, of a random text that is repeated once


@functools.lru_cache(maxsize=64)
def _losses(cfg):
    return jax.jit(lambda params, tokens: next_token_losses(run(cfg, params, tokens), tokens))


@allow_transfers
def token_losses(source, text) -> np.ndarray:
    """The loss of each next token in nats: (B, T - 1); entry t is the loss of token t + 1."""
    subject = as_subject(source)
    tokens_BT = as_tokens(subject, text, least=2)
    return as_numpy(_losses(subject.cfg)(subject.params, tokens_BT))


@functools.lru_cache(maxsize=64)
def _unembedding(cfg):
    """The compiled function (params, x_BTD) -> logits_BTV: final LayerNorm and output head."""

    def unembed(params, x_BTD):
        y_BTD = LayerNorm(cfg).apply({'params': params['ln_f']}, x_BTD.astype(cfg.stream_dtype))
        return GPT2(cfg).apply({'params': params}, y_BTD, method='head')

    return jax.jit(unembed)


def unembed(source, x_BTD) -> np.ndarray:
    """The logits if the residual stream ended as x: (B, T, D) -> (B, T, V)."""
    subject = as_subject(source)
    return as_numpy(_unembedding(subject.cfg)(subject.params, jnp.asarray(x_BTD)))


def residual_stream(cfg) -> list[str]:
    """The residual stream before the first block and after each: L + 1 names."""
    return ['h_0.resid_pre', *(f'h_{i}.resid_post' for i in range(cfg.n_layer))]


@allow_transfers
def logit_lens(source, text, jacobians=None) -> np.ndarray:
    """The logits read off the residual stream before the first block and after each.

    Returns (L + 1, B, T, V).

    The final LayerNorm and the output head are applied to the stream as it is (nostalgebraist 2020,
    "interpreting GPT: the logit lens"); the last entry is the model's own logits, to rounding. With
    `jacobians` of `jacobian_lens`, the stream is first carried to the last layer by them. The
    result has (L + 1) B T V x 4 bytes: 670 MB for GPT-2 on 256 tokens.
    """
    subject = as_subject(source)
    names = residual_stream(subject.cfg)
    stream = capture(subject, text, names)
    if jacobians is not None:
        expected = (len(names), subject.cfg.n_embd, subject.cfg.n_embd)
        if np.shape(jacobians) != expected:
            raise UserError(
                f'the Jacobians have the shape {np.shape(jacobians)}: expected {expected}, as '
                'jacobian_lens gives them for this model'
            )
        stream = {
            name: transport(x_BTD, jacobian_DD)
            for (name, x_BTD), jacobian_DD in zip(stream.items(), jacobians, strict=True)
        }
    return np.stack([unembed(subject, stream[name]) for name in names])


def transport(x_BTD, jacobian_DD) -> np.ndarray:
    """The residual stream carried to the last layer: J x at each position, (B, T, D)."""
    return np.einsum('ED,BTD->BTE', jacobian_DD, x_BTD).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _jacobian_rows(cfg):
    """The compiled function (params, tokens_BT, rows_R) -> rows of the Jacobians, (L, R, D)."""
    names = residual_stream(cfg)

    def rows_of(params, tokens_BT, rows_R):
        B, T = tokens_BT.shape
        zero_BTD = jnp.zeros((B, T, cfg.n_embd), cfg.stream_dtype)

        def last_stream(added):
            taken = {}

            def tap(name, x):
                if name in added:
                    x = x + added[name]
                if name == names[-1]:
                    taken[name] = x
                return x

            run(cfg, params, tokens_BT, tap)
            return taken[names[-1]].astype(jnp.float32)

        _, pull_back = jax.vjp(last_stream, dict.fromkeys(names[:-1], zero_BTD))

        def one_row(row):
            # The cotangent picks one channel at every position at once, so that the gradient at a
            # position sums over itself and all later ones.
            chosen_BTD = jnp.broadcast_to(jnp.arange(cfg.n_embd) == row, (B, T, cfg.n_embd))
            (gradients,) = pull_back(chosen_BTD.astype(jnp.float32))
            return jnp.stack(
                [gradients[name].astype(jnp.float32).mean((0, 1)) for name in names[:-1]]
            )

        return jax.vmap(one_row, out_axes=1)(rows_R)

    return jax.jit(rows_of)


@allow_transfers
def jacobian_lens(source, text) -> np.ndarray:
    """The average Jacobian from the residual stream at each layer to the last: (L + 1, D, D).

    J_l[i, j] = mean over positions p of  sum over positions p' >= p of  d x_last[p', i] / d x_l[p,
    j], with x_l as in `logit_lens`: before the first block, then after each; the last one is the
    identity. It says what a change at layer l does to the end of the stream, and `logit_lens(..,
    jacobians)` reads the stream through it (Gurnee et al. 2026, "Verbalizable Representations Form
    a Global Workspace in Language Models"). Computed by D backward passes; average over several
    texts by taking the mean of their results.
    """
    subject = as_subject(source)
    cfg, D = subject.cfg, subject.cfg.n_embd
    tokens_BT = as_tokens(subject, text)
    jacobians = np.zeros((cfg.n_layer + 1, D, D), np.float32)
    jacobians[-1] = np.eye(D)
    for start in range(0, D, JACOBIAN_ROWS):
        rows_R = np.arange(start, start + JACOBIAN_ROWS).clip(max=D - 1)  # one shape for all
        found = as_numpy(_jacobian_rows(cfg)(subject.params, tokens_BT, rows_R))
        stop = min(D, start + JACOBIAN_ROWS)
        jacobians[:-1, start:stop] = found[:, : stop - start]
    return jacobians


def default_targets(tokens_BT, logits_BTV) -> np.ndarray:
    """The next token of each position, and at the last one the likeliest: (B, T)."""
    return np.concatenate([tokens_BT[:, 1:], logits_BTV[:, -1:].argmax(-1)], 1)


@allow_transfers
def attribution(source, text, targets=None, against=None) -> dict[str, np.ndarray]:
    """Direct logit attribution: how much each part of the model adds to the logit of a token.

    The last residual stream is a sum of what embeddings, heads and MLPs wrote. The final LayerNorm,
    its mean and its standard deviation taken as they are, is linear in it, and so is the output
    head: the logit is a sum with one term for each part. Returns these terms in fp64:

        'embed', 'pos_embed' (B, T)     'h_3.attn' (B, T, H), a term for each head
        'h_3.mlp' (B, T, F), for each neuron     'h_3.attn.bias', 'h_3.mlp.bias' (B, T), of c_proj
        'ln_f.bias' (B, T)

    All terms at a position sum to the logit, to rounding. `targets` (T,) or (B, T) are the tokens
    whose logit is explained; by default the next token of each position, and the likeliest at the
    last one. With `against`, tokens of the same shape, the terms are of the difference of the two
    logits.
    """
    subject = as_subject(source)
    cfg = subject.cfg
    tokens_BT = as_tokens(subject, text)
    streams = ['embed', 'pos_embed', 'z', 'mlp_post', residual_stream(cfg)[-1], 'logits']
    taken = capture(subject, tokens_BT, streams)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), subject.params)
    if targets is None:
        targets = default_targets(tokens_BT, taken['logits'])
    wte_VD = params['wte']['embedding']
    direction_BTD = wte_VD[_targets(subject, targets, tokens_BT)]
    if against is not None:
        direction_BTD = direction_BTD - wte_VD[_targets(subject, against, tokens_BT)]
    return direct_terms(cfg, params, taken, direction_BTD)


def _targets(subject: Subject, targets, tokens_BT) -> np.ndarray:
    targets_BT = as_tokens(subject, targets)
    if targets_BT.shape not in (tokens_BT.shape, (1, tokens_BT.shape[1])):
        raise UserError(
            f'targets of shape {targets_BT.shape} for tokens of shape {tokens_BT.shape}: give one '
            'for each position'
        )
    return np.broadcast_to(targets_BT, tokens_BT.shape)


def direct_terms(cfg, params, taken, direction_BTD) -> dict[str, np.ndarray]:
    """The terms of `attribution` for the output ln_f(x) . direction, from fp64 parameters."""
    stream_BTD = np.float64(taken[residual_stream(cfg)[-1]])
    variance_BT1 = stream_BTD.var(-1, keepdims=True)
    ln_f = params['ln_f']
    # logit = sum_d (x_d - mean(x)) r scale_d direction_d = x . u, with the mean moved over to u.
    u_BTD = direction_BTD * ln_f['scale'] / np.sqrt(variance_BT1 + cfg.layer_norm_epsilon)
    u_BTD = u_BTD - u_BTD.mean(-1, keepdims=True)
    terms = {name: (taken[name] * u_BTD).sum(-1) for name in ('embed', 'pos_embed')}
    for i in range(cfg.n_layer):
        block = params[f'h_{i}']
        attn, mlp = block['attn']['c_proj'], block['mlp']['c_proj']
        per_head_BTHK = np.einsum('HKD,BTD->BTHK', attn['kernel'], u_BTD)
        terms[f'h_{i}.attn'] = (taken[f'h_{i}.z'] * per_head_BTHK).sum(-1)
        terms[f'h_{i}.mlp'] = taken[f'h_{i}.mlp_post'] * (u_BTD @ mlp['kernel'].T)
        if cfg.bias:
            terms[f'h_{i}.attn.bias'] = u_BTD @ attn['bias']
            terms[f'h_{i}.mlp.bias'] = u_BTD @ mlp['bias']
    if cfg.bias:
        terms['ln_f.bias'] = direction_BTD @ ln_f['bias']
    return terms


class HeadScores(NamedTuple):
    """Mean attention of each head (L, H) from the tokens of the second half of a repeated text.

    previous: to the token before; duplicate: to the same token in the first half; induction: to the
    token that followed it there, which is the token that comes next.
    """

    previous: np.ndarray
    duplicate: np.ndarray
    induction: np.ndarray


def repeated_half(cfg) -> int:
    """The length of the text that `repeated_tokens` repeats."""
    return min(cfg.n_positions, REPEATED_TOKENS) // 2


def repeated_tokens(cfg, rows: int, seed: int = 0) -> np.ndarray:
    """Random tokens, then the same once more: int32 (rows, 2 `repeated_half`)."""
    half = repeated_half(cfg)
    if half < 2:
        raise UsageError(f'a context of {cfg.n_positions} is too short to repeat a text in it')
    first = np.random.default_rng(seed).integers(0, cfg.vocab_size, (rows, half))
    return np.concatenate([first, first], 1).astype(np.int32)


@allow_transfers
def head_scores(source, *, rows: int = 8, seed: int = 0) -> HeadScores:
    """What each head does on random tokens that are repeated once.

    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022,
    "In-context Learning and Induction Heads".

    Random, so that nothing but the repetition can be known; `rows` texts are averaged. Each score
    is a mean attention weight, 0 to 1.
    """
    check_whole('rows', rows, 1)
    check_whole('seed', seed, 0)
    subject = as_subject(source)
    tokens_BT = repeated_tokens(subject.cfg, rows, seed)
    names = tuple(f'h_{i}.pattern' for i in range(subject.cfg.n_layer))
    patterns = capturing(subject.cfg, names)(subject.params, tokens_BT)
    half = tokens_BT.shape[1] // 2
    query = np.arange(half, 2 * half)

    def mean_weight(back: int) -> np.ndarray:
        return np.stack(
            [as_numpy(patterns[name][:, :, query, query - back]).mean((0, 2)) for name in names]
        )

    # At the first token of the second half, half - 1 back is the second token: the one that comes
    # next.
    return HeadScores(mean_weight(1), mean_weight(half), mean_weight(half - 1))
