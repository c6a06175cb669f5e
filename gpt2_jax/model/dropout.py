"""Dropout whose mask is a hash of (seed, site, element), so that any kernel can draw it again."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from gpt2_jax.architecture import GPT2Config


def dropout_seeds(cfg: GPT2Config, key, first_row=0):
    """The seed of each dropout site, as a list: (two random words uint32, the site's number, row).

    Site 0 is the embeddings. Then come, for each layer, the attention pattern, the output of
    attention and the output of the MLP. Without a key every seed is None: no dropout. `first_row`
    is the index, in the whole micro-batch, of the first row on this device, so that a device with
    some of the rows draws their part of the mask.
    """
    n_sites = 1 + 3 * cfg.n_layer
    if key is None:
        return [None] * n_sites
    words_2 = jax.random.bits(key, (2,), jnp.uint32)
    row = jnp.uint32(first_row)
    return [(words_2, jnp.uint32(site), row) for site in range(n_sites)]


def hash_uint32(x):
    """A 32-bit hash of x, uint32 (lowbias32 by Chris Wellons)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def keep_mask(index, seed, rate: float):
    """The elements that dropout keeps, each with probability 1 - rate: index uint32 -> bool.

    It takes a few multiplications. JAX's own generator would cost as much as the layers around it.
    """
    (word_0, word_1), site, _ = seed
    site = site * jnp.uint32(0x9E3779B9)  # spreads the sites over the whole range
    multiplier = hash_uint32(word_1 ^ site) | 1
    draw = hash_uint32(index ^ hash_uint32(word_0 + site)) * multiplier
    return draw >= jnp.uint32(rate * 2**32)


def dropout(x, seed, rate: float):
    """Zeroes each element of x with probability `rate` and scales the others by 1 / (1 - rate).

    Computed in fp32 and rounded once to the dtype of x. A seed of None keeps everything. The index
    of an element wraps at 2^32, so elements 2^32 apart share a mask: in the attention pattern of
    GPT-2 (12 heads, 1,024 positions), elements 341 rows of the batch apart.
    """
    if seed is None or not rate:
        return x
    strides = [math.prod(x.shape[axis + 1 :]) % 2**32 for axis in range(x.ndim)]
    index = sum(
        lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
        for axis, stride in enumerate(strides)
    )
    index += seed[2] * jnp.uint32(strides[0])
    scaled = x.astype(jnp.float32) / (1 - rate)
    return jnp.where(keep_mask(index, seed, rate), scaled, 0).astype(x.dtype)
