"""The residual stream between two products: a branch with its dropout is added, then LayerNorm.

A row is one token's D numbers, padded to a power of two within the kernels.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.kernels.launch import (
    SEED_SPECS,
    call,
    only,
    read_seed,
    row_programs,
    seed_inputs,
)
from gpt2_jax.model.dropout import keep_mask

# Sizes of blocks, warps and stages of the software pipeline: the best of those tried on an H100.
NORM_ROWS, NORM_WARPS = 2, 2  # rows of a program in the forward pass
# In the backward pass: the most programs, and rows processed at a time.
NORM_PROGRAMS, NORM_BACKWARD_ROWS = 1024, 2


def backward_grid(N, D):
    """(programs, warps of each) of the backward pass for N rows of D numbers.

    The programs share the rows equally. A warp has at most 512 numbers of a row: its intermediate
    results are in registers, and so is the row that is loaded ahead. Several warps hide more of the
    time that loads take, so fewer programs are as fast, and there are fewer sums to add up.
    Raises ValueError if rows would be left out.
    """
    warps = max(pl.next_power_of_2(D) // 512, 1)
    most = NORM_PROGRAMS // min(warps, 2)
    return row_programs('add_norm', N, NORM_BACKWARD_ROWS, most), warps


def _stored_rows(ref, index, D):
    """Rows of a block, with 0 in the padding after D."""
    inside = (jnp.arange(ref.shape[-1]) < D)[None, :]
    return plgpu.load(ref.at[index], mask=inside, other=0.0)


def _rows(ref, index, D):
    """The same in fp32."""
    return _stored_rows(ref, index, D).astype(jnp.float32)


def _element_index(row0, rows, D, width):
    """The index of each element of `rows` rows from `row0` in the whole array (N, D)."""
    row = row0 + jnp.arange(rows).astype(jnp.uint32)
    return row[:, None] * jnp.uint32(D) + jnp.arange(width).astype(jnp.uint32)[None, :]


def _dropout(x, ins, rate, row0, D):
    """dropout(x) of the rows from `row0`."""
    if not rate:
        return x
    seed = read_seed(ins)
    first = jnp.uint32(row0) + seed[2]
    keep = keep_mask(_element_index(first, x.shape[0], D, x.shape[1]), seed, rate)
    return jnp.where(keep, x * (1 / (1 - rate)), 0.0)


def _add_norm_kernel(ins, outs, *, D, rate, eps):
    """x <- x + dropout(branch + bias), rounded to the dtype of x;  y <- LayerNorm(x).

    For a backward pass it keeps the mean and 1 / std of each row, and normalises the rounded x,
    which is what that pass reads. Otherwise it normalises the sum before it is rounded, as XLA does
    in the plain model.
    """
    rows, width = outs['y'].shape
    inside = jnp.arange(width) < D

    def vector(name):
        return plgpu.load(ins[name], mask=inside, other=0.0)

    x = _rows(ins['x'], slice(None), D)
    if ins['branch'] is not None:
        branch = _rows(ins['branch'], slice(None), D)
        if ins['branch_bias'] is not None:
            branch += vector('branch_bias')
        branch = _dropout(branch, ins, rate, pl.program_id(0) * rows, D)
        x += branch
        stored = x.astype(outs['x'].dtype)
        plgpu.store(outs['x'], stored, mask=inside[None, :])
        if outs['mean'] is not None:
            x = stored.astype(jnp.float32)
    mean = x.sum(-1) / D
    centred = jnp.where(inside[None, :], x - mean[:, None], 0.0)
    rstd = lax.rsqrt(jnp.square(centred).sum(-1) / D + eps)
    if outs['mean'] is not None:
        outs['mean'][...], outs['rstd'][...] = mean, rstd
    y = centred * rstd[:, None] * vector('scale')
    if ins['bias'] is not None:
        y += vector('bias')
    plgpu.store(outs['y'], y.astype(outs['y'].dtype), mask=inside[None, :])


def _add_norm_backward_kernel(ins, outs, *, D, rate, summed):
    """The gradients of x and of the branch.

    Also this program's share of the gradients of `summed`: 'scale', and the biases that exist.
    """
    (span, width), rows = ins['x'].shape, NORM_BACKWARD_ROWS
    inside = jnp.arange(width) < D
    scale, row0 = plgpu.load(ins['scale'], mask=inside, other=0.0), pl.program_id(0) * span

    def load(r):
        """Block r of x, dy and dx as they are stored. dx may be None."""
        here = pl.ds(r * rows, rows), slice(None)
        arrays = (ins['x'], ins['dy'], ins['dx'])
        return [None if ref is None else _stored_rows(ref, here, D) for ref in arrays]

    def body(r, carry):
        sums, (x, dy, dx_after) = carry
        # The next block is loaded while this one is computed.
        following = load(jnp.minimum(r + 1, span // rows - 1))
        block = pl.ds(r * rows, rows)
        here = block, slice(None)
        mean, rstd = ins['mean'][block][:, None], ins['rstd'][block][:, None]
        n, dy = (x.astype(jnp.float32) - mean) * rstd, dy.astype(jnp.float32)
        dn = dy * scale
        mean_dn = dn.sum(-1, keepdims=True) / D
        dx = (dn - mean_dn - n * ((dn * n).sum(-1, keepdims=True) / D)) * rstd
        if dx_after is not None:
            dx += dx_after.astype(jnp.float32)
        plgpu.store(outs['dx'].at[here], dx.astype(outs['dx'].dtype), mask=inside[None, :])
        dbranch = _dropout(dx, ins, rate, row0 + r * rows, D)
        if outs['dbranch'] is not None:
            stored = dbranch.astype(outs['dbranch'].dtype)
            plgpu.store(outs['dbranch'].at[here], stored, mask=inside[None, :])
        terms = {'scale': dy * n, 'bias': dy, 'branch_bias': dbranch}
        sums = {name: total + terms[name].sum(0) for name, total in sums.items()}
        return sums, following

    sums = {name: jnp.zeros(width, jnp.float32) for name in summed}
    sums, _ = lax.fori_loop(0, span // rows, body, (sums, load(0)))
    for row, name in enumerate(summed):
        plgpu.store(outs['sums'].at[pl.ds(row, 1), :], sums[name][None, :], mask=inside[None, :])


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9))
def _add_norm_forward(
    x_ND, branch_ND, branch_bias_D, scale_D, bias_D, seed, rate, eps, dtype, differentiated
):
    N, D = x_ND.shape
    if N % NORM_ROWS:  # the kernel would leave out the rest
        raise ValueError(f'the kernel add_norm got {N} rows; expected a multiple of {NORM_ROWS}')
    width, adds = pl.next_power_of_2(D), branch_ND is not None
    rows = pl.BlockSpec((NORM_ROWS, width), lambda i: (i, 0))
    row = pl.BlockSpec((NORM_ROWS,), lambda i: (i,))
    vector = pl.BlockSpec((width,), lambda i: (0,))
    ins = seed_inputs(seed) | {
        'x': x_ND,
        'branch': branch_ND,
        'branch_bias': branch_bias_D,
        'scale': scale_D,
        'bias': bias_D,
    }
    specs = SEED_SPECS | {'x': rows, 'branch': rows, 'y': rows, 'mean': row, 'rstd': row}
    specs |= dict.fromkeys(('branch_bias', 'scale', 'bias'), vector)
    like_x = jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype)
    statistic = jax.ShapeDtypeStruct((N,), jnp.float32) if differentiated else None
    shapes = {
        'x': like_x if adds else None,
        'y': jax.ShapeDtypeStruct(x_ND.shape, dtype),
        'mean': statistic,
        'rstd': statistic,
    }
    outs = call(
        functools.partial(_add_norm_kernel, D=D, rate=rate, eps=eps),
        grid=(N // NORM_ROWS,),
        warps=NORM_WARPS,
        name='add_norm',
        in_specs=[only(ins, specs)],
        out_specs=only(shapes, specs),
        out_shape=shapes,
    )(ins)
    return outs['x'] if adds else x_ND, outs['y'], outs['mean'], outs['rstd']


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def add_norm(x_ND, branch_ND, branch_bias_D, scale_D, bias_D, seed, rate, eps, dtype):
    """x + dropout(branch + branch_bias), and the LayerNorm of the sum: (N, D), (N, D).

    The sum has the dtype of x, and its LayerNorm has `dtype`, as the branch. `branch` (with
    branch_bias), `branch_bias` alone, and `bias` may be None. Raises ValueError unless N is a
    multiple of NORM_ROWS. Its gradient needs rows that `backward_grid` can share.
    """
    return _add_norm_forward(
        x_ND, branch_ND, branch_bias_D, scale_D, bias_D, seed, rate, eps, dtype, False
    )[:2]


def _add_norm_fwd(*args):
    arrays = jax.tree.map(lambda primal: primal.value, args[:6])
    (x_ND, branch_ND, branch_bias_D, scale_D, bias_D, seed), (rate, eps, dtype) = arrays, args[6:]
    # Raises what the backward pass would raise.
    backward_grid(*x_ND.shape)
    x_ND, y_ND, *statistics = _add_norm_forward(
        x_ND, branch_ND, branch_bias_D, scale_D, bias_D, seed, rate, eps, dtype, True
    )
    present = tuple(leaf is not None for leaf in (branch_ND, branch_bias_D, bias_D))
    return (x_ND, y_ND), (x_ND, *statistics, scale_D, seed, present)


def _add_norm_bwd(rate, _eps, _dtype, saved, cotangents):
    *arrays, present = saved
    dx_ND, dy_ND = cotangents
    # After the last LayerNorm nothing reads the sum. Its gradient is not made an array of zeros.
    dx_ND = None if isinstance(dx_ND, SymbolicZero) else dx_ND
    return *_add_norm_backward(*arrays, dx_ND, dy_ND, present, rate), None


@functools.partial(jax.jit, static_argnums=(7, 8))
def _add_norm_backward(x_ND, mean_N, rstd_N, scale_D, seed, dx_ND, dy_ND, present, rate):
    adds, has_branch_bias, has_bias = present
    N, D = x_ND.shape
    width = pl.next_power_of_2(D)
    programs, warps = backward_grid(N, D)
    drops = adds and rate > 0
    # Without dropout the branch has the gradient of x, unless it has another dtype.
    apart = drops or (adds and x_ND.dtype != dy_ND.dtype)
    summed = ('scale',) + ('bias',) * has_bias + ('branch_bias',) * has_branch_bias
    rows = pl.BlockSpec((N // programs, width), lambda i: (i, 0))
    row = pl.BlockSpec((N // programs,), lambda i: (i,))
    vector = pl.BlockSpec((width,), lambda i: (0,))
    ins = seed_inputs(seed if drops else None) | {
        'x': x_ND,
        'mean': mean_N,
        'rstd': rstd_N,
        'dx': dx_ND,
        'dy': dy_ND,
        'scale': scale_D,
    }
    mine = pl.BlockSpec((None, len(summed), width), lambda i: (i, 0, 0))
    specs = SEED_SPECS | dict.fromkeys(('x', 'dx', 'dy', 'dbranch'), rows)
    specs |= {'mean': row, 'rstd': row, 'scale': vector, 'sums': mine}
    shapes = {
        'dx': jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype),
        'dbranch': jax.ShapeDtypeStruct(x_ND.shape, dy_ND.dtype) if apart else None,
        'sums': jax.ShapeDtypeStruct((programs, len(summed), D), jnp.float32),
    }
    outs = call(
        functools.partial(_add_norm_backward_kernel, D=D, rate=rate if drops else 0, summed=summed),
        grid=(programs,),
        warps=warps,
        name='add_norm_backward',
        in_specs=[only(ins, specs)],
        out_specs=only(shapes, specs),
        out_shape=shapes,
    )(ins)
    dbranch = (outs['dbranch'] if apart else outs['dx']) if adds else None
    sums = dict(zip(summed, outs['sums'].sum(0), strict=True))
    return outs['dx'], dbranch, sums.get('branch_bias'), sums['scale'], sums.get('bias')


add_norm.defvjp(_add_norm_fwd, _add_norm_bwd, symbolic_zeros=True)
