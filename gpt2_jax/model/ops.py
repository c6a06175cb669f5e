"""The arithmetic of the model, twice: `PLAIN` has one formula a line, `FAST` is faster.

A fast function computes its plain formula forwards, and its gradient by hand, in the order that XLA
runs fastest. In full fp32 the forward passes are equal bit for bit, and the gradients to rounding
(tests/test_ops.py). JAX cannot differentiate a hand-written gradient in forward mode (`jvp`,
`hessian`), so `GPT2` takes the plain functions by default, and training passes the fast ones.

Each fast function saves at least 2 % of a training step on some machine, and its docstring states
how much. "CPU" is a model of 4 layers, 128 wide, on 12 x 64 tokens in fp32 (2 cores). "GPU" is an
H200 in bf16 with configs/shakespeare.py or, if it says 124M, with GPT-2 124M on 12 x 1024 tokens
and cuDNN's attention.

N is all leading axes merged into one. `precision` is JAX's setting for matrix products.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.architecture import ACTIVATIONS, padded_vocab

# What a block keeps for its backward pass, by model.remat ('none' keeps what JAX needs). 'block'
# keeps the inputs of the block. 'dots' keeps its matrix products too, without those of attention,
# whose pattern would be kept with them; a kernel names what it would keep itself
# (kernels/attention.py: q, k, v, z and the log-sum-exp).
KEPT_BY_DOTS = 'attention'
REMAT_POLICIES = {
    'block': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(KEPT_BY_DOTS),
    ),
}


class Ops(NamedTuple):
    """The functions that the modules of gpt2.py call; hashable, so static under jit.

    attention: (q_BTHK, k_BTHK, v_BTHK) -> z_BTHK, which replaces scores, softmax and mix if there
        is no cache and no dropout on the pattern. None: the steps of gpt2.causal_attention.
    tap: (name, activation) -> activation, called at every named activation. None: not called.
    """

    matmul: Callable
    normalize: Callable
    scores: Callable
    mix: Callable
    logits: Callable
    activate: Callable
    attention: Callable | None = None
    tap: Callable | None = None


def matmul(x, kernel, n_inputs: int, precision):
    """x W over the last `n_inputs` axes of x: (..., *inputs) -> (..., *outputs)."""
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


def activate(name: str, x):
    """The function of that name in architecture.ACTIVATIONS, in fp32, rounded once to x's dtype."""
    function, options = ACTIVATIONS[name]
    return getattr(nn, function)(x.astype(jnp.float32), **options).astype(x.dtype)


