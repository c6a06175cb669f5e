"""Decoding one token by fused kernels: five for each layer, instead of XLA's eighteen.

The arithmetic of one token takes almost no time. Reading every weight once does, and so does
starting kernels. So there are few kernels, each starts enough programs for the whole GPU to read
weights, and each program starts all of its loads before it uses the first:

    linear     x W + b or LayerNorm(x) W + b, through GELU, or added to the residual stream; also
               writes the token's keys and values into the cache
    attend     attention to the cache, of which it reads only the filled positions

They compute what model/gpt2.py spells out, rounding fewer intermediate results. Names carry shapes
as there; N is the number of outputs of a matrix, which is kept as (N, D), so that the share of a
program is contiguous in memory. On a CPU they run in Pallas' interpreter, for tests.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.kernels.launch import block_mask, call, load_or_zero, only, shared_memory
from gpt2_jax.model.gpt2 import Cache, embed
from gpt2_jax.model.ops import activate

# Sizes of blocks are the best of those tried on an H100 with GPT-2 124M. For one row, the rule also
# serves gpt2-xl. docs/speed.md has times.
STATISTICS = 64  # columns of several rows that are read at a time for the statistics of LayerNorm
HEAD_OUTS = 8192  # a matrix with more outputs is the head: it keeps the memory busy by itself
# With one row, a program computes two outputs, or four if the matrix has more outputs than this,
# because more programs would take longer to start.
MAX_PAIRED = 5000
MAX_WEIGHTS = 6400  # weights of a warp: its registers hold them, and as many inputs
MAX_MERGED = 4096  # width of a model whose attention is split: `linear` holds all of the splits


class LinearSizes(NamedTuple):
    """What a program of `linear` processes."""

    rows: int
    outs: int
    inputs: int  # columns that are read at a time
    warps: int
    stages: int  # blocks of inputs that are on their way at a time, with several rows


def linear_sizes(B, D, N, width, merges):
    """The sizes for B rows and a matrix of N outputs and D inputs, in a model of this width.

    A single row is multiplied and summed, with a program's whole share loading at once. A warp
    reads 256 columns at a time, so that it sums up its outputs without another warp. Several warps
    share a program only if its outputs have many inputs, or if it merges attention's splits.

    More rows go to tensor cores, which take 16 and more. A matrix of few outputs has few programs,
    so each has more on its way.
    """
    if B == 1 and merges:
        return LinearSizes(1, 4, 256, 4 if width <= 768 else 8, 1)
    if B == 1 and width < D:
        return LinearSizes(1, 1, 1024, 8, 1)
    if B == 1:
        outs = 2 if N <= MAX_PAIRED else 4
        return LinearSizes(1, outs, 256, pl.next_power_of_2(pl.cdiv(outs * D, MAX_WEIGHTS)), 1)
    rows = 16 if B <= 16 else 32
    few = rows == 16
    if N > HEAD_OUTS:
        return LinearSizes(rows, 128, 128, 4 if few else 8, 4)
    if N > 2048:
        return LinearSizes(rows, 16, 128, 2, 6) if few else LinearSizes(rows, 32, 128, 8, 4)
    if D > 2048:
        return LinearSizes(rows, 16, 512, 2, 6) if few else LinearSizes(rows, 16, 512, 4, 4)
    return LinearSizes(rows, 16, 256, 4, 3)


class AttendSizes(NamedTuple):
    """What a program of `attend` processes."""

    positions: int  # that are read at a time
    warps: int
    splits: int  # programs that share the positions of a head


def attend_sizes(B, width):
    """The sizes for B rows in a model of this width.

    The heads of one row are too few programs for the GPU, so several programs share a head. More
    splits are each shorter, but merging them takes longer: `linear` holds width x splits numbers in
    registers. With many rows, programs with fewer registers are faster.
    """
    if B == 1 and width <= MAX_MERGED:
        return AttendSizes(32, 4, 8) if width <= 1024 else AttendSizes(64, 4, 4)
    return AttendSizes(128, 8, 1) if B <= 16 else AttendSizes(64, 4, 1)


def _within(start, size, total):
    """Which of `size` indices from `start` on exist; None if all do."""
    return start + jnp.arange(size) < total if total % size else None


def _inside(axis, size, total):
    """Which of this program's `size` indices along a grid axis exist; None if all do."""
    return _within(pl.program_id(axis) * size, size, total)


