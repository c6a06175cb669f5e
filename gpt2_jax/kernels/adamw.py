"""AdamW's update in place, and the sums for its norms in the same pass; see triton_call.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.kernels.launch import call

# Sizes of blocks, warps and stages of the software pipeline: the best of those tried on an H100.
ADAMW_BLOCK, ADAMW_WARPS = 2048, 4
ADAMW_VECTORS = 16  # in one call, so that its arguments are no more than CUDA takes


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


def _adamw_kernel(
    scalars_ref, g_ref, m_ref, v_ref, p_ref, m_out, v_out, p_out, sums_ref, *, size, rates
):
    inside = pl.program_id(0) * ADAMW_BLOCK + jnp.arange(ADAMW_BLOCK) < size
    sums_ref[0], sums_ref[1] = _adamw(
        scalars_ref, (g_ref, m_ref, v_ref, p_ref), (m_out, v_out, p_out), inside, rates
    )


@functools.partial(jax.jit, static_argnames='rates')
def adamw(g, m, v, p, scalars, *, rates):
    """One AdamW update of one leaf, in place: (m, v, p, partial sums of (update)^2 and of p^2, (programs, 2)).

    rows of g past those of p are left out. `scalars` fp32 (4,): learning rate, what clipping
    multiplies g by, 1 / (1 - beta1^s), 1 / (1 - beta2^s); `rates`: beta1, beta2, eps, weight_decay.
    """
    shape, size, programs = p.shape, p.size, pl.cdiv(p.size, ADAMW_BLOCK)
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
            sums_ref[0], sums_ref[1] = _adamw(
                scalars_ref,
                (g_ref.at[pl.ds(start, block)], *ins[i::n]),
                outs[i::n],
                jnp.arange(block) < size,
                rates,
            )


@functools.partial(jax.jit, static_argnames='rates')
def adamw_vectors(g, m, v, p, scalars, *, rates):
    """`adamw` for lists of small leaves, a program each: of 98 of the 148 leaves of the 124M model."""
    shapes, sizes, n = [leaf.shape for leaf in p], tuple(leaf.size for leaf in p), len(p)
    blocks = [pl.next_power_of_2(size) for size in sizes]
    g = jnp.concatenate(
        [leaf.reshape(-1) for leaf in g] + [jnp.zeros(max(blocks))]
    )  # room for the last one's block
    whole = [pl.BlockSpec((block,), lambda i: (0,)) for block in blocks] * 3
    f32 = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes] * 3
    *leaves, sums = call(
        functools.partial(
            _adamw_vectors_kernel,
            starts=tuple(itertools.accumulate(sizes, initial=0))[:-1],
            sizes=sizes,
            rates=rates,
        ),
        grid=(n,),
        warps=ADAMW_WARPS,
        name='adamw_vectors',
        in_specs=[
            pl.BlockSpec((4,), lambda i: (0,)),
            pl.BlockSpec(g.shape, lambda i: (0,)),
            *whole,
        ],
        out_specs=[*whole, pl.BlockSpec((None, 2), lambda i: (i, 0))],
        out_shape=[*f32, jax.ShapeDtypeStruct((n, 2), jnp.float32)],
        input_output_aliases={2 + i: i for i in range(3 * n)},
    )(scalars, g, *(leaf.reshape(-1) for leaf in (*m, *v, *p)))
    leaves = [leaf.reshape(shape) for leaf, shape in zip(leaves, shapes * 3, strict=True)]
    return leaves[:n], leaves[n : 2 * n], leaves[2 * n :], sums
