"""Drawing the next token: temperature, top_k and the draw, without a sort.

The kernel `sample` draws the token of a row. One program, which holds the row's values in its
registers, would take long to find the k largest of a vocabulary. So the kernel `select`, with a
program for each block of logits, first finds the k largest of the block, and `sample` chooses among
them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gpt2_jax.kernels.launch import call, column_blocks

COLUMNS, SAMPLE_WARPS, SELECT_WARPS = 4096, 16, 8  # columns of a block of logits
# With more rows the GPU has a row for each multiprocessor, so that nothing is gained by `select`:
# a token of 124M takes 693 -> 688 us for 64 texts, but 1,149 -> 1,154 us for 128 (H100).
MAX_SELECT_ROWS = 64
MAX_VOCAB = 2**16  # because the registers of one program hold all logits of a row


def _kth_largest(x, k, most):
    """A bound that at least k elements of the blocks `x` reach; how many reach it; how many exceed.

    At most `most` elements reach the bound, except on a tie: then the bound is the k-th largest
    element. Only then is the last number needed, and exact.
    """

    def narrow(x, low, high):
        """Bisects: at least k values are >= low, fewer than k are >= high.

        Ends when at most `most` values are >= low, or when no number lies between low and high.
        Returns low, its count, and the count of high.
        """

        def count(bound):
            return sum((part >= bound).astype(jnp.float32) for part in x).sum()

        def undecided(state):
            low, n_low, high, _, _ = state
            middle = 0.5 * low + 0.5 * high
            return (n_low > most) & (low < middle) & (middle < high)

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

        low, n_low, _, n_high, _ = lax.while_loop(
            undecided, step, (low, count(low), high, 0 * high, 0)
        )
        return low, n_low, n_high

    finite = [jnp.where(part == -jnp.inf, jnp.inf, part) for part in x]
    low = functools.reduce(jnp.minimum, finite).min()
    lane_max = functools.reduce(jnp.maximum, x)  # the largest value of each lane over all blocks
    largest = lane_max.max()
    high = largest + jnp.maximum(jnp.abs(largest) * 1e-6, 1e-30)
    if len(x) > 1:
        # A bound that k lanes' maxima reach is a lower bound for the k-th largest, and near it: it
        # takes one block of work instead of all.
        low = narrow([lane_max], low, high)[0]
    return narrow(x, low, high)


def _k_largest(x, columns, k, most):
    """Masks of the k largest elements of the blocks `x`; on a tie, the first columns count.

    Up to `most` of the largest elements may be kept, if they are found sooner than k of them.
    Without a tie, this adds no pass over the blocks.
    """
    bound, n_reaching, n_above = _kth_largest(x, k, most)

    def count(column):
        """The ties in columns up to this one."""
        reached = [(part == bound) & (at <= column) for part, at in zip(x, columns, strict=True)]
        return sum(part.astype(jnp.float32) for part in reached).sum()

    def narrow(state):
        low, high = state
        middle = (low + high) // 2
        enough = count(middle) >= k - n_above
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # Bisects: columns <= low have too few of the tied elements, columns <= high enough. If at most
    # `most` elements reach the bound, low and high begin next to each other, and the loop ends.
    low = MAX_VOCAB - 1 - MAX_VOCAB * (n_reaching > most).astype(jnp.int32)  # -1 on a tie
    _, last = lax.while_loop(
        lambda state: state[1] - state[0] > 1, narrow, (low, 0 * low + MAX_VOCAB)
    )
    return [
        (part > bound) | ((part == bound) & (at <= last))
        for part, at in zip(x, columns, strict=True)
    ]


def _select_kernel(logits_ref, values_ref, columns_ref, *, V, k):
    """The k largest logits of a block, and a few more, with their columns; -inf fills the rest."""
    (most,) = values_ref.shape
    index = jnp.arange(COLUMNS, dtype=jnp.int32)
    columns = pl.program_id(1) * COLUMNS + index
    x = plgpu.load(logits_ref, mask=columns < V, other=-jnp.inf)
    (kept,) = _k_largest([x], [columns], k, most)
    # The kept elements come first, in their order, and the rest after them.
    rank = jnp.cumsum(kept.astype(jnp.int32))
    slot = jnp.where(kept, rank - 1, rank.max() + index - rank)
    plgpu.store(values_ref.at[slot], jnp.where(kept, x, -jnp.inf), mask=slot < most)
    plgpu.store(columns_ref.at[slot], columns, mask=slot < most)


def _select(logits_BV, k):
    """The candidates for the k largest logits of each row: their values and columns, (B, N).

    Returns all logits and None if that would take longer, or if k is 0.
    """
    (B, V), blocks = logits_BV.shape, pl.cdiv(logits_BV.shape[1], COLUMNS)
    most = pl.next_power_of_2(k + 1)
    if not k or B > MAX_SELECT_ROWS or blocks < 3 or most > COLUMNS // 2:
        return logits_BV, None
    kept = pl.BlockSpec((None, most), lambda b, j: (b, j))
    return call(
        functools.partial(_select_kernel, V=V, k=k),
        grid=(B, blocks),
        warps=SELECT_WARPS,
        in_specs=[pl.BlockSpec((None, COLUMNS), lambda b, j: (b, j))],
        out_specs=[kept, kept],
        out_shape=[
            jax.ShapeDtypeStruct((B, blocks * most), dtype) for dtype in (jnp.float32, jnp.int32)
        ],
    )(logits_BV)


def _sample_kernel(
    at_ref, x_ref, columns_ref, noise_ref, _, tokens_ref, next_ref, *, N, V, temperature, top_k
):
    next_ref[...] = at_ref[...] + 1
    i = at_ref[0]  # loaded first, as the line before: the end of the kernel would wait for it
    size, blocks = column_blocks(N, COLUMNS)
    index = [j * size + jnp.arange(size, dtype=jnp.int32) for j in range(blocks)]
    blocks = [pl.ds(j * size, size) for j in range(blocks)]
    x = [
        plgpu.load(x_ref.at[block], mask=at < N, other=-jnp.inf)
        for block, at in zip(blocks, index, strict=True)
    ]
    columns = index
    if columns_ref is not None:
        columns = [
            plgpu.load(columns_ref.at[block], mask=at < N, other=0)
            for block, at in zip(blocks, index, strict=True)
        ]
    if temperature:
        kept = [part > -jnp.inf for part in x]
        if 0 < top_k < V:
            kept = _k_largest(x, columns, top_k, top_k)
        largest = functools.reduce(jnp.maximum, x).max()
        x = [(part - largest) / temperature for part in x]
        # The noise is loaded for the kept values only. So it is not loaded before they are known,
        # when it would take registers.
        noisy = [
            part + plgpu.load(noise_ref.at[i, at], mask=mask & (at < V), other=-jnp.inf)
            for part, at, mask in zip(x, columns, kept, strict=True)
        ]
        x = [jnp.where(*parts, -jnp.inf) for parts in zip(kept, noisy, strict=True)]
    best, token = x[0], columns[0]
    for part, column in zip(x[1:], columns[1:], strict=True):
        token, best = jnp.where(part > best, column, token), jnp.maximum(part, best)
    token = jnp.where(best == best.max(), token, V - 1).min()  # the first on a tie
    tokens_ref[i] = token


@functools.partial(jax.jit, static_argnames=('temperature', 'top_k'))
def sample_token(logits_BV, noise_CBV, tokens_CB, at_2, *, temperature, top_k):
    """Writes each row's token into tokens[i]: of its top_k, the one with the largest logit + noise.

    at_2 holds i and the position of the token. Returns tokens_CB and the at_2 of the next token:
    XLA would add 1 to each in a kernel of its own.

    With Gumbel noise this is a draw from the softmax. Temperature 0 ignores noise and top_k. The
    kernel writes into the memory of tokens_CB: a token written by XLA would be copied first, on a
    stream that the next kernel waits for. Raises ValueError if V exceeds MAX_VOCAB.
    """
    (B, V), C = logits_BV.shape, tokens_CB.shape[0]
    if V > MAX_VOCAB:
        raise ValueError(f'the sample kernel got {V} tokens; expected at most {MAX_VOCAB}')
    x_BN, columns_BN = _select(logits_BV, top_k if temperature and top_k < V else 0)
    N = x_BN.shape[1]
    row = pl.BlockSpec((None, math.prod(column_blocks(N, COLUMNS))), lambda b: (b, 0))
    tokens, at = pl.BlockSpec((C, None), lambda b: (0, b)), pl.BlockSpec((2,), lambda b: (0,))
    in_specs = [
        at,
        row,
        None if columns_BN is None else row,
        None if noise_CBV is None else pl.BlockSpec((C, None, V), lambda b: (0, b, 0)),
        tokens,
    ]
    return call(
        functools.partial(_sample_kernel, N=N, V=V, temperature=temperature, top_k=top_k),
        grid=(B,),
        warps=SAMPLE_WARPS,
        in_specs=in_specs,
        out_specs=[tokens, at],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in (tokens_CB.shape, (2,))],
        input_output_aliases={sum(spec is not None for spec in in_specs) - 1: 0},
    )(at_2, x_BN, columns_BN, noise_CBV, tokens_CB)


def make_sampler(keys_CB, V, temperature, top_k):
    """pick(logits_BV, tokens_CB, at_2) -> tokens_CB, next at_2: see `sample_token`.

    Tokens are drawn as by jax.random.categorical with keys[i]. The noise does not depend on the
    logits, so the noise of all C tokens of the chunk is drawn at once.
    """
    noise_CBV = None
    if temperature:
        draw = functools.partial(jax.random.gumbel, shape=(V,), dtype=jnp.float32)
        noise_CBV = jax.vmap(jax.vmap(draw))(keys_CB)

    def pick(logits_BV, tokens_CB, at_2):
        options = dict(temperature=temperature, top_k=top_k)
        return sample_token(logits_BV, noise_CBV, tokens_CB, at_2, **options)

    return pick
