"""Decoding by fused GPU kernels, written in Pallas (Triton): five a layer for each token, instead of eighteen.

A token's arithmetic is nothing; what takes time is reading every weight once, and starting kernels. So these are few,
and each starts so many programs that all of the GPU reads weights:

    affine     LayerNorm(x) W + b, through GELU, or added to the residual stream
    attend     writes one token's keys and values into the cache, and reads no more of it than is written
    choose     temperature, top_k and the draw, without a sort

They compute what model.py and generate.py spell out, with the roundings of fewer stored results. On a CPU they run in
Pallas' interpreter: slow, and only there to be tested against the open formulas.

Shapes as in model.py; N stands for the outputs of a matrix, which is kept as (N, D): a program's share is in one piece.
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
from gpt2_jax.kernels.launch import call, column_blocks
from gpt2_jax.model.gpt2 import Cache, activate, embed

# Sizes of blocks and warps: the best of those tried on an H100 with GPT-2 124M.
# A matrix is shared among so many programs, at least, with outputs from least to most for each, and read by blocks of
# inputs. One row is multiplied and summed, all of a program's share on its way at once; more rows are for the tensor
# cores, which take 16 and more.
ONE_PROGRAMS, ONE_OUTS, ONE_INPUTS, ONE_WARPS = 528, (1, 8), 1024, 4
ROWS_PROGRAMS, ROWS_OUTS, ROWS_INPUTS, ROWS_WARPS, ROWS_STAGES, MAX_ROWS = (
    132,
    (16, 64),
    128,
    4,
    4,
    32,
)
# Positions of the cache that are read at a time, and warps: many for one text, whose heads are few programs; with more
# texts, fewer registers for each (17 instead of 24 us at 32 texts).
ONE_ATTEND, ROWS_ATTEND = (256, 8), (128, 4)


def _inside(axis, size, total):
    """Which of this program's `size` places along a grid axis exist; None: all."""
    return None if total % size == 0 else pl.program_id(axis) * size + jnp.arange(size) < total


def _tile(ref, D, j, block, inside=None):
    """Columns j * block and on, of D, of the rows `inside`, and zeros for what does not exist."""
    mask = None if inside is None else inside[:, None]
    if D % block:
        columns = (j * block + jnp.arange(block) < D)[None, :]
        mask = columns if mask is None else mask & columns
    return plgpu.load(
        ref.at[:, pl.ds(j * block, block)], mask=mask, other=None if mask is None else 0
    )


def _statistics(x, D, eps):
    """Mean and 1 / std of rows that are cut into blocks, in fp32."""
    x, block = [part.astype(jnp.float32) for part in x], x[0].shape[-1]
    mean = sum(x).sum(-1, keepdims=True) / D
    centred = [
        jnp.where((j * block + jnp.arange(block) < D)[None, :], part - mean, 0)
        for j, part in enumerate(x)
    ]
    return mean, lax.rsqrt(sum(map(jnp.square, centred)).sum(-1, keepdims=True) / D + eps)


def _affine_kernel(ins, y_ref, *, B, D, N, eps, gelu, precision):
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
        return (y if ins['shift'] is None else y + _tile(ins['shift'], D, j, block)).astype(x.dtype)

    w = (
        [weights(j) for j in range(blocks)] if rows == 1 else None
    )  # first of all: on their way during the LayerNorm
    x = [inputs(j) for j in range(blocks)] if rows == 1 or ins['scale'] is not None else None
    if ins['scale'] is not None:
        mean, rstd = _statistics(x, D, eps)
    if rows == 1:
        y = sum(
            w[j].astype(jnp.float32) * normalised(j, x[j]).astype(jnp.float32)
            for j in range(blocks)
        )
        y = y.sum(-1)[None, :]
    else:  # both stream through shared memory, the next blocks while these are multiplied
        y = lax.fori_loop(
            0,
            blocks,
            lambda j, y: y + plgpu.dot(normalised(j, inputs(j)), weights(j).T, precision=precision),
            jnp.zeros((rows, outs), jnp.float32),
        )
    row, out = None if row is None else row[:, None], None if out is None else out[None, :]
    mine = row if out is None else out if row is None else row & out

    def part(name, mask):
        return plgpu.load(ins[name], mask=mask, other=None if mask is None else 0).astype(
            jnp.float32
        )

    if ins['bias'] is not None:
        y += part('bias', out)
    if gelu:
        y = nn.gelu(y, approximate=True)
    if ins['residual'] is not None:
        y += part('residual', mine)
    plgpu.store(y_ref, y.astype(y_ref.dtype), mask=mine)


