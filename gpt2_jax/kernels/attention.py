"""Causal attention that never writes its pattern to memory (Dao et al. 2022, FlashAttention); see triton_call.py."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.kernels.launch import LOG2_E, SEED_SPECS, call, only, seed_inputs, seeds_of
from gpt2_jax.kernels.support import SEQ_LEN_MULTIPLE
from gpt2_jax.model.dropout import keep_mask

# Sizes of blocks, warps and stages of the software pipeline: the best of those tried on an H100.
BLOCK = SEQ_LEN_MULTIPLE  # queries, and keys, processed at a time
WARPS, STAGES, KEYS_STAGES = 4, 3, 2
DROPPED_BLOCK = 32  # where the backward pass draws a dropout mask, which takes registers


def _places(start, n):
    return (start + jnp.arange(n)).astype(jnp.int32)


def _scores(a, b, queries, keys, masked):
    """log2(e) a b^T / sqrt(K) of two blocks, one of queries and one of keys; -inf where a key comes after its query."""
    scores = plgpu.dot(a, b.T) * (LOG2_E / math.sqrt(a.shape[-1]))
    return jnp.where(queries >= keys, scores, -jnp.inf) if masked else scores


def _keep(seeds, rate, first_row, T, queries, keys):
    """The dropout mask of a block of the pattern of one text and head, whose rows are numbered from `first_row` on."""
    index = (first_row + queries).astype(jnp.uint32) * jnp.uint32(T) + keys.astype(jnp.uint32)
    return keep_mask(index, seeds, rate)


def _first_row(T):
    """The number of a text and head's first row of the pattern among those of all."""
    return (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)) * T


def _add_bias(rows, ins, which):
    """Rows of q or v with their bias.

    That of k adds the same to all scores of a query, which softmax takes no notice of: it is left out everywhere.
    """
    if ins['bias'] is None:
        return rows
    return (rows.astype(jnp.float32) + ins['bias'][which][None, :]).astype(rows.dtype)


def _forward_kernel(ins, outs, *, rate):
    """Block i of z. Where there is a bias, q with it takes the place of q, for the backward pass."""
    i = (
        pl.num_programs(2) - 1 - pl.program_id(2)
    )  # the long rows first, so that no long one is left alone at the end
    T, _, K = ins['qkv'].shape
    mine, first_row, queries = (
        pl.ds(i * BLOCK, BLOCK),
        _first_row(T),
        _places(i * BLOCK, BLOCK)[:, None],
    )
    q = _add_bias(ins['qkv'][mine, 0, :], ins, 0)
    if outs['qkv'] is not None:
        outs['qkv'][mine, 0, :] = q

    def body(masked, j, carry):
        z, most, total, kept = carry
        block, keys = pl.ds(j * BLOCK, BLOCK), _places(j * BLOCK, BLOCK)[None, :]
        scores = _scores(q, ins['qkv'][block, 1, :], queries, keys, masked)
        most_now = jnp.maximum(most, scores.max(-1))
        shrink, p = jnp.exp2(most - most_now), jnp.exp2(scores - most_now[:, None])
        total = total * shrink + p.sum(-1)
        if rate:
            p = jnp.where(_keep(seeds_of(ins), rate, first_row, T, queries, keys), p, 0.0)
            kept = kept * shrink + p.sum(-1)
        v = ins['qkv'][block, 2, :]
        return z * shrink[:, None] + plgpu.dot(p.astype(v.dtype), v), most_now, total, kept

    zero_Q = jnp.zeros((BLOCK,), jnp.float32)
    carry = jnp.zeros((BLOCK, K), jnp.float32), zero_Q - jnp.inf, zero_Q, zero_Q
    z, most, total, kept = body(True, i, lax.fori_loop(0, i, functools.partial(body, False), carry))
    if ins['bias'] is not None:
        z += (kept if rate else total)[:, None] * ins['bias'][2][None, :]
    outs['z'][mine, :] = (z / (total[:, None] * (1 - rate))).astype(outs['z'].dtype)
    outs['lse'][mine] = most + jnp.log2(total)


def _backward(ins, rate, p, dp, delta, first_row, queries, keys):
    """What dv and ds are made of, from the pattern p and the gradient dp of what dropout made of it.

    Kept elements of p times 1 - rate, and ds times sqrt(K): the sums are scaled, and not each element.
    """
    dropped = p
    if rate:
        keep = _keep(seeds_of(ins), rate, first_row, ins['qkv'].shape[0], queries, keys)
        dropped, dp = jnp.where(keep, p, 0.0), jnp.where(keep, dp * (1 / (1 - rate)), 0.0)
    return dropped.astype(ins['qkv'].dtype), (p * (dp - delta)).astype(ins['qkv'].dtype)


