"""Fused GPU kernels of the training step, written in Pallas (Triton), each with its own backward pass.

They compute what model.py, step.py and optim.py spell out, in fewer passes over memory, which is where a small model's
time goes: between two matrix products stands one kernel. On a CPU they run in Pallas' interpreter: slow, and only there
to be tested against the open formulas.

    attention        softmax(q k^T / sqrt(K), causal) v with the pattern's dropout (Dao et al. 2022, FlashAttention)
    add_norm         x + dropout(branch + bias), and its LayerNorm
    gelu             gelu_new(x + bias)
    head_loss        the cross-entropy of the tied head, with the gradient of the logits made in the forward pass
    adamw            the update of a parameter

The gradient of a bias or scale is a sum over all rows: each program adds up its own, and XLA the few sums of programs.
Each call is jitted by itself, so that the equal ones of all layers are traced and lowered once.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.model import keep_mask

LOG2_E = math.log2(math.e)
GELU_SCALE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715

# Sizes of blocks, warps and stages of the software pipeline: the best of those tried on an H100, at the shapes of
# configs/shakespeare.py and configs/gpt2_124m.py.
BLOCK = 64  # queries that an attention kernel works on at a time, and keys; a head's T is a multiple of it
ATTENTION = dict(warps=4, stages=3)
DROPPED_BLOCK = 16  # where the backward pass draws a dropout mask, which takes registers: 87 instead of 98 us
NORM_ROWS, NORM_WARPS = 2, 2
NORM_PROGRAMS = 1024  # of the backward pass, each with its share of all rows, which it goes through one by one
GELU_ROWS, GELU_COLUMNS, GELU_WARPS = 4, 512, 4
GELU_PROGRAMS = 512  # of the backward pass, for each block of columns
COLUMNS, UNROLL, SOFTMAX_WARPS = 4096, 2, 8
ADAMW_BLOCK, ADAMW_WARPS = 2048, 4
ADAMW_VECTORS = 16  # in one call, so that its arguments are no more than CUDA takes
ROWS = GELU_PROGRAMS * GELU_ROWS  # of x: a multiple of this


def interprets() -> bool:
    """Whether kernels run in the interpreter, where there is no GPU."""
    return jax.default_backend() != 'gpu'


def _call(kernel, *, grid, warps, stages=2, **options):
    return pl.pallas_call(kernel, grid=grid, interpret=interprets(), **options,
                          compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages))


def _places(start, n):
    return (start + jnp.arange(n)).astype(jnp.int32)


def _only(present, specs):
    """`specs` with None for what is not there."""
    return {name: None if present[name] is None else spec for name, spec in specs.items()}


# A kernel's part of model.dropout_seeds: None where it drops nothing.
SEED_SPECS = {'words': pl.BlockSpec((2,), lambda *grid: (0,)), 'place': pl.BlockSpec((1,), lambda *grid: (0,))}


def _seed_inputs(seeds):
    words_2, place = (None, None) if seeds is None else seeds
    return {'words': words_2, 'place': None if place is None else jnp.reshape(place, 1)}


def _seeds(ins):
    return (ins['words'][0], ins['words'][1]), ins['place'][0]


# -- attention


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
    i = pl.num_programs(2) - 1 - pl.program_id(2)  # the long rows first, so that no long one is left alone at the end
    T, _, K = ins['qkv'].shape
    mine, first_row, queries = pl.ds(i * BLOCK, BLOCK), _first_row(T), _places(i * BLOCK, BLOCK)[:, None]
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
            p = jnp.where(_keep(_seeds(ins), rate, first_row, T, queries, keys), p, 0.0)
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
        keep = _keep(_seeds(ins), rate, first_row, ins['qkv'].shape[0], queries, keys)
        dropped, dp = jnp.where(keep, p, 0.0), jnp.where(keep, dp * (1 / (1 - rate)), 0.0)
    return dropped.astype(ins['qkv'].dtype), (p * (dp - delta)).astype(ins['qkv'].dtype)


def _write(outs, places, **gradients):
    """A block of each of dq, dk and dv, and the sum of its rows: this program's share of the bias' gradient."""
    for at, gradient in gradients.items():
        which = 'qkv'.index(at)
        outs['dqkv'][places, which, :] = gradient.astype(outs['dqkv'].dtype)
        if outs['dbias'] is not None:
            outs['dbias'][which, :] = gradient.sum(0)


def _keys_backward_kernel(ins, outs, *, rate, inner):
    """Block i of dk and dv, over the queries that see it."""
    i = pl.program_id(2)
    T, _, K = ins['qkv'].shape
    mine, blocks, keys = pl.ds(i * BLOCK, BLOCK), BLOCK // inner, _places(i * BLOCK, BLOCK)[:, None]
    k, v, first_row = ins['qkv'][mine, 1, :], _add_bias(ins['qkv'][mine, 2, :], ins, 2), _first_row(T)

    def body(masked, j, carry):  # transposed, keys before queries, so that no product transposes a pattern
        dk, dv = carry
        theirs, queries = pl.ds(j * inner, inner), _places(j * inner, inner)[None, :]
        q, dz = ins['qkv'][theirs, 0, :], ins['dz'][theirs, :]
        p = jnp.exp2(_scores(k, q, queries, keys, masked) - ins['lse'][theirs][None, :])
        dropped, ds = _backward(ins, rate, p, plgpu.dot(v, dz.T), ins['delta'][theirs][None, :], first_row, queries,
                                keys)
        return dk + plgpu.dot(ds, q), dv + plgpu.dot(dropped, dz)

    zero = jnp.zeros((BLOCK, K), jnp.float32)
    carry = lax.fori_loop(i * blocks, (i + 1) * blocks, functools.partial(body, True), (zero, zero))
    dk, dv = lax.fori_loop((i + 1) * blocks, T // inner, functools.partial(body, False), carry)
    _write(outs, mine, k=dk / math.sqrt(K), v=dv / (1 - rate))


def _queries_backward_kernel(ins, outs, *, rate, inner):
    """Block i of dq, over the keys it sees."""
    i = pl.num_programs(2) - 1 - pl.program_id(2)  # the long ones first, as in the forward pass
    T, _, K = ins['qkv'].shape
    mine, blocks, queries = pl.ds(i * BLOCK, BLOCK), BLOCK // inner, _places(i * BLOCK, BLOCK)[:, None]
    q, dz, first_row = ins['qkv'][mine, 0, :], ins['dz'][mine, :], _first_row(T)
    lse, delta = ins['lse'][mine][:, None], ins['delta'][mine][:, None]
    through_bias = 0.0 if ins['bias'] is None else (dz.astype(jnp.float32) * ins['bias'][2][None, :]).sum(-1)[:, None]

    def body(masked, j, dq):
        theirs, keys = pl.ds(j * inner, inner), _places(j * inner, inner)[None, :]
        k, v = ins['qkv'][theirs, 1, :], ins['qkv'][theirs, 2, :]
        p = jnp.exp2(_scores(q, k, queries, keys, masked) - lse)
        _, ds = _backward(ins, rate, p, plgpu.dot(dz, v.T) + through_bias, delta, first_row, queries, keys)
        return dq + plgpu.dot(ds, k)

    dq = lax.fori_loop(0, i * blocks, functools.partial(body, False), jnp.zeros((BLOCK, K), jnp.float32))
    dq = lax.fori_loop(i * blocks, (i + 1) * blocks, functools.partial(body, True), dq)
    _write(outs, mine, q=dq / math.sqrt(K))


def _specs(T, K):
    """Of one text and head: all rows of q, k, v; seeds and bias."""
    return SEED_SPECS | {'qkv': pl.BlockSpec((None, T, 3, None, K), lambda b, h, i: (b, 0, 0, h, 0)),
                         'bias': pl.BlockSpec((3, None, K), lambda b, h, i: (0, h, 0))}


@functools.partial(jax.jit, static_argnums=3)
def _attention_forward(qkv_BT3HK, bias_3HK, seeds, rate):
    B, T, _, H, K = qkv_BT3HK.shape
    ins, specs, biased = {'qkv': qkv_BT3HK, 'bias': bias_3HK} | _seed_inputs(seeds), _specs(T, K), bias_3HK is not None
    shapes = {'qkv': qkv_BT3HK if biased else None, 'z': jax.ShapeDtypeStruct((B, T, H, K), qkv_BT3HK.dtype),
              'lse': jax.ShapeDtypeStruct((B, H, T), jnp.float32)}
    out_specs = {'qkv': specs['qkv'], 'z': pl.BlockSpec((None, T, None, K), lambda b, h, i: (b, 0, h, 0)),
                 'lse': pl.BlockSpec((None, None, T), lambda b, h, i: (b, h, 0))}
    outs = _call(
        functools.partial(_forward_kernel, rate=rate), grid=(B, H, T // BLOCK), **ATTENTION, name='attention_forward',
        in_specs=[_only(ins, specs)], out_specs=_only(shapes, out_specs), out_shape=shapes,
        # In the order of their names, without what is None: bias, place, qkv, words; lse, qkv, z.
        input_output_aliases={1 + (seeds is not None): 1} if biased else {})(ins)
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
    delta_BHT = (z_BTHK.astype(jnp.float32) * dz_BTHK.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    row, n = pl.BlockSpec((None, None, T), lambda b, h, i: (b, h, 0)), T // BLOCK
    dqkv = pl.BlockSpec((None, T, 3, None, K), lambda b, h, i: (b, 0, 0, h, 0))
    dbias = pl.BlockSpec((None, 3, None, K), lambda b, h, i: (b * n + i, 0, h, 0))
    shapes = {'dqkv': jax.ShapeDtypeStruct(qkv_BT3HK.shape, qkv_BT3HK.dtype),
              'dbias': None if bias_3HK is None else jax.ShapeDtypeStruct((B * n, 3, H, K), jnp.float32)}
    ins = _seed_inputs(seeds) | {'qkv': qkv_BT3HK, 'bias': bias_3HK, 'dz': dz_BTHK, 'lse': lse_BHT, 'delta': delta_BHT}
    specs = _specs(T, K) | {'dz': pl.BlockSpec((None, T, None, K), lambda b, h, i: (b, 0, h, 0)), 'lse': row,
                            'delta': row}
    out_specs = _only(shapes, {'dqkv': dqkv, 'dbias': dbias})

    def call(kernel, name, ins, in_specs, **options):
        return _call(functools.partial(kernel, rate=rate, inner=DROPPED_BLOCK if rate else BLOCK), grid=(B, H, n),
                     **ATTENTION, name=name, in_specs=in_specs, out_specs=out_specs, out_shape=shapes, **options)(*ins)

    # Two kernels, the second of which goes on in the memory of the first: in one, the registers for keys would leave
    # room for fewer programs on queries too.
    outs = call(_keys_backward_kernel, 'attention_backward_keys', [ins], [_only(ins, specs)])
    before = len(jax.tree.leaves(ins))
    outs = call(lambda ins, _, outs, **options: _queries_backward_kernel(ins, outs, **options),
                'attention_backward_queries', [ins, outs], [_only(ins, specs), out_specs],
                input_output_aliases={before + i: i for i in range(len(jax.tree.leaves(outs)))})
    return outs['dqkv'], None if bias_3HK is None else outs['dbias'].sum(0), None


attention.defvjp(_attention_fwd, _attention_bwd)

# -- add_norm


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


def _dropped(x, ins, rate, row0, D):
    """dropout(x) for rows from `row0` on."""
    if not rate:
        return x
    keep = keep_mask(_row_index(row0, x.shape[0], D, x.shape[1]), _seeds(ins), rate)
    return jnp.where(keep, x * (1 / (1 - rate)), 0.0)


def _add_norm_kernel(ins, outs, *, D, rate, eps):
    """x <- x + dropout(branch + bias), rounded as it is stored; y <- LayerNorm(x)."""
    rows, width = outs['y'].shape
    inside = jnp.arange(width) < D

    def vector(name):
        return plgpu.load(ins[name], mask=inside, other=0.0)

    x = _rows(ins['x'], slice(None), D)
    if ins['branch'] is not None:
        branch = _rows(ins['branch'], slice(None), D)
        if ins['branch_bias'] is not None:
            branch += vector('branch_bias')
        branch = _dropped(branch, ins, rate, pl.program_id(0) * rows, D)
        stored = (x + branch).astype(outs['x'].dtype)
        plgpu.store(outs['x'], stored, mask=inside[None, :])
        x = stored.astype(jnp.float32)
    y = _normalised(x, D, eps)[0] * vector('scale')
    if ins['bias'] is not None:
        y += vector('bias')
    plgpu.store(outs['y'], y.astype(outs['y'].dtype), mask=inside[None, :])


def _add_norm_backward_kernel(ins, outs, *, D, rate, eps, summed):
    """The gradients of x and of the branch, and this program's share of those of scale and biases: `summed`."""
    span, width = ins['x'].shape
    inside = jnp.arange(width) < D
    scale, row0 = plgpu.load(ins['scale'], mask=inside, other=0.0), pl.program_id(0) * span

    def body(r, sums):
        here = pl.ds(r, 1), slice(None)
        x_hat, rstd = _normalised(_rows(ins['x'], here, D), D, eps)
        dy = _rows(ins['dy'], here, D)
        g = dy * scale
        dx = (g - g.sum(-1, keepdims=True) / D - x_hat * ((g * x_hat).sum(-1, keepdims=True) / D)) * rstd
        if ins['dx'] is not None:
            dx += _rows(ins['dx'], here, D)
        plgpu.store(outs['dx'].at[here], dx.astype(outs['dx'].dtype), mask=inside[None, :])
        dbranch = _dropped(dx, ins, rate, row0 + r, D)
        if outs['dbranch'] is not None:
            plgpu.store(outs['dbranch'].at[here], dbranch.astype(outs['dbranch'].dtype), mask=inside[None, :])
        terms = {'scale': dy * x_hat, 'bias': dy, 'branch_bias': dbranch}
        return {name: total + terms[name].sum(0) for name, total in sums.items()}

    sums = lax.fori_loop(0, span, body, {name: jnp.zeros(width, jnp.float32) for name in summed})
    for row, name in enumerate(summed):
        plgpu.store(outs['sums'].at[pl.ds(row, 1), :], sums[name][None, :], mask=inside[None, :])