@functools.partial(jax.jit, static_argnames=('cfg', 'gelu', 'dtype'))
def affine(cfg: GPT2Config, x_BD, weights, norm=None, residual_BN=None, *, gelu=False, dtype=None):
    """residual + gelu(LayerNorm(x) W^T + b), each but the product where it is given: (B, D) -> (B, N).

    `weights` and `norm` are {'kernel': (N, D), 'bias': (N,)} and {'scale': (D,), 'bias': (D,)}, with or without biases.
    """
    (B, D), N = x_BD.shape, weights['kernel'].shape[0]
    rows = 1 if B == 1 else max(16, min(MAX_ROWS, pl.next_power_of_2(B)))
    programs, (least, most) = (ONE_PROGRAMS, ONE_OUTS) if B == 1 else (ROWS_PROGRAMS, ROWS_OUTS)
    outs = max(least, min(most, 2 ** (max(N // programs, 1).bit_length() - 1)))
    norm = norm or {}
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
    kernel = functools.partial(
        _affine_kernel,
        B=B,
        D=D,
        N=N,
        eps=cfg.layer_norm_epsilon,
        gelu=gelu,
        precision=cfg.precision,
    )
    return call(
        kernel,
        grid=(pl.cdiv(B, rows), pl.cdiv(N, outs)),
        warps=ONE_WARPS if B == 1 else ROWS_WARPS,
        stages=ROWS_STAGES,
        in_specs=[{name: None if ins[name] is None else spec for name, spec in specs.items()}],
        out_specs=specs['residual'],
        out_shape=jax.ShapeDtypeStruct((B, N), dtype or x_BD.dtype),
    )(ins)


def _attend_kernel(
    pos_ref, q_ref, new_k_ref, new_v_ref, k_ref, v_ref, z_ref, k_out_ref, v_out_ref, *, K, block
):
    S, width = k_ref.shape
    pos = jnp.minimum(
        pos_ref[0], S - 1
    )  # what is decoded past the context is of no use, but must not write past it
    columns = jnp.arange(width) < K
    q, k, v = (plgpu.load(ref, mask=columns, other=0) for ref in (q_ref, new_k_ref, new_v_ref))
    plgpu.store(k_out_ref.at[pos, :], k, mask=columns)
    plgpu.store(v_out_ref.at[pos, :], v, mask=columns)
    q, k, v = q.astype(jnp.float32) / math.sqrt(K), k.astype(jnp.float32), v.astype(jnp.float32)

    def body(j, carry):
        """Place p of every block has a softmax of its own, so that the loop waits for no one's sum but its own."""
        z, most, total = carry
        here = j * block + jnp.arange(block) < pos
        at, mask = (pl.ds(j * block, block), slice(None)), here[:, None] & columns[None, :]
        keys, values = (
            plgpu.load(ref.at[at], mask=mask, other=0).astype(jnp.float32) for ref in (k_ref, v_ref)
        )
        scores = jnp.where(here, (keys * q[None, :]).sum(-1), -1e30)
        most_now = jnp.maximum(most, scores)
        shrink, p = jnp.exp(most - most_now), jnp.where(here, jnp.exp(scores - most_now), 0)
        return z * shrink[:, None] + p[:, None] * values, most_now, total * shrink + p

    zero = jnp.zeros(block, jnp.float32)
    z, most, total = lax.fori_loop(
        0, pl.cdiv(pos, block), body, (jnp.zeros((block, width), jnp.float32), zero - 1e30, zero)
    )
    own = (q * k).sum()
    top = jnp.maximum(most.max(), own)
    weight, own = jnp.exp(most - top), jnp.exp(own - top)
    z = ((z * weight[:, None]).sum(0) + own * v) / ((total * weight).sum() + own)
    plgpu.store(z_ref, z.astype(z_ref.dtype), mask=columns)


@jax.jit
def attend(qkv_B3HK, k_BHSK, v_BHSK, pos_1):
    """One token's attention at position `pos` to itself and what the cache holds before; writes it into the cache.

    Returns z_BHK and the cache, which keeps its memory. What the cache holds from `pos` on is never seen.
    """
    B, H, S, K = k_BHSK.shape
    width, (block, warps) = pl.next_power_of_2(K), ONE_ATTEND if B == 1 else ROWS_ATTEND
    cache = pl.BlockSpec((None, None, S, width), lambda b, h: (b, h, 0, 0))

    def part(which):
        return pl.BlockSpec((None, None, None, width), lambda b, h: (b, which, h, 0))

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
    """The parameters as decoding reads them: matrices (N, D) in the compute dtype, embeddings and norms in fp32."""
    dtype = cfg.compute_dtype

    def matrix(affine, outputs):
        flat = {'kernel': affine['kernel'].astype(dtype).reshape(-1, outputs).T}
        return flat | ({'bias': affine['bias'].astype(dtype).reshape(-1)} if cfg.bias else {})

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
    """The logits after a token at position `pos`, and the cache with it: what GPT2.features and .head compute."""
    B, pos_1, layers = token_B.shape[0], jnp.reshape(pos, 1), []
    embed_B1D, pos_embed_1D = embed(weights['wte'], weights['wpe'], token_B[:, None], pos)
    x_BD = (embed_B1D + pos_embed_1D).astype(cfg.compute_dtype)[:, 0]
    in_kernel = cfg.activation_function == 'gelu_new'  # Triton, as Pallas has it, knows no erf
    for h, (k_BHSK, v_BHSK) in zip(weights['h'], cache, strict=True):
        qkv_B3HK = affine(cfg, x_BD, h['c_attn'], h['ln_1']).reshape(B, 3, cfg.n_head, cfg.head_dim)
        z_BHK, *layer_cache = attend(qkv_B3HK, k_BHSK, v_BHSK, pos_1)
        x_BD = affine(cfg, z_BHK.reshape(B, -1), h['attn_proj'], None, x_BD)
        h_BF = affine(cfg, x_BD, h['c_fc'], h['ln_2'], gelu=in_kernel)
        h_BF = h_BF if in_kernel else activate(cfg.activation_function, h_BF)
        x_BD = affine(cfg, h_BF, h['mlp_proj'], None, x_BD)
        layers.append(tuple(layer_cache))
    return affine(cfg, x_BD, weights['head'], weights['ln_f'], dtype=jnp.float32), tuple(layers)