def _tiles(ref, D, block, rows):
    """A function that loads block j of D columns, of these rows; 0 for elements outside."""

    def tile(j):
        columns = _within(j * block, block, D)
        return load_or_zero(ref.at[:, pl.ds(j * block, block)], block_mask(rows, columns))

    return tile


def _row_tiles(ref, D, block, outs):
    """As _tiles for a single row, repeated for each output, and laid out as the weights are."""
    out = jnp.zeros(outs, jnp.int32)[:, None]

    def tile(j):
        columns = (j * block + jnp.arange(block))[None, :]
        return load_or_zero(ref.at[out, columns], (columns < D) & (out == 0) if D % block else None)

    return tile


def _merged(ins, splits, H, K, out):
    """The weights (outs, H, K), and the result of attention in splits, (1, H, K).

    It is the mean of the splits, weighted by exp(lse).
    """
    split, head, column = (
        jnp.arange(size) < n for size, n in zip(ins['x'].shape, (splits, H, K), strict=True)
    )
    inside = block_mask(head, column)[None]
    w = load_or_zero(ins['w'], inside if out is None else inside & out[:, None, None])
    z_SHK = load_or_zero(ins['x'], inside & split[:, None, None]).astype(jnp.float32)
    lse_SH = plgpu.load(ins['lse'], mask=block_mask(split, head), other=-1e30)
    weight_SH = jnp.exp(lse_SH - lse_SH.max(0, keepdims=True))
    weight_SH = weight_SH / weight_SH.sum(0, keepdims=True)
    return w, (z_SHK * weight_SH[:, :, None]).sum(0)[None]


def _statistics(x, D, eps, keepdims):
    """mean(x) and 1 / std(x) of each row, from blocks of columns."""
    x = [part.astype(jnp.float32) for part in x]
    mean = sum(x).sum(-1, keepdims=keepdims) / D
    square = sum(map(jnp.square, x)).sum(-1, keepdims=keepdims) / D
    return mean, lax.rsqrt(jnp.maximum(square - mean * mean, 0) + eps)


def _store_in_cache(refs, pos, y, B, D):
    """Writes the keys and values among this program's outputs y, (outs,) or (rows, outs).

    Outputs are the queries, keys and values of all heads, (3, H, K); refs are k_BHSK and v_BHSK.
    """
    _, _, S, K = refs[0].shape
    out = pl.program_id(1) * y.shape[-1] + jnp.arange(y.shape[-1], dtype=jnp.int32)
    pos = jnp.minimum(pos, S - 1)  # a token past the context is never used
    row, inside = jnp.int32(0), None
    if y.ndim > 1:
        row = pl.program_id(0) * y.shape[0] + jnp.arange(y.shape[0], dtype=jnp.int32)[:, None]
        inside = row < B
    for i, ref in enumerate(refs):
        here = out - (i + 1) * D
        mine = (here >= 0) & (here < D)
        # The rest gets an index outside: the interpreter writes old values where the mask is False.
        here = jnp.where(mine, here, D)
        head, column = lax.div(here, jnp.int32(K)), lax.rem(here, jnp.int32(K))
        index = tuple(jnp.broadcast_arrays(row, head, pos, column))
        plgpu.store(
            ref.at[index], y.astype(ref.dtype), mask=mine if inside is None else inside & mine
        )


