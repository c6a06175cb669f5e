"""Drawing the next token in one kernel: temperature, top_k and the draw, without a sort."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.kernels.launch import call, column_blocks

COLUMNS, SAMPLE_WARPS = 4096, 16  # columns of a block of logits
MAX_VOCAB = 2**16  # because the registers of one program hold all logits of a row


def _kth_largest(x, k):
    """A threshold that only the k largest elements of the blocks `x` reach, and their equals."""

    def narrow(x, low, high):
        """Bisects: at least k values are >= low, fewer than k are >= high.

        Ends when exactly k values are >= low, or when no number lies between low and high.
        """

        def count(bound):
            return sum((part >= bound).astype(jnp.float32) for part in x).sum()

        def undecided(state):
            low, n_low, high, _, _ = state
            middle = 0.5 * low + 0.5 * high
            return (n_low > k) & (low < middle) & (middle < high)

        def step(state):
            low, n_low, high, n_high, turn = state
            # In turns: the middle, and a guess as if the logarithm of the count fell evenly.
            part = jnp.log(n_low / k) / jnp.log(n_low / jnp.maximum(n_high, 0.5))
            guess, middle = low + part * (high - low), 0.5 * low + 0.5 * high
            middle = jnp.where((turn == 0) & (low < guess) & (guess < high), guess, middle)
            n = count(middle)
            enough = n >= k
            low, n_low = jnp.where(enough, middle, low), jnp.where(enough, n, n_low)
            high, n_high = jnp.where(enough, high, middle), jnp.where(enough, n_high, n)
            return low, n_low, high, n_high, 1 - turn

        return lax.while_loop(undecided, step, (low, count(low), high, 0 * high, 0))[0]

    finite = [jnp.where(part == -jnp.inf, jnp.inf, part) for part in x]
    low = functools.reduce(jnp.minimum, finite).min()
    lane_max = functools.reduce(jnp.maximum, x)  # the largest value of each lane over all blocks
    largest = lane_max.max()
    high = largest + jnp.maximum(jnp.abs(largest) * 1e-6, 1e-30)
    if len(x) > 1:
        # A bound that k lanes' maxima reach is a lower bound for the k-th largest, and near it: it
        # takes one block of work instead of all.
        low = narrow([lane_max], low, high)
    return narrow(x, low, high)


def _k_largest(x, columns, k):
    """Masks of the k largest elements of the blocks `x`; of equal ones, the first columns count."""
    bound = _kth_largest(x, k)
    tied = [part == bound for part in x]
    n = k - sum((part > bound).astype(jnp.float32) for part in x).sum()

    def count(column):
        reached = [part & (at <= column) for part, at in zip(tied, columns, strict=True)]
        return sum(part.astype(jnp.float32) for part in reached).sum()

    def narrow(state):
        low, high = state
        middle = (low + high) // 2
        enough = count(middle) >= n
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # Bisects: fewer than n ties are in columns <= low, n or more in columns <= high. Without a tie
    # too many there is nothing to do.
    end = x[0].shape[0] * len(x)
    low = end - 1 - end * (count(end) > n).astype(jnp.int32)  # -1 or end - 1
    _, last = lax.while_loop(lambda state: state[1] - state[0] > 1, narrow, (low, 0 * low + end))
    return [
        (part > bound) | (tie & (at <= last))
        for part, tie, at in zip(x, tied, columns, strict=True)
    ]


def _sample_kernel(i_ref, logits_ref, noise_ref, _, tokens_ref, *, V, temperature, top_k):
    size, blocks = column_blocks(V, COLUMNS)
    columns = [j * size + jnp.arange(size) for j in range(blocks)]

    def load(ref, j, *index, of=True):
        here = ref.at[(*index, pl.ds(j * size, size))]
        return plgpu.load(here, mask=(columns[j] < V) & of, other=-jnp.inf)

    x = [load(logits_ref, j) for j in range(blocks)]
    if temperature:
        kept = _k_largest(x, columns, top_k) if 0 < top_k < V else [part > -jnp.inf for part in x]
        largest = functools.reduce(jnp.maximum, x).max()
        x = [(part - largest) / temperature for part in x]
        # The noise is loaded for the values kept only, so that it cannot be loaded, and take
        # registers, before they are known.
        noisy = [part + load(noise_ref, j, i_ref[0], of=kept[j]) for j, part in enumerate(x)]
        x = [jnp.where(*parts, -jnp.inf) for parts in zip(kept, noisy, strict=True)]
    best, token = x[0], columns[0]
    for part, column in zip(x[1:], columns[1:], strict=True):
        token, best = jnp.where(part > best, column, token), jnp.maximum(part, best)
    tokens_ref[i_ref[0]] = jnp.where(best == best.max(), token, V - 1).min()  # the first on a tie


@functools.partial(jax.jit, static_argnames=('temperature', 'top_k'))
def sample_token(logits_BV, noise_CBV, tokens_CB, i, *, temperature, top_k):
    """Writes each row's token into tokens[i]: of its top_k, the one with the largest logit + noise.

    With Gumbel noise this is a draw from the softmax. Temperature 0 ignores noise and top_k. The
    kernel writes into the memory of tokens_CB: a token written by XLA would be copied first, on a
    stream that the next kernel waits for. Raises ValueError if V exceeds MAX_VOCAB.
    """
    (B, V), C = logits_BV.shape, tokens_CB.shape[0]
    if V > MAX_VOCAB:
        raise ValueError(f'the sample kernel got {V} tokens; expected at most {MAX_VOCAB}')
    width = math.prod(column_blocks(V, COLUMNS))
    tokens = pl.BlockSpec((C, None), lambda b: (0, b))
    noise = pl.BlockSpec((C, None, width), lambda b: (0, b, 0))
    in_specs = [
        pl.BlockSpec((1,), lambda b: (0,)),
        pl.BlockSpec((None, width), lambda b: (b, 0)),
        None if noise_CBV is None else noise,
        tokens,
    ]
    return call(
        functools.partial(_sample_kernel, V=V, temperature=temperature, top_k=top_k),
        grid=(B,),
        warps=SAMPLE_WARPS,
        in_specs=in_specs,
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(tokens_CB.shape, jnp.int32),
        input_output_aliases={2 if noise_CBV is None else 3: 0},
    )(jnp.reshape(i, 1), logits_BV, noise_CBV, tokens_CB)


def make_sampler(keys_CB, V, temperature, top_k):
    """pick(logits_BV, tokens_CB, i) -> tokens_CB, drawn as jax.random.categorical with keys[i].

    The noise that is added to the logits does not depend on them, so the noise of all C tokens of
    the chunk is drawn at once.
    """
    noise_CBV = None
    if temperature:
        noise_CBV = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (V,))))(keys_CB)
    return functools.partial(_pick, noise_CBV, temperature, top_k)


def _pick(noise_CBV, temperature, top_k, logits_BV, tokens_CB, i):
    return sample_token(logits_BV, noise_CBV, tokens_CB, i, temperature=temperature, top_k=top_k)
