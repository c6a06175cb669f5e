"""GPT-2's optimizer: clipping by global norm, AdamW with masked decay or Muon, and a schedule.

The learning rate rises linearly in a warmup and then decays along a cosine or a line. Two
implementations compute the same AdamW: optax, and the equations written out here. A third,
fused_step.py, uses GPU kernels. Muon is written out here alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt2_jax.parallel.partition import leaf_name

# Weight decay pulls these leaves, the matrices, towards 0, and leaves biases and LayerNorm scales
# alone. The name of a leaf decides, not its rank: the bias of the q, k, v projection is (3, H, K).
DECAYED = ('kernel', 'embedding')

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


class FusedOptimizer(NamedTuple):
    """An optimizer whose update returns the new parameters, not what to add to them.

    init(params) -> state;  update(grads, state, params) -> (params, state, norms).
    """

    init: Callable
    update: Callable


Optimizer = optax.GradientTransformation | FusedOptimizer


def decay_mask(params):
    """True for each leaf that is decayed, by the last part of its path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def make_schedule(
    *,
    implementation: str = 'optax',
    learning_rate: float,
    end_learning_rate: float,
    warmup_steps: int,
    steps: int,
    decay: str = 'cosine',
    hold: float = 0.0,
) -> optax.Schedule:
    """The learning rate of update s = 0, 1, ..: linear over w = `warmup_steps`, held, then decayed.

        s < w:   peak (s + 1) / (w + 1)
        s < h:   peak                        h = w + `hold` (steps - w), rounded
        s >= h:  end + (peak - end) (1 + cos(pi (s - h) / (steps - h))) / 2     decay 'cosine'
                 end + (peak - end) (1 - (s - h) / (steps - h))                 decay 'linear'

    From s = `steps` on, the rate is `end`. The cosine is equation 5 of Loshchilov & Hutter 2017.
    The warmup starts at peak / (w + 1), because a first update at a rate of 0 would be wasted. A
    run with steps <= w ends during the warmup. `implementation` is 'optax', or 'explicit' for these
    equations.
    """
    peak, end, w = learning_rate, end_learning_rate, warmup_steps
    steps = max(steps, w + 1)
    h = min(w + round(hold * (steps - w)), steps - 1)
    if implementation == 'optax' and (decay, h) == ('cosine', w):
        return optax.warmup_cosine_decay_schedule(
            init_value=peak / (w + 1),
            peak_value=peak,
            warmup_steps=w,
            decay_steps=steps,
            end_value=end,
        )
    if implementation == 'optax':
        decays = {
            'cosine': optax.cosine_decay_schedule(peak, steps - h, alpha=end / peak),
            'linear': optax.linear_schedule(peak, end, steps - h),
        }
        warmup = optax.linear_schedule(peak / (w + 1), peak, w)
        return optax.join_schedules(
            [warmup, optax.constant_schedule(peak), decays[decay]], boundaries=[w, h]
        )

    def schedule(s):
        ramp = peak * (s + 1) / (w + 1)
        part = jnp.minimum((s - h) / (steps - h), 1)
        if decay == 'cosine':
            falling = end + (peak - end) * (1 + jnp.cos(jnp.pi * part)) / 2
        else:
            falling = end + (peak - end) * (1 - part)
        if h > w:
            falling = jnp.where(s < h, peak, falling)
        return jnp.where(s < w, ramp, falling)

    return schedule


