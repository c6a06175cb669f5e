"""Muon: orthogonal updates for the matrices of the blocks, and AdamW for everything else."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.parallel.partition import leaf_name, named_leaves
from gpt2_jax.training.optim import (
    AdamW,
    DirectOptimizer,
    as_parameters,
    bias_correction,
    clip_factor,
    root_of_squares,
    unclipped_adamw,
)

# The leaves that Muon updates, by the end of their path, and how to read one as matrices that
# multiply rows from the left: (axes that count matrices, axes of inputs, axes of outputs). The
# projections to q, k and v, one leaf of shape (D, 3, H, K), are three matrices.
MATRICES = {
    'attn/c_attn/kernel': ((1,), (0,), (2, 3)),
    'attn/c_proj/kernel': ((), (0, 1), (2,)),
    'mlp/c_fc/kernel': ((), (0,), (1,)),
    'mlp/c_proj/kernel': ((), (0,), (1,)),
}
# x <- a x + (b x x^T + c (x x^T)^2) x, five times, brings all singular values of x from (0, 1] near
# 1: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5
# Root mean square of the elements of a Muon update at a learning rate of 1: about that of AdamW, so
# that learning rates and decays of the two compare (Liu et al. 2025, arXiv 2502.16982).
MUON_RMS = 0.2


def make_muon(
    settings: AdamW,
    implementation: str = 'optax',
    *,
    muon_schedule: optax.Schedule,
    muon_beta: float,
    dtype: str = 'float32',
    precision: str = 'highest',
) -> DirectOptimizer:
    """Muon on the matrices of the blocks (MATRICES), AdamW on all other leaves, clipped together.

        m <- mu m + (1 - mu) g
        d <- mu m / (1 - mu^(n + 1)) + (1 - mu) g / (1 - mu^n)             Nesterov's look-ahead
        p <- p - lr (MUON_RMS sqrt(max(inputs, outputs)) orthogonal(d) + weight_decay p)

    mu is `muon_beta`, lr = muon_schedule(n - 1), and n counts the updates with this one.
    orthogonal(d) sets the singular values of d near 1 (see `orthogonalize`). The update of a matrix
    equals the one of optax.contrib.muon(.., consistent_rms=MUON_RMS). optax computes one matrix
    after the other, in hundreds of small kernels on a GPU; here all matrices of one shape are one
    array.

    `dtype` and `precision` are those of the products in `orthogonalize`. AdamW has its own learning
    rate in `settings`, and shares `weight_decay` and `clip_norm` with Muon.
    """
    others = unclipped_adamw(settings, implementation)

    def init(params) -> MuonState:
        m = jax.tree.map(jnp.zeros_like, muon_leaves(params))
        # Two counters, as in optax: the schedule's is set back when another run is continued.
        at = optax.ScaleByScheduleState(jnp.int32(0))
        return MuonState(jnp.int32(0), m, at, others.init(muon_leaves(params, False)))

    def update(grads, state, params):
        grads = as_parameters(grads, params)
        norm = root_of_squares(grads)
        if settings.clip_norm:
            factor = clip_factor(norm, settings.clip_norm)
            grads = jax.tree.map(lambda g: g * factor, grads)
        g, p = muon_leaves(grads), muon_leaves(params)
        n, lr = state.count + 1, jnp.float32(muon_schedule(state.schedule.count))
        ahead = muon_beta / bias_correction(muon_beta, n + 1)
        now = (1 - muon_beta) / bias_correction(muon_beta, n)
        m = jax.tree.map(lambda m, g: muon_beta * m + (1 - muon_beta) * g, state.m, g)
        looked_ahead = jax.tree.map(lambda m, g: ahead * m + now * g, m, g)
        directions = {
            (I, O): MUON_RMS * math.sqrt(max(I, O)) * orthogonalize(d_NIO, dtype, precision)
            for (I, O), d_NIO in stack_matrices(looked_ahead).items()
        }
        updates = jax.tree.map(
            lambda d, p: -lr * (d + settings.weight_decay * p), unstack_matrices(directions, m), p
        )
        g_others, p_others = (muon_leaves(tree, False) for tree in (grads, params))
        updates_others, state_others = others.update(g_others, state.others, p_others)
        p, p_others = optax.apply_updates((p, p_others), (updates, updates_others))
        norms = {
            'grad_norm': norm,
            'update_norm': root_of_squares((updates, updates_others)),
            'param_norm': root_of_squares((p, p_others)),
        }
        at = optax.ScaleByScheduleState(state.schedule.count + 1)
        state = MuonState(n, m, at, state_others)
        params = jax.tree.map(lambda is_m, a, b: a if is_m else b, muon_mask(params), p, p_others)
        return params, state, None, norms

    return DirectOptimizer(init, update)


class MuonState(NamedTuple):
    """The number n of updates done, the mean gradient m of the matrices, and AdamW's state.

    `m` and `others` have the structure of params, each with empty nodes for the other's leaves.
    """

    count: jax.Array
    m: optax.Params
    schedule: optax.ScaleByScheduleState
    others: optax.OptState


def matrix_axes(name: str) -> tuple[tuple[int, ...], ...] | None:
    """The axes in MATRICES of a leaf, by its path; None if AdamW updates it."""
    return next((axes for end, axes in MATRICES.items() if name.endswith(end)), None)


def muon_mask(params):
    """True for each leaf that Muon updates."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: matrix_axes(leaf_name(path)) is not None, params
    )


