"""N-gram baselines against counting by hand."""

import collections
import math
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2_jax.data.dataset import Tokens
from gpt2_jax.diagnostics.ngrams import baselines

V = 4


def by_hand(train, val, longest):
    """Witten and Bell's rule, token by token."""
    counts = collections.defaultdict(collections.Counter)
    for order in range(longest + 1):
        for i in range(order, len(train)):
            counts[tuple(train[i - order : i])][train[i]] += 1

    def probability(context, token, order):
        lower = probability(context[1:], token, order - 1) if order else 1 / V
        seen = counts[tuple(context)]
        if not seen:
            return lower
        return (seen[token] + len(seen) * lower) / (sum(seen.values()) + len(seen))

    losses = []
    for i in range(1, len(val)):
        order = min(longest, i)
        losses.append(-math.log(probability(val[i - order : i], val[i], order)))
    return sum(losses) / len(losses)


def test_baselines_equal_counting_by_hand():
    draw = np.random.default_rng(0)
    train = draw.integers(0, V - 1, 60).tolist()  # token 3 is never seen in training
    val = [*draw.integers(0, V - 1, 20).tolist(), 3, 3, 1, 0]
    dataset = SimpleNamespace(
        tokenizer=SimpleNamespace(vocab_size=V),
        train=Tokens((np.array(train, np.uint8),)),
        val=Tokens((np.array(val, np.uint8),)),
    )
    found = baselines(dataset)
    assert found['uniform'] == math.log(V)
    for order, name in enumerate(('unigram', 'bigram', 'trigram')):
        assert found[name] == pytest.approx(by_hand(train, val, order), rel=1e-12)


def test_a_text_of_one_character_costs_nothing():
    tokens = Tokens((np.zeros(9, np.uint8),))
    dataset = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=1), train=tokens, val=tokens)
    assert set(map(str, baselines(dataset).values())) == {'0.0'}  # and not -0.0
