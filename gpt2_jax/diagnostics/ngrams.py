"""What counting reaches: the held-out loss of unigram, bigram and trigram models of a corpus.

Interpolated by Witten and Bell's rule (1991, "The zero-frequency problem", method C): after a
context h that was seen c(h) times, with n(h) different next tokens,

    p(w | h) = (c(h, w) + n(h) p(w | h')) / (c(h) + n(h))

with h' the context without its first token, and 1 / V below the unigrams. Nothing is tuned. No JAX.
"""

import math

import numpy as np

from gpt2_jax.data.dataset import Dataset, Tokens

MOST_TOKENS = 20_000_000  # counted, and as many predicted: from the beginning of each split


def baselines(dataset: Dataset) -> dict[str, float]:
    """{'uniform': ln V, 'unigram': .., 'bigram': .., 'trigram': ..} in nats per validation token.

    The loss is of the same targets as in evaluation: every validation token but the first.
    """
    V = dataset.tokenizer.vocab_size
    train, val = _ids(dataset.train), _ids(dataset.val)
    targets = val[1:]
    p = np.full(len(targets), 1 / V)
    losses = {'uniform': math.log(V)}
    for order, name in enumerate(('unigram', 'bigram', 'trigram')):
        p = _interpolated(train, val, order, V, p)
        losses[name] = abs(float(np.log(p).mean()))  # not -0.0
    return losses


def _ids(tokens: Tokens) -> np.ndarray:
    return tokens.read(0, min(len(tokens), MOST_TOKENS)).astype(np.int64)


def _interpolated(train, val, order: int, V: int, lower) -> np.ndarray:
    """p of each target of `val` after its last `order` tokens; `lower` is p after one fewer."""
    contexts, next_ids = _contexts(train, order, V), train[order:]
    pairs, pair_counts = np.unique(contexts * V + next_ids, return_counts=True)
    of_pair = pairs // V  # the context of each pair; sorted, as the pairs are
    seen, first = np.unique(of_pair, return_index=True)
    different = np.diff(np.append(first, len(pairs)))
    times = np.add.reduceat(pair_counts, first)
    # The first targets have a shorter context than `order`; they keep the lower p.
    wanted = _contexts(val, order, V)[max(0, 1 - order) :]
    targets = val[max(order, 1) :]
    at = np.searchsorted(seen, wanted).clip(max=len(seen) - 1)
    known = seen[at] == wanted
    n, c = np.where(known, different[at], 0), np.where(known, times[at], 0)
    pair = wanted * V + targets
    at = np.searchsorted(pairs, pair).clip(max=len(pairs) - 1)
    count = np.where(pairs[at] == pair, pair_counts[at], 0)
    below = lower[len(lower) - len(targets) :]
    p = np.where(known, (count + n * below) / np.maximum(c + n, 1), below)
    return np.concatenate([lower[: len(lower) - len(targets)], p])


def _contexts(ids: np.ndarray, order: int, V: int) -> np.ndarray:
    """The `order` tokens before each of ids[order:], as one number."""
    number = np.zeros(len(ids) - order, np.int64)
    for back in range(order, 0, -1):
        number = number * V + ids[order - back : len(ids) - back]
    return number