def make_optimizer(
    *,
    implementation: str = 'optax',
    schedule: optax.Schedule,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW on clipped gradients (Loshchilov & Hutter 2019, algorithm 2; Pascanu et al. 2013).

        g <- g min(1, clip_norm / ||g||)     over all leaves at once; clip_norm = 0: no clipping
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        p <- p - lr (m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps) + weight_decay p)

    For update s = 0, 1, .., lr = schedule(s), and n = s + 1 counts the updates with this one. The
    term weight_decay p applies only to leaves for which `decay_mask` is True. `implementation` is
    'optax', or 'explicit' for these equations written out in `explicit_adamw`.
    """
    update = adamw(implementation, schedule, beta1, beta2, eps, weight_decay)
    if not clip_norm:
        return update
    is_optax = implementation == 'optax'
    clip = optax.clip_by_global_norm(clip_norm) if is_optax else explicit_clip(clip_norm)
    return optax.chain(clip, update)


def adamw(
    implementation: str,
    schedule: optax.Schedule,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> optax.GradientTransformation:
    """`make_optimizer` without clipping."""
    if implementation == 'optax':
        return optax.adamw(
            schedule, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=decay_mask
        )
    return explicit_adamw(schedule, beta1, beta2, eps, weight_decay)


def as_parameters(grads, params):
    """The gradients in fp32, cut to the shapes of the parameters.

    Without fused GPU kernels this changes nothing. The kernels may return bf16 gradients with rows
    of padding after the last row.
    """
    return jax.tree.map(lambda g, p: g[: len(p)].astype(jnp.float32), grads, params)


def apply_update(optimizer: Optimizer, grads, opt_state, params):
    """Clips, runs AdamW and adds the result to the parameters: new (params, opt_state, norms).

    The norms are grad_norm (before clipping), update_norm and param_norm (after the update).
    """
    if isinstance(optimizer, FusedOptimizer):
        return optimizer.update(grads, opt_state, params)
    grads = as_parameters(grads, params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    trees = {'grad_norm': grads, 'update_norm': updates, 'param_norm': params}
    return params, opt_state, {name: optax.tree.norm(tree) for name, tree in trees.items()}


def average_in(average, params, n, decay: float):
    """The average of the parameters over updates, with those of update n = 1, 2, .. taken in.

        a <- a + max(1 - decay, 10 / (n + 9)) (p - a)

    An exponential moving average over the last 1 / (1 - decay) updates or so. Early on it covers
    the last tenth of the updates, so that it forgets the initial parameters.
    """
    weight = jnp.maximum(1 - decay, 10 / (n + 9.0))
    return jax.tree.map(lambda a, p: a + weight * (p - a), average, params)


def explicit_clip(clip_norm: float) -> optax.GradientTransformation:
    """g <- g min(1, clip_norm / ||g||), with ||g||^2 the sum of squares over all leaves."""

    def update(grads, state, params=None):
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
        factor = jnp.where(norm > clip_norm, clip_norm / norm, 1)
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class AdamWState(NamedTuple):
    """The number of updates done, and the running means m of g and v of g^2, shaped as params."""

    count: jax.Array
    m: optax.Params
    v: optax.Params


def zero_moments(params) -> AdamWState:
    """The state before the first update."""
    return AdamWState(jnp.int32(0), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))


def bias_correction(beta: float, n):
    """1 - beta^n: the sum of the weights of n values in a running mean that starts at 0.

    It is computed with expm1, because the subtraction loses digits in fp32: its relative error is
    1e-5 at n = 1, beta = 0.999.
    """
    return -jnp.expm1(jnp.float32(n) * math.log(beta)) if beta else jnp.float32(1)


def explicit_adamw(
    schedule: optax.Schedule, beta1: float, beta2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """The equations of m, v and p in `make_optimizer`: what an update adds to the parameters."""

    def update(grads, state, params):
        # fp32 also under JAX_ENABLE_X64, so that parameters and moments keep their dtype.
        learning_rate = jnp.float32(schedule(state.count))
        m_weight, v_weight = (bias_correction(beta, state.count + 1) for beta in (beta1, beta2))
        m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.m, grads)
        v = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g**2, state.v, grads)

        def leaf_update(m, v, p, decays):
            decay = weight_decay * p if decays else 0
            return -learning_rate * (m / m_weight / (jnp.sqrt(v / v_weight) + eps) + decay)

        updates = jax.tree.map(leaf_update, m, v, params, decay_mask(params))
        return updates, AdamWState(state.count + 1, m, v)

    return optax.GradientTransformation(zero_moments, update)


def make_muon(
    *,
    implementation: str = 'optax',
    schedule: optax.Schedule,
    muon_schedule: optax.Schedule,
    muon_beta: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    dtype: str = 'float32',
    precision: str = 'highest',
) -> FusedOptimizer:
    """Muon on the matrices of the blocks (MATRICES), AdamW on all other leaves, clipped together.

        m <- mu m + (1 - mu) g
        d <- mu m / (1 - mu^(n + 1)) + (1 - mu) g / (1 - mu^n)             Nesterov's look-ahead
        p <- p - lr (MUON_RMS sqrt(max(inputs, outputs)) orthogonal(d) + weight_decay p)

    mu is `muon_beta`, lr = muon_schedule(n - 1), and n counts the updates with this one.
    orthogonal(d) sets the singular values of d near 1 (see `orthogonalize`). The update of a matrix
    equals that of optax.contrib.muon(.., consistent_rms=MUON_RMS). optax computes one matrix after
    the other, hundreds of small kernels on a GPU; here all matrices of one shape are one array.
    `dtype` and `precision` are those of the products in `orthogonalize`. The other options are
    those of `make_optimizer`.
    """
    others = adamw(implementation, schedule, beta1, beta2, eps, weight_decay)

    def init(params) -> MuonState:
        m = jax.tree.map(jnp.zeros_like, muon_leaves(params))
        # Two counters, as in optax: the schedule's is set back when another run is continued.
        at = optax.ScaleByScheduleState(jnp.int32(0))
        return MuonState(jnp.int32(0), m, at, others.init(muon_leaves(params, False)))

    def update(grads, state, params):
        grads = as_parameters(grads, params)
        g, p, m = map(stack_matrices, (muon_leaves(grads), muon_leaves(params), state.m))
        g_others, p_others = (muon_leaves(tree, False) for tree in (grads, params))
        norm = root_of_squares((g, g_others))
        if clip_norm:
            factor = jnp.where(norm > clip_norm, clip_norm / norm, 1)
            g, g_others = jax.tree.map(lambda x: x * factor, (g, g_others))
        n, lr = state.count + 1, jnp.float32(muon_schedule(state.schedule.count))
        ahead = muon_beta / bias_correction(muon_beta, n + 1)
        now = (1 - muon_beta) / bias_correction(muon_beta, n)
        updates = {}
        for shape in g:
            m[shape] = muon_beta * m[shape] + (1 - muon_beta) * g[shape]
            direction_NIO = orthogonalize(ahead * m[shape] + now * g[shape], dtype, precision)
            scale = MUON_RMS * math.sqrt(max(shape))
            updates[shape] = -lr * (scale * direction_NIO + weight_decay * p[shape])
        updates_others, state_others = others.update(g_others, state.others, p_others)
        p, p_others = optax.apply_updates((p, p_others), (updates, updates_others))
        norms = {
            'grad_norm': norm,
            'update_norm': root_of_squares((updates, updates_others)),
            'param_norm': root_of_squares((p, p_others)),
        }
        at = optax.ScaleByScheduleState(state.schedule.count + 1)
        state = MuonState(n, unstack_matrices(m, state.m), at, state_others)
        matrices, mask = unstack_matrices(p, state.m), muon_mask(params)
        params = jax.tree.map(lambda is_m, a, b: a if is_m else b, mask, matrices, p_others)
        return params, state, norms

    return FusedOptimizer(init, update)


class MuonState(NamedTuple):
    """The number n of updates done, the mean gradient m of the matrices, and AdamW's state.

    `m` and `others` are shaped as params, with empty nodes for the leaves of the other one.
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
    """The leaves that Muon updates, or all others; an empty node, as optax masks one, for the rest.

    The paths are those of the parameters.
    """
    mask = muon_mask(tree)
    return jax.tree.map(lambda m, leaf: leaf if m == of_muon else optax.MaskedNode(), mask, tree)


