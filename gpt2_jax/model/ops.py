"""The arithmetic of the model, twice: `PLAIN`, one formula a line, and `FAST`, the same values sooner.

A fast function computes the forward pass by its plain formula, and its gradient by hand in the order
that XLA runs fastest; forward passes are equal bit for bit in fp32 (tests/test_ops.py). JAX cannot
differentiate a hand-written gradient forward (`jvp`, `hessian`), so the plain ones are the default of
`GPT2`, and training passes the fast ones. Each earns at least 2 % of a step somewhere; the docstring of
each tells what and where: "CPU" is 2 cores, 4 layers, 128 wide, 12 x 64 in fp32; "GPU" is an H200,
configs/shakespeare.py (character model) or GPT-2 124M at 12 x 1024 with cuDNN's attention, in bf16.

N is any number of leading axes merged into one; `precision` is of the matrix products.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.architecture import padded_vocab


class Ops(NamedTuple):
    """What the modules of gpt2.py call. A tuple of functions: hashable, so static under jit.

    attention: replaces scores, softmax and mix where there is no cache and no dropout on the pattern;
        (q_BTHK, k_BTHK, v_BTHK) -> z_BTHK. None: the steps of gpt2.causal_attention.
    tap: (name, activation) -> activation, called at every named activation. None: nobody looks.
    """

    matmul: Callable
    normalize: Callable
    scores: Callable
    mix: Callable
    logits: Callable
    attention: Callable | None = None
    tap: Callable | None = None


def matmul(x, kernel, n_inputs: int, precision):
    """x W, contracting the last `n_inputs` axes of x: (B, T, *inputs), (*inputs, *outputs)."""
    return jnp.tensordot(x, kernel, n_inputs, precision=precision)


def normalize(x, epsilon: float):
    """(x - mean(x)) / sqrt(var(x) + epsilon) over the last axis: (..., D) -> (..., D)."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


def scores(q_BTHK, k_BHSK, precision):
    """q k^T of each head, summed and returned in fp32: (B, H, T, S)."""
    return jnp.einsum(
        'BTHK,BHSK->BHTS', q_BTHK, k_BHSK, precision=precision, preferred_element_type=jnp.float32
    )


def mix(pattern_BHTS, v_BHSK, precision):
    """pattern v of each head: (B, T, H, K)."""
    return jnp.einsum('BHTS,BHSK->BHTK', pattern_BHTS, v_BHSK, precision=precision).swapaxes(1, 2)


def logits(x_D, wte_VD, precision):
    """x wte^T, summed and returned in fp32: (..., D), (V, D) -> (..., V)."""
    return jnp.einsum(
        '...D,VD->...V', x_D, wte_VD, precision=precision, preferred_element_type=jnp.float32
    )


PLAIN = Ops(matmul, normalize, scores, mix, logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_rows(x_N, kernel, precision):
    """x W over all axes of x but the first: (N, *inputs), (*inputs, *outputs) -> (N, *outputs).

    Gradients: dx = dy W^T and dW = x^T dy. JAX would take (dy^T x)^T for dW, with transposed copies
    where a side has several axes: a step takes 3 to 5 % longer (CPU), 4.4 % (GPU, character model).
    """
    return matmul(x_N, kernel, x_N.ndim - 1, precision)


def _matmul_rows_forward(x_N, kernel, precision):
    return matmul_rows(x_N, kernel, precision), (x_N, kernel)


def _matmul_rows_backward(precision, saved, dy_N):
    x_N, kernel = saved
    outputs = tuple(range(1 - dy_N.ndim, 0))
    dx_N = jnp.tensordot(dy_N, kernel, (outputs, outputs), precision=precision)
    return dx_N, jnp.tensordot(x_N, dy_N, (0, 0), precision=precision)


matmul_rows.defvjp(_matmul_rows_forward, _matmul_rows_backward)


def fast_matmul(x, kernel, n_inputs: int, precision):
    """`matmul` with all leading axes merged into one, for `matmul_rows`."""
    lead, inputs = x.shape[:-n_inputs], x.shape[-n_inputs:]
    y_N = matmul_rows(x.reshape(-1, *inputs), kernel, precision)
    return y_N.reshape(*lead, *kernel.shape[n_inputs:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fast_normalize(x, epsilon: float):
    """`normalize`. Gradient, for n = normalize(x), r = 1 / std: r (dn - mean(dn) - n mean(dn n)).

    JAX goes back through each operation of the forward pass, in more passes over memory: a step takes
    6 to 7 % longer (CPU), 3.3 % (GPU, character model).
    """
    return normalize(x, epsilon)


def _normalize_forward(x, epsilon):
    mean = x.mean(-1, keepdims=True)
    r = lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon)
    return (x - mean) * r, (x, mean, r)


def _normalize_backward(epsilon, saved, dn):
    x, mean, r = saved
    n = (x - mean) * r
    return (r * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)),)


