"""Causal attention that never writes its pattern to memory (Dao et al. 2022, FlashAttention).

Names within the kernels are FlashAttention's. For a block of queries, m is the running maximum of
the scores, l the running sum of exp(scores - m), and alpha the factor by which a new maximum
shrinks the earlier sum. Scores carry a factor log2(e), so that exp is exp2.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.kernels.choose import HEAD_DIMS, SEQ_LEN_MULTIPLE
from gpt2_jax.kernels.launch import LOG2_E, SEED_SPECS, call, only, read_seed, seed_inputs
from gpt2_jax.model.dropout import keep_mask
from gpt2_jax.model.ops import KEPT_BY_DOTS

BLOCK = SEQ_LEN_MULTIPLE  # queries, or keys, of a program


class Blocks(NamedTuple):
    """Keys (or queries) that a program reads at a time; warps; stages of the software pipeline."""

    read: int
    warps: int
    stages: int


# The best of those tried on an H100, without and with dropout, whose mask takes registers.
FORWARD = Blocks(64, 4, 3), Blocks(32, 4, 3)
QUERIES = Blocks(32, 4, 3), Blocks(32, 4, 3)
KEYS = Blocks(32, 4, 3), Blocks(32, 4, 3)


def _positions(start, n):
    return (start + jnp.arange(n)).astype(jnp.int32)


def _scores(a, b, queries, keys, masked):
    """log2(e) a b^T / sqrt(K), of queries and keys in either order; -inf if a key comes later."""
    scores = plgpu.dot(a, b.T) * (LOG2_E / math.sqrt(a.shape[-1]))
    return jnp.where(queries >= keys, scores, -jnp.inf) if masked else scores


def _keep(seed, rate, first_row, T, queries, keys):
    """The dropout mask of a block of one head's pattern, whose rows count from `first_row`."""
    index = (first_row + queries.astype(jnp.uint32)) * jnp.uint32(T) + keys.astype(jnp.uint32)
    return keep_mask(index, seed, rate)


def _first_row(ins, T):
    """The number of this head's first row of the pattern, among the rows of all texts and heads."""
    text, head, H = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    before = 0 if ins['row'] is None else ins['row'][0]  # texts on the devices before this one
    return ((before + jnp.uint32(text)) * jnp.uint32(H) + jnp.uint32(head)) * jnp.uint32(T)


def _add_bias(rows, ins, part):
    """Rows of q (part 0) or v (part 2) with their bias.

    The bias of k adds the same number to all scores of a query, and softmax ignores it: the kernels
    leave it out, and its gradient is 0.
    """
    if ins['bias'] is None:
        return rows
    return (rows.astype(jnp.float32) + ins['bias'][part][None, :]).astype(rows.dtype)


def _forward_kernel(ins, outs, *, rate, blocks):
    """Block i of z.

    For a backward pass the log-sum-exp of the rows is kept and, if there is a bias, q + bias
    replaces q in memory.
    """
    # Long rows first, so that none is left to the end.
    i = pl.num_programs(2) - 1 - pl.program_id(2)
    (T, _, K), read, steps = ins['qkv'].shape, blocks.read, BLOCK // blocks.read
    mine, queries = pl.ds(i * BLOCK, BLOCK), _positions(i * BLOCK, BLOCK)[:, None]
    first_row, biased = _first_row(ins, T), ins['bias'] is not None
    q = _add_bias(ins['qkv'][mine, 0, :], ins, 0)
    if outs['qkv'] is not None:
        outs['qkv'][mine, 0, :] = q

    def body(masked, j, carry):
        z, m, l, l_kept = carry
        block, keys = pl.ds(j * read, read), _positions(j * read, read)[None, :]
        scores = _scores(q, ins['qkv'][block, 1, :], queries, keys, masked)
        m_new = jnp.maximum(m, scores.max(-1))
        alpha, p = jnp.exp2(m - m_new), jnp.exp2(scores - m_new[:, None])
        l = l * alpha + p.sum(-1)
        if rate:
            p = jnp.where(_keep(read_seed(ins), rate, first_row, T, queries, keys), p, 0.0)
            l_kept = l_kept * alpha + p.sum(-1)
        v = ins['qkv'][block, 2, :]
        return z * alpha[:, None] + plgpu.dot(p.astype(v.dtype), v), m_new, l, l_kept

    zero_Q = jnp.zeros((BLOCK,), jnp.float32)
    carry = jnp.zeros((BLOCK, K), jnp.float32), zero_Q - jnp.inf, zero_Q, zero_Q
    carry = lax.fori_loop(0, i * steps, functools.partial(body, False), carry)
    carry = lax.fori_loop(i * steps, (i + 1) * steps, functools.partial(body, True), carry)
    z, m, l, l_kept = carry
    if biased:
        z += (l_kept if rate else l)[:, None] * ins['bias'][2][None, :]
    outs['z'][mine, :] = (z / (l[:, None] * (1 - rate))).astype(outs['z'].dtype)
    if outs['lse'] is not None:
        outs['lse'][mine] = m + jnp.log2(l)