def _write(outs, places, **gradients):
    """A block of each of dq, dk and dv, and the sum of its rows: this program's share of the bias' gradient."""
    for at, gradient in gradients.items():
        which = 'qkv'.index(at)
        outs['dqkv'][places, which, :] = gradient.astype(outs['dqkv'].dtype)
        if outs['dbias'] is not None:
            outs['dbias'][which, :] = gradient.sum(0)


def _queries_backward_kernel(ins, outs, *, rate, inner):
    """Block i of dq, over the keys it sees; and of delta, the sum of p dp over a row, which is that of z dz."""
    i = pl.num_programs(2) - 1 - pl.program_id(2)  # the long ones first, as in the forward pass
    T, _, K = ins['qkv'].shape
    mine, blocks, queries = (
        pl.ds(i * BLOCK, BLOCK),
        BLOCK // inner,
        _places(i * BLOCK, BLOCK)[:, None],
    )
    q, dz, first_row = ins['qkv'][mine, 0, :], ins['dz'][mine, :], _first_row(T)
    lse, delta = (
        ins['lse'][mine][:, None],
        (dz.astype(jnp.float32) * ins['z'][mine, :].astype(jnp.float32)).sum(-1),
    )
    outs['delta'][mine], delta = delta, delta[:, None]
    through_bias = (
        0.0
        if ins['bias'] is None
        else (dz.astype(jnp.float32) * ins['bias'][2][None, :]).sum(-1)[:, None]
    )

    def body(masked, j, dq):
        theirs, keys = pl.ds(j * inner, inner), _places(j * inner, inner)[None, :]
        k, v = ins['qkv'][theirs, 1, :], ins['qkv'][theirs, 2, :]
        p = jnp.exp2(_scores(q, k, queries, keys, masked) - lse)
        _, ds = _backward(
            ins, rate, p, plgpu.dot(dz, v.T) + through_bias, delta, first_row, queries, keys
        )
        return dq + plgpu.dot(ds, k)

    dq = lax.fori_loop(
        0, i * blocks, functools.partial(body, False), jnp.zeros((BLOCK, K), jnp.float32)
    )
    dq = lax.fori_loop(i * blocks, (i + 1) * blocks, functools.partial(body, True), dq)
    _write(outs, mine, q=dq / math.sqrt(K))


