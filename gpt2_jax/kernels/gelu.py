"""GPT-2's GELU, with the bias before it."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from gpt2_jax.kernels.choose import ROWS_MULTIPLE
from gpt2_jax.kernels.launch import LOG2_E, call, only, row_programs

GELU_SCALE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715

# Sizes of blocks, warps and stages of the software pipeline: the best of those tried on an H100.
GELU_ROWS, GELU_COLUMNS, GELU_WARPS = 4, 512, 4
GELU_PROGRAMS = ROWS_MULTIPLE // GELU_ROWS  # of the backward pass, for each block of columns


def _gelu_gate(x):
    """The gate s with gelu_new(x) = x s: (1 + tanh(u)) / 2 = sigmoid(2 u), by one exponential."""
    return 1 / (1 + jnp.exp2((-2 * LOG2_E * GELU_SCALE) * (x + GELU_CUBE * x * x * x)))


def _gelu_kernel(ins, outs):
    x = ins['x'][...].astype(jnp.float32)
    if ins['bias'] is not None:
        x += ins['bias'][...][None, :]
    outs['h'][...] = (x * _gelu_gate(x)).astype(outs['h'].dtype)


def _gelu_backward_kernel(ins, outs):
    span, columns = ins['x'].shape
    bias = None if ins['bias'] is None else ins['bias'][...][None, :]

    def body(r, total):
        here = pl.ds(r * GELU_ROWS, GELU_ROWS), slice(None)
        x = ins['x'][here].astype(jnp.float32)
        if bias is not None:
            x += bias
        s = _gelu_gate(x)
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
    """gelu_new(x + bias), (N, F), in fp32 and rounded once to the dtype of x. The bias may be None.

    Raises ValueError unless N is a multiple of GELU_PROGRAMS * GELU_ROWS, or a smaller multiple of
    GELU_ROWS.
    """
    return _gelu_fwd(x_NF, bias_F)[0]


@jax.jit
def _gelu_fwd(x_NF, bias_F):
    N, F = x_NF.shape
    row_programs('gelu', N, GELU_ROWS, GELU_PROGRAMS)  # what the backward pass needs
    columns = _columns(F)
    block = pl.BlockSpec((GELU_ROWS, columns), lambda i, j: (i, j))
    vector = pl.BlockSpec((columns,), lambda i, j: (j,))
    ins = {'x': x_NF, 'bias': bias_F}
    h_NF = call(
        _gelu_kernel,
        grid=(N // GELU_ROWS, F // columns),
        warps=GELU_WARPS,
        name='gelu',
        in_specs=[only(ins, {'x': block, 'bias': vector})],
        out_specs={'h': block},
        out_shape={'h': jax.ShapeDtypeStruct(x_NF.shape, x_NF.dtype)},
    )(ins)['h']
    return h_NF, (x_NF, bias_F)


@jax.jit
def _gelu_bwd(saved, dh_NF):
    x_NF, bias_F = saved
    N, F = x_NF.shape
    columns, programs = _columns(F), row_programs('gelu', N, GELU_ROWS, GELU_PROGRAMS)
    block = pl.BlockSpec((N // programs, columns), lambda i, j: (i, j))
    vector = pl.BlockSpec((columns,), lambda i, j: (j,))
    partial = pl.BlockSpec((None, columns), lambda i, j: (i, j))
    ins = {'x': x_NF, 'bias': bias_F, 'dh': dh_NF}
    shapes = {
        'dx': jax.ShapeDtypeStruct(x_NF.shape, x_NF.dtype),
        'dbias': None if bias_F is None else jax.ShapeDtypeStruct((programs, F), jnp.float32),
    }
    outs = call(
        _gelu_backward_kernel,
        grid=(programs, F // columns),
        warps=GELU_WARPS,
        name='gelu_backward',
        in_specs=[only(ins, {'x': block, 'bias': vector, 'dh': block})],
        out_specs=only(shapes, {'dx': block, 'dbias': partial}),
        out_shape=shapes,
    )(ins)
    return outs['dx'], None if bias_F is None else outs['dbias'].sum(0)


gelu.defvjp(_gelu_fwd, _gelu_bwd)
