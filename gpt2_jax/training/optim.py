"""GPT-2's optimizer: clipping by global norm, AdamW with masked decay, averaging, and a schedule.

The learning rate rises linearly in a warmup and then decays along a cosine or a line. Two
implementations compute the same AdamW: optax, and the equations written out here. A third,
fused_optim.py, uses GPU kernels. Muon, another optimizer for the matrices, is in muon.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# Weight decay pulls these leaves, the matrices, towards 0, and leaves biases and LayerNorm scales
# alone. The name of a leaf decides, not its rank: the bias of the q, k, v projection is (3, H, K).
DECAYED = ('kernel', 'embedding')


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
    if implementation == 'optax':
        warmup = optax.linear_schedule(peak / (w + 1), peak, w)
        falling = {
            'cosine': optax.cosine_decay_schedule(peak, steps - h, alpha=end / peak),
            'linear': optax.linear_schedule(peak, end, steps - h),
        }[decay]
        if h == w:
            return optax.join_schedules([warmup, falling], [w])
        return optax.join_schedules([warmup, optax.constant_schedule(peak), falling], [w, h])

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


class AdamW(NamedTuple):
    """The schedule and the numbers of AdamW with clipping: see `make_optimizer`."""

    schedule: optax.Schedule
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float


def make_optimizer(settings: AdamW, implementation: str = 'optax') -> optax.GradientTransformation:
    """AdamW on clipped gradients (Loshchilov & Hutter 2019, algorithm 2; Pascanu et al. 2013).

        g <- g min(1, clip_norm / ||g||)     over all leaves at once; clip_norm = 0: no clipping
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        p <- p - lr (m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps) + weight_decay p)

    For update s = 0, 1, .., lr = schedule(s), and n = s + 1 counts the updates up to this one.
    The term weight_decay p applies only to leaves for which `decay_mask` is True.
    `implementation` is 'optax', or 'explicit' for these equations, written out in `explicit_adamw`.
    """
    update = unclipped_adamw(settings, implementation)
    if not settings.clip_norm:
        return update
    clip = optax.clip_by_global_norm if implementation == 'optax' else explicit_clip
    return optax.chain(clip(settings.clip_norm), update)


def unclipped_adamw(settings: AdamW, implementation: str) -> optax.GradientTransformation:
    """`make_optimizer` without clipping."""
    if implementation == 'explicit':
        return explicit_adamw(settings)
    schedule, beta1, beta2, eps, weight_decay, _ = settings
    return optax.adamw(schedule, beta1, beta2, eps, weight_decay=weight_decay, mask=decay_mask)


def explicit_clip(clip_norm: float) -> optax.GradientTransformation:
    """g <- g min(1, clip_norm / ||g||), with ||g||^2 the sum of squares over all leaves."""

    def update(grads, state, params=None):
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
        factor = clip_factor(norm, clip_norm)
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_factor(norm, clip_norm: float):
    """min(1, clip_norm / norm): what gradients of this global norm are multiplied by."""
    return jnp.where(norm > clip_norm, clip_norm / norm, 1)


class AdamWState(NamedTuple):
    """The number of updates done, and the running means m of g and v of g^2, shaped like params."""

    count: jax.Array
    m: optax.Params
    v: optax.Params


def zero_moments(params) -> AdamWState:
    """The state before the first update."""
    return AdamWState(jnp.int32(0), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))


def explicit_adamw(settings: AdamW) -> optax.GradientTransformation:
    """The equations for m, v and p in `make_optimizer`. An update returns what to add to p."""
    schedule, beta1, beta2, eps, weight_decay, _ = settings

    def update(grads, state, params):
        # fp32 even under JAX_ENABLE_X64, so that parameters and moments keep their dtype.
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


def bias_correction(beta: float, n):
    """1 - beta^n: the sum of the weights of n values in a running mean that starts at 0.

    It is computed with expm1, because the subtraction loses digits in fp32: its relative error is
    1e-5 at n = 1, beta = 0.999.
    """
    return -jnp.expm1(jnp.float32(n) * math.log(beta)) if beta else jnp.float32(1)


class DirectOptimizer(NamedTuple):
    """An optimizer whose update returns the new parameters, not what to add to them.

    AdamW by fused kernels (fused_optim.py) and Muon (muon.py) are direct.

    init(params) -> state;  update(grads, state, params) -> (params, state, rounded, norms).
    `rounded` is `round_kernels(params, round_to)` of the new parameters, or None if `round_to` is
    None.
    """

    init: Callable
    update: Callable
    round_to: str | None = None


Optimizer = optax.GradientTransformation | DirectOptimizer


def apply_update(optimizer: Optimizer, grads, opt_state, params):
    """Clips, runs AdamW and adds the result: new (params, opt_state, rounded, norms).

    `rounded` is as in DirectOptimizer, and None for other optimizers. The norms are grad_norm
    (before clipping), update_norm and param_norm (after the update).
    """
    if isinstance(optimizer, DirectOptimizer):
        return optimizer.update(grads, opt_state, params)
    grads = as_parameters(grads, params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    trees = {'grad_norm': grads, 'update_norm': updates, 'param_norm': params}
    return params, opt_state, None, {name: optax.tree.norm(tree) for name, tree in trees.items()}


def as_parameters(grads, params):
    """The gradients in fp32, cut to the shapes of the parameters.

    Without fused GPU kernels this changes nothing. The kernels may return bf16 gradients with rows
    of padding after the last row.
    """
    return jax.tree.map(lambda g, p: g[: len(p)].astype(jnp.float32), grads, params)


def average_in(average, params, n, decay: float):
    """The average of the parameters over updates, with the parameters of update n = 1, 2, .. added.

        a <- a + max(1 - decay, 10 / (n + 9)) (p - a)

    This is an exponential moving average over about the last 1 / (1 - decay) updates. Early in a
    run it covers the last tenth of the updates, so that it forgets the initial parameters.
    """
    weight = jnp.maximum(1 - decay, 10 / (n + 9.0))
    return jax.tree.map(lambda a, p: a + weight * (p - a), average, params)


def round_kernels(params, dtype: str):
    """The leaves 'kernel', the matrices of the blocks, in this dtype; None for other leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(dtype) if path[-1].key == 'kernel' else None, params
    )


def join_kernels(rounded, params):
    """The parameters, with each leaf of `round_kernels` in the place of the original leaf."""
    return jax.tree.map(
        lambda kernel, leaf: leaf if kernel is None else kernel,
        rounded,
        params,
        is_leaf=lambda leaf: leaf is None,
    )


def root_of_squares(tree):
    """The global norm of a tree, fp32, in few passes.

    Each matrix is summed by rows, all vectors are joined into one, and then these sums are summed.
    """
    parts, vectors = [], []
    for leaf in jax.tree.leaves(tree):
        leaf = leaf.astype(jnp.float32)
        if leaf.size > 1 << 16:
            parts.append(jnp.square(leaf).sum(-1).reshape(-1))
        else:
            vectors.append(leaf.reshape(-1))
    parts += [jnp.square(jnp.concatenate(vectors))] if vectors else []
    # Without the barrier XLA sums each part by itself: 100 small kernels for the 124M model.
    return jnp.sqrt(jax.lax.optimization_barrier(jnp.concatenate(parts)).sum())