def _linear_kernel(ins, outputs, *, B, D, N, H, splits, inputs, eps, gelu, precision):
    """A single row comes without its axis: y (outs,), bias (outs,), .."""
    y_ref = outputs['y']
    one, outs = y_ref.ndim == 1, y_ref.shape[-1]
    row, out = None if one else _inside(0, y_ref.shape[0], B), _inside(1, outs, N)
    normed, dtype, blocks = ins['sum'] is not None, ins['w'].dtype, range(pl.cdiv(D, inputs))
    mine, vector = (out, out) if one else (block_mask(row, out), block_mask(None, out))
    pos = None if ins['pos'] is None else ins['pos'][...]
    w, x = [], []
    if ins['lse'] is not None:
        w, x = zip(_merged(ins, splits, H, D // H, out))
    elif one:
        w = list(map(_tiles(ins['w'], D, inputs, out), blocks))
        x = list(map(_row_tiles(ins['x'], D, inputs, outs), blocks))
    elif normed:
        x = list(map(_tiles(ins['x'], D, STATISTICS, row), range(pl.cdiv(D, STATISTICS))))
    total, bias, residual = (
        0 if ins[name] is None else load_or_zero(ins[name], mask).astype(jnp.float32)
        for name, mask in (('sum', vector), ('bias', vector), ('residual', mine))
    )
    if one:
        # These need x alone, so they are computed while the weights load.
        mean, scale = _statistics(x, D, eps, keepdims=False) if normed else (0, 1)
        y = sum(w.astype(jnp.float32) * x.astype(jnp.float32) for w, x in zip(w, x, strict=True))
        y = y.reshape(outs, -1).sum(-1)
    else:
        # Both stream through shared memory: the next blocks load while these are multiplied.
        tile_x, tile_w = _tiles(ins['x'], D, inputs, row), _tiles(ins['w'], D, inputs, out)

        def add_block(j, y):
            return y + plgpu.dot(tile_x(j).astype(dtype), tile_w(j).T, precision=precision)

        y = lax.fori_loop(0, len(blocks), add_block, jnp.zeros(y_ref.shape, jnp.float32))
        mean, scale = _statistics(x, D, eps, keepdims=True) if normed else (0, 1)
    if normed:
        y = (y - mean * total) * scale
    y += bias
    if gelu:
        y = nn.gelu(y, approximate=True)
    y += residual
    plgpu.store(y_ref, y.astype(y_ref.dtype), mask=mine)
    if pos is not None:
        _store_in_cache((outputs['k'], outputs['v']), pos, y, B, D)


@functools.partial(jax.jit, static_argnames=('cfg', 'gelu', 'dtype'))
def linear(
    cfg: GPT2Config,
    x,
    weights,
    residual_BN=None,
    lse_SH=None,
    cache=None,
    *,
    gelu=False,
    dtype=None,
):
    """residual + gelu(x W^T + b): (B, D) -> (B, N). All but the product are optional.

    `weights` is {'kernel': (N, D), 'bias': (N,), 'sum': (N,)}. The bias may be left out. With `sum`
    the input is LayerNorm(x): see `cast_params`. x is (B, D), or with `lse` a single row of
    `attend` in splits, (splits, H, K). `dtype` is the result's: by default that of the residual or,
    without one, of the weights.

    With `cache`, (k_BHSK, v_BHSK, at_2), the outputs are queries, keys and values. It returns them
    and the cache, in the same memory, with the keys and values at position at_2[1].
    """
    (N, D), H, K = weights['kernel'].shape, cfg.n_head, cfg.head_dim
    B = 1 if lse_SH is not None else x.shape[0]
    rows, outs, inputs, warps, stages = linear_sizes(B, D, N, cfg.n_embd, lse_SH is not None)
    # One stage computes, and the others each hold a block of x and of the weights.
    held = inputs * (rows * x.dtype.itemsize + outs * weights['kernel'].dtype.itemsize)
    stages = min(stages, 1 + shared_memory() // held)
    one = None if B == 1 else 1  # in a BlockSpec: no axis for a single row
    vector = pl.BlockSpec((one, outs), lambda i, j: (0, j))
    mine = pl.BlockSpec((one and rows, outs), lambda i, j: (i, j))
    width = max(block * pl.cdiv(D, block) for block in (inputs, STATISTICS))
    x_spec = pl.BlockSpec((rows, width), lambda i, j: (i, 0))
    w, w_spec = weights['kernel'], pl.BlockSpec((outs, width), lambda i, j: (j, 0))
    splits, lse_spec = 1, None
    if lse_SH is not None:
        splits, sizes = len(lse_SH), tuple(map(pl.next_power_of_2, x.shape))
        x_spec = pl.BlockSpec(sizes, lambda i, j: (0, 0, 0))
        w, w_spec = w.reshape(N, H, K), pl.BlockSpec((outs, *sizes[1:]), lambda i, j: (j, 0, 0))
        lse_spec = pl.BlockSpec(sizes[:2], lambda i, j: (0, 0))
    k_BHSK, v_BHSK, at_2 = cache or (None, None, None)
    ins = dict(x=x, w=w, residual=residual_BN, lse=lse_SH, pos=at_2, k=k_BHSK, v=v_BHSK) | {
        name: weights[name][None] if name in weights else None for name in ('bias', 'sum')
    }
    dtype = dtype or (weights['kernel'] if residual_BN is None else residual_BN).dtype
    outputs = {'y': jax.ShapeDtypeStruct((B, N), dtype)} | {
        name: jax.ShapeDtypeStruct(k_BHSK.shape, k_BHSK.dtype) if cache else None for name in 'kv'
    }
    whole = cache and pl.BlockSpec(k_BHSK.shape, lambda i, j: (0, 0, 0, 0))
    specs = dict(x=x_spec, w=w_spec, bias=vector, sum=vector, residual=mine, lse=lse_spec)
    specs |= dict(y=mine, pos=pl.BlockSpec((None,), lambda i, j: (1,)), k=whole, v=whole)
    options = dict(B=B, D=D, N=N, H=H, splits=splits, inputs=inputs, gelu=gelu)
    options |= dict(eps=cfg.layer_norm_epsilon, precision=cfg.precision)
    # Arrays are counted in the order of their names.
    order = sorted(name for name in ins if ins[name] is not None)
    outputs = call(
        functools.partial(_linear_kernel, **options),
        grid=(pl.cdiv(B, rows), pl.cdiv(N, outs)),
        warps=warps,
        stages=stages,
        input_output_aliases={order.index('k'): 0, order.index('v'): 1} if cache else {},
        in_specs=[only(ins, specs)],
        out_specs=only(outputs, specs),
        out_shape=outputs,
    )(ins)
    return (outputs['y'], outputs['k'], outputs['v']) if cache else outputs['y']


def _attend_kernel(pos_ref, q_ref, k_ref, v_ref, z_ref, lse_ref, *, S, K, block, splits):
    """Softmax names are FlashAttention's, m, l and alpha: see attention.py."""
    columns = jnp.arange(q_ref.shape[0]) < K
    end = jnp.minimum(pos_ref[...], S - 1) + 1
    # Split i takes the blocks i, i + splits, .. of positions.
    first, stride = pl.program_id(2) * block, splits * block

    def load(start):
        mask = block_mask(start + jnp.arange(block) < end, columns)
        return [load_or_zero(ref.at[pl.ds(start, block), :], mask) for ref in (k_ref, v_ref)]

    held = load(first)
    q = load_or_zero(q_ref, columns).astype(jnp.float32) / math.sqrt(K)

    def add_block(j, carry):
        """One running softmax a lane, merged afterwards: no reduction across lanes in the loop."""
        z, m, l, keys, values = carry
        start = first + j * stride
        held = load(start + stride)  # while this block is processed
        here = start + jnp.arange(block) < end
        scores = jnp.where(here, (keys.astype(jnp.float32) * q[None, :]).sum(-1), -1e30)
        m_new = jnp.maximum(m, scores)
        alpha, p = jnp.exp(m - m_new), jnp.where(here, jnp.exp(scores - m_new), 0)
        values = jnp.where(here[:, None], values.astype(jnp.float32), 0)
        return z * alpha[:, None] + p[:, None] * values, m_new, l * alpha + p, *held

    zero = jnp.zeros(block, jnp.float32)
    carry = jnp.zeros((block, q_ref.shape[0]), jnp.float32), zero - 1e30, zero, *held
    blocks = lax.div(end - first + stride - 1, jnp.int32(stride))
    z, m, l, *_ = lax.fori_loop(0, blocks, add_block, carry)
    m_all = m.max()
    alpha = jnp.exp(m - m_all)
    l = (l * alpha).sum()
    l = jnp.where(l == 0, 1, l)  # 0 in a split without positions
    z = (z * alpha[:, None]).sum(0) / l
    plgpu.store(z_ref, z.astype(z_ref.dtype), mask=columns)
    if lse_ref is not None:
        lse_ref[...] = m_all + jnp.log(l)


@jax.jit
def attend(qkv_B3HK, k_BHSK, v_BHSK, at_2):
    """Attention of one token at position at_2[1] to the cache up to there.

    Returns z_BD and None. Whatever the cache holds after this position is ignored. A single row
    may be split: several programs share the positions of a head. Then it returns the result of
    each split, z_SHK, and the logarithm of the sum of its weights, lse_SH; `linear` merges them.
    """
    B, H, S, K = k_BHSK.shape
    width, (block, warps, splits) = pl.next_power_of_2(K), attend_sizes(B, H * K)
    positions = block * pl.cdiv(S, block)
    cache = pl.BlockSpec((None, None, positions, width), lambda b, h, s: (b, h, 0, 0))
    z = jax.ShapeDtypeStruct((B, H, K), qkv_B3HK.dtype)
    z_spec, lse, lse_spec = pl.BlockSpec((None, None, width), lambda b, h, s: (b, h, 0)), None, None
    if splits > 1:
        z = jax.ShapeDtypeStruct((splits, H, K), qkv_B3HK.dtype)
        z_spec = pl.BlockSpec((None, None, width), lambda b, h, s: (s, h, 0))
        lse = jax.ShapeDtypeStruct((splits, H), jnp.float32)
        lse_spec = pl.BlockSpec((None, None), lambda b, h, s: (s, h))
    z, lse_SH = call(
        functools.partial(_attend_kernel, S=S, K=K, block=block, splits=splits),
        grid=(B, H, splits),
        warps=warps,
        in_specs=[
            pl.BlockSpec((None,), lambda b, h, s: (1,)),
            pl.BlockSpec((None, None, None, width), lambda b, h, s: (b, 0, h, 0)),
            cache,
            cache,
        ],
        out_specs=[z_spec, lse_spec],
        out_shape=[z, lse],
    )(at_2, qkv_B3HK, k_BHSK, v_BHSK)
    return z.reshape(B, -1) if lse is None else z, lse_SH


def cast_params(cfg: GPT2Config, params):
    """The parameters as decoding reads them.

    Matrices are (N, D) in the compute dtype, everything else stays in fp32. A LayerNorm is part of
    the matrix after it, so that no product waits for the statistics of its input:

        LayerNorm(x) W + b = (x (scale W) - mean(x) sum(scale W)) / std(x) + (shift W + b)

    with the sum over inputs.
    """

    def matrix(layer, outputs, norm=None):
        w_DN = layer['kernel'].astype(jnp.float32).reshape(-1, outputs)
        flat, bias_N = {}, layer.get('bias')
        if bias_N is not None:
            flat['bias'] = bias_N.astype(jnp.float32).reshape(-1)
        if norm is None:
            return flat | {'kernel': w_DN.astype(cfg.compute_dtype).T}
        if 'bias' in norm:
            shift_N = jnp.matmul(norm['bias'], w_DN, precision='highest')
            flat['bias'] = flat.get('bias', 0) + shift_N
        w_DN = (w_DN * norm['scale'][:, None]).astype(cfg.compute_dtype)
        # Without the barrier XLA would write the product in fp32 too, and read it again.
        w_ND = lax.optimization_barrier(w_DN.T)
        return flat | {'kernel': w_ND, 'sum': w_ND.astype(jnp.float32).sum(1)}

    D, wte_VD = cfg.n_embd, params['wte']['embedding']
    layers = [
        {
            'c_attn': matrix(h['attn']['c_attn'], 3 * D, h['ln_1']),
            'attn_proj': matrix(h['attn']['c_proj'], D),
            'c_fc': matrix(h['mlp']['c_fc'], cfg.d_ff, h['ln_2']),
            'mlp_proj': matrix(h['mlp']['c_proj'], D),
        }
        for h in (params[f'h_{i}'] for i in range(cfg.n_layer))
    ]
    return {
        'wte': wte_VD,
        'wpe': params['wpe']['embedding'],
        'h': layers,
        'head': matrix({'kernel': wte_VD.T}, cfg.vocab_size, params['ln_f']),
    }


def next_logits(cfg: GPT2Config, weights, token_B, cache: Cache, at_2):
    """The logits after a token at position at_2[1], and the cache with it.

    As GPT2.features and GPT2.head. `weights` are from `cast_params`.
    """
    B, layers = token_B.shape[0], []
    embed_B1D, pos_embed_1D = embed(weights['wte'], weights['wpe'], token_B[:, None], at_2[1])
    x_BD = (embed_B1D + pos_embed_1D).astype(cfg.stream_dtype)[:, 0]
    in_kernel = cfg.activation_function == 'gelu_new'  # Pallas' Triton has no erf for 'gelu'
    for h, layer_cache in zip(weights['h'], cache, strict=True):
        qkv_BN, *layer_cache = linear(cfg, x_BD, h['c_attn'], cache=(*layer_cache, at_2))
        qkv_B3HK = qkv_BN.reshape(B, 3, cfg.n_head, cfg.head_dim)
        z, lse_SH = attend(qkv_B3HK, *layer_cache, at_2)
        x_BD = linear(cfg, z, h['attn_proj'], x_BD, lse_SH)
        h_BF = linear(cfg, x_BD, h['c_fc'], gelu=in_kernel)
        h_BF = h_BF if in_kernel else activate(cfg.activation_function, h_BF)
        x_BD = linear(cfg, h_BF, h['mlp_proj'], x_BD)
        layers.append(tuple(layer_cache))
    return linear(cfg, x_BD, weights['head'], dtype=jnp.float32), tuple(layers)