def muon_leaves(tree, of_muon: bool = True):
    """The leaves that Muon updates, or all others. The rest are empty nodes, as optax masks leaves.

    The paths are those of the parameters.
    """
    mask = muon_mask(tree)
    return jax.tree.map(lambda m, leaf: leaf if m == of_muon else optax.MaskedNode(), mask, tree)


def orthogonalize(x_NIO, dtype: str, precision: str):
    """N matrices U S V^T -> about U V^T: singular values near 1, from 0.7 to 1.2. I <= O.

    Newton-Schulz iterations, with products in `dtype` (see NEWTON_SCHULZ).
    """
    a, b, c = NEWTON_SCHULZ
    norm_N11 = jnp.sqrt(jnp.square(x_NIO).sum((1, 2), keepdims=True))
    x = (x_NIO / (norm_N11 + 1e-8)).astype(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = jnp.matmul(x, x.mT, precision=precision)
        polynomial = b * square + c * jnp.matmul(square, square, precision=precision)
        x = a * x + jnp.matmul(polynomial, x, precision=precision)
    return x.astype(x_NIO.dtype)


def stack_matrices(tree) -> dict[tuple[int, int], jax.Array]:
    """The matrices of all leaves, those of equal shape as one array: {(I, O): (N, I, O)}.

    A matrix with more inputs than outputs is transposed: Newton-Schulz multiplies by I x I.
    """
    stacks = {}
    for name, leaf in named_leaves(tree).items():
        permutation, shape = _as_matrices(name, leaf.shape)
        matrices = leaf.transpose(permutation).reshape(shape)
        if shape[1] > shape[2]:
            matrices = matrices.mT
        stacks.setdefault(matrices.shape[1:], []).append(matrices)
    return {shape: jnp.concatenate(matrices) for shape, matrices in stacks.items()}


def unstack_matrices(stacks: dict[tuple[int, int], jax.Array], like):
    """The inverse of `stack_matrices`; `like` is the tree that was stacked."""
    taken = dict.fromkeys(stacks, 0)

    def take(path, leaf):
        permutation, shape = _as_matrices(leaf_name(path), leaf.shape)
        key, n = tuple(sorted(shape[1:])), shape[0]
        matrices = stacks[key][taken[key] : taken[key] + n]
        taken[key] += n
        if shape[1] > shape[2]:
            matrices = matrices.mT
        transposed = matrices.reshape([leaf.shape[axis] for axis in permutation])
        return transposed.transpose([permutation.index(axis) for axis in range(leaf.ndim)])

    return jax.tree_util.tree_map_with_path(take, like)


def _as_matrices(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How a leaf becomes matrices (N, inputs, outputs): the order of its axes, and their shape."""
    axes = matrix_axes(name)
    return sum(axes, ()), tuple(math.prod(shape[i] for i in group) for group in axes)