def _backward(ins, rate, p, dp, delta, first_row, queries, keys):
    """For a block of the pattern p: (dropout(p) (1 - rate), the gradient of the scores sqrt(K)).

    `dp` is the gradient of dropout(p). The sums over blocks are scaled afterwards, instead of each
    element.
    """
    dropped = p
    if rate:
        keep = _keep(read_seed(ins), rate, first_row, ins['qkv'].shape[0], queries, keys)
        dropped, dp = jnp.where(keep, p, 0.0), jnp.where(keep, dp * (1 / (1 - rate)), 0.0)
    return dropped.astype(ins['qkv'].dtype), (p * (dp - delta)).astype(ins['qkv'].dtype)


def _write(outs, rows, part, gradient):
    """Writes a block of dq, dk or dv (part 0, 1 or 2)."""
    outs['dqkv'][rows, part, :] = gradient.astype(outs['dqkv'].dtype)


def _queries_backward_kernel(ins, outs, *, rate, blocks):
    """Block i of dq, over the keys it sees, and of delta = sum_s p_s dp_s = sum_k z_k dz_k."""
    i = pl.num_programs(2) - 1 - pl.program_id(2)  # long rows first, as in the forward pass
    (T, _, K), read, steps = ins['qkv'].shape, blocks.read, BLOCK // blocks.read
    mine, queries = pl.ds(i * BLOCK, BLOCK), _positions(i * BLOCK, BLOCK)[:, None]
    q, dz, lse = ins['qkv'][mine, 0, :], ins['dz'][mine, :], ins['lse'][mine][:, None]
    first_row = _first_row(ins, T)
    delta = (dz.astype(jnp.float32) * ins['z'][mine, :].astype(jnp.float32)).sum(-1)
    outs['delta'][mine], delta = delta, delta[:, None]
    dp_of_bias = 0.0
    if ins['bias'] is not None:
        dp_of_bias = (dz.astype(jnp.float32) * ins['bias'][2][None, :]).sum(-1)[:, None]

    def body(masked, j, dq):
        block, keys = pl.ds(j * read, read), _positions(j * read, read)[None, :]
        k, v = ins['qkv'][block, 1, :], ins['qkv'][block, 2, :]
        p = jnp.exp2(_scores(q, k, queries, keys, masked) - lse)
        dp = plgpu.dot(dz, v.T) + dp_of_bias
        _, dscores = _backward(ins, rate, p, dp, delta, first_row, queries, keys)
        return dq + plgpu.dot(dscores, k)

    dq = jnp.zeros((BLOCK, K), jnp.float32)
    dq = lax.fori_loop(0, i * steps, functools.partial(body, False), dq)
    dq = lax.fori_loop(i * steps, (i + 1) * steps, functools.partial(body, True), dq)
    dq /= math.sqrt(K)
    _write(outs, mine, 0, dq)
    if outs['dbias'] is not None:
        outs['dbias'][...] = dq.sum(0)