PLAIN = Ops(matmul, normalize, scores, mix, logits, activate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_rows(x_N, kernel, precision):
    """x W over all axes of x but the first: (N, *inputs), (*inputs, *outputs) -> (N, *outputs).

    Gradients: dx = dy W^T and dW = x^T dy. JAX would compute dW as (dy^T x)^T, with transposed
    copies if a side has several axes, and a step would take 3 to 5 % longer (CPU), 4.4 % (GPU).
    """
    return matmul(x_N, kernel, x_N.ndim - 1, precision)


def _matmul_rows_forward(x_N, kernel, precision):
    return matmul(x_N, kernel, x_N.ndim - 1, precision), (x_N, kernel)


def _matmul_rows_backward(precision, saved, dy_N):
    x_N, kernel = saved
    outputs = tuple(range(1 - dy_N.ndim, 0))
    dx_N = jnp.tensordot(dy_N, kernel, (outputs, outputs), precision=precision)
    return dx_N, jnp.tensordot(x_N, dy_N, (0, 0), precision=precision)


matmul_rows.defvjp(_matmul_rows_forward, _matmul_rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_rows_each(x_ND, kernels, precision):
    """(x W1, x W2, ..) for several kernels: a tuple of (N, *outputs).

    The gradient of x is a sum of products. Each product but the first is the left operand of its
    addition, because XLA then lets cuBLAS add the right operand to the product. JAX would leave one
    of two additions to a separate kernel (60.4 instead of 59.8 ms, 124M, 32 x 1024 tokens, H100).
    """
    return tuple(matmul(x_ND, kernel, 1, precision) for kernel in kernels)


def _matmul_rows_each_forward(x_ND, kernels, precision):
    # Products that a policy of jax.checkpoint can see: within a custom_vjp it would not keep them.
    return tuple(matmul(x_ND, kernel, 1, precision) for kernel in kernels), (x_ND, kernels)


def _matmul_rows_each_backward(precision, saved, dy_N):
    x_ND, kernels = saved
    (dx_ND, dkernel), *others = (
        _matmul_rows_backward(precision, (x_ND, kernel), dy)
        for kernel, dy in zip(kernels, dy_N, strict=True)
    )
    dkernels = [dkernel]
    for part_ND, dkernel in others:
        dx_ND = part_ND + dx_ND
        dkernels.append(dkernel)
    return dx_ND, tuple(dkernels)


matmul_rows_each.defvjp(_matmul_rows_each_forward, _matmul_rows_each_backward)


def fast_matmul(x, kernel, n_inputs: int, precision):
    """`matmul` by `matmul_rows`."""
    lead, inputs = x.shape[:-n_inputs], x.shape[-n_inputs:]
    y_N = matmul_rows(x.reshape(-1, *inputs), kernel, precision)
    return y_N.reshape(*lead, *kernel.shape[n_inputs:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fast_normalize(x, epsilon: float):
    """`normalize`. With n = normalize(x) and r = 1 / std, dx = r (dn - mean(dn) - n mean(dn n)).

    JAX would differentiate operation by operation, in more passes over memory, and a step would
    take 6 to 7 % longer (CPU), 3.3 % (GPU).
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

    XLA's fast CPU matmuls contract the last axis of the left operand, so the smaller operand, a, is
    transposed.
    """
    a_BHKT = a_BTHK.transpose(0, 2, 3, 1)
    return jnp.einsum('BHKT,BHTS->BHKS', a_BHKT, b_BHTS, precision=precision).swapaxes(2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fast_scores(q_BTHK, k_BHSK, precision):
    """`scores`. The gradients are matrix products in the dtype of the operands.

    JAX would multiply the fp32 gradient of the scores with bf16 operands in fp32, and a step would
    take 3.7 % longer (GPU).
    """
    return scores(q_BTHK, k_BHSK, precision)


def _scores_forward(q_BTHK, k_BHSK, precision):
    return scores(q_BTHK, k_BHSK, precision), (q_BTHK, k_BHSK)


def _scores_backward(precision, saved, dscores_BHTS):
    q_BTHK, k_BHSK = saved
    dscores_BHTS = dscores_BHTS.astype(q_BTHK.dtype)
    dq_BHTK = jnp.einsum('BHTS,BHSK->BHTK', dscores_BHTS, k_BHSK, precision=precision)
    return dq_BHTK.swapaxes(1, 2), _sum_over_queries(q_BTHK, dscores_BHTS, precision)


fast_scores.defvjp(_scores_forward, _scores_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fast_mix(pattern_BHTS, v_BHSK, precision):
    """`mix`. The gradients have their axes in the fast order.

    Without this, a step would take 4.4 % longer (CPU).
    """
    return mix(pattern_BHTS, v_BHSK, precision)


def _mix_forward(pattern_BHTS, v_BHSK, precision):
    return mix(pattern_BHTS, v_BHSK, precision), (pattern_BHTS, v_BHSK)


def _mix_backward(precision, saved, dz_BTHK):
    pattern_BHTS, v_BHSK = saved
    dpattern_BHTS = jnp.einsum('BTHK,BHSK->BHTS', dz_BTHK, v_BHSK, precision=precision)
    return dpattern_BHTS, _sum_over_queries(dz_BTHK, pattern_BHTS, precision)


fast_mix.defvjp(_mix_forward, _mix_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _logits(x_D, wte_VD, precision):
    """`logits`. The gradients are products in the dtype of the operands, as in `fast_scores`."""
    return logits(x_D, wte_VD, precision)


def _logits_forward(x_D, wte_VD, precision):
    return logits(x_D, wte_VD, precision), (x_D, wte_VD)


def _logits_backward(precision, saved, dlogits_V):
    def same_dtype(x_D, wte_VD):
        return jnp.einsum('...D,VD->...V', x_D, wte_VD, precision=precision)

    return jax.vjp(same_dtype, *saved)[1](dlogits_V.astype(saved[0].dtype))


_logits.defvjp(_logits_forward, _logits_backward)


def fast_logits(x_D, wte_VD, precision):
    """`logits`, with a padded table for tensor cores.

    Without padding, a step would take 15 % longer (GPU, 124M): tensor cores need sizes that are
    multiples of 8. A table of more than 1,024 tokens gets rows of 0 up to
    architecture.padded_vocab, and their logits are cut off. Full fp32 does not use tensor cores,
    and padding would make the head and its gradient take a fifth longer (CPU) and change the order
    of the sums.
    """
    V = wte_VD.shape[0]
    padded = V if V <= 1024 or precision == 'highest' else padded_vocab(V)
    wte_VD = jnp.pad(wte_VD, ((0, padded - V), (0, 0)))
    return _logits(x_D, wte_VD, precision)[..., :V]


@jax.custom_vjp
def _gelu_new(x):
    return activate('gelu_new', x)


def _gelu_new_forward(x):
    return activate('gelu_new', x), x


def _gelu_new_backward(x, dh):
    dtype, x, dh = x.dtype, x.astype(jnp.float32), dh.astype(jnp.float32)
    a, b = math.sqrt(2 / math.pi), 0.044715
    s = jax.nn.sigmoid(2 * a * (x + b * x**3))
    slope = s + x * s * (1 - s) * 2 * a * (1 + 3 * b * x**2)
    return ((dh * slope).astype(dtype),)


_gelu_new.defvjp(_gelu_new_forward, _gelu_new_backward)


def fast_activate(name: str, x):
    """`activate`. In bf16 the gradient of 'gelu_new' keeps x alone, and x in bf16.

    gelu_new(x) is x s with s the sigmoid of u = 2 sqrt(2 / pi) (x + 0.044715 x^3), so its slope is
    s + x s (1 - s) du/dx. JAX would keep several fp32 intermediates, and a step would take 2.6 %
    longer (GPU), 1.1 % (GPU, 124M without cuDNN).
    """
    in_bf16 = name == 'gelu_new' and x.dtype == jnp.bfloat16
    return _gelu_new(x) if in_bf16 else activate(name, x)


def cudnn_attention(q_BTHK, k_BTHK, v_BTHK):
    """Causal attention by cuDNN, which never stores the pattern. fp16 or bf16, on NVIDIA GPUs."""
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation='cudnn'
    )


FAST = Ops(fast_matmul, fast_normalize, fast_scores, fast_mix, fast_logits, fast_activate)


def fast_ops(attention: str) -> Ops:
    """`FAST`, with cuDNN's attention if `attention` is 'cudnn'."""
    return FAST._replace(attention=cudnn_attention) if attention == 'cudnn' else FAST
