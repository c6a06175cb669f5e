"""What tests share: a small model, and parameters far from their initial values."""

import jax
import numpy as np

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.ops import fast_ops
from gpt2_jax.model.params import param_shapes


def tiny(vocab_size=11, **changes) -> GPT2:
    """Two layers, two heads, width 16, 12 positions, no dropout; the rest as in GPT-2.

    Epsilon is 1e-3, so that a test sees a fixed 1e-5 in its place.
    """
    small = dict(
        n_layer=2,
        n_head=2,
        n_embd=16,
        n_positions=12,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        layer_norm_epsilon=1e-3,
    )
    cfg = GPT2Config(**small | changes, vocab_size=vocab_size)
    return GPT2(cfg, fast_ops(cfg.attention))


def shapes(model: GPT2):
    """The shapes of the parameters, by abstract evaluation."""
    return param_shapes(model.cfg)


def rough_params(model: GPT2, seed=0, std=0.3):
    """Parameters that all matter: no bias is 0, no scale is 1, attention is far from uniform."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.float32((path[-1].key == 'scale') + rng.normal(0, std, leaf.shape)),
        shapes(model),
    )


def tokens(model: GPT2, batch=3, length=None, seed=1):
    """Random tokens (B, T), as long as the context by default."""
    size = batch, length or model.cfg.n_positions
    return np.random.default_rng(seed).integers(0, model.cfg.vocab_size, size, np.int32)


def flat(tree) -> dict[str, np.ndarray]:
    """{'h_0/attn/c_attn/kernel': leaf, ..}."""
    return {
        '/'.join(
            str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path
        ): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def relative_errors(gradients, exact) -> dict[str, float]:
    """||g - exact|| / ||exact|| of each leaf, without the bias of k, whose true gradient is 0."""
    errors, gradients = {}, flat(gradients)
    for name, leaf in flat(exact).items():
        parts = [0, 2] if name.endswith('c_attn/bias') else slice(None)
        a, b = np.float64(gradients[name])[parts], np.float64(leaf)[parts]
        errors[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return errors