def _keys_backward_kernel(ins, outs, *, rate, blocks):
    """Block i of dk and dv, over the queries that see it."""
    i = pl.program_id(2)
    (T, _, K), read, steps = ins['qkv'].shape, blocks.read, BLOCK // blocks.read
    mine, keys = pl.ds(i * BLOCK, BLOCK), _positions(i * BLOCK, BLOCK)[:, None]
    k, v = ins['qkv'][mine, 1, :], _add_bias(ins['qkv'][mine, 2, :], ins, 2)
    first_row = _first_row(ins, T)

    def body(masked, j, carry):
        # Keys come before queries here, so that no product transposes a pattern.
        dk, dv = carry
        block, queries = pl.ds(j * read, read), _positions(j * read, read)[None, :]
        q, dz = ins['qkv'][block, 0, :], ins['dz'][block, :]
        lse, delta = ins['lse'][block][None, :], ins['delta'][block][None, :]
        p = jnp.exp2(_scores(k, q, queries, keys, masked) - lse)
        dp = plgpu.dot(v, dz.T)
        dropped, dscores = _backward(ins, rate, p, dp, delta, first_row, queries, keys)
        return dk + plgpu.dot(dscores, q), dv + plgpu.dot(dropped, dz)

    # Without a loop for the masked queries, more programs fit into the registers.
    carry = (jnp.zeros((BLOCK, K), jnp.float32),) * 2
    for step in range(steps):
        carry = body(True, i * steps + step, carry)
    dk, dv = lax.fori_loop((i + 1) * steps, T // read, functools.partial(body, False), carry)
    dv /= 1 - rate
    _write(outs, mine, 1, dk / math.sqrt(K))
    _write(outs, mine, 2, dv)
    if outs['dbias'] is not None:
        outs['dbias'][...] = dv.sum(0)


def _specs(T, K):
    """The blocks for one head of one text, with all rows of the text; the seed; the bias."""
    qkv = pl.BlockSpec((None, T, 3, None, K), lambda b, h, i: (b, 0, 0, h, 0))
    z = pl.BlockSpec((None, T, None, K), lambda b, h, i: (b, 0, h, 0))
    row = pl.BlockSpec((None, None, T), lambda b, h, i: (b, h, 0))
    bias = pl.BlockSpec((3, None, K), lambda b, h, i: (0, h, 0))
    specs = {'qkv': qkv, 'dqkv': qkv, 'z': z, 'dz': z, 'lse': row, 'delta': row, 'bias': bias}
    return SEED_SPECS | specs


def _check_shape(qkv_BT3HK):
    """Raises ValueError for a shape of which the kernels would process only a part."""
    _, T, _, _, K = qkv_BT3HK.shape
    if T % BLOCK:
        raise ValueError(f'the attention kernel got {T} positions; expected a multiple of {BLOCK}')
    if K not in HEAD_DIMS:
        expected = ', '.join(map(str, HEAD_DIMS))
        raise ValueError(
            f'the attention kernel got a head width of {K}; expected one of {expected}'
        )


@functools.partial(jax.jit, static_argnums=(3, 4))
def _attention_forward(qkv_BT3HK, bias_3HK, seed, rate, differentiated):
    """(z, (qkv, lse)), what a backward pass needs; (z, None) if it is not `differentiated`."""
    _check_shape(qkv_BT3HK)
    B, T, _, H, K = qkv_BT3HK.shape
    ins, specs = {'qkv': qkv_BT3HK, 'bias': bias_3HK} | seed_inputs(seed), _specs(T, K)
    keeps_q, blocks = differentiated and bias_3HK is not None, FORWARD[rate > 0]
    shapes = {
        'qkv': qkv_BT3HK if keeps_q else None,
        'z': jax.ShapeDtypeStruct((B, T, H, K), qkv_BT3HK.dtype),
        'lse': jax.ShapeDtypeStruct((B, H, T), jnp.float32) if differentiated else None,
    }
    outs = call(
        functools.partial(_forward_kernel, rate=rate, blocks=blocks),
        grid=(B, H, T // BLOCK),
        warps=blocks.warps,
        stages=blocks.stages,
        name='attention_forward',
        in_specs=[only(ins, specs)],
        out_specs=only(shapes, specs),
        out_shape=shapes,
        # Arrays are numbered in the order of their names: bias, qkv, .. -> lse, qkv, z.
        input_output_aliases={1: 1} if keeps_q else {},
    )(ins)
    if not differentiated:
        return outs['z'], None
    return outs['z'], (outs['qkv'] if keeps_q else qkv_BT3HK, outs['lse'])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(qkv_BT3HK, bias_3HK, seed, rate):
    """Causal attention from the fused projection and its bias (or None): (B, T, 3, H, K) -> BTHK.

    The pattern never reaches memory. The backward pass computes it again from the log-sum-exp of
    its rows, and draws the same dropout mask from `seed`. The gradient of k's bias is exactly 0.
    Raises ValueError unless T is a multiple of BLOCK and K one of choose.HEAD_DIMS.
    """
    return _attention_forward(qkv_BT3HK, bias_3HK, seed, rate, False)[0]


def _attention_fwd(qkv_BT3HK, bias_3HK, seed, rate):
    z_BTHK, (qkv_BT3HK, lse_BHT) = _attention_forward(qkv_BT3HK, bias_3HK, seed, rate, True)
    # With model.remat = 'dots' these are kept: else the backward pass would run this kernel again.
    qkv_BT3HK, z_BTHK, lse_BHT = (
        checkpoint_name(x, KEPT_BY_DOTS) for x in (qkv_BT3HK, z_BTHK, lse_BHT)
    )
    return z_BTHK, (qkv_BT3HK, bias_3HK, seed, z_BTHK, lse_BHT)


@functools.partial(jax.jit, static_argnums=0)
def _attention_bwd(rate, saved, dz_BTHK):
    qkv_BT3HK, bias_3HK, seed, z_BTHK, lse_BHT = saved
    B, T, _, H, K = qkv_BT3HK.shape
    biased, n = bias_3HK is not None, T // BLOCK
    ins = seed_inputs(seed) | {'qkv': qkv_BT3HK, 'bias': bias_3HK, 'dz': dz_BTHK, 'lse': lse_BHT}
    share = pl.BlockSpec((None, None, K), lambda b, h, i: (b * n + i, h, 0))
    specs = _specs(T, K) | {'dbias': share}

    def run(kernel, name, blocks, ins, in_specs, delta=None, **options):
        """dqkv, and each program's share of the gradient of the bias of q or v."""
        shapes = {
            'dqkv': jax.ShapeDtypeStruct(qkv_BT3HK.shape, qkv_BT3HK.dtype),
            'dbias': jax.ShapeDtypeStruct((B * n, H, K), jnp.float32) if biased else None,
            'delta': delta,
        }
        return call(
            functools.partial(kernel, rate=rate, blocks=blocks),
            grid=(B, H, n),
            warps=blocks.warps,
            stages=blocks.stages,
            name=name,
            in_specs=in_specs,
            out_specs=only(shapes, specs),
            out_shape=shapes,
            **options,
        )(*ins)

    # Two kernels write into the same array. In one kernel, the registers that keys take would
    # leave room for fewer programs on queries too.
    for_queries = ins | {'z': z_BTHK}
    from_queries = run(
        _queries_backward_kernel,
        'attention_backward_queries',
        QUERIES[rate > 0],
        [for_queries],
        [only(for_queries, specs)],
        delta=jax.ShapeDtypeStruct(lse_BHT.shape, jnp.float32),
    )
    ins |= {'delta': from_queries['delta']}
    from_keys = run(
        lambda ins, _, outs, **options: _keys_backward_kernel(ins, outs, **options),
        'attention_backward_keys',
        KEYS[rate > 0],
        [ins, from_queries['dqkv']],
        [only(ins, specs), specs['dqkv']],
        input_output_aliases={len(jax.tree.leaves(ins)): int(biased)},  # dbias comes before dqkv
    )
    if not biased:
        return from_keys['dqkv'], None, None
    dq_HK, dv_HK = from_queries['dbias'].sum(0), from_keys['dbias'].sum(0)
    return from_keys['dqkv'], jnp.stack([dq_HK, jnp.zeros_like(dq_HK), dv_HK]), None


attention.defvjp(_attention_fwd, _attention_bwd)
