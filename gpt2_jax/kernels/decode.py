"""Decoding one token by fused kernels: five for each layer, instead of XLA's eighteen.

The arithmetic of one token takes almost no time. Reading every weight once does, and so does
starting kernels. So there are few kernels, and each starts enough programs for the whole GPU to
read weights:

    linear     LayerNorm(x) W + b, through GELU, or added to the residual stream attend     writes
    the token's keys and values into the cache, and reads only what is written there

They compute what model/gpt2.py spells out, rounding fewer intermediate results. Names carry shapes
as there; N is the number of outputs of a matrix, which is kept as (N, D), so that the share of a
program lies in one piece. On a CPU they run in Pallas' interpreter, for tests.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.kernels.launch import call, column_blocks, only
from gpt2_jax.model.gpt2 import Cache, embed
from gpt2_jax.model.ops import activate

# Sizes of blocks, warps and stages: the best of those tried on an H100 with GPT-2 124M. A matrix is
# shared by at least PROGRAMS programs, each with OUTS (min, max) outputs, and read in blocks of
# INPUTS columns. A single row is multiplied and summed, with a program's whole share loading at
# once. More rows go to tensor cores, which take 16 and more; a program processes up to MAX_ROWS of
# them.
ONE_PROGRAMS, ONE_OUTS, ONE_INPUTS, ONE_WARPS = 528, (1, 8), 1024, 4
ROWS_PROGRAMS, ROWS_OUTS, ROWS_INPUTS, ROWS_WARPS = 132, (16, 64), 128, 4
ROWS_STAGES, MAX_ROWS = 4, 32
# (positions of the cache that are read at a time, warps). One text has few programs, its heads, so
# each reads many positions. With several texts, fewer registers a program are faster (24 -> 17 us
# at 32 texts).
ONE_ATTEND, ROWS_ATTEND = (256, 8), (128, 4)


def _inside(axis, size, total):
    """Which of this program's `size` indices along a grid axis exist; None if all do."""
    return None if total % size == 0 else pl.program_id(axis) * size + jnp.arange(size) < total


def _load(ref, mask):
    """The elements under the mask, which may be None, and 0 elsewhere."""
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _tile(ref, D, j, block, inside=None):
    """Block j of D columns, of the rows `inside`; 0 for elements that do not exist."""
    mask = None if inside is None else inside[:, None]
    if D % block:
        columns = (j * block + jnp.arange(block) < D)[None, :]
        mask = columns if mask is None else mask & columns
    return _load(ref.at[:, pl.ds(j * block, block)], mask)


def _statistics(x, D, eps):
    """Mean and 1 / std of rows that are cut into blocks, in fp32."""
    x, block = [part.astype(jnp.float32) for part in x], x[0].shape[-1]
    mean = sum(x).sum(-1, keepdims=True) / D
    centred = [
        jnp.where((j * block + jnp.arange(block) < D)[None, :], part - mean, 0)
        for j, part in enumerate(x)
    ]
    return mean, lax.rsqrt(sum(map(jnp.square, centred)).sum(-1, keepdims=True) / D + eps)


def _linear_kernel(ins, y_ref, *, B, D, N, eps, gelu, precision):
    rows, outs = y_ref.shape
    block, blocks = column_blocks(D, ROWS_INPUTS if rows > 1 else ONE_INPUTS)
    row, out = _inside(0, rows, B), _inside(1, outs, N)

    def weights(j):
        return _tile(ins['w'], D, j, block, out)

    def inputs(j):
        return _tile(ins['x'], D, j, block, row)

    def normalised(j, x):
        if ins['scale'] is None:
            return x
        y = (x.astype(jnp.float32) - mean) * rstd * _tile(ins['scale'], D, j, block)
        y = y if ins['shift'] is None else y + _tile(ins['shift'], D, j, block)
        return y.astype(ins['w'].dtype)

    # A single row's weights are loaded first of all, so that they arrive during the LayerNorm.
    w = [weights(j) for j in range(blocks)] if rows == 1 else None
    x = [inputs(j) for j in range(blocks)] if rows == 1 or ins['scale'] is not None else None
    if ins['scale'] is not None:
        mean, rstd = _statistics(x, D, eps)
    if rows == 1:
        x = [normalised(j, part).astype(jnp.float32) for j, part in enumerate(x)]
        y = sum(w[j].astype(jnp.float32) * x[j] for j in range(blocks)).sum(-1)[None, :]
    else:
        # Both stream through shared memory: the next blocks load while these are multiplied.
        def add_block(j, y):
            x = normalised(j, inputs(j))
            return y + plgpu.dot(x, weights(j).T, precision=precision)

        y = lax.fori_loop(0, blocks, add_block, jnp.zeros((rows, outs), jnp.float32))
    row, out = None if row is None else row[:, None], None if out is None else out[None, :]
    mine = row if out is None else out if row is None else row & out
    if ins['bias'] is not None:
        y += _load(ins['bias'], out).astype(jnp.float32)
    if gelu:
        y = nn.gelu(y, approximate=True)
    if ins['residual'] is not None:
        y += _load(ins['residual'], mine).astype(jnp.float32)
    plgpu.store(y_ref, y.astype(y_ref.dtype), mask=mine)


