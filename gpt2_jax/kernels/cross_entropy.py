"""The loss of the tied head, whose logits are the largest of all arrays; see triton_call.py."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.kernels.launch import LOG2_E, call

# Sizes of blocks, warps and stages of the software pipeline: the best of those tried on an H100.
COLUMNS, UNROLL, SOFTMAX_WARPS = 4096, 3, 16
PADDING = 128  # the vocabulary is padded to a multiple of it: products are several times slower where it is odd


def _softmax_gradient_kernel(targets_ref, logits_ref, dlogits_ref, nats_ref, *, V, columns):
    """-log softmax(logits)[target] of one row, and its gradient softmax(logits) - onehot(target)."""
    target, padded = targets_ref[...], V + -V % PADDING
    hit = logits_ref[target].astype(jnp.float32)  # before any thread overwrites it
    blocks, whole = (
        logits_ref.shape[0] // columns,
        V // (columns * UNROLL) * UNROLL,
    )  # of these none has padding

    def block(j, masked):
        """The columns of block j, and which of them are in the array: a mask, or None for all."""
        column = j * columns + jnp.arange(columns)
        return column, pl.ds(j * columns, columns), column < padded if masked else None

    def load(j, masked):
        column, here, inside = block(j, masked)
        if not masked:
            return logits_ref[here].astype(jnp.float32) * LOG2_E
        # A mask that ended at V, and not at a multiple of 128, would have each thread load one number at a time.
        logits = plgpu.load(logits_ref.at[here], mask=inside, other=-jnp.inf).astype(jnp.float32)
        return jnp.where(column < V, logits * LOG2_E, -jnp.inf)

    def scan(masked, several, carry):
        most, total = carry
        parts = [load(j, masked) for j in several]
        most_now = functools.reduce(jnp.maximum, parts, most)
        return most_now, total * jnp.exp2(most - most_now) + sum(
            jnp.exp2(logits - most_now) for logits in parts
        )

    zero = jnp.zeros(columns, jnp.float32)
    # Lanes of padding alone begin finite, so that no -inf - -inf is met.
    carry = lax.fori_loop(
        0,
        whole // UNROLL,
        lambda i, carry: scan(False, [i * UNROLL + u for u in range(UNROLL)], carry),
        (zero - 1e30, zero),
    )
    most, total = scan(True, range(whole, blocks), carry)
    top = most.max(0)
    lse = top + jnp.log2((total * jnp.exp2(most - top)).sum(0))
    nats_ref[...] = lse / LOG2_E - hit

    def write(masked, j, _):
        column, here, inside = block(j, masked)
        gradient = jnp.exp2(load(j, masked) - lse) - jnp.where(column == target, 1.0, 0.0)
        plgpu.store(dlogits_ref.at[here], gradient.astype(dlogits_ref.dtype), mask=inside)

    lax.fori_loop(0, whole, functools.partial(write, False), None)
    for j in range(whole, blocks):
        write(True, j, None)


def _softmax_gradient(logits_NV, targets_N, V):
    """(gradient of the logits, in their memory; nats_N). Columns from V on are padding: gradient 0."""
    N, padded = logits_NV.shape
    columns = min(COLUMNS, pl.next_power_of_2(padded))
    row = pl.BlockSpec((None, pl.cdiv(padded, columns) * columns), lambda n: (n, 0))
    one = pl.BlockSpec((None,), lambda n: (n,))
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
    """Cross-entropy in nats, fp32, of each target under softmax(x wte^T), and the gradients of scale times their sum.

    (N, D), fp32 (V, D), (N,) -> (N,); of x (N, D), in its dtype; of wte, fp32, with rows of 0 after the V-th: a copy of
    the others alone would cost 0.14 ms for the 124M model on an H100.

    The logits are written once, in the dtype of x, and then overwritten by their own gradient; what is left of the
    backward pass is two matrix products. Left to XLA, an fp32 copy of this largest of all arrays goes through memory
    six times.

    So in bf16 a logit has 8 bits: of the 100 that all logits of a published model may have in common, none would be
    left. Softmax does not see that common part, and neither do the gradients, whose sum over V is 0: it is taken out
    beforehand, as the embedding's mean.
    """
    (V, _), dtype = wte_VD.shape, x_ND.dtype
    head_VD = jnp.pad((wte_VD - wte_VD.mean(0)).astype(dtype), ((0, -V % PADDING), (0, 0)))
    dlogits_NV, nats_N = _softmax_gradient(x_ND @ head_VD.T, targets_N, V)
    multiply = functools.partial(
        jnp.einsum, preferred_element_type=jnp.float32
    )  # bf16 has too few bits for the scale
    dx_ND = (multiply('NV,VD->ND', dlogits_NV, head_VD) * scale).astype(dtype)
    return nats_N, dx_ND, multiply('NV,ND->VD', dlogits_NV, x_ND) * scale
