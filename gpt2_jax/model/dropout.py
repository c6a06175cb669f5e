"""Dropout whose masks are a hash of (seed, site, element): any kernel can draw the same mask again."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.architecture import GPT2Config


def dropout_seeds(cfg: GPT2Config, key):
    """The seed of each dropout site, (two random words uint32, the site's number), as a list.

    Site 0 is the embeddings; then come, for each layer, the attention pattern, the output of attention
    and the output of the MLP. Without a key every seed is None: no dropout.
    """
    n_sites = 1 + 3 * cfg.n_layer
    if key is None:
        return [None] * n_sites
    words_2 = jax.random.bits(key, (2,), jnp.uint32)
    return [(words_2, jnp.uint32(site)) for site in range(n_sites)]


def hash_uint32(x):
    """A 32-bit hash of x, uint32 (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def keep_mask(index, seed, rate: float):
    """Which elements dropout keeps: True with probability 1 - rate. uint32 indices -> bool, same shape.

    A few multiplications: JAX's own generator would cost as much as the layers around it.
    """
    (a, b), site = seed
    site = site * jnp.uint32(0x9E3779B9)  # spreads the sites over the whole range
    return hash_uint32(index ^ hash_uint32(a + site)) * (hash_uint32(b ^ site) | 1) >= jnp.uint32(
        rate * 2**32
    )


def dropout(x, seed, rate: float):
    """Zeroes each element with probability `rate` and scales the others by 1 / (1 - rate).

    Computed in fp32 and rounded once to the dtype of x. A seed of None keeps everything. The index of
    an element wraps at 2^32, so elements 2^32 apart share a mask (350 attention patterns of GPT-2).
    """
    if seed is None or not rate:
        return x
    strides = [math.prod(x.shape[axis + 1 :]) % 2**32 for axis in range(x.ndim)]
    index = sum(
        lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
        for axis, stride in enumerate(strides)
    )
    scaled = x.astype(jnp.float32) / (1 - rate)
    return jnp.where(keep_mask(index, seed, rate), scaled, 0).astype(x.dtype)