@functools.partial(jax.jit, static_argnames=('cfg', 'gelu', 'dtype'))
def linear(cfg: GPT2Config, x_BD, weights, norm=None, residual_BN=None, *, gelu=False, dtype=None):
    """residual + gelu(LayerNorm(x) W^T + b): (B, D) -> (B, N). All but the product are optional.

    `weights` is {'kernel': (N, D), 'bias': (N,)}, and `norm` is {'scale': (D,), 'bias': (D,)}; the
    biases may be left out. `dtype` is the result's: by default that of the residual or, without
    one, of the weights.
    """
    (B, D), N = x_BD.shape, weights['kernel'].shape[0]
    rows = 1 if B == 1 else max(16, min(MAX_ROWS, pl.next_power_of_2(B)))
    programs, (min_outs, max_outs) = (
        (ONE_PROGRAMS, ONE_OUTS) if B == 1 else (ROWS_PROGRAMS, ROWS_OUTS)
    )
    outs = max(min_outs, min(max_outs, 2 ** (max(N // programs, 1).bit_length() - 1)))
    norm, like = norm or {}, weights['kernel'] if residual_BN is None else residual_BN
    dtype = dtype or like.dtype
    ins = {
        'x': x_BD,
        'w': weights['kernel'],
        'bias': weights.get('bias'),
        'scale': norm.get('scale'),
        'shift': norm.get('bias'),
        'residual': residual_BN,
    }
    ins = {
        name: value[None] if value is not None and value.ndim == 1 else value
        for name, value in ins.items()
    }
    width = math.prod(column_blocks(D, ONE_INPUTS if B == 1 else ROWS_INPUTS))
    vector = pl.BlockSpec((1, width), lambda i, j: (0, 0))
    specs = {
        'x': pl.BlockSpec((rows, width), lambda i, j: (i, 0)),
        'w': pl.BlockSpec((outs, width), lambda i, j: (j, 0)),
        'bias': pl.BlockSpec((1, outs), lambda i, j: (0, j)),
        'scale': vector,
        'shift': vector,
        'residual': pl.BlockSpec((rows, outs), lambda i, j: (i, j)),
    }
    eps, precision = cfg.layer_norm_epsilon, cfg.precision
    options = dict(B=B, D=D, N=N, eps=eps, gelu=gelu, precision=precision)
    return call(
        functools.partial(_linear_kernel, **options),
        grid=(pl.cdiv(B, rows), pl.cdiv(N, outs)),
        warps=ONE_WARPS if B == 1 else ROWS_WARPS,
        stages=ROWS_STAGES,
        in_specs=[only(ins, specs)],
        out_specs=specs['residual'],
        out_shape=jax.ShapeDtypeStruct((B, N), dtype),
    )(ins)


def _attend_kernel(
    pos_ref, q_ref, new_k_ref, new_v_ref, k_ref, v_ref, z_ref, k_out_ref, v_out_ref, *, K, block
):
    """Softmax names are FlashAttention's, m, l and alpha: see attention.py."""
    S, width = k_ref.shape
    # A token past the context is never used, but writing it must not leave the cache.
    pos = jnp.minimum(pos_ref[0], S - 1)
    columns = jnp.arange(width) < K
    q, k, v = (_load(ref, columns) for ref in (q_ref, new_k_ref, new_v_ref))
    plgpu.store(k_out_ref.at[pos, :], k, mask=columns)
    plgpu.store(v_out_ref.at[pos, :], v, mask=columns)
    q, k, v = q.astype(jnp.float32) / math.sqrt(K), k.astype(jnp.float32), v.astype(jnp.float32)

    def body(j, carry):
        """One running softmax a lane, merged afterwards: no reduction across lanes in the loop."""
        z, m, l = carry
        here = j * block + jnp.arange(block) < pos
        at, mask = (pl.ds(j * block, block), slice(None)), here[:, None] & columns[None, :]
        keys, values = (_load(ref.at[at], mask).astype(jnp.float32) for ref in (k_ref, v_ref))
        scores = jnp.where(here, (keys * q[None, :]).sum(-1), -1e30)
        m_new = jnp.maximum(m, scores)
        alpha, p = jnp.exp(m - m_new), jnp.where(here, jnp.exp(scores - m_new), 0)
        return z * alpha[:, None] + p[:, None] * values, m_new, l * alpha + p

    zero = jnp.zeros(block, jnp.float32)
    carry = jnp.zeros((block, width), jnp.float32), zero - 1e30, zero
    z, m, l = lax.fori_loop(0, pl.cdiv(pos, block), body, carry)
    own_score = (q * k).sum()
    m_all = jnp.maximum(m.max(), own_score)
    alpha, own = jnp.exp(m - m_all), jnp.exp(own_score - m_all)
    z = ((z * alpha[:, None]).sum(0) + own * v) / ((l * alpha).sum() + own)
    plgpu.store(z_ref, z.astype(z_ref.dtype), mask=columns)


@jax.jit
def attend(qkv_B3HK, k_BHSK, v_BHSK, pos_1):
    """Attention of one token at position `pos` to itself and to the cache before it.

    Returns z_BHK, and the cache with the token's keys and values, in the same memory. Whatever the
    cache holds from `pos` on is ignored.
    """
    B, H, S, K = k_BHSK.shape
    width, (block, warps) = pl.next_power_of_2(K), ONE_ATTEND if B == 1 else ROWS_ATTEND
    cache = pl.BlockSpec((None, None, S, width), lambda b, h: (b, h, 0, 0))

    def part(index):
        return pl.BlockSpec((None, None, None, width), lambda b, h: (b, index, h, 0))

    return call(
        functools.partial(_attend_kernel, K=K, block=block),
        grid=(B, H),
        warps=warps,
        input_output_aliases={4: 1, 5: 2},
        in_specs=[pl.BlockSpec((1,), lambda b, h: (0,)), *map(part, range(3)), cache, cache],
        out_specs=[pl.BlockSpec((None, None, width), lambda b, h: (b, h, 0)), cache, cache],
        out_shape=[
            jax.ShapeDtypeStruct((B, H, K), qkv_B3HK.dtype),
            *(jax.ShapeDtypeStruct(old.shape, old.dtype) for old in (k_BHSK, v_BHSK)),
        ],
    )(pos_1, qkv_B3HK, qkv_B3HK, qkv_B3HK, k_BHSK, v_BHSK)


def cast_params(cfg: GPT2Config, params):
    """The parameters as decoding reads them.

    Matrices are (N, D) in the compute dtype; embeddings and norms stay in fp32.
    """
    dtype = cfg.compute_dtype

    def matrix(layer, outputs):
        flat = {'kernel': layer['kernel'].astype(dtype).reshape(-1, outputs).T}
        return flat | ({'bias': layer['bias'].astype(dtype).reshape(-1)} if cfg.bias else {})

    D, F = cfg.n_embd, cfg.d_ff
    layers = [
        {
            'ln_1': h['ln_1'],
            'ln_2': h['ln_2'],
            'c_attn': matrix(h['attn']['c_attn'], 3 * D),
            'attn_proj': matrix(h['attn']['c_proj'], D),
            'c_fc': matrix(h['mlp']['c_fc'], F),
            'mlp_proj': matrix(h['mlp']['c_proj'], D),
        }
        for h in (params[f'h_{i}'] for i in range(cfg.n_layer))
    ]
    wte_VD = params['wte']['embedding']
    return {
        'wte': wte_VD,
        'wpe': params['wpe']['embedding'],
        'h': layers,
        'ln_f': params['ln_f'],
        'head': {'kernel': wte_VD.astype(dtype)},
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
        qkv_B3HK = linear(cfg, x_BD, h['c_attn'], h['ln_1']).reshape(B, 3, cfg.n_head, cfg.head_dim)
        z_BHK, *layer_cache = attend(qkv_B3HK, k_BHSK, v_BHSK, pos_1)
        x_BD = linear(cfg, z_BHK.reshape(B, -1), h['attn_proj'], None, x_BD)
        h_BF = linear(cfg, x_BD, h['c_fc'], h['ln_2'], gelu=in_kernel)
        h_BF = h_BF if in_kernel else activate(cfg.activation_function, h_BF)
        x_BD = linear(cfg, h_BF, h['mlp_proj'], None, x_BD)
        layers.append(tuple(layer_cache))
    return linear(cfg, x_BD, weights['head'], weights['ln_f'], dtype=jnp.float32), tuple(layers)
