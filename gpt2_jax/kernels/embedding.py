"""The token embedding at both ends of the model.

head_loss: the loss of the tied head, with the gradient of the logits, the largest of all arrays.
add_rows: the gradient of the lookup.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.architecture import padded_vocab
from gpt2_jax.kernels.launch import LOG2_E, call, column_blocks

# Sizes of blocks, warps and stages of the software pipeline: the best of those tried on an H100.
COLUMNS, UNROLL, SOFTMAX_WARPS = 4096, 3, 16
ADDED_ROWS, ADD_WARPS = 8, 4  # rows of a token that are read at a time


class _Row(NamedTuple):
    """One row of logits within a kernel, in blocks of `columns`, of which V columns count.

    `unit` multiplies each logit, and exp(unit x) is `exp` of the product.
    """

    logits_ref: Any
    V: int
    columns: int
    unit: float
    exp: Callable

    @property
    def blocks(self) -> int:
        return self.logits_ref.shape[0] // self.columns

    @property
    def whole(self) -> int:
        """This many blocks have no padding; a multiple of UNROLL."""
        return self.V // (self.columns * UNROLL) * UNROLL

    def block(self, j, masked):
        """The columns of block j, and which of them the array has: a mask, or None for all."""
        column = j * self.columns + jnp.arange(self.columns)
        inside = column < padded_vocab(self.V) if masked else None
        return column, pl.ds(j * self.columns, self.columns), inside

    def load(self, j, masked):
        """The logits of block j in fp32, times `unit`; -inf in the padding."""
        column, here, inside = self.block(j, masked)
        if not masked:
            return self.logits_ref[here].astype(jnp.float32) * self.unit
        # If the mask ended at V, no multiple of 128, each thread would load one number at a time.
        logits = plgpu.load(self.logits_ref.at[here], mask=inside, other=-jnp.inf)
        return jnp.where(column < self.V, logits.astype(jnp.float32) * self.unit, -jnp.inf)

    def softmax_sums(self):
        """(m, l): the largest of the loaded logits, and the sum of exp(logit - m).

        Each lane has its own running softmax (m, l as in attention.py), merged after the loop.
        """

        def scan(masked, several, carry):
            m, l = carry
            parts = [self.load(j, masked) for j in several]
            m_new = functools.reduce(jnp.maximum, parts, m)
            return m_new, l * self.exp(m - m_new) + sum(self.exp(x - m_new) for x in parts)

        def scan_whole(i, carry):
            return scan(False, [i * UNROLL + u for u in range(UNROLL)], carry)

        zero = jnp.zeros(self.columns, jnp.float32)
        # m starts finite, so that a lane of padding alone does not compute -inf - -inf.
        carry = lax.fori_loop(0, self.whole // UNROLL, scan_whole, (zero - 1e30, zero))
        m, l = scan(True, range(self.whole, self.blocks), carry)
        m_row = m.max(0)
        return m_row, (l * self.exp(m - m_row)).sum(0)


def _softmax_gradient_kernel(targets_ref, logits_ref, dlogits_ref, nats_ref, *, V, columns):
    """-log softmax(logits)[target] of one row, and its gradient softmax(logits) - one_hot(target).

    Logits carry a factor log2(e), so that exp is exp2.
    """
    target = targets_ref[...]
    target_logit = logits_ref[target].astype(jnp.float32)  # read before any thread overwrites it
    row = _Row(logits_ref, V, columns, LOG2_E, jnp.exp2)
    m, l = row.softmax_sums()
    lse = m + jnp.log2(l)
    nats_ref[...] = lse / LOG2_E - target_logit

    def write(masked, j, _):
        column, here, inside = row.block(j, masked)
        gradient = jnp.exp2(row.load(j, masked) - lse) - jnp.where(column == target, 1.0, 0.0)
        plgpu.store(dlogits_ref.at[here], gradient.astype(dlogits_ref.dtype), mask=inside)

    lax.fori_loop(0, row.whole, functools.partial(write, False), None)
    for j in range(row.whole, row.blocks):
        write(True, j, None)


def _row_specs(padded):
    """(columns of a block, the specs of a program's row of logits and of its one number)."""
    columns = min(COLUMNS, pl.next_power_of_2(padded))
    row = pl.BlockSpec((None, pl.cdiv(padded, columns) * columns), lambda n: (n, 0))
    return columns, row, pl.BlockSpec((None,), lambda n: (n,))


def _softmax_gradient(logits_NV, targets_N, V):
    """(the gradient of the logits, in their memory, and 0 from column V on; nats_N)."""
    N, padded = logits_NV.shape
    columns, row, one = _row_specs(padded)
    return call(
        functools.partial(_softmax_gradient_kernel, V=V, columns=columns),
        grid=(N,),
        warps=SOFTMAX_WARPS,
        name='softmax_gradient',
        in_specs=[one, row],
        out_specs=[row, one],
        input_output_aliases={1: 0},
        out_shape=[
            jax.ShapeDtypeStruct(logits_NV.shape, logits_NV.dtype),
            jax.ShapeDtypeStruct((N,), jnp.float32),
        ],
    )(targets_N, logits_NV)


def head_loss(x_ND, wte_VD, targets_N, scale):
    """The loss of each target under softmax(x wte^T), and the gradients of `scale` times their sum.

    (N, D), fp32 (V, D), (N,) -> nats_N fp32; dx (N, D) in the dtype of x; dwte fp32, with rows of 0
    after the V-th, because copying the rows before would take 0.14 ms (124M, H100).

    The logits are written once, in the dtype of x, and then overwritten by their own gradient. The
    rest of the backward pass is two matrix products. XLA would move an fp32 copy of the logits
    through memory six times.

    A bf16 logit has 8 bits. All logits of a published model share an offset of about -100, which
    would take all of them. Softmax ignores a shared offset, and so does the gradient, whose sum
    over V is 0. So the offset is removed beforehand, as the mean of the embeddings.
    """
    (V, _), dtype = wte_VD.shape, x_ND.dtype
    centred_VD = (wte_VD - wte_VD.mean(0)).astype(dtype)
    head_VD = jnp.pad(centred_VD, ((0, padded_vocab(V) - V), (0, 0)))
    dlogits_NV, nats_N = _softmax_gradient(x_ND @ head_VD.T, targets_N, V)
    # Products are scaled in fp32: bf16 has too few bits for the scale.
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dx_ND = (product('NV,VD->ND', dlogits_NV, head_VD) * scale).astype(dtype)
    return nats_N, dx_ND, product('NV,ND->VD', dlogits_NV, x_ND) * scale


def _nats_kernel(targets_ref, logits_ref, nats_ref, *, V, columns):
    """-log softmax(logits)[target] of one row.

    The largest logit is subtracted before anything is rounded: an offset that all logits share
    takes no bits of the loss.
    """
    m, l = _Row(logits_ref, V, columns, 1.0, jnp.exp).softmax_sums()
    nats_ref[...] = (m - logits_ref[targets_ref[...]]) + jnp.log(l)


def row_nats(logits_NV, targets_N, V):
    """-log softmax(logits)[target], of fp32 logits whose columns from V on are padding: (N,) fp32.

    It reads each logit once. XLA reads all logits twice: for their maximum, and for the sum of
    their exponentials.
    """
    N, padded = logits_NV.shape
    columns, row, one = _row_specs(padded)
    return call(
        functools.partial(_nats_kernel, V=V, columns=columns),
        grid=(N,),
        warps=SOFTMAX_WARPS,
        name='row_nats',
        in_specs=[one, row],
        out_specs=one,
        out_shape=jax.ShapeDtypeStruct((N,), jnp.float32),
    )(targets_N, logits_NV)


def _add_rows_kernel(tokens_ref, order_ref, rows_ref, _, table_ref, *, N, D):
    """The sum of the rows of one token, if this program is at the first of them, in fixed order."""
    i, width = pl.program_id(0), table_ref.shape[-1]
    token = tokens_ref[i]
    column = pl.program_id(1) * width + jnp.arange(width)

    def is_mine(at):
        return (at < N) & (tokens_ref[jnp.minimum(at, N - 1)] == token)

    def add(carry):
        at, total = carry
        for each in range(ADDED_ROWS):
            row = rows_ref.at[order_ref[jnp.minimum(at + each, N - 1)], :]
            mask = is_mine(at + each) & (column < D)
            total += plgpu.load(row, mask=mask, other=0.0).astype(jnp.float32)
        return at + ADDED_ROWS, total

    @pl.when((i == 0) | (tokens_ref[jnp.maximum(i, 1) - 1] != token))
    def _():
        start = i, jnp.zeros(width, jnp.float32)
        _, total = lax.while_loop(lambda carry: is_mine(carry[0]), add, start)
        row = table_ref.at[token, :]
        total += plgpu.load(row, mask=column < D, other=0.0)
        plgpu.store(row, total, mask=column < D)


@jax.jit
def add_rows(table_VD, tokens_N, rows_ND):
    """The table, fp32, with each row added to the row of its token, in its memory: (V, D).

    Two runs give the same bits. XLA's scatter-add adds with atomics, in no fixed order. Here the
    rows are sorted by token, and one program adds up all rows of a token.
    """
    (V, D), N = table_VD.shape, len(tokens_N)
    order_N = jnp.argsort(tokens_N, stable=True).astype(jnp.int32)
    width, blocks = column_blocks(D, 1024)
    whole = pl.BlockSpec((N,), lambda i, j: (0,))
    return call(
        functools.partial(_add_rows_kernel, N=N, D=D),
        grid=(N, blocks),
        warps=ADD_WARPS,
        name='add_rows',
        in_specs=[
            whole,
            whole,
            pl.BlockSpec((N, width), lambda i, j: (0, j)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((V, width), lambda i, j: (0, j)),
        out_shape=jax.ShapeDtypeStruct(table_VD.shape, table_VD.dtype),
        input_output_aliases={3: 0},
    )(tokens_N[order_N], order_N, rows_ND, table_VD)
