"""Decoding one token by fused kernels: five for each layer, instead of XLA's eighteen.

The arithmetic of one token takes almost no time. Reading every weight once does, and so does
starting kernels. So there are few kernels, each starts enough programs for the whole GPU to read
weights, and each program starts all of its loads before it uses the first:

    linear     x W + b or LayerNorm(x) W + b, through GELU, or added to the residual stream
    attend     writes the token's keys and values into the cache, and reads only what is there

They compute what model/gpt2.py spells out, rounding fewer intermediate results. Names carry shapes
as there; N is the number of outputs of a matrix, which is kept as (N, D), so that the share of a
program lies in one piece. On a CPU they run in Pallas' interpreter, for tests.
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

# Sizes of blocks are the best of those tried on an H100 with GPT-2 124M; docs/speed.md has times.
STATISTICS = 64  # columns of several rows that are read at a time for the statistics of LayerNorm
HEAD_OUTS = 8192  # a matrix with more outputs is the head: it keeps the memory busy by itself
# Up to this width, many small programs process one row. A wider row would leave each of them less
# on its way: gpt2-xl decoded 431 tokens/s with them, and 485 in an earlier version with larger ones
# (H100).
MAX_NARROW = 1024
WIDE_PROGRAMS = 528  # that share a matrix if one row is wider: four a multiprocessor of an H100
MAX_SPLITS = 16  # because a program of `linear` holds all splits of all heads in registers


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
    reads 256 columns at a time, so that it sums up its outputs without another warp. A long share
    of few outputs is worth several warps for one output, and so is merging attention's splits.

    More rows go to tensor cores, which take 16 and more. A matrix of few outputs has few programs,
    so each has more on its way.
    """
    if B == 1 and width > MAX_NARROW:
        outs = max(1, N // WIDE_PROGRAMS)
        return LinearSizes(1, min(8, 2 ** (outs.bit_length() - 1)), 1024, 4, 1)
    if B == 1:
        if merges:
            return LinearSizes(1, 8, 256, 8, 1)
        if D > MAX_NARROW:
            return LinearSizes(1, 1, 1024, 8, 1)
        if N > HEAD_OUTS:
            return LinearSizes(1, 4, 256, 1, 1)
        return LinearSizes(1, 4, 256, 4, 1) if N > 3 * D else LinearSizes(1, 2, 256, 1, 1)
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


def attend_sizes(B, S, width):
    """The sizes for B rows and a cache of S positions, in a model of this width.

    One row has few heads, too few programs for the GPU, so up to MAX_SPLITS programs share one.
    With many rows, fewer registers a program are faster.
    """
    if B == 1 and width <= MAX_NARROW and pl.cdiv(S, 64) <= MAX_SPLITS:
        return AttendSizes(64, 4, pl.cdiv(S, 64))
    return AttendSizes(128, 8, 1) if B <= 16 else AttendSizes(64, 4, 1)


def _inside(axis, size, total):
    """Which of this program's `size` indices along a grid axis exist; None if all do."""
    return None if total % size == 0 else pl.program_id(axis) * size + jnp.arange(size) < total


def _tiles(ref, D, block, rows):
    """A function that loads block j of D columns, of these rows; 0 for elements outside."""

    def tile(j):
        columns = j * block + jnp.arange(block) < D if D % block else None
        return load_or_zero(ref.at[:, pl.ds(j * block, block)], block_mask(rows, columns))

    return tile


def _row_tiles(ref, D, block, outs):
    """As _tiles of a single row, which is repeated for each output: it lies as the weights do."""
    out = jnp.zeros(outs, jnp.int32)[:, None]

    def tile(j):
        columns = (j * block + jnp.arange(block))[None, :]
        return load_or_zero(ref.at[out, columns], (columns < D) & (out == 0) if D % block else None)

    return tile


def _split_tiles(ins, splits, H, K, out):
    """The weights (outs, H, K), and the result of attention in splits, (1, H, K).

    It is the mean of the splits, weighted by exp(lse).
    """
    split, head, column = (
        jnp.arange(size) < n for size, n in zip(ins['x'].shape, (splits, H, K), strict=True)
    )
    inside = block_mask(head, column)[None]
    w = load_or_zero(ins['w'], inside if out is None else inside & out[:, None, None])
    z = load_or_zero(ins['x'], inside & split[:, None, None])
    lse = plgpu.load(ins['lse'], mask=block_mask(split, head), other=-1e30)
    weight = jnp.exp(lse - lse.max(0, keepdims=True))
    weight = weight / weight.sum(0, keepdims=True)
    return w, (z * weight[:, :, None]).sum(0)[None]


def _linear_kernel(ins, y_ref, *, B, D, N, H, splits, inputs, eps, gelu, precision):
    """A single row comes without its axis: y (outs,), bias (outs,), .."""
    one, outs = y_ref.ndim == 1, y_ref.shape[-1]
    row, out = None if one else _inside(0, y_ref.shape[0], B), _inside(1, outs, N)
    normed, dtype, blocks = ins['sum'] is not None, ins['w'].dtype, range(pl.cdiv(D, inputs))
    mine, vector = (out, out) if one else (block_mask(row, out), block_mask(None, out))
    w, x = [], []
    if ins['lse'] is not None:
        w, x = zip(_split_tiles(ins, splits, H, D // H, out))
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
        x = [part.astype(jnp.float32) for part in x]
        y = sum(w.astype(jnp.float32) * x for w, x in zip(w, x, strict=True))
        y = y.reshape(outs, -1).sum(-1)
    else:
        # Both stream through shared memory: the next blocks load while these are multiplied.
        tile_x, tile_w = _tiles(ins['x'], D, inputs, row), _tiles(ins['w'], D, inputs, out)

        def add_block(j, y):
            return y + plgpu.dot(tile_x(j).astype(dtype), tile_w(j).T, precision=precision)

        y = lax.fori_loop(0, len(blocks), add_block, jnp.zeros(y_ref.shape, jnp.float32))
    if normed:
        x = [part.astype(jnp.float32) for part in x]
        mean = sum(x).sum(-1, keepdims=not one) / D
        square = sum(map(jnp.square, x)).sum(-1, keepdims=not one) / D
        y = (y - mean * total) * lax.rsqrt(jnp.maximum(square - mean * mean, 0) + eps)
    y += bias
    if gelu:
        y = nn.gelu(y, approximate=True)
    plgpu.store(y_ref, (y + residual).astype(y_ref.dtype), mask=mine)


@functools.partial(jax.jit, static_argnames=('cfg', 'gelu', 'dtype'))
def linear(cfg: GPT2Config, x, weights, residual_BN=None, lse_SH=None, *, gelu=False, dtype=None):
    """residual + gelu(x W^T + b): (B, D) -> (B, N). All but the product are optional.

    `weights` is {'kernel': (N, D), 'bias': (N,), 'sum': (N,)}. The bias may be left out. With `sum`
    the input is LayerNorm(x): see `cast_params`. x is (B, D), or with `lse` a single row of
    `attend` in splits, (splits, H, K). `dtype` is the result's: by default that of the residual or,
    without one, of the weights.
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
    specs = dict(x=x_spec, w=w_spec, bias=vector, sum=vector, residual=mine, lse=lse_spec)
    ins = dict(x=x, w=w, residual=residual_BN, lse=lse_SH) | {
        name: weights[name][None] if name in weights else None for name in ('bias', 'sum')
    }
    options = dict(B=B, D=D, N=N, H=H, splits=splits, inputs=inputs, gelu=gelu)
    options |= dict(eps=cfg.layer_norm_epsilon, precision=cfg.precision)
    return call(
        functools.partial(_linear_kernel, **options),
        grid=(pl.cdiv(B, rows), pl.cdiv(N, outs)),
        warps=warps,
        stages=stages,
        in_specs=[only(ins, specs)],
        out_specs=mine,
        out_shape=jax.ShapeDtypeStruct(
            (B, N), dtype or (weights['kernel'] if residual_BN is None else residual_BN).dtype
        ),
    )(ins)


def _attend_kernel(pos_ref, q_ref, new_k_ref, new_v_ref, k_ref, v_ref, *outputs, S, K, block):
    """Softmax names are FlashAttention's, m, l and alpha: see attention.py."""
    z_ref, k_out_ref, v_out_ref, lse_ref = outputs
    width = k_ref.shape[1]
    split = 0 if lse_ref is None else pl.program_id(2)
    columns = jnp.arange(width) < K

    def load(j, end):
        """The keys and values of block j up to the position `end`."""
        mask = block_mask(j * block + jnp.arange(block) < end, columns)
        return [load_or_zero(ref.at[pl.ds(j * block, block), :], mask) for ref in (k_ref, v_ref)]

    # The first block of several is read before the position is known.
    held = load(0, S) if lse_ref is None else None
    # A token past the context is never used, but writing it must not leave the cache.
    pos = jnp.minimum(pos_ref[0], S - 1)
    held = held or load(split, pos)
    q, k, v = (load_or_zero(ref, columns) for ref in (q_ref, new_k_ref, new_v_ref))
    first = columns & (split == 0)  # the split that processes the token itself
    plgpu.store(k_out_ref.at[pos, :], k, mask=first)
    plgpu.store(v_out_ref.at[pos, :], v, mask=first)
    q, k, v = q.astype(jnp.float32) / math.sqrt(K), k.astype(jnp.float32), v.astype(jnp.float32)

    def add_block(j, carry):
        """One running softmax a lane, merged afterwards: no reduction across lanes in the loop."""
        z, m, l, keys, values = carry
        held = load(j + 1, pos)  # while this block is processed
        here = j * block + jnp.arange(block) < pos
        scores = jnp.where(here, (keys.astype(jnp.float32) * q[None, :]).sum(-1), -1e30)
        m_new = jnp.maximum(m, scores)
        alpha, p = jnp.exp(m - m_new), jnp.where(here, jnp.exp(scores - m_new), 0)
        values = jnp.where(here[:, None], values.astype(jnp.float32), 0)
        return z * alpha[:, None] + p[:, None] * values, m_new, l * alpha + p, *held

    zero = jnp.zeros(block, jnp.float32)
    carry = jnp.zeros((block, width), jnp.float32), zero - 1e30, zero, *held
    if lse_ref is None:
        z, m, l, *_ = lax.fori_loop(0, pl.cdiv(pos, block), add_block, carry)
    else:
        z, m, l, *_ = add_block(split, carry)
    own_score = jnp.where(split == 0, (q * k).sum(), -1e30)
    m_all = jnp.maximum(m.max(), own_score)
    alpha, own = jnp.exp(m - m_all), jnp.where(split == 0, jnp.exp(own_score - m_all), 0)
    l = (l * alpha).sum() + own
    l = jnp.where(l == 0, 1, l)  # 0 in a split that begins behind the position
    z = ((z * alpha[:, None]).sum(0) + own * v) / l
    plgpu.store(z_ref, z.astype(z_ref.dtype), mask=columns)
    if lse_ref is not None:
        lse_ref[...] = m_all + jnp.log(l)


@jax.jit
def attend(qkv_B3HK, k_BHSK, v_BHSK, pos_1):
    """Attention of one token at position `pos` to itself and to the cache before it.

    Returns z_BD, the cache with the token's keys and values, in the same memory, and None.
    Whatever the cache holds from `pos` on is ignored. A single row may be split: several programs
    share the positions of a head. Then it returns the result of each split, z_SHK, and instead of
    None the logarithm of the sum of its weights, lse_SH; `linear` merges them.
    """
    B, H, S, K = k_BHSK.shape
    width, (block, warps, splits) = pl.next_power_of_2(K), attend_sizes(B, S, H * K)
    whole = block * pl.cdiv(S, block)  # positions in whole blocks
    cache = pl.BlockSpec((None, None, whole, width), lambda b, h, s: (b, h, 0, 0))

    def part(index):
        return pl.BlockSpec((None, None, None, width), lambda b, h, s: (b, index, h, 0))

    z = jax.ShapeDtypeStruct((B, H, K), qkv_B3HK.dtype)
    z_spec, lse, lse_spec = pl.BlockSpec((None, None, width), lambda b, h, s: (b, h, 0)), None, None
    if splits > 1:
        z = jax.ShapeDtypeStruct((splits, H, K), jnp.float32)
        z_spec = pl.BlockSpec((None, None, width), lambda b, h, s: (s, h, 0))
        lse = jax.ShapeDtypeStruct((splits, H), jnp.float32)
        lse_spec = pl.BlockSpec((None, None), lambda b, h, s: (s, h))
    z, *layer_cache, lse_SH = call(
        functools.partial(_attend_kernel, S=S, K=K, block=block),
        grid=(B, H, splits),
        warps=warps,
        input_output_aliases={4: 1, 5: 2},
        in_specs=[pl.BlockSpec((1,), lambda b, h, s: (0,)), *map(part, range(3)), cache, cache],
        out_specs=[z_spec, cache, cache, lse_spec],
        out_shape=[
            z,
            *(jax.ShapeDtypeStruct(old.shape, old.dtype) for old in (k_BHSK, v_BHSK)),
            lse,
        ],
    )(pos_1, qkv_B3HK, qkv_B3HK, qkv_B3HK, k_BHSK, v_BHSK)
    return z.reshape(B, -1) if lse is None else z, tuple(layer_cache), lse_SH


def cast_params(cfg: GPT2Config, params):
    """The parameters as decoding reads them.

    Matrices are (N, D) in the compute dtype, everything else stays in fp32. A LayerNorm is part of
    the matrix behind it, so that no product waits for the statistics of its input:

        LayerNorm(x) W + b = (x (scale W) - mean(x) sum(scale W)) / std(x) + (shift W + b)

    with the sum over inputs.
    """

    def matrix(layer, outputs, norm=None):
        w_ND = layer['kernel'].astype(jnp.float32).reshape(-1, outputs).T
        flat, bias_N = {}, layer.get('bias')
        if bias_N is not None:
            flat['bias'] = bias_N.astype(jnp.float32).reshape(-1)
        if norm is None:
            return flat | {'kernel': w_ND.astype(cfg.compute_dtype)}
        if 'bias' in norm:
            shift_N = jnp.matmul(w_ND, norm['bias'], precision='highest')
            flat['bias'] = flat.get('bias', 0) + shift_N
        w_ND = (w_ND * norm['scale']).astype(cfg.compute_dtype)
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


def next_logits(cfg: GPT2Config, weights, token_B, cache: Cache, pos):
    """The logits after a token at position `pos`, and the cache with it: GPT2.features and .head.

    `weights` are from `cast_params`.
    """
    B, pos_1, layers = token_B.shape[0], jnp.reshape(pos, 1), []
    embed_B1D, pos_embed_1D = embed(weights['wte'], weights['wpe'], token_B[:, None], pos)
    x_BD = (embed_B1D + pos_embed_1D).astype(cfg.stream_dtype)[:, 0]
    in_kernel = cfg.activation_function == 'gelu_new'  # Pallas' Triton has no erf for 'gelu'
    for h, (k_BHSK, v_BHSK) in zip(weights['h'], cache, strict=True):
        qkv_B3HK = linear(cfg, x_BD, h['c_attn']).reshape(B, 3, cfg.n_head, cfg.head_dim)
        z, layer_cache, lse_SH = attend(qkv_B3HK, k_BHSK, v_BHSK, pos_1)
        x_BD = linear(cfg, z, h['attn_proj'], x_BD, lse_SH)
        h_BF = linear(cfg, x_BD, h['c_fc'], gelu=in_kernel)
        h_BF = h_BF if in_kernel else activate(cfg.activation_function, h_BF)
        x_BD = linear(cfg, h_BF, h['mlp_proj'], x_BD)
        layers.append(layer_cache)
    return linear(cfg, x_BD, weights['head'], dtype=jnp.float32), tuple(layers)
