"""TODO."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.kernels.launch import call, column_blocks

COLUMNS, CHOOSE_WARPS = 4096, 16  # of the logits; all of a row lie in one program's registers


MAX_VOCAB = 2**16


def _kth_largest(x, k):
    """A threshold that exactly the k largest of all elements of the blocks `x` reach, and what equals the k-th."""

    def narrow(x, low, high):
        """From low, which k or more reach, and high, which fewer do, until k reach low or no number lies between."""

        def count(bound):
            return sum((part >= bound).astype(jnp.float32) for part in x).sum()

        def undecided(state):
            low, n_low, high, _, _ = state
            middle = 0.5 * low + 0.5 * high
            return (n_low > k) & (low < middle) & (middle < high)

        def step(state):
            low, n_low, high, n_high, turn = state
            # By turns in the middle, and where it would be if the logarithm of the count fell evenly.
            part = jnp.log(n_low / k) / jnp.log(n_low / jnp.maximum(n_high, 0.5))
            guess, middle = low + part * (high - low), 0.5 * low + 0.5 * high
            middle = jnp.where((turn == 0) & (low < guess) & (guess < high), guess, middle)
            n = count(middle)
            return (
                *(
                    jnp.where(n >= k, *pair)
                    for pair in ((middle, low), (n, n_low), (high, middle), (n_high, n))
                ),
                1 - turn,
            )

        return lax.while_loop(undecided, step, (low, count(low), high, 0 * high, 0))[0]

    least = functools.reduce(
        jnp.minimum, [jnp.where(part == -jnp.inf, jnp.inf, part) for part in x]
    ).min()
    largest = functools.reduce(jnp.maximum, x)
    most = largest.max()
    above = most + jnp.maximum(jnp.abs(most) * 1e-6, 1e-30)
    if len(x) > 1:
        # At least as many of all reach what k of the places' largest reach: a near bound, for little work.
        least = narrow([largest], least, above)
    return narrow(x, least, above)


def _choose_kernel(i_ref, logits_ref, noise_ref, _, tokens_ref, *, V, temperature, top_k):
    size, blocks = column_blocks(V, COLUMNS)
    columns = [j * size + jnp.arange(size) for j in range(blocks)]

    def load(ref, j, *index, of=True):
        return plgpu.load(
            ref.at[(*index, pl.ds(j * size, size))], mask=(columns[j] < V) & of, other=-jnp.inf
        )

    x = [load(logits_ref, j) for j in range(blocks)]
    if temperature:
        x = [part / temperature for part in x]
        bound = _kth_largest(x, top_k) if 0 < top_k < V else -jnp.inf
        # Noise for those above the bound alone, which also keeps it from being loaded, into registers, before that.
        x = [
            jnp.where(
                part >= bound, part + load(noise_ref, j, i_ref[0], of=part >= bound), -jnp.inf
            )
            for j, part in enumerate(x)
        ]
    best, where = x[0], columns[0]
    for part, column in zip(x[1:], columns[1:], strict=True):
        where, best = jnp.where(part > best, column, where), jnp.maximum(part, best)
    tokens_ref[i_ref[0]] = jnp.where(best == best.max(), where, V - 1).min()  # of equals, the first


@functools.partial(jax.jit, static_argnames=('temperature', 'top_k'))
def sample_token(logits_BV, noise_CBV, tokens_CB, i, *, temperature, top_k):
    """tokens[i] of each row becomes that of its top_k which is likeliest after noise[i] is added to the logits.

    With Gumbel noise that is a draw from the softmax; with temperature 0 there is none, nor top_k. tokens_CB keeps its
    memory: written by XLA, the token would be a copy of its own, on a stream that the next kernel waits for.
    """
    (B, V), C = logits_BV.shape, tokens_CB.shape[0]
    width = math.prod(column_blocks(V, COLUMNS))
    tokens, noise = (
        pl.BlockSpec((C, None), lambda b: (0, b)),
        pl.BlockSpec((C, None, width), lambda b: (0, b, 0)),
    )
    return call(
        functools.partial(_choose_kernel, V=V, temperature=temperature, top_k=top_k),
        grid=(B,),
        warps=CHOOSE_WARPS,
        in_specs=[
            pl.BlockSpec((1,), lambda b: (0,)),
            pl.BlockSpec((None, width), lambda b: (b, 0)),
            None if noise_CBV is None else noise,
            tokens,
        ],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(tokens_CB.shape, jnp.int32),
        input_output_aliases={2 if noise_CBV is None else 3: 0},
    )(jnp.reshape(i, 1), logits_BV, noise_CBV, tokens_CB)


def chooser(keys_CB, V, temperature, top_k):
    """The function pick(logits_BV, tokens_CB, i) -> tokens_CB that draws as jax.random.categorical with keys_CB[i].

    What that adds to the logits is the same whatever they are: it is made for all tokens of the chunk at once.
    """
    noise_CBV = (
        jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (V,))))(keys_CB)
        if temperature
        else None
    )
    return lambda logits_BV, tokens_CB, i: sample_token(
        logits_BV, noise_CBV, tokens_CB, i, temperature=temperature, top_k=top_k
    )
