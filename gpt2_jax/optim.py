"""The optimizer of GPT-2's training: AdamW with masked decay, clipping by global norm, warmup and cosine."""

import jax
import optax

# Leaves that weight decay pulls towards 0: the matrices. Biases and LayerNorm scales are left alone. By name and
# not by rank: the bias of the fused q, k, v projection is (3, H, K).
DECAYED = ('kernel', 'embedding')


def decay_mask(params):
    """True for each leaf that is decayed, by the last part of its path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def make_schedule(*, learning_rate: float, end_learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """The learning rate of update s = 0, 1, ..: linear to the peak over `warmup_steps`, cosine to the end.

        s < w:   peak (s + 1) / (w + 1)
        s >= w:  end + (peak - end) (1 + cos(pi (s - w) / (steps - w))) / 2

    The ramp starts at peak / (w + 1): starting at 0 would waste the first update.
    A run with steps <= w is all ramp.
    """
    return optax.warmup_cosine_decay_schedule(init_value=learning_rate / (warmup_steps + 1), peak_value=learning_rate,
                                              warmup_steps=warmup_steps, decay_steps=max(steps, warmup_steps + 1),
                                              end_value=end_learning_rate)


def make_optimizer(*, schedule: optax.Schedule, beta1: float, beta2: float, eps: float, weight_decay: float,
                   clip_norm: float) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on gradients clipped to `clip_norm` (Pascanu et al. 2013).

        g <- g min(1, clip_norm / ||g||)            over all leaves at once; 0 turns clipping off
        m <- beta1 m + (1 - beta1) g                v <- beta2 v + (1 - beta2) g^2
        p <- p - lr_s (m / (1 - beta1^s) / (sqrt(v / (1 - beta2^s)) + eps) + weight_decay p)     decay where masked
    """
    adamw = optax.adamw(schedule, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw
