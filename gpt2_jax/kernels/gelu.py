"""GPT-2's GELU, with the bias before it: by cuBLAS forward, by a kernel backward."""

import math

import flax.linen as nn
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


def gelu_slope(u, reciprocal):
    """gelu_new'(u), in few operations; `reciprocal` is a function that computes 1 / x.

    gelu_new(u) = u s, with s = (1 + tanh(v)) / 2 = sigmoid(2 v): one exponential.
    """
    square, scale = u * u, 2 * GELU_SCALE
    power = u * (square * (-LOG2_E * scale * GELU_CUBE) - LOG2_E * scale)
    s = reciprocal(1 + jnp.exp2(power))
    dv = u * (square * (3 * scale * GELU_CUBE) + scale)
    return s + s * (dv - dv * s)


def _gelu_backward_kernel(ins, outs):
    span, columns = ins['u'].shape

    def body(r, total):
        here = pl.ds(r * GELU_ROWS, GELU_ROWS), slice(None)
        u = ins['u'][here].astype(jnp.float32)
        du = ins['dh'][here].astype(jnp.float32) * gelu_slope(u, lambda x: 1 / x)
        outs['du'][here] = du.astype(outs['du'].dtype)
        return total + du.sum(0) if outs['dbias'] is not None else total

    total = lax.fori_loop(0, span // GELU_ROWS, body, jnp.zeros(columns, jnp.float32))
    if outs['dbias'] is not None:
        outs['dbias'][...] = total


@jax.custom_vjp
def gelu(x_NF, bias_F):
    """gelu_new(x + bias), (N, F), in the dtype of x. x is a matrix product; the bias may be None.

    Its gradient raises ValueError unless N is a multiple of GELU_PROGRAMS * GELU_ROWS, or a smaller
    multiple of GELU_ROWS.
    """
    return gelu_forward(x_NF, bias_F)[0]


def gelu_forward(x_NF, bias_F):
    """(h, u), with u = x + bias.

    XLA knows these formulas: with programs.compiler_options cuBLAS computes them in fp32 at the end
    of the product, and writes u too if it is wanted. A kernel of their own would read u once more:
    an update takes 1.5 % longer with configs/shakespeare.py, 1 % with 32 rows of GPT-2 124M, an
    evaluation 6 % (H100).
    """
    u_NF = x_NF if bias_F is None else x_NF + bias_F.astype(x_NF.dtype)
    return nn.gelu(u_NF, approximate=True), u_NF


def _gelu_fwd(x_NF, bias_F):
    row_programs('gelu', len(x_NF), GELU_ROWS, GELU_PROGRAMS)
    h_NF, u_NF = gelu_forward(x_NF, bias_F)
    return h_NF, (u_NF, bias_F)


@jax.jit
def _gelu_bwd(saved, dh_NF):
    u_NF, bias_F = saved
    N, F = u_NF.shape
    columns = min(F & -F, GELU_COLUMNS)  # the largest power of two that divides F, up to this
    programs = row_programs('gelu', N, GELU_ROWS, GELU_PROGRAMS)
    block = pl.BlockSpec((N // programs, columns), lambda i, j: (i, j))
    shapes = {
        'du': jax.ShapeDtypeStruct(u_NF.shape, u_NF.dtype),
        'dbias': None if bias_F is None else jax.ShapeDtypeStruct((programs, F), jnp.float32),
    }
    partial = pl.BlockSpec((None, columns), lambda i, j: (i, j))
    outs = call(
        _gelu_backward_kernel,
        grid=(programs, F // columns),
        warps=GELU_WARPS,
        name='gelu_backward',
        in_specs=[{'u': block, 'dh': block}],
        out_specs=only(shapes, {'du': block, 'dbias': partial}),
        out_shape=shapes,
    )({'u': u_NF, 'dh': dh_NF})
    return outs['du'], None if bias_F is None else outs['dbias'].sum(0)


gelu.defvjp(_gelu_fwd, _gelu_bwd)
