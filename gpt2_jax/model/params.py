"""The parameters of a model: initial values, their number, and the arithmetic they cost."""

import dataclasses
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


def count_params(params) -> int:
    """The number of elements in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def flops_per_token(cfg: GPT2Config, seq_len: int) -> int:
    """Model FLOPs of one training token, forward and backward (Chowdhery et al. 2022, appendix B).

    6 for each weight that multiplies a token (the tied head counts, the embedding lookups do not),
    and 12 L D T for the two products of attention, without a discount for the causal half.
    """
    D, F = cfg.n_embd, cfg.d_ff
    matmul_weights = cfg.n_layer * (4 * D * D + 2 * D * F) + cfg.vocab_size * D
    return 6 * matmul_weights + 12 * cfg.n_layer * D * seq_len
