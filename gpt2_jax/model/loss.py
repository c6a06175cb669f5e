"""Cross-entropy of the next token, and for a large vocabulary over chunks of the targets.

A target has V logits: 0.2 MB in fp32 with GPT-2's vocabulary, and several times as much with their
gradients. The loss does not need all of them at once: the logits of a chunk of targets are
computed, reduced to losses and dropped before the next chunk. The values are the same. Chunks take
less memory and, on a CPU, less time too, because touching new pages of memory takes time.

Chunks are cut along T, so that each device of a mesh keeps its rows. Letters as in gpt2.py; t is
the length of a chunk, n the number of chunks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.architecture import padded_vocab
from gpt2_jax.model.ops import logits


def token_losses(logits_BTV, targets_BT):
    """-log softmax(logits)[target], the cross-entropy in nats: (B, T, V), (B, T) -> (B, T)."""
    # Compare and sum instead of indexing: XLA fuses the comparison into the sum over V, and the
    # gradient needs no scatter.
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    target_logits_BT = jnp.where(is_target_BTV, logits_BTV, 0).sum(-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_logits_BT


def chunk_length(shape: tuple[int, int], chunk_targets: int) -> int:
    """The largest t that divides T and keeps B t at most `chunk_targets`; at least 1."""
    B, T = shape
    return max(t for t in range(1, T + 1) if T % t == 0 and (t == 1 or B * t <= chunk_targets))


def map_logits(function: Callable, x_BTD, wte_VD, targets_BT, precision, chunk_targets: int):
    """function(logits_BtV, targets_Bt) -> arrays (B, t), over chunks of the targets: (B, T).

    The logits are x wte^T, of at most `chunk_targets` targets at a time.
    """
    V, table_VD = wte_VD.shape[0], _padded(wte_VD, precision)

    def call(chunk):
        x_BtD, targets_Bt = chunk
        return function(_logits(x_BtD, table_VD, V, precision), targets_Bt)

    t = chunk_length(targets_BT.shape, chunk_targets)
    return jax.tree.map(_join, lax.map(call, (_split(x_BTD, t), _split(targets_BT, t))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def summed_loss(x_BTD, wte_VD, targets_BT, precision, chunk_targets: int):
    """The sum of `token_losses` of the logits x wte^T; chunks are as in `map_logits`.

    Its gradient is computed in the forward pass, while the logits of a chunk exist: JAX would keep
    the logits of all chunks, or compute them a second time.
    """
    return map_logits(token_losses, x_BTD, wte_VD, targets_BT, precision, chunk_targets).sum()


def _summed_loss_forward(x_BTD, wte_VD, targets_BT, precision, chunk_targets):
    V, table_VD = wte_VD.shape[0], _padded(wte_VD, precision)

    def step(dtable_VD, chunk):
        x_BtD, targets_Bt = chunk
        logits_BtV = _logits(x_BtD, table_VD, V, precision)
        exp_BtV = jnp.exp(logits_BtV - logits_BtV.max(-1, keepdims=True))
        is_target_BtV = jnp.arange(logits_BtV.shape[-1]) == targets_Bt[..., None]
        dlogits_BtV = exp_BtV / exp_BtV.sum(-1, keepdims=True) - is_target_BtV
        dlogits_BtV = dlogits_BtV.astype(x_BtD.dtype)
        dx_BtD = jnp.einsum('BtV,VD->BtD', dlogits_BtV, table_VD, precision=precision)
        dtable_VD += jnp.einsum(
            'BtV,BtD->VD',
            dlogits_BtV,
            x_BtD,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return dtable_VD, (token_losses(logits_BtV, targets_Bt).sum(), dx_BtD)

    t = chunk_length(targets_BT.shape, chunk_targets)
    zero_VD = jnp.zeros(table_VD.shape, jnp.float32)
    dtable_VD, (losses_n, dx_nBtD) = lax.scan(
        step, zero_VD, (_split(x_BTD, t), _split(targets_BT, t))
    )
    return losses_n.sum(), (_join(dx_nBtD), dtable_VD[:V].astype(wte_VD.dtype))


def _summed_loss_backward(precision, chunk_targets, gradients, dloss):
    return *(dloss.astype(gradient.dtype) * gradient for gradient in gradients), None


summed_loss.defvjp(_summed_loss_forward, _summed_loss_backward)


def _padded(wte_VD, precision):
    """The table with rows of 0 for tensor cores: see ops.fast_logits."""
    V = wte_VD.shape[0]
    return wte_VD if precision == 'highest' else jnp.pad(wte_VD, ((0, padded_vocab(V) - V), (0, 0)))


def _logits(x_BtD, table_VD, V, precision):
    """x wte^T in fp32, and -inf for the rows of padding."""
    logits_BtV = logits(x_BtD, table_VD, precision)
    if table_VD.shape[0] > V:
        logits_BtV = jnp.where(jnp.arange(table_VD.shape[0]) < V, logits_BtV, -jnp.inf)
    return logits_BtV


def _split(x_BT, t: int):
    """(B, T, ..) -> (n, B, t, ..)."""
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, t, *x_BT.shape[2:]), 1, 0)


def _join(x_nBt):
    """(n, B, t, ..) -> (B, T, ..)."""
    n, B, t, *rest = x_nBt.shape
    return jnp.moveaxis(x_nBt, 0, 1).reshape(B, n * t, *rest)
