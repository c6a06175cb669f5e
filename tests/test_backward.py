"""Backward passes by hand: a worked example of what jax.grad does to each part of GPT-2.

For y = f(x) and a loss that is some function of y, write dy for the gradient of the loss in y. A
backward pass takes dy to dx = J^T dy, with J_ij = dy_i / dx_j, without ever building J. Letters in
names are those of `model/gpt2.py`. Each pass here is numpy in fp32, repeats the part of the forward
pass that it needs, and is compared with the gradient of the code in use.
"""

import functools
import math

import jax
import numpy as np
import pytest
from tiny import tiny

from gpt2_jax.model.gpt2 import LayerNorm, causal_attention
from gpt2_jax.model.loss import token_losses
from gpt2_jax.model.ops import activate

B, T, H, K, D, V = 3, 24, 4, 16, 64, 97


def softmax(x):
    """exp(x) / sum exp(x) over the last axis. Subtracting the maximum first prevents overflow."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy_backward(logits_BTV, targets_BT, dloss_BT):
    """loss = log sum_v exp(l_v) - l_target.

    d/dl_v of the first term is exp(l_v) / sum exp(l) = softmax(l)_v. Of the second it is 1 if v is
    the target, else 0:

        dl_v = (softmax(l)_v - [v = target]) dloss
    """
    one_hot_BTV = np.eye(V, dtype=np.float32)[targets_BT]
    return (softmax(logits_BTV) - one_hot_BTV) * dloss_BT[..., None]


def layer_norm_backward(x, scale, dy, eps):
    """n = (x - mean) r with r = (var + eps)^(-1/2);  y = n scale + bias.

    The same scale and bias serve every position, so their gradients sum over positions:

        dscale = sum dy n        dbias = sum dy        dn = dy scale

    x_j reaches n_i directly, through the mean (dmean / dx_j = 1 / D), and through r:

        dr / dx_j = -r^3 / 2  dvar / dx_j = -r^3 / 2  2 (x_j - mean) / D = -r^2 n_j / D

        dn_i / dx_j = r ([i = j] - 1 / D) + (x_i - mean) dr / dx_j
                    = r ([i = j] - 1 / D - n_i n_j / D)

    The mean inside var adds nothing, because the x_i - mean sum to 0. Summed over i against dn_i:

        dx = r (dn - mean(dn) - n mean(dn n))

    This is dn without its parts along the constant vector and along n: a step of x in either of
    these two directions does not change n.
    """
    centred = x - x.mean(-1, keepdims=True)
    r = 1 / np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.float32(eps))
    n = centred * r
    positions = tuple(range(x.ndim - 1))
    dn = dy * scale
    dx = r * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True))
    return dx, (dy * n).sum(positions), dy.sum(positions)


def gelu_backward(x, dy):
    """y = x (1 + tanh u) / 2 with u = a (x + b x^3), a = sqrt(2 / pi), b = 0.044715.

    The product rule, tanh' = 1 - tanh^2, and u' = a (1 + 3 b x^2):

        dx = dy ((1 + tanh u) / 2 + x (1 - tanh^2 u) u' / 2)
    """
    a, b = np.float32(math.sqrt(2 / math.pi)), np.float32(0.044715)
    tanh = np.tanh(a * (x + b * x**3))
    return dy * ((1 + tanh) / 2 + x * (1 - tanh**2) * a * (1 + 3 * b * x**2) / 2)


def attention_backward(q_BTHK, k_BSHK, v_BSHK, dz_BTHK):
    """scores = q k^T / sqrt(K), and -inf if s > t;  p = softmax(scores);  z = p v, for each head.

    A matrix product Z = P V has dP = dZ V^T and dV = P^T dZ. With the rows p_t of P:

        dp_ts = sum_k dz_tk v_sk        dv_sk = sum_t p_ts dz_tk

    The softmax of one row: dp_s / dscore_j = p_s ([s = j] - p_j), so

        dscore_j = sum_s dp_s p_s ([s = j] - p_j) = p_j (dp_j - sum_s dp_s p_s)

    If s > t, p is 0 and so is the gradient: a masked score is a constant. The row sum is also
    sum_k dz_tk z_tk, which FlashAttention stores in its place. Last, the scores q k^T / sqrt(K):

        dq_tk = sum_s dscore_ts k_sk / sqrt(K)        dk_sk = sum_t dscore_ts q_tk / sqrt(K)
    """
    root = np.float32(math.sqrt(q_BTHK.shape[-1]))
    scores_BHTS = np.einsum('BTHK,BSHK->BHTS', q_BTHK, k_BSHK) / root
    visible_TS = np.tril(np.ones(scores_BHTS.shape[-2:], bool))
    p_BHTS = softmax(np.where(visible_TS, scores_BHTS, -np.inf))

    dp_BHTS = np.einsum('BTHK,BSHK->BHTS', dz_BTHK, v_BSHK)
    dv_BSHK = np.einsum('BHTS,BTHK->BSHK', p_BHTS, dz_BTHK)
    dscores_BHTS = p_BHTS * (dp_BHTS - (dp_BHTS * p_BHTS).sum(-1, keepdims=True)) / root
    dq_BTHK = np.einsum('BHTS,BSHK->BTHK', dscores_BHTS, k_BSHK)
    dk_BSHK = np.einsum('BHTS,BTHK->BSHK', dscores_BHTS, q_BTHK)
    return dq_BTHK, dk_BSHK, dv_BSHK


def check(function, inputs, dy, by_hand):
    """Compares `by_hand` with the gradients of sum(function(*inputs) dy): J^T dy for each input."""
    with jax.default_matmul_precision('highest'):
        summed = jax.grad(lambda inputs, dy: (function(*inputs) * dy).sum())
        gradients = jax.jit(summed)(inputs, dy)
    for gradient, ours in zip(gradients, by_hand, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == gradient.shape
        assert np.linalg.norm(ours - gradient) <= 1e-6 * np.linalg.norm(gradient)


def draw(*shape, seed=0, spread=1.0):
    return np.float32(np.random.default_rng([seed, *shape]).normal(0, spread, shape))


@pytest.mark.parametrize('seed', range(3))
def test_cross_entropy(seed):
    logits_BTV, dloss_BT = draw(B, T, V, seed=seed, spread=3), draw(B, T, seed=seed)
    targets_BT = np.random.default_rng(seed).integers(0, V, (B, T))
    check(
        lambda logits_BTV: token_losses(logits_BTV, targets_BT),
        [logits_BTV],
        dloss_BT,
        [cross_entropy_backward(logits_BTV, targets_BT, dloss_BT)],
    )


@pytest.mark.parametrize('seed', range(3))
def test_layer_norm(seed):
    module = LayerNorm(tiny().cfg)
    x_BTD, dy_BTD = draw(B, T, D, seed=seed, spread=2) + 1, draw(B, T, D, seed=seed + 10)
    scale, bias = 1 + draw(D, seed=seed, spread=0.3), draw(D, seed=seed + 1)
    check(
        lambda x, scale, bias: module.apply({'params': {'scale': scale, 'bias': bias}}, x),
        [x_BTD, scale, bias],
        dy_BTD,
        layer_norm_backward(x_BTD, scale, dy_BTD, module.cfg.layer_norm_epsilon),
    )


@pytest.mark.parametrize('seed', range(3))
def test_gelu(seed):
    x_BTD, dy_BTD = draw(B, T, D, seed=seed, spread=2), draw(B, T, D, seed=seed + 10)
    check(functools.partial(activate, 'gelu_new'), [x_BTD], dy_BTD, [gelu_backward(x_BTD, dy_BTD)])


@pytest.mark.parametrize('seed', range(3))
def test_attention(seed):
    q, k, v, dz = (draw(B, T, H, K, seed=4 * seed + i) for i in range(4))

    def attention(q, k, v):
        return causal_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2))

    check(attention, [q, k, v], dz, attention_backward(q, k, v, dz))
