"""The optimizer of GPT-2's training: AdamW with masked decay, clipping by global norm, warmup and cosine.

Each in two implementations that compute the same: optax's, and one written out from the equations. A third is in
fused.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# Leaves that weight decay pulls towards 0: the matrices. Biases and LayerNorm scales are left alone. By name and
# not by rank: the bias of the fused q, k, v projection is (3, H, K).
DECAYED = ('kernel', 'embedding')


class FusedOptimizer(NamedTuple):
    """An optimizer that changes parameters itself: update(grads, state, params) -> (params, state, norms)."""

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
) -> optax.Schedule:
    """The learning rate of update s = 0, 1, ..: linear to the peak over `warmup_steps`, cosine to the end.

        s < w:   peak (s + 1) / (w + 1)
        s >= w:  end + (peak - end) (1 + cos(pi (s - w) / (steps - w))) / 2          (Loshchilov & Hutter 2017, eq. 5)

    The ramp starts at peak / (w + 1): starting at 0 would waste the first update.
    A run with steps <= w is all ramp.
    """
    peak, end, w, steps = (
        learning_rate,
        end_learning_rate,
        warmup_steps,
        max(steps, warmup_steps + 1),
    )
    if implementation == 'optax':
        return optax.warmup_cosine_decay_schedule(
            init_value=peak / (w + 1),
            peak_value=peak,
            warmup_steps=w,
            decay_steps=steps,
            end_value=end,
        )

    def schedule(s):
        ramp = peak * (s + 1) / (w + 1)
        cosine = (
            end + (peak - end) * (1 + jnp.cos(jnp.pi * jnp.minimum((s - w) / (steps - w), 1))) / 2
        )
        return jnp.where(s < w, ramp, cosine)

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
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on gradients clipped to `clip_norm` (Pascanu et al. 2013).

    g <- g min(1, clip_norm / ||g||)            over all leaves at once; 0 turns clipping off
    m <- beta1 m + (1 - beta1) g                v <- beta2 v + (1 - beta2) g^2
    p <- p - lr_s (m / (1 - beta1^s) / (sqrt(v / (1 - beta2^s)) + eps) + weight_decay p)     decay where masked
    """
    if implementation == 'optax':
        clip = optax.clip_by_global_norm(clip_norm)
        update = optax.adamw(
            schedule, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=decay_mask
        )
    else:
        clip = explicit_clip(clip_norm)
        update = explicit_adamw(schedule, beta1, beta2, eps, weight_decay)
    return optax.chain(clip, update) if clip_norm else update


def as_parameters(grads, params):
    """Gradients in the parameters' shapes and dtypes: those of fused kernels may be bf16, and have rows of padding."""
    return jax.tree.map(lambda g, p: g[: len(p)].astype(p.dtype), grads, params)


def apply_update(optimizer: Optimizer, grads, opt_state, params):
    """One update: (params, opt_state, norms), where norms has grad_norm (before clipping), update_norm and param_norm
    (after the update)."""
    if isinstance(optimizer, FusedOptimizer):
        return optimizer.update(grads, opt_state, params)
    grads = as_parameters(grads, params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    norm = optax.tree.norm
    return (
        params,
        opt_state,
        {'grad_norm': norm(grads), 'update_norm': norm(updates), 'param_norm': norm(params)},
    )


def explicit_clip(clip_norm: float) -> optax.GradientTransformation:
    """g <- g min(1, clip_norm / ||g||), where ||g||^2 sums the squares of all leaves; keeps no state."""

    def update(grads, state, params=None):
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
        factor = jnp.where(norm > clip_norm, clip_norm / norm, 1)
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class AdamWState(NamedTuple):
    """Updates done, and the running means of g and of g^2, which are laid out as the parameters are."""

    count: jax.Array
    m: optax.Params
    v: optax.Params


def zero_moments(params) -> AdamWState:
    """The state before the first update."""
    return AdamWState(jnp.int32(0), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))


def explicit_adamw(
    schedule: optax.Schedule, beta1: float, beta2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """The other three lines of `make_optimizer`, which update s = 1, 2, .. adds to the parameters."""

    def update(grads, state, params):
        s = state.count + 1
        learning_rate = schedule(state.count)
        m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.m, grads)
        v = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g**2, state.v, grads)

        def step(m, v, p, decays):
            m_hat = m / (
                1 - beta1**s
            )  # m and v start at 0: without this they are too small at first
            v_hat = v / (1 - beta2**s)
            return -learning_rate * (
                m_hat / (jnp.sqrt(v_hat) + eps) + (weight_decay * p if decays else 0)
            )

        return jax.tree.map(step, m, v, params, decay_mask(params)), AdamWState(s, m, v)

    return optax.GradientTransformation(zero_moments, update)
