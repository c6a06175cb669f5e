"""AdamW's update in place, with the sums for its norms in the same pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.kernels.launch import call

# Sizes of blocks, warps and stages of the software pipeline: the best of those tried on an H100.
ADAMW_BLOCK, ADAMW_WARPS = 2048, 4
MAX_VECTORS = 16  # leaves in one call of adamw_vectors: CUDA limits the size of its arguments


def _adamw(scalars_ref, refs, outs, inside, rates):
    """The equations of optim.make_optimizer for the elements `inside` a block.

    Returns the sums of update^2 and of p^2.
    """
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


def _adamw_kernel(
    scalars_ref, g_ref, m_ref, v_ref, p_ref, m_out, v_out, p_out, sums_ref, *, size, rates
):
    inside = pl.program_id(0) * ADAMW_BLOCK + jnp.arange(ADAMW_BLOCK) < size
    refs, outs = (g_ref, m_ref, v_ref, p_ref), (m_out, v_out, p_out)
    sums_ref[0], sums_ref[1] = _adamw(scalars_ref, refs, outs, inside, rates)


@functools.partial(jax.jit, static_argnames='rates')
def adamw(g, m, v, p, scalars, *, rates):
    """One AdamW update of one leaf, in place: (m, v, p, sums).

    The gradient may have more rows than p: they are ignored. `scalars` is fp32 (4,): learning rate,
    clipping factor, 1 / (1 - beta1^s), 1 / (1 - beta2^s). `rates` is (beta1, beta2, eps,
    weight_decay). `sums` holds each program's sums of update^2 and of p^2: (programs, 2).
    """
    shape, size, programs = p.shape, p.size, pl.cdiv(p.size, ADAMW_BLOCK)
    if g.shape[1:] != shape[1:] or len(g) < len(p):
        raise ValueError(f'the adamw kernel got a gradient of shape {g.shape}; expected {shape}')
    part, four = pl.BlockSpec((ADAMW_BLOCK,), lambda i: (i,)), pl.BlockSpec((4,), lambda i: (0,))
    f32 = jax.ShapeDtypeStruct((size,), jnp.float32)
    m, v, p, sums = call(
        functools.partial(_adamw_kernel, size=size, rates=rates),
        grid=(programs,),
        warps=ADAMW_WARPS,
        name='adamw',
        in_specs=[four, part, part, part, part],
        out_specs=[part, part, part, pl.BlockSpec((None, 2), lambda i: (i, 0))],
        out_shape=[f32, f32, f32, jax.ShapeDtypeStruct((programs, 2), jnp.float32)],
        input_output_aliases={2: 0, 3: 1, 4: 2},
    )(scalars, *(leaf.reshape(-1) for leaf in (g, m, v, p)))
    return m.reshape(shape), v.reshape(shape), p.reshape(shape), sums


def _adamw_vectors_kernel(scalars_ref, g_ref, *refs, starts, sizes, rates):
    *leaves, sums_ref = refs
    ins, outs, n = leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :], len(sizes)
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):

        @pl.when(pl.program_id(0) == i)
        def _(i=i, start=start, size=size):
            block = ins[i].shape[0]
            mine = g_ref.at[pl.ds(start, block)], *ins[i::n]
            inside = jnp.arange(block) < size
            sums_ref[0], sums_ref[1] = _adamw(scalars_ref, mine, outs[i::n], inside, rates)


@functools.partial(jax.jit, static_argnames='rates')
def adamw_vectors(g, m, v, p, scalars, *, rates):
    """`adamw` for lists of up to MAX_VECTORS small leaves, one program each.

    98 of the 148 leaves of the 124M model are that small.
    """
    shapes, sizes, n = [leaf.shape for leaf in p], tuple(leaf.size for leaf in p), len(p)
    blocks = [pl.next_power_of_2(size) for size in sizes]
    room = jnp.zeros(max(blocks), jnp.float32)  # the last leaf's block may be larger than the leaf
    g = jnp.concatenate([leaf.reshape(-1) for leaf in g] + [room])
    whole = [pl.BlockSpec((block,), lambda i: (0,)) for block in blocks] * 3
    f32 = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes] * 3
    kernel = functools.partial(
        _adamw_vectors_kernel,
        starts=tuple(itertools.accumulate(sizes, initial=0))[:-1],
        sizes=sizes,
        rates=rates,
    )
    four, every = pl.BlockSpec((4,), lambda i: (0,)), pl.BlockSpec(g.shape, lambda i: (0,))
    *leaves, sums = call(
        kernel,
        grid=(n,),
        warps=ADAMW_WARPS,
        name='adamw_vectors',
        in_specs=[four, every, *whole],
        out_specs=[*whole, pl.BlockSpec((None, 2), lambda i: (i, 0))],
        out_shape=[*f32, jax.ShapeDtypeStruct((n, 2), jnp.float32)],
        input_output_aliases={2 + i: i for i in range(3 * n)},
    )(scalars, g, *(leaf.reshape(-1) for leaf in (*m, *v, *p)))
    leaves = [leaf.reshape(shape) for leaf, shape in zip(leaves, shapes * 3, strict=True)]
    return leaves[:n], leaves[n : 2 * n], leaves[2 * n :], sums
