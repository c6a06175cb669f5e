"""What tests share: a small model, parameters far from their initial values, GPT-2 in numpy."""

import functools
import math

import jax
import numpy as np

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.model.ops import fast_ops
from gpt2_jax.model.params import param_shapes

erf = np.vectorize(math.erf)
GELU = {
    'gelu': lambda x: x / 2 * (1 + erf(x / math.sqrt(2))),
    'gelu_new': lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


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


def numpy_gpt2(params, cfg, tokens_BT, tap=lambda name, x: x):
    """The logits of GPT-2 in fp64, with every activation handed through `tap`."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def linear(x, at, axes):
        y = np.tensordot(x, at['kernel'], axes)
        return y + at['bias'] if cfg.bias else y

    def norm(x, at):
        n = (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + cfg.layer_norm_epsilon
        )
        return n * at['scale'] + (at['bias'] if cfg.bias else 0)

    T = tokens_BT.shape[1]
    visible_TS = np.tril(np.ones((T, T), bool))
    wte_VD = params['wte']['embedding']
    x = tap('embed', wte_VD[tokens_BT]) + tap('pos_embed', params['wpe']['embedding'][:T])
    for i in range(cfg.n_layer):
        block = params[f'h_{i}']
        named = functools.partial(lambda i, name, x: tap(f'h_{i}.{name}', x), i)
        x = named('resid_pre', x)
        y = named('ln_1', norm(x, block['ln_1']))
        qkv = linear(y, block['attn']['c_attn'], 1)
        q, k, v = (named(name, qkv[:, :, j]) for j, name in enumerate('qkv'))
        scores = np.einsum('BTHK,BSHK->BHTS', q, k) / math.sqrt(cfg.head_dim)
        scores = named('attn_scores', np.where(visible_TS, scores, -np.inf))
        e = np.exp(scores - scores.max(-1, keepdims=True))
        pattern = named('pattern', e / e.sum(-1, keepdims=True))
        z = named('z', np.einsum('BHTS,BSHK->BTHK', pattern, v))
        x = named('resid_mid', x + named('attn_out', linear(z, block['attn']['c_proj'], 2)))
        y = named('ln_2', norm(x, block['ln_2']))
        h = named('mlp_pre', linear(y, block['mlp']['c_fc'], 1))
        h = named('mlp_post', GELU[cfg.activation_function](h))
        x = named('resid_post', x + named('mlp_out', linear(h, block['mlp']['c_proj'], 1)))
    return tap('logits', tap('ln_f', norm(x, params['ln_f'])) @ wte_VD.T)
