"""Fused GPU kernels of the training step, written in Pallas (Triton), each with its own backward pass.

They compute what model.py and step.py spell out, in fewer passes over memory, which is where a small model's time
goes. On a CPU they run in Pallas' interpreter: slow, and only there to be tested against the open formulas.

    attention        softmax(q k^T / sqrt(K), causal) v, dropout of the pattern included (Dao et al. 2022, FlashAttention)
    add_norm         x + dropout(branch), and its LayerNorm
    head_loss        the cross-entropy of the tied head, with the gradient of the logits made in the forward pass
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.model import keep_mask

BLOCK = 64  # queries, and keys, that an attention kernel works on at a time
LOG2_E = math.log2(math.e)
NORM_ROWS, NORM_WARPS, NORM_PROGRAMS, BACKWARD_ROWS, BACKWARD_WARPS = 4, 4, 256, 4, 4
COLUMNS, SOFTMAX_WARPS = 4096, 8


def _call(kernel, *, grid, warps, stages=2, **options):
    """pallas_call on a GPU; in the interpreter elsewhere."""
    return pl.pallas_call(kernel, grid=grid, interpret=jax.default_backend() != 'gpu', **options,
                          compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages))


def _keep(seeds_ref, rate, row0, col0, n_columns):
    """The dropout mask of a block of the pattern, whose element (0, 0) is that of row `row0` and column `col0`."""
    rows = (row0 + jnp.arange(BLOCK)).astype(jnp.uint32)
    columns = (col0 + jnp.arange(BLOCK)).astype(jnp.uint32)
    return keep_mask(rows[:, None] * jnp.uint32(n_columns) + columns[None, :], (seeds_ref[0], seeds_ref[1]), rate)


def _scores(q, k, masked):
    """log2(e) q k^T / sqrt(K) of a block, -inf above the diagonal where the block lies on it."""
    scores = plgpu.dot(q, k.T) * (LOG2_E / math.sqrt(q.shape[-1]))
    if masked:
        scores = jnp.where(jnp.arange(BLOCK)[:, None] >= jnp.arange(BLOCK)[None, :], scores, -jnp.inf)
    return scores


def _forward_kernel(seeds_ref, q_ref, k_ref, v_ref, z_ref, lse_ref, *, rate):
    b, h, i = (pl.program_id(axis) for axis in range(3))
    T, K = k_ref.shape
    q = q_ref[...]
    row0 = ((b * pl.num_programs(1) + h) * T + i * BLOCK)

    def body(j, carry, masked=False):
        z, most, total = carry
        block = pl.ds(j * BLOCK, BLOCK)
        scores = _scores(q, k_ref[block, :], masked)
        most_now = jnp.maximum(most, scores.max(-1))
        shrink = jnp.exp2(most - most_now)
        p = jnp.exp2(scores - most_now[:, None])
        total = total * shrink + p.sum(-1)
        if rate:
            p = jnp.where(_keep(seeds_ref, rate, row0, j * BLOCK, T), p, 0.0)
        v = v_ref[block, :]
        return z * shrink[:, None] + plgpu.dot(p.astype(v.dtype), v), most_now, total

    carry = jnp.zeros((BLOCK, K), jnp.float32), jnp.full((BLOCK,), -jnp.inf, jnp.float32), jnp.zeros((BLOCK,), jnp.float32)
    z, most, total = body(i, lax.fori_loop(0, i, body, carry), masked=True)
    z_ref[...] = (z / (total[:, None] * (1 - rate))).astype(z_ref.dtype)
    lse_ref[...] = most + jnp.log2(total)


def _backward_kernel(seeds_ref, q_ref, k_ref, v_ref, dz_ref, lse_ref, delta_ref, dqkv_ref, *, rate):
    """Block i of dq, and block i of dk and dv: together n + 1 of the n^2 / 2 blocks in each of the n programs."""
    b, h, i = (pl.program_id(axis) for axis in range(3))
    T, K = k_ref.shape
    row0 = (b * pl.num_programs(1) + h) * T
    mine = pl.ds(i * BLOCK, BLOCK)

    def block(queries, keys, q, dz, lse, delta, k, v, masked):
        """(pattern after dropout, gradient of the scores) of one block."""
        p = jnp.exp2(_scores(q, k, masked) - lse[:, None])
        dp, dropped = plgpu.dot(dz, v.T), p
        if rate:
            keep = _keep(seeds_ref, rate, row0 + queries * BLOCK, keys * BLOCK, T)
            dropped, dp = (jnp.where(keep, x / (1 - rate), 0.0) for x in (p, dp))
        return dropped.astype(q.dtype), (p * (dp - delta[:, None]) / math.sqrt(K)).astype(q.dtype)

    k, v = k_ref[mine, :], v_ref[mine, :]

    def over_queries(j, carry, masked=False):
        dk, dv = carry
        theirs = pl.ds(j * BLOCK, BLOCK)
        q, dz = q_ref[theirs, :], dz_ref[theirs, :]
        dropped, ds = block(j, i, q, dz, lse_ref[theirs], delta_ref[theirs], k, v, masked)
        return dk + plgpu.dot(ds.T, q), dv + plgpu.dot(dropped.T, dz)

    zero = jnp.zeros((BLOCK, K), jnp.float32)
    dk, dv = lax.fori_loop(i + 1, T // BLOCK, over_queries, over_queries(i, (zero, zero), masked=True))
    dqkv_ref[:, 1, :], dqkv_ref[:, 2, :] = dk.astype(k.dtype), dv.astype(v.dtype)

    q, dz, lse, delta = q_ref[mine, :], dz_ref[mine, :], lse_ref[mine], delta_ref[mine]

    def over_keys(j, dq, masked=False):
        theirs = pl.ds(j * BLOCK, BLOCK)
        k = k_ref[theirs, :]
        _, ds = block(i, j, q, dz, lse, delta, k, v_ref[theirs, :], masked)
        return dq + plgpu.dot(ds, k)

    dqkv_ref[:, 0, :] = over_keys(i, lax.fori_loop(0, i, over_keys, zero), masked=True).astype(q.dtype)


def _part(which, T, K, blocked):
    """One of q, k, v (0, 1, 2) in qkv_BT3HK: of one text and head a block of T, or all of it."""
    return pl.BlockSpec((None, BLOCK if blocked else T, None, None, K),
                        lambda b, h, i: (b, i if blocked else 0, which, h, 0))


def _attention_forward(qkv_BT3HK, seeds, rate):
    B, T, _, H, K = qkv_BT3HK.shape
    return _call(
        functools.partial(_forward_kernel, rate=rate), grid=(B, H, T // BLOCK), warps=4, name='attention_forward',
        in_specs=[pl.BlockSpec((2,), lambda b, h, i: (0,)), _part(0, T, K, True), _part(1, T, K, False),
                  _part(2, T, K, False)],
        out_specs=[pl.BlockSpec((None, BLOCK, None, K), lambda b, h, i: (b, i, h, 0)),
                   pl.BlockSpec((None, None, BLOCK), lambda b, h, i: (b, h, i))],
        out_shape=[jax.ShapeDtypeStruct((B, T, H, K), qkv_BT3HK.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32)],
    )(seeds, qkv_BT3HK, qkv_BT3HK, qkv_BT3HK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention(qkv_BT3HK, seeds, rate):
    """Causal attention from the fused projection: (B, T, 3, H, K) -> (B, T, H, K); T is a multiple of BLOCK.

    The pattern never reaches memory; the backward pass computes it anew from the log-sum-exp of its rows, and draws the
    same dropout mask, a hash of (seeds, place).
    """
    return _attention_forward(qkv_BT3HK, seeds, rate)[0]


def _attention_fwd(qkv_BT3HK, seeds, rate):
    z_BTHK, lse_BHT = _attention_forward(qkv_BT3HK, seeds, rate)
    return z_BTHK, (qkv_BT3HK, seeds, z_BTHK, lse_BHT)


def _attention_bwd(rate, saved, dz_BTHK):
    qkv_BT3HK, seeds, z_BTHK, lse_BHT = saved
    B, T, _, H, K = qkv_BT3HK.shape
    delta_BHT = (z_BTHK.astype(jnp.float32) * dz_BTHK.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    whole_T = pl.BlockSpec((None, None, T), lambda b, h, i: (b, h, 0))
    dqkv_BT3HK = _call(
        functools.partial(_backward_kernel, rate=rate), grid=(B, H, T // BLOCK), warps=4, name='attention_backward',
        in_specs=[pl.BlockSpec((2,), lambda b, h, i: (0,)), *(_part(which, T, K, False) for which in range(3)),
                  pl.BlockSpec((None, T, None, K), lambda b, h, i: (b, 0, h, 0)), whole_T, whole_T],
        out_specs=pl.BlockSpec((None, BLOCK, 3, None, K), lambda b, h, i: (b, i, 0, h, 0)),
        out_shape=jax.ShapeDtypeStruct(qkv_BT3HK.shape, qkv_BT3HK.dtype),
    )(seeds, qkv_BT3HK, qkv_BT3HK, qkv_BT3HK, dz_BTHK, lse_BHT, delta_BHT)
    return dqkv_BT3HK, None


attention.defvjp(_attention_fwd, _attention_bwd)


def _rows(ref, index, D):
    """Rows of a block whose last dimension is padded to a power of two, in fp32, with zeros for the padding."""
    width = ref.shape[-1]
    return plgpu.load(ref.at[index], mask=(jnp.arange(width) < D)[None, :], other=0.0).astype(jnp.float32)


def _row_index(row0, rows, D, width):
    """The place of each element of `rows` rows from `row0` on in the whole array (N, D)."""
    row = (row0 + jnp.arange(rows)).astype(jnp.uint32)
    return row[:, None] * jnp.uint32(D) + jnp.arange(width).astype(jnp.uint32)[None, :]


def _normalised(x, D, eps):
    """(x - mean) / std of each row, 0 in the padding; and 1 / std."""
    inside = (jnp.arange(x.shape[-1]) < D)[None, :]
    centred = jnp.where(inside, x - x.sum(-1, keepdims=True) / D, 0.0)
    rstd = lax.rsqrt(jnp.square(centred).sum(-1, keepdims=True) / D + eps)
    return centred * rstd, rstd


def _dropped(x, seeds_ref, rate, row0, D):
    """dropout(x) for rows from `row0` on."""
    if not rate:
        return x
    keep = keep_mask(_row_index(row0, x.shape[0], D, x.shape[1]), (seeds_ref[0], seeds_ref[1]), rate)
    return jnp.where(keep, x / (1 - rate), 0.0)


def _add_norm_kernel(ins, outs, *, D, rate, eps):
    """x <- x + dropout(branch), rounded as it is stored; y <- LayerNorm(x)."""
    rows, width = outs['y'].shape
    inside = jnp.arange(width) < D
    x = _rows(ins['x'], slice(None), D)
    if ins['branch'] is not None:
        branch = _dropped(_rows(ins['branch'], slice(None), D), ins['seeds'], rate, pl.program_id(0) * rows, D)
        stored = (x + branch).astype(outs['x'].dtype)
        plgpu.store(outs['x'], stored, mask=inside[None, :])
        x = stored.astype(jnp.float32)
    y = _normalised(x, D, eps)[0] * plgpu.load(ins['scale'], mask=inside, other=0.0)
    if ins['bias'] is not None:
        y += plgpu.load(ins['bias'], mask=inside, other=0.0)
    plgpu.store(outs['y'], y.astype(outs['y'].dtype), mask=inside[None, :])


def _add_norm_backward_kernel(ins, outs, *, D, rate, eps):
    """The gradients of x, of the branch, and this program's share of those of scale and bias."""
    span, width = ins['x'].shape
    inside = jnp.arange(width) < D
    scale, row0 = plgpu.load(ins['scale'], mask=inside, other=0.0), pl.program_id(0) * span

    def body(r, carry):
        dscale, dbias = carry
        here = pl.ds(r * BACKWARD_ROWS, BACKWARD_ROWS), slice(None)
        x_hat, rstd = _normalised(_rows(ins['x'], here, D), D, eps)
        dy = _rows(ins['dy'], here, D)
        g = dy * scale
        dx = (g - g.sum(-1, keepdims=True) / D - x_hat * ((g * x_hat).sum(-1, keepdims=True) / D)) * rstd
        dx += _rows(ins['dx'], here, D)
        plgpu.store(outs['dx'].at[here], dx.astype(outs['dx'].dtype), mask=inside[None, :])
        if outs['dbranch'] is not None:
            dbranch = _dropped(dx, ins['seeds'], rate, row0 + r * BACKWARD_ROWS, D)
            plgpu.store(outs['dbranch'].at[here], dbranch.astype(outs['dbranch'].dtype), mask=inside[None, :])
        return dscale + (dy * x_hat).sum(0), dbias + dy.sum(0)

    zero = jnp.zeros(width, jnp.float32)
    dscale, dbias = lax.fori_loop(0, span // BACKWARD_ROWS, body, (zero, zero))
    plgpu.store(outs['dscale'], dscale, mask=inside)
    if outs['dbias'] is not None:
        plgpu.store(outs['dbias'], dbias, mask=inside)


def _add_norm_fwd(x_ND, branch_ND, scale_D, bias_D, seeds, rate, eps):
    N, D = x_ND.shape
    width = pl.next_power_of_2(D)
    rows, vector = pl.BlockSpec((NORM_ROWS, width), lambda i: (i, 0)), pl.BlockSpec((width,), lambda i: (0,))
    like_x = jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype)
    both = branch_ND is not None
    ins = {'seeds': seeds, 'x': x_ND, 'branch': branch_ND, 'scale': scale_D, 'bias': bias_D}
    outs = _call(
        functools.partial(_add_norm_kernel, D=D, rate=rate, eps=eps), grid=(N // NORM_ROWS,), warps=NORM_WARPS,
        name='add_norm',
        in_specs=[{'seeds': pl.BlockSpec((2,), lambda i: (0,)), 'x': rows, 'branch': rows if both else None,
                   'scale': vector, 'bias': None if bias_D is None else vector}],
        out_specs={'x': rows if both else None, 'y': rows},
        out_shape={'x': like_x if both else None, 'y': like_x},
    )(ins)
    sum_ND = outs['x'] if both else x_ND
    return (sum_ND, outs['y']), (sum_ND, both, scale_D, bias_D, seeds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def add_norm(x_ND, branch_ND, scale_D, bias_D, seeds, rate, eps):
    """x + dropout(branch), and the LayerNorm of that: (N, D), (N, D). `branch` and `bias` may be None."""
    return _add_norm_fwd(x_ND, branch_ND, scale_D, bias_D, seeds, rate, eps)[0]


def _add_norm_bwd(rate, eps, saved, cotangents):
    x_ND, both, scale_D, bias_D, seeds = saved
    dx_ND, dy_ND = cotangents
    N, D = x_ND.shape
    width = pl.next_power_of_2(D)
    programs = min(NORM_PROGRAMS, N // BACKWARD_ROWS)
    rows, vector = pl.BlockSpec((N // programs, width), lambda i: (i, 0)), pl.BlockSpec((width,), lambda i: (0,))
    like_x, shares = jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype), jax.ShapeDtypeStruct((programs, D), jnp.float32)
    share = pl.BlockSpec((None, width), lambda i: (i, 0))
    drops, biased = both and rate > 0, bias_D is not None
    outs = _call(
        functools.partial(_add_norm_backward_kernel, D=D, rate=rate, eps=eps), grid=(programs,), warps=BACKWARD_WARPS,
        name='add_norm_backward',
        in_specs=[{'seeds': pl.BlockSpec((2,), lambda i: (0,)), 'x': rows, 'dx': rows, 'dy': rows, 'scale': vector}],
        out_specs={'dx': rows, 'dbranch': rows if drops else None, 'dscale': share, 'dbias': share if biased else None},
        out_shape={'dx': like_x, 'dbranch': like_x if drops else None, 'dscale': shares,
                   'dbias': shares if biased else None},
    )({'seeds': seeds, 'x': x_ND, 'dx': dx_ND, 'dy': dy_ND, 'scale': scale_D})
    dbranch = (outs['dbranch'] if drops else outs['dx']) if both else None
    return outs['dx'], dbranch, outs['dscale'].sum(0), outs['dbias'].sum(0) if biased else None, None


add_norm.defvjp(_add_norm_fwd, _add_norm_bwd)


def _softmax_gradient_kernel(targets_ref, logits_ref, dlogits_ref, nats_ref, *, V):
    """-log softmax(logits)[target] of one row, and its gradient softmax(logits) - onehot(target)."""
    target, padded = targets_ref[...], logits_ref.shape[0]

    def load(j):
        column = j * COLUMNS + jnp.arange(COLUMNS)
        logits = plgpu.load(logits_ref.at[pl.ds(j * COLUMNS, COLUMNS)], mask=column < V, other=-jnp.inf)
        return column, logits.astype(jnp.float32)

    def scan(j, carry):
        most, total, hit = carry
        column, logits = load(j)
        most_now = jnp.maximum(most, jnp.maximum(logits, -1e30))  # finite also where all of a lane is padding
        total = total * jnp.exp(most - most_now) + jnp.exp(logits - most_now)
        return most_now, total, hit + jnp.where(column == target, logits, 0.0)

    blocks, zero = pl.cdiv(padded, COLUMNS), jnp.zeros(COLUMNS, jnp.float32)
    most, total, hit = lax.fori_loop(0, blocks, scan, (zero - 1e30, zero, zero))
    top = most.max(0)
    lse = top + jnp.log((total * jnp.exp(most - top)).sum(0))
    nats_ref[...] = lse - hit.sum(0)

    def write(j, _):
        column, logits = load(j)
        gradient = jnp.exp(logits - lse) - jnp.where(column == target, 1.0, 0.0)
        plgpu.store(dlogits_ref.at[pl.ds(j * COLUMNS, COLUMNS)], gradient.astype(dlogits_ref.dtype), mask=column < padded)

    lax.fori_loop(0, blocks, write, None)


def _softmax_gradient(logits_NV, targets_N, V):
    """(gradient of the logits, in their memory; nats_N). Columns from V on are padding: gradient 0."""
    N, padded = logits_NV.shape
    row = pl.BlockSpec((None, padded), lambda n: (n, 0))
    one = pl.BlockSpec((None,), lambda n: (n,))
    return _call(functools.partial(_softmax_gradient_kernel, V=V), grid=(N,), warps=SOFTMAX_WARPS,
                 name='softmax_gradient', in_specs=[one, row], out_specs=[row, one], input_output_aliases={1: 0},
                 out_shape=[jax.ShapeDtypeStruct(logits_NV.shape, logits_NV.dtype),
                            jax.ShapeDtypeStruct((N,), jnp.float32)])(targets_N, logits_NV)


def _head_loss_fwd(x_ND, wte_VD, targets_N):
    V = wte_VD.shape[0]
    wte_VD = jnp.pad(wte_VD, ((0, -V % 128), (0, 0)))
    dlogits_NV, nats_N = _softmax_gradient(x_ND @ wte_VD.T, targets_N, V)
    return nats_N, (x_ND, wte_VD, dlogits_NV, V)


@jax.custom_vjp
def head_loss(x_ND, wte_VD, targets_N):
    """Cross-entropy in nats, fp32, of each target under softmax(x wte^T): (N, D), (V, D), (N,) -> (N,).

    The logits are written once, in the operands' dtype, and then overwritten by their own gradient: the backward pass
    is two matrix products. Left to XLA, an fp32 copy of this largest of all arrays goes through memory six times.
    """
    return _head_loss_fwd(x_ND, wte_VD, targets_N)[0]


def _head_loss_bwd(saved, g_N):
    x_ND, wte_VD, dlogits_NV, V = saved
    g_N1 = g_N[:, None].astype(x_ND.dtype)
    dwte_VD = jnp.einsum('NV,ND->VD', dlogits_NV, x_ND * g_N1)
    return (dlogits_NV @ wte_VD) * g_N1, dwte_VD[:V], None


head_loss.defvjp(_head_loss_fwd, _head_loss_bwd)