fast_normalize.defvjp(_normalize_forward, _normalize_backward)


def _sum_over_queries(a_BTHK, b_BHTS, precision):
    """sum_t a_tk b_ts, the gradient of the keys or the values: (B, H, S, K).

    XLA's fast CPU matmuls contract the last axis of the left operand, so the smaller one is transposed.
    """
    a_BHKT = a_BTHK.transpose(0, 2, 3, 1)
    return jnp.einsum('BHKT,BHTS->BHKS', a_BHKT, b_BHTS, precision=precision).swapaxes(2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fast_scores(q_BTHK, k_BHSK, precision):
    """`scores`. The gradients are products in the dtype of the operands.

    JAX multiplies the fp32 gradient of the scores with bf16 operands in fp32: a step takes 3.7 % longer
    (GPU, character model).
    """
    return scores(q_BTHK, k_BHSK, precision)


def _scores_backward(precision, saved, g_BHTS):
    q_BTHK, k_BHSK = saved
    g_BHTS = g_BHTS.astype(q_BTHK.dtype)
    dq_BHTK = jnp.einsum('BHTS,BHSK->BHTK', g_BHTS, k_BHSK, precision=precision)
    return dq_BHTK.swapaxes(1, 2), _sum_over_queries(q_BTHK, g_BHTS, precision)


fast_scores.defvjp(lambda q, k, precision: (scores(q, k, precision), (q, k)), _scores_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fast_mix(pattern_BHTS, v_BHSK, precision):
    """`mix`. Gradients with the axes in the order that is fast: a step takes 4.4 % longer without (CPU)."""
    return mix(pattern_BHTS, v_BHSK, precision)


def _mix_backward(precision, saved, dz_BTHK):
    pattern_BHTS, v_BHSK = saved
    dpattern_BHTS = jnp.einsum('BTHK,BHSK->BHTS', dz_BTHK, v_BHSK, precision=precision)
    return dpattern_BHTS, _sum_over_queries(dz_BTHK, pattern_BHTS, precision)


fast_mix.defvjp(lambda p, v, precision: (mix(p, v, precision), (p, v)), _mix_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _logits_bf16_gradient(x_D, wte_VD, precision):
    """`logits`. The gradients are products in the dtype of the operands, as in `fast_scores`."""
    return logits(x_D, wte_VD, precision)


def _logits_backward(precision, saved, g_V):
    def same_dtype(x_D, wte_VD):
        return jnp.einsum('...D,VD->...V', x_D, wte_VD, precision=precision)

    return jax.vjp(same_dtype, *saved)[1](g_V.astype(saved[0].dtype))


_logits_bf16_gradient.defvjp(
    lambda x, wte, precision: (logits(x, wte, precision), (x, wte)), _logits_backward
)


def fast_logits(x_D, wte_VD, precision):
    """`logits`, for a large vocabulary by a padded table: a step takes 15 % longer without (GPU, 124M).

    The table gets rows of zeros up to architecture.VOCAB_MULTIPLE, and their logits are cut off.
    """
    V = wte_VD.shape[0]
    padded = padded_vocab(V) if V > 1024 else V
    wte_VD = jnp.pad(wte_VD, ((0, padded - V), (0, 0)))
    return _logits_bf16_gradient(x_D, wte_VD, precision)[..., :V]


def cudnn_attention(q_BTHK, k_BTHK, v_BTHK):
    """Causal attention by cuDNN's kernel, which never stores the pattern. fp16 or bf16, NVIDIA GPUs."""
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation='cudnn'
    )


FAST = Ops(fast_matmul, fast_normalize, fast_scores, fast_mix, fast_logits)


def training_ops(attention: str) -> Ops:
    """The functions that training takes: `FAST`, and cuDNN's attention if the setting asks for it."""
    return FAST._replace(attention=cudnn_attention) if attention == 'cudnn' else FAST