def _keys_backward_kernel(ins, outs, *, rate, inner):
    """Block i of dk and dv, over the queries that see it."""
    i = pl.program_id(2)
    T, _, K = ins['qkv'].shape
    mine, blocks, keys = pl.ds(i * BLOCK, BLOCK), BLOCK // inner, _places(i * BLOCK, BLOCK)[:, None]
    k, v, first_row = (
        ins['qkv'][mine, 1, :],
        _add_bias(ins['qkv'][mine, 2, :], ins, 2),
        _first_row(T),
    )

    def body(
        masked, j, carry
    ):  # transposed, keys before queries, so that no product transposes a pattern
        dk, dv = carry
        theirs, queries = pl.ds(j * inner, inner), _places(j * inner, inner)[None, :]
        q, dz = ins['qkv'][theirs, 0, :], ins['dz'][theirs, :]
        p = jnp.exp2(_scores(k, q, queries, keys, masked) - ins['lse'][theirs][None, :])
        dropped, ds = _backward(
            ins,
            rate,
            p,
            plgpu.dot(v, dz.T),
            ins['delta'][theirs][None, :],
            first_row,
            queries,
            keys,
        )
        return dk + plgpu.dot(ds, q), dv + plgpu.dot(dropped, dz)

    zero = jnp.zeros((BLOCK, K), jnp.float32)
    carry = lax.fori_loop(i * blocks, (i + 1) * blocks, functools.partial(body, True), (zero, zero))
    dk, dv = lax.fori_loop((i + 1) * blocks, T // inner, functools.partial(body, False), carry)
    _write(outs, mine, k=dk / math.sqrt(K), v=dv / (1 - rate))


def _specs(T, K):
    """Of one text and head: all rows of q, k, v; seeds and bias."""
    return SEED_SPECS | {
        'qkv': pl.BlockSpec((None, T, 3, None, K), lambda b, h, i: (b, 0, 0, h, 0)),
        'bias': pl.BlockSpec((3, None, K), lambda b, h, i: (0, h, 0)),
    }


@functools.partial(jax.jit, static_argnums=3)
def _attention_forward(qkv_BT3HK, bias_3HK, seeds, rate):
    B, T, _, H, K = qkv_BT3HK.shape
    ins, specs, biased = (
        {'qkv': qkv_BT3HK, 'bias': bias_3HK} | seed_inputs(seeds),
        _specs(T, K),
        bias_3HK is not None,
    )
    shapes = {
        'qkv': qkv_BT3HK if biased else None,
        'z': jax.ShapeDtypeStruct((B, T, H, K), qkv_BT3HK.dtype),
        'lse': jax.ShapeDtypeStruct((B, H, T), jnp.float32),
    }
    out_specs = {
        'qkv': specs['qkv'],
        'z': pl.BlockSpec((None, T, None, K), lambda b, h, i: (b, 0, h, 0)),
        'lse': pl.BlockSpec((None, None, T), lambda b, h, i: (b, h, 0)),
    }
    outs = call(
        functools.partial(_forward_kernel, rate=rate),
        grid=(B, H, T // BLOCK),
        warps=WARPS,
        stages=STAGES,
        name='attention_forward',
        in_specs=[only(ins, specs)],
        out_specs=only(shapes, out_specs),
        out_shape=shapes,
        # In the order of their names, without what is None: bias, place, qkv, words; lse, qkv, z.
        input_output_aliases={1 + (seeds is not None): 1} if biased else {},
    )(ins)
    return outs['z'], (outs['qkv'] if biased else qkv_BT3HK, outs['lse'])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(qkv_BT3HK, bias_3HK, seeds, rate):
    """Causal attention from the fused projection and its bias (or None): (B, T, 3, H, K) -> (B, T, H, K).

    The pattern never reaches memory; the backward pass computes it anew from the log-sum-exp of its rows, and draws the
    same dropout mask, a hash of (seeds, place). T is a multiple of BLOCK.
    """
    return _attention_forward(qkv_BT3HK, bias_3HK, seeds, rate)[0]


def _attention_fwd(qkv_BT3HK, bias_3HK, seeds, rate):
    z_BTHK, (qkv_BT3HK, lse_BHT) = _attention_forward(qkv_BT3HK, bias_3HK, seeds, rate)
    return z_BTHK, (qkv_BT3HK, bias_3HK, seeds, z_BTHK, lse_BHT)


@functools.partial(jax.jit, static_argnums=0)
def _attention_bwd(rate, saved, dz_BTHK):
    qkv_BT3HK, bias_3HK, seeds, z_BTHK, lse_BHT = saved
    B, T, _, H, K = qkv_BT3HK.shape
    row, n = pl.BlockSpec((None, None, T), lambda b, h, i: (b, h, 0)), T // BLOCK
    z = pl.BlockSpec((None, T, None, K), lambda b, h, i: (b, 0, h, 0))
    dqkv = pl.BlockSpec((None, T, 3, None, K), lambda b, h, i: (b, 0, 0, h, 0))
    dbias = pl.BlockSpec((None, 3, None, K), lambda b, h, i: (b * n + i, 0, h, 0))
    shapes = {
        'dqkv': jax.ShapeDtypeStruct(qkv_BT3HK.shape, qkv_BT3HK.dtype),
        'dbias': None if bias_3HK is None else jax.ShapeDtypeStruct((B * n, 3, H, K), jnp.float32),
    }
    ins = seed_inputs(seeds) | {'qkv': qkv_BT3HK, 'bias': bias_3HK, 'dz': dz_BTHK, 'lse': lse_BHT}
    specs, out_specs = (
        _specs(T, K) | {'dz': z, 'lse': row},
        only(shapes, {'dqkv': dqkv, 'dbias': dbias}),
    )

    def run(kernel, name, stages, ins, in_specs, **options):
        return call(
            functools.partial(kernel, rate=rate, inner=DROPPED_BLOCK if rate else BLOCK),
            grid=(B, H, n),
            warps=WARPS,
            stages=stages,
            name=name,
            in_specs=in_specs,
            **options,
        )(*ins)

    # Two kernels, the second of which goes on in the memory of the first: in one, the registers for keys would leave
    # room for fewer programs on queries too.
    outs = run(
        _queries_backward_kernel,
        'attention_backward_queries',
        STAGES,
        [ins | {'z': z_BTHK}],
        [only(ins, specs) | {'z': z}],
        out_specs=out_specs | {'delta': row},
        out_shape=shapes | {'delta': jax.ShapeDtypeStruct(lse_BHT.shape, jnp.float32)},
    )
    ins, specs = ins | {'delta': outs.pop('delta')}, specs | {'delta': row}
    before = len(jax.tree.leaves(ins))
    outs = run(
        lambda ins, _, outs, **options: _keys_backward_kernel(ins, outs, **options),
        'attention_backward_keys',
        KEYS_STAGES,
        [ins, outs],
        [only(ins, specs), out_specs],
        out_specs=out_specs,
        out_shape=shapes,
        input_output_aliases={before + i: i for i in range(len(jax.tree.leaves(outs)))},
    )
    return outs['dqkv'], None if bias_3HK is None else outs['dbias'].sum(0), None


attention.defvjp(_attention_fwd, _attention_bwd)
