"""The parameters of a model: initial values, and their number."""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.architecture import GPT2Config
from gpt2_jax.model.gpt2 import GPT2, Block
from gpt2_jax.model.ops import PLAIN


def init_params(cfg: GPT2Config, seed: int):
    """Initial parameters, fp32: a pure function of the seed."""
    ends_key, blocks_key = jax.random.split(jax.random.key(seed))
    ends = GPT2(dataclasses.replace(cfg, n_layer=0))
    params = ends.init(ends_key, jnp.zeros((1, 1), jnp.int32))['params']
    x_BTD = jnp.zeros((1, 1, cfg.n_embd), cfg.stream_dtype)

    def init_block(key):
        return Block(cfg, PLAIN).init(key, x_BTD, None, 0, (None,) * 3)['params']

    # All blocks in one vmap: compiling takes 3 s instead of 6 (H100, 6 layers). The barrier keeps
    # XLA from initialising all blocks again for each slice.
    keys = jax.random.split(blocks_key, cfg.n_layer)
    blocks = lax.optimization_barrier(jax.vmap(init_block)(keys))
    return params | {
        f'h_{i}': jax.tree.map(operator.itemgetter(i), blocks) for i in range(cfg.n_layer)
    }


@functools.lru_cache(maxsize=64)
def param_shapes(cfg: GPT2Config):
    """The shapes and dtypes of the parameters: one tree for all callers, to be read only.

    It is traced once for each model, which takes 0.05 s.
    """
    return jax.eval_shape(lambda: init_params(cfg, 0))


def count_params(params) -> int:
    """The number of elements in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