@functools.partial(jax.jit, static_argnums=(6, 7))
def _add_norm_forward(x_ND, branch_ND, branch_bias_D, scale_D, bias_D, seeds, rate, eps):
    N, D = x_ND.shape
    width = pl.next_power_of_2(D)
    rows, vector = pl.BlockSpec((NORM_ROWS, width), lambda i: (i, 0)), pl.BlockSpec((width,), lambda i: (0,))
    like_x = jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype)
    both = branch_ND is not None
    ins = _seed_inputs(seeds) | {'x': x_ND, 'branch': branch_ND, 'branch_bias': branch_bias_D, 'scale': scale_D,
                                 'bias': bias_D}
    outs = _call(
        functools.partial(_add_norm_kernel, D=D, rate=rate, eps=eps), grid=(N // NORM_ROWS,), warps=NORM_WARPS,
        name='add_norm',
        in_specs=[_only(ins, SEED_SPECS | {'x': rows, 'branch': rows, 'branch_bias': vector, 'scale': vector,
                                           'bias': vector})],
        out_specs={'x': rows if both else None, 'y': rows},
        out_shape={'x': like_x if both else None, 'y': like_x},
    )(ins)
    return outs['x'] if both else x_ND, outs['y']


def _add_norm_fwd(x_ND, branch_ND, branch_bias_D, scale_D, bias_D, seeds, rate, eps):
    out = _add_norm_forward(x_ND, branch_ND, branch_bias_D, scale_D, bias_D, seeds, rate, eps)
    present = tuple(leaf is not None for leaf in (branch_ND, branch_bias_D, bias_D))
    return out, (out[0], scale_D, seeds, present)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def add_norm(x_ND, branch_ND, branch_bias_D, scale_D, bias_D, seeds, rate, eps):
    """x + dropout(branch + branch_bias), and the LayerNorm of that: (N, D), (N, D).

    `branch` (and with it branch_bias), `branch_bias` alone, and `bias` may be None. N is a multiple of ROWS.
    """
    return _add_norm_forward(x_ND, branch_ND, branch_bias_D, scale_D, bias_D, seeds, rate, eps)


def _add_norm_bwd(rate, eps, saved, cotangents):
    *arrays, present = saved
    return *_add_norm_backward(*arrays, *cotangents, present, rate, eps), None


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _add_norm_backward(x_ND, scale_D, seeds, dx_ND, dy_ND, present, rate, eps):
    both, branch_biased, biased = present
    N, D = x_ND.shape
    width, programs = pl.next_power_of_2(D), min(NORM_PROGRAMS, N)
    rows, vector = pl.BlockSpec((N // programs, width), lambda i: (i, 0)), pl.BlockSpec((width,), lambda i: (0,))
    drops = both and rate > 0
    summed = ('scale',) + ('bias',) * biased + ('branch_bias',) * branch_biased
    like_x = jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype)
    shapes = {'dx': like_x, 'dbranch': like_x if drops else None,
              'sums': jax.ShapeDtypeStruct((programs, len(summed), D), jnp.float32)}
    mine = pl.BlockSpec((None, len(summed), width), lambda i: (i, 0, 0))
    ins = _seed_inputs(seeds if drops else None) | {'x': x_ND, 'dx': dx_ND, 'dy': dy_ND, 'scale': scale_D}
    outs = _call(
        functools.partial(_add_norm_backward_kernel, D=D, rate=rate if both else 0, eps=eps, summed=summed),
        grid=(programs,), warps=1, name='add_norm_backward',
        in_specs=[_only(ins, SEED_SPECS | {'x': rows, 'dx': rows, 'dy': rows, 'scale': vector})],
        out_specs=_only(shapes, {'dx': rows, 'dbranch': rows, 'sums': mine}), out_shape=shapes,
    )(ins)
    dbranch = (outs['dbranch'] if drops else outs['dx']) if both else None
    sums = dict(zip(summed, outs['sums'].sum(0), strict=True))
    return outs['dx'], dbranch, sums.get('branch_bias'), sums['scale'], sums.get('bias')


add_norm.defvjp(_add_norm_fwd, _add_norm_bwd)

# -- gelu


def _gelu_parts(x):
    """x, and the sigmoid s with gelu_new(x) = x s: (1 + tanh(u)) / 2 is the sigmoid of 2 u, one exponential."""
    return 1 / (1 + jnp.exp2((-2 * LOG2_E * GELU_SCALE) * (x + GELU_CUBE * x * x * x)))


def _gelu_kernel(ins, outs):
    x = ins['x'][...].astype(jnp.float32)
    if ins['bias'] is not None:
        x += ins['bias'][...][None, :]
    outs['h'][...] = (x * _gelu_parts(x)).astype(outs['h'].dtype)


def _gelu_backward_kernel(ins, outs):
    span, columns = ins['x'].shape
    bias = None if ins['bias'] is None else ins['bias'][...][None, :]

    def body(r, total):
        here = pl.ds(r * GELU_ROWS, GELU_ROWS), slice(None)
        x = ins['x'][here].astype(jnp.float32)
        if bias is not None:
            x += bias
        s = _gelu_parts(x)
        slope = s + x * s * (1 - s) * (2 * GELU_SCALE) * (1 + 3 * GELU_CUBE * x * x)
        dx = ins['dh'][here].astype(jnp.float32) * slope
        outs['dx'][here] = dx.astype(outs['dx'].dtype)
        return total + dx.sum(0) if bias is not None else total

    total = lax.fori_loop(0, span // GELU_ROWS, body, jnp.zeros(columns, jnp.float32))
    if bias is not None:
        outs['dbias'][...] = total


def _columns(F):
    """The largest power of two that divides F, up to GELU_COLUMNS."""
    return min(F & -F, GELU_COLUMNS)


@jax.custom_vjp
def gelu(x_NF, bias_F):
    """gelu_new(x + bias), (N, F); the bias may be None."""
    return _gelu_fwd(x_NF, bias_F)[0]


@jax.jit
def _gelu_fwd(x_NF, bias_F):
    N, F = x_NF.shape
    columns = _columns(F)
    block, vector = pl.BlockSpec((GELU_ROWS, columns), lambda i, j: (i, j)), pl.BlockSpec((columns,), lambda i, j: (j,))
    ins = {'x': x_NF, 'bias': bias_F}
    h_NF = _call(_gelu_kernel, grid=(N // GELU_ROWS, F // columns), warps=GELU_WARPS, name='gelu',
                 in_specs=[_only(ins, {'x': block, 'bias': vector})], out_specs={'h': block},
                 out_shape={'h': jax.ShapeDtypeStruct(x_NF.shape, x_NF.dtype)})(ins)['h']
    return h_NF, (x_NF, bias_F)


@jax.jit
def _gelu_bwd(saved, dh_NF):
    x_NF, bias_F = saved
    N, F = x_NF.shape
    columns, programs = _columns(F), min(GELU_PROGRAMS, N // GELU_ROWS)
    block, vector = (pl.BlockSpec((N // programs, columns), lambda i, j: (i, j)),
                     pl.BlockSpec((columns,), lambda i, j: (j,)))
    ins = {'x': x_NF, 'bias': bias_F, 'dh': dh_NF}
    shapes = {'dx': jax.ShapeDtypeStruct(x_NF.shape, x_NF.dtype),
              'dbias': None if bias_F is None else jax.ShapeDtypeStruct((programs, F), jnp.float32)}
    outs = _call(_gelu_backward_kernel, grid=(programs, F // columns), warps=GELU_WARPS, name='gelu_backward',
                 in_specs=[_only(ins, {'x': block, 'bias': vector, 'dh': block})],
                 out_specs=_only(shapes, {'dx': block, 'dbias': pl.BlockSpec((None, columns), lambda i, j: (i, j))}),
                 out_shape=shapes)(ins)
    return outs['dx'], None if bias_F is None else outs['dbias'].sum(0)


gelu.defvjp(_gelu_fwd, _gelu_bwd)

# -- head_loss


def _softmax_gradient_kernel(targets_ref, logits_ref, dlogits_ref, nats_ref, *, V, columns):
    """-log softmax(logits)[target] of one row, and its gradient softmax(logits) - onehot(target)."""
    target, padded = targets_ref[...], logits_ref.shape[0]

    def load(j):
        column = j * columns + jnp.arange(columns)
        # A mask that ends at a multiple of 128, not at V: with that, each thread would load one number at a time.
        logits = plgpu.load(logits_ref.at[pl.ds(j * columns, columns)], mask=column < padded, other=-jnp.inf)
        return column, jnp.where(column < V, logits.astype(jnp.float32) * LOG2_E, -jnp.inf)

    def scan(j, carry):
        most, total, hit = carry
        parts = [load(j * UNROLL + u) for u in range(UNROLL)]
        most_now = functools.reduce(jnp.maximum, (logits for _, logits in parts), most)
        total = total * jnp.exp2(most - most_now)
        for column, logits in parts:
            total += jnp.exp2(logits - most_now)
            hit += jnp.where(column == target, logits, 0.0)
        return most_now, total, hit

    zero = jnp.zeros(columns, jnp.float32)
    # Lanes of padding alone begin finite, so that no -inf - -inf is met.
    most, total, hit = lax.fori_loop(0, pl.cdiv(padded, columns * UNROLL), scan, (zero - 1e30, zero, zero))
    top = most.max(0)
    lse = top + jnp.log2((total * jnp.exp2(most - top)).sum(0))
    nats_ref[...] = (lse - hit.sum(0)) / LOG2_E

    def write(j, _):
        column, logits = load(j)
        gradient = jnp.exp2(logits - lse) - jnp.where(column == target, 1.0, 0.0)
        here = dlogits_ref.at[pl.ds(j * columns, columns)]
        plgpu.store(here, gradient.astype(dlogits_ref.dtype), mask=column < padded)

    lax.fori_loop(0, pl.cdiv(padded, columns), write, None)


def _softmax_gradient(logits_NV, targets_N, V):
    """(gradient of the logits, in their memory; nats_N). Columns from V on are padding: gradient 0."""
    N, padded = logits_NV.shape
    columns = min(COLUMNS, pl.next_power_of_2(padded))
    row = pl.BlockSpec((None, padded), lambda n: (n, 0))
    one = pl.BlockSpec((None,), lambda n: (n,))
    return _call(functools.partial(_softmax_gradient_kernel, V=V, columns=columns), grid=(N,),
                 warps=SOFTMAX_WARPS, name='softmax_gradient', in_specs=[one, row], out_specs=[row, one],
                 input_output_aliases={1: 0}, out_shape=[jax.ShapeDtypeStruct(logits_NV.shape, logits_NV.dtype),
                                                         jax.ShapeDtypeStruct((N,), jnp.float32)])(targets_N, logits_NV)


def _head_loss_fwd(x_ND, wte_VD, targets_N):
    V = wte_VD.shape[0]
    centred_VD = (wte_VD - wte_VD.mean(0)).astype(x_ND.dtype)
    head_VD = jnp.pad(centred_VD, ((0, -V % 128), (0, 0)))
    dlogits_NV, nats_N = _softmax_gradient(x_ND @ head_VD.T, targets_N, V)
    return nats_N, (x_ND, head_VD, dlogits_NV, V)


@jax.custom_vjp
def head_loss(x_ND, wte_VD, targets_N):
    """Cross-entropy in nats, fp32, of each target under softmax(x wte^T): (N, D), fp32 (V, D), (N,) -> (N,).

    The logits are written once, in the dtype of x, and then overwritten by their own gradient: the backward pass is
    two matrix products. Left to XLA, an fp32 copy of this largest of all arrays goes through memory six times.

    So in bf16 a logit has 8 bits: of the 100 that all logits of a published model may have in common, none would be
    left. Softmax does not see that common part, and neither do the gradients, whose sum over V is 0: it is taken out
    beforehand, as the embedding's mean.
    """
    return _head_loss_fwd(x_ND, wte_VD, targets_N)[0]


def _head_loss_bwd(saved, g_N):
    x_ND, head_VD, dlogits_NV, V = saved
    g_N1, dtype = g_N[:, None], x_ND.dtype
    dwte_VD = jnp.einsum('NV,ND->VD', dlogits_NV, (x_ND * g_N1).astype(dtype), preferred_element_type=jnp.float32)
    return ((dlogits_NV @ head_VD) * g_N1).astype(dtype), dwte_VD[:V], None


head_loss.defvjp(_head_loss_fwd, _head_loss_bwd)

# -- adamw


def _adamw(scalars_ref, refs, outs, inside, rates):
    """The equations of optim.make_optimizer for what is `inside` a block; returns the sums of (update)^2 and of p^2."""
    learning_rate, factor, correct1, correct2 = (scalars_ref[i] for i in range(4))
    beta1, beta2, eps, weight_decay = rates
    g, m, v, p = (plgpu.load(ref, mask=inside, other=0.0).astype(jnp.float32) for ref in refs)
    g *= factor
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    update = -learning_rate * (m * correct1 / (jnp.sqrt(v * correct2) + eps) + weight_decay * p)
    p += update
    for ref, value in zip(outs, (m, v, p), strict=True):
        plgpu.store(ref, value, mask=inside)
    return (update * update).sum(0), (p * p).sum(0)


def _adamw_kernel(scalars_ref, g_ref, m_ref, v_ref, p_ref, m_out, v_out, p_out, sums_ref, *, size, rates):
    inside = pl.program_id(0) * ADAMW_BLOCK + jnp.arange(ADAMW_BLOCK) < size
    sums_ref[0], sums_ref[1] = _adamw(scalars_ref, (g_ref, m_ref, v_ref, p_ref), (m_out, v_out, p_out), inside, rates)


@functools.partial(jax.jit, static_argnames='rates')
def adamw(g, m, v, p, scalars, *, rates):
    """One AdamW update of one leaf, in place: (m, v, p, partial sums of (update)^2 and of p^2, (programs, 2)).

    `scalars` fp32 (4,): learning rate, what clipping multiplies g by, 1 / (1 - beta1^s), 1 / (1 - beta2^s);
    `rates`: beta1, beta2, eps, weight_decay.
    """
    shape, size, programs = p.shape, p.size, pl.cdiv(p.size, ADAMW_BLOCK)
    part, four = pl.BlockSpec((ADAMW_BLOCK,), lambda i: (i,)), pl.BlockSpec((4,), lambda i: (0,))
    f32 = jax.ShapeDtypeStruct((size,), jnp.float32)
    m, v, p, sums = _call(
        functools.partial(_adamw_kernel, size=size, rates=rates), grid=(programs,), warps=ADAMW_WARPS, name='adamw',
        in_specs=[four, part, part, part, part],
        out_specs=[part, part, part, pl.BlockSpec((None, 2), lambda i: (i, 0))],
        out_shape=[f32, f32, f32, jax.ShapeDtypeStruct((programs, 2), jnp.float32)],
        input_output_aliases={2: 0, 3: 1, 4: 2},
    )(scalars, *(leaf.reshape(-1) for leaf in (g, m, v, p)))
    return m.reshape(shape), v.reshape(shape), p.reshape(shape), sums


def _adamw_vectors_kernel(scalars_ref, g_ref, *refs, starts, sizes, rates):
    *leaves, sums_ref = refs
    ins, outs, n = leaves[:len(leaves) // 2], leaves[len(leaves) // 2:], len(sizes)
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        @pl.when(pl.program_id(0) == i)
        def _(i=i, start=start, size=size):
            block = ins[i].shape[0]
            sums_ref[0], sums_ref[1] = _adamw(scalars_ref, (g_ref.at[pl.ds(start, block)], *ins[i::n]), outs[i::n],
                                              jnp.arange(block) < size, rates)


@functools.partial(jax.jit, static_argnames='rates')
def adamw_vectors(g, m, v, p, scalars, *, rates):
    """`adamw` for lists of small leaves, a program each: of 98 of the 148 leaves of the 124M model."""
    shapes, sizes, n = [leaf.shape for leaf in p], tuple(leaf.size for leaf in p), len(p)
    blocks = [pl.next_power_of_2(size) for size in sizes]
    g = jnp.concatenate([leaf.reshape(-1) for leaf in g] + [jnp.zeros(max(blocks))])  # room for the last one's block
    whole = [pl.BlockSpec((block,), lambda i: (0,)) for block in blocks] * 3
    f32 = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes] * 3
    *leaves, sums = _call(
        functools.partial(_adamw_vectors_kernel, starts=tuple(itertools.accumulate(sizes, initial=0))[:-1], sizes=sizes,
                          rates=rates), grid=(n,), warps=ADAMW_WARPS, name='adamw_vectors',
        in_specs=[pl.BlockSpec((4,), lambda i: (0,)), pl.BlockSpec(g.shape, lambda i: (0,)), *whole],
        out_specs=[*whole, pl.BlockSpec((None, 2), lambda i: (i, 0))],
        out_shape=[*f32, jax.ShapeDtypeStruct((n, 2), jnp.float32)],
        input_output_aliases={2 + i: i for i in range(3 * n)},
    )(scalars, g, *(leaf.reshape(-1) for leaf in (*m, *v, *p)))
    leaves = [leaf.reshape(shape) for leaf, shape in zip(leaves, shapes * 3, strict=True)]
    return leaves[:n], leaves[n:2 * n], leaves[2 * n:], sums
