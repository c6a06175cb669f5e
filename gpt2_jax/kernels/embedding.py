"""The token embedding at both ends of the model.

head_loss: the loss of the tied head, with the gradient of the logits, the largest of all arrays.
head_nats: the loss alone, without the logits ever reaching memory.
add_rows: the gradient of the lookup.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.architecture import padded_vocab
from gpt2_jax.kernels.launch import LOG2_E, call, column_blocks

# Sizes of blocks, warps and stages of the software pipeline: the best of those tried on an H100.
COLUMNS, UNROLL = 4096, 3
SOFTMAX_NUMBERS = 8  # logits of a thread in each block of columns
CENTRE_ROWS = 512  # about this many embeddings are enough for their mean
ADDED_ROWS, ADD_WARPS = 8, 4  # rows of a token that are read at a time
# The rows and columns of a tile of logits. Its product takes up to HEAD_STEP numbers at a time.
HEAD_ROWS, HEAD_COLUMNS, HEAD_STEP, HEAD_WARPS, HEAD_STAGES = 128, 256, 64, 8, 3
HEAD_PARTS = 8  # programs that share the vocabulary, for each block of rows


def _softmax_gradient_kernel(targets_ref, logits_ref, dlogits_ref, nats_ref, *, V, columns):
    """-log softmax(logits)[target] of one row, and its gradient softmax(logits) - one_hot(target).

    Each lane has its own running softmax (m, l as in attention.py), merged after the loop.
    """
    target, padded = targets_ref[...], padded_vocab(V)
    target_logit = logits_ref[target].astype(jnp.float32)  # read before any thread overwrites it
    blocks = logits_ref.shape[0] // columns
    whole = V // (columns * UNROLL) * UNROLL  # this many blocks have no padding

    def block(j, masked):
        """The columns of block j, and which of them the array has: a mask, or None for all."""
        column = j * columns + jnp.arange(columns)
        return column, pl.ds(j * columns, columns), column < padded if masked else None

    def load(j, masked):
        column, here, inside = block(j, masked)
        if not masked:
            return logits_ref[here].astype(jnp.float32) * LOG2_E
        # If the mask ended at V, no multiple of 128, each thread would load one number at a time.
        logits = plgpu.load(logits_ref.at[here], mask=inside, other=-jnp.inf).astype(jnp.float32)
        return jnp.where(column < V, logits * LOG2_E, -jnp.inf)

    def scan(masked, several, carry):
        m, l = carry
        parts = [load(j, masked) for j in several]
        m_new = functools.reduce(jnp.maximum, parts, m)
        return m_new, l * jnp.exp2(m - m_new) + sum(jnp.exp2(logits - m_new) for logits in parts)

    def scan_whole(i, carry):
        return scan(False, [i * UNROLL + u for u in range(UNROLL)], carry)

    zero = jnp.zeros(columns, jnp.float32)
    # m starts finite, so that a lane of padding alone does not compute -inf - -inf.
    carry = lax.fori_loop(0, whole // UNROLL, scan_whole, (zero - 1e30, zero))
    m, l = scan(True, range(whole, blocks), carry)
    m_row = m.max(0)
    lse = m_row + jnp.log2((l * jnp.exp2(m - m_row)).sum(0))
    nats_ref[...] = lse / LOG2_E - target_logit

    def write(masked, j, _):
        column, here, inside = block(j, masked)
        gradient = jnp.exp2(load(j, masked) - lse) - jnp.where(column == target, 1.0, 0.0)
        plgpu.store(dlogits_ref.at[here], gradient.astype(dlogits_ref.dtype), mask=inside)

    lax.fori_loop(0, whole, functools.partial(write, False), None)
    for j in range(whole, blocks):
        write(True, j, None)


def _softmax_gradient(logits_NV, targets_N, V):
    """(the gradient of the logits, in their memory, and 0 from column V on; nats_N)."""
    N, padded = logits_NV.shape
    columns = min(COLUMNS, pl.next_power_of_2(padded))
    row = pl.BlockSpec((None, pl.cdiv(padded, columns) * columns), lambda n: (n, 0))
    one = pl.BlockSpec((None,), lambda n: (n,))
    return call(
        functools.partial(_softmax_gradient_kernel, V=V, columns=columns),
        grid=(N,),
        warps=max(columns // (32 * SOFTMAX_NUMBERS), 1),
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

    (N, D), fp32 (V, D), (N,), a number -> nats_N fp32; dx (N, D) in the dtype of x; dwte fp32, with
    rows of 0 after the V-th, because copying the rows before would take 0.14 ms (124M, H100).

    The logits are written once, in the dtype of x, and then overwritten by their own gradient. The
    rest of the backward pass is two matrix products. XLA would move an fp32 copy of the logits
    through memory six times.

    A bf16 logit has 8 significant bits. All logits of a published model share an offset of about
    -100, which would use up these bits. Softmax ignores a shared offset, and so does the gradient,
    whose sum over V is 0. So the offset is removed beforehand, as the mean of some embeddings.
    Reading all of them would take 0.06 ms (124M, H100).
    """
    (V, _), dtype = wte_VD.shape, x_ND.dtype
    centred_VD = (wte_VD - wte_VD[:: max(V // CENTRE_ROWS, 1)].mean(0)).astype(dtype)
    head_VD = jnp.pad(centred_VD, ((0, padded_vocab(V) - V), (0, 0)))
    dlogits_NV, nats_N = _softmax_gradient(x_ND @ head_VD.T, targets_N, V)
    # Products are scaled in fp32, because bf16 has too few bits for the scale. But scaling by a
    # power of two loses no bits, so cuBLAS may round dx before it is scaled, and write half the
    # bytes.
    exact = math.frexp(scale)[0] == 0.5
    dx_ND = jnp.einsum(
        'NV,VD->ND', dlogits_NV, head_VD, preferred_element_type=dtype if exact else jnp.float32
    )
    dwte_VD = jnp.einsum('NV,ND->VD', dlogits_NV, x_ND, preferred_element_type=jnp.float32)
    return nats_N, (dx_ND * scale).astype(dtype), dwte_VD * scale


def _head_nats_kernel(x_ref, head_ref, targets_ref, outs, *, V, tiles, step):
    """A running softmax over this program's tiles of the logits x head^T, and the target's logit.

    Logits carry a factor log2(e). m and l are as in attention.py.
    """
    (rows, D), target = x_ref.shape, targets_ref[...]
    first = pl.program_id(1) * tiles
    here = jnp.minimum(tiles, head_ref.shape[0] // HEAD_COLUMNS - first)

    def tile(j, carry):
        m, l, target_logit = carry
        start = (first + j) * HEAD_COLUMNS

        def add(k, logits):
            part = pl.ds(k * step, step)
            return logits + plgpu.dot(x_ref[:, part], head_ref[pl.ds(start, HEAD_COLUMNS), part].T)

        logits = jnp.zeros((rows, HEAD_COLUMNS), jnp.float32)
        logits = lax.fori_loop(0, D // step, add, logits)
        column = (start + jnp.arange(HEAD_COLUMNS)).astype(jnp.int32)[None, :]
        target_logit += jnp.where(column == target[:, None], logits, 0.0).sum(1)
        logits = jnp.where(column < V, logits, -jnp.inf)
        m_new = jnp.maximum(m, logits.max(1) * LOG2_E)
        l = l * jnp.exp2(m - m_new) + jnp.exp2(logits * LOG2_E - m_new[:, None]).sum(1)
        return m_new, l, target_logit

    zero = jnp.zeros((rows,), jnp.float32)
    # m starts finite, so that a tile of padding alone does not compute -inf - -inf.
    m, l, target_logit = lax.fori_loop(0, here, tile, (zero - 1e30, zero, zero))
    outs['m'][...], outs['l'][...], outs['target_logit'][...] = m, l, target_logit


def padded_head(wte_VD):
    """The table with rows of 0 up to a whole number of `head_nats`' tiles."""
    V = wte_VD.shape[0]
    return jnp.pad(wte_VD, ((0, -V % HEAD_COLUMNS), (0, 0)))


def head_nats(x_ND, head_VD, targets_N, V):
    """The loss of each target under softmax(x head^T), summed in fp32: (N,) fp32.

    `head_VD` is a `padded_head` of V rows that count, in the dtype of x. Raises ValueError unless N
    is a multiple of HEAD_ROWS / 2, and D of 16.

    A target has 0.2 MB of logits, which XLA writes once and reads twice. Here a tile of them lives
    in registers: an evaluation of GPT-2 124M in 16 x 1024 tokens runs at 1.60 M tokens/s, with
    logits that are written and read once at 1.44 (H100).
    """
    N, D = x_ND.shape
    rows, step = math.gcd(N, HEAD_ROWS), math.gcd(D, HEAD_STEP)
    if rows < HEAD_ROWS // 2 or step < 16:
        raise ValueError(
            f'the kernel head_nats got {N} rows of {D} numbers; expected multiples of '
            f'{HEAD_ROWS // 2} and 16'
        )
    tiles = pl.cdiv(head_VD.shape[0] // HEAD_COLUMNS, HEAD_PARTS)
    parts = pl.cdiv(head_VD.shape[0] // HEAD_COLUMNS, tiles)
    names = 'm', 'l', 'target_logit'
    outs = call(
        functools.partial(_head_nats_kernel, V=V, tiles=tiles, step=step),
        grid=(N // rows, parts),
        warps=HEAD_WARPS,
        stages=HEAD_STAGES,
        name='head_nats',
        in_specs=[
            pl.BlockSpec((rows, D), lambda i, j: (i, 0)),
            pl.BlockSpec(head_VD.shape, lambda i, j: (0, 0)),
            pl.BlockSpec((rows,), lambda i, j: (i,)),
        ],
        out_specs=dict.fromkeys(names, pl.BlockSpec((None, rows), lambda i, j: (j, i))),
        out_shape=dict.fromkeys(names, jax.ShapeDtypeStruct((parts, N), jnp.float32)),
    )(x_ND, head_VD, targets_N)
    m_N = outs['m'].max(0)
    l_N = (outs['l'] * jnp.exp2(outs['m'] - m_N)).sum(0)
    return m_N / LOG2_E - outs['target_logit'].sum(0) + jnp.log(l_N)


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
