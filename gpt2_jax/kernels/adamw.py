"""AdamW's update in place, and the sum of squares that clipping needs, for several leaves at once.

A kernel leaves the GPU half idle while it starts and ends, so one kernel takes several leaves. For
the 96 matrices of GPT-2 350M, AdamW takes 2.36 ms with a kernel for each matrix, and 2.08 ms with
a kernel for every four matrices (H200).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.kernels.launch import call

# Sizes of blocks, and warps: the best of those tried on an H100 and an H200.
ADAMW_BLOCK, ADAMW_WARPS = 2048, 4
SQUARES_BLOCK, SQUARES_WARPS = 8192, 8
MAX_LEAVES = 16  # in one call: CUDA limits the size of a kernel's arguments


def _programs(leaves, block: int) -> list[int]:
    """How many programs each leaf has: one for each of its blocks."""
    if len(leaves) > MAX_LEAVES:
        raise ValueError(
            f'an optimizer kernel got {len(leaves)} leaves; expected {MAX_LEAVES} at most'
        )
    return [pl.cdiv(leaf.size, block) for leaf in leaves]


def _specs(programs: list[int], block: int) -> list[pl.BlockSpec]:
    """The blocks of each leaf. The programs of a leaf follow the programs of the leaf before."""

    def spec(j: int):
        first, last = sum(programs[:j]), programs[j] - 1
        return pl.BlockSpec((block,), lambda i: (jnp.clip(i - first, 0, last),))

    return [spec(j) for j in range(len(programs))]


def _in_each_leaf(programs: list[int], sizes: list[int], block: int, body: Callable) -> None:
    """Calls body(j, block, inside) in the program of each block of leaf j.

    `inside` says which elements of the block are in the leaf.
    """
    i, first = pl.program_id(0), 0
    for j, (number, size) in enumerate(zip(programs, sizes, strict=True)):

        @pl.when((i >= first) & (i < first + number))
        def _(j=j, first=first, size=size):
            body(j, i - first, (i - first) * block + jnp.arange(block) < size)

        first += number


def join(leaves):
    """The elements of all leaves in one array.

    XLA computes the gradients of vectors right in the joined array. If a kernel took them one by
    one, XLA would copy each gradient out of an array that holds several: 79 kernels of 1.1 us in an
    update of GPT-2 124M.
    """
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


@functools.partial(jax.jit, static_argnames=('rates', 'joined', 'dtype'))
def adamw(g, m, v, p, scalars_4, *, rates, joined=False, dtype=None):
    """The equations of optim.make_optimizer for lists of leaves: new (m, v, p, rounded, sums).

    The gradients may be bf16, and may have more rows than the parameters. The extra rows are
    ignored. If `joined`, the gradients are a list of one array, from `join`. `scalars_4` is fp32:
    learning rate, clipping factor, 1 / (1 - beta1^n), 1 / (1 - beta2^n). `rates` is (beta1, beta2,
    eps, weight_decay). `rounded` is a list of the new parameters in `dtype`, empty if `dtype` is
    None. `sums` holds the sums of update^2 and of p^2 of each program: (2, programs). Raises
    ValueError for gradients of other shapes, and for more than MAX_LEAVES leaves.
    """
    beta1, beta2, eps, weight_decay = rates
    n, sizes, programs = len(p), [leaf.size for leaf in p], _programs(p, ADAMW_BLOCK)
    expected = [(sum(sizes),)] if joined else [leaf.shape for leaf in p]
    for gradient, shape in zip(g, expected, strict=True):
        if gradient.shape[1:] != shape[1:] or len(gradient) < shape[0]:
            raise ValueError(
                f'the adamw kernel got a gradient of shape {gradient.shape}; expected {shape}'
            )
    blocks = _specs(programs, ADAMW_BLOCK)
    g_blocks = [pl.BlockSpec(g[0].shape, lambda i: (0,))] if joined else blocks

    def kernel(scalars_ref, *refs):
        *refs, sums_ref = refs
        g_refs, ins, outs = refs[: len(g)], refs[len(g) : len(g) + 3 * n], refs[len(g) + 3 * n :]

        def body(j, block, inside):
            here = pl.ds(sum(sizes[:j]) + block * ADAMW_BLOCK, ADAMW_BLOCK)
            gradient, m, v, p = (
                plgpu.load(ref, mask=inside, other=0.0).astype(jnp.float32)
                for ref in (g_refs[0].at[here] if joined else g_refs[j], *ins[j::n])
            )
            learning_rate, factor, correct1, correct2 = (scalars_ref[i] for i in range(4))
            gradient *= factor
            m = beta1 * m + (1 - beta1) * gradient
            v = beta2 * v + (1 - beta2) * gradient * gradient
            direction = m * correct1 / (jnp.sqrt(v * correct2) + eps) + weight_decay * p
            update = -learning_rate * direction
            p += update
            for ref, value in zip(outs[j::n], (m, v, p, p)[: len(outs) // n], strict=True):
                plgpu.store(ref, value.astype(ref.dtype), mask=inside)
            sums_ref[0], sums_ref[1] = (update * update).sum(0), (p * p).sum(0)

        _in_each_leaf(programs, sizes, ADAMW_BLOCK, body)

    def shapes(dtype):
        return [jax.ShapeDtypeStruct((size,), dtype) for size in sizes]

    *new, sums = call(
        kernel,
        grid=(sum(programs),),
        warps=ADAMW_WARPS,
        name='adamw',
        in_specs=[pl.BlockSpec((4,), lambda i: (0,)), *g_blocks, *blocks * 3],
        out_specs=[*blocks * (4 if dtype else 3), pl.BlockSpec((2, None), lambda i: (0, i))],
        out_shape=[
            *shapes(jnp.float32) * 3,
            *(shapes(dtype) if dtype else []),
            jax.ShapeDtypeStruct((2, sum(programs)), jnp.float32),
        ],
        input_output_aliases={1 + len(g) + i: i for i in range(3 * n)},
    )(scalars_4, *(leaf.reshape(-1) for leaf in (*g, *m, *v, *p)))
    new = [leaf.reshape(p[i % n].shape) for i, leaf in enumerate(new)]
    return new[:n], new[n : 2 * n], new[2 * n : 3 * n], new[3 * n :], sums


@jax.jit
def squares(leaves):
    """Each program's sum of x^2 over the elements x of its block of a leaf, fp32.

    Raises ValueError for more than MAX_LEAVES leaves.
    """
    programs, sizes = _programs(leaves, SQUARES_BLOCK), [leaf.size for leaf in leaves]

    def kernel(*refs):
        *refs, sums_ref = refs

        def body(j, _, inside):
            x = plgpu.load(refs[j], mask=inside, other=0.0).astype(jnp.float32)
            sums_ref[...] = (x * x).sum(0)

        _in_each_leaf(programs, sizes, SQUARES_BLOCK, body)

    return call(
        kernel,
        grid=(sum(programs),),
        warps=SQUARES_WARPS,
        name='squares',
        in_specs=_specs(programs, SQUARES_BLOCK),
        out_specs=pl.BlockSpec((None,), lambda i: (i,)),
        out_shape=jax.ShapeDtypeStruct((sum(programs),), jnp.float32),
    )(*(leaf.reshape(-1) for leaf in leaves))