def orthogonalize(x_NIO, dtype: str = 'float32', precision: str = 'highest'):
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
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        permutation, shape = _as_matrices(leaf_name(path), leaf.shape)
        matrices = leaf.transpose(permutation).reshape(shape)
        stacks.setdefault(tuple(sorted(shape[1:])), []).append(_wide(matrices))
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


def _wide(matrices):
    return matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT


def root_of_squares(tree):
    """The global norm of a tree in few passes: see `sum_of_squares`."""
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(sum_of_squares(leaves, [1.0] * len(leaves)))


def sum_of_squares(leaves: list, weights: list[float]):
    """The sum of weight x^2 over all elements x of all leaves, fp32, in few passes.

    Each matrix is summed by rows, all vectors are joined into one, and then these sums are summed.
    """
    parts, vectors = [], {}
    for leaf, weight in zip(leaves, weights, strict=True):
        if leaf.size > 1 << 16:
            rows = jnp.square(leaf.astype(jnp.float32)).sum(-1).reshape(-1)
            parts.append(rows if weight == 1 else rows * weight)
        else:
            vectors.setdefault(weight, []).append(leaf.astype(jnp.float32).reshape(-1))
    for weight, group in vectors.items():
        squares = jnp.square(jnp.concatenate(group))
        parts.append(squares if weight == 1 else squares * weight)
    # Without the barrier XLA sums each part by itself: 100 small kernels for the 124M model.
    return jax.lax.optimization_barrier(jnp.concatenate(parts)).sum()
