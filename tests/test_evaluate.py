"""Evaluation of a whole split = a plain loop over its windows, one by one."""

import math

import jax
import numpy as np
import pytest
from bpe import SMALL
from tiny import rough_params, tiny

from gpt2_jax.data.batches import eval_batches
from gpt2_jax.data.dataset import Tokens
from gpt2_jax.data.tokenizers import make_tokenizer
from gpt2_jax.inference.evaluate import (
    Evaluation,
    Sums,
    make_evaluation,
    perplexity,
    sum_losses,
)
from gpt2_jax.parallel.mesh import make_mesh
from gpt2_jax.training.step import make_eval_step

T = 8
ALPHABET = 'ab éß中文😀🙂\n'  # one to four bytes each
MODEL = tiny(vocab_size=len(set(ALPHABET)), n_layer=1)
PARAMS = rough_params(MODEL)
eval_step = jax.jit(make_eval_step(MODEL))
forward = jax.jit(MODEL.apply)


def text_of(n):
    return ''.join(np.random.default_rng(n).choice(list(ALPHABET), n))


def evaluated(text, batch_size, cuts=(), on_batch=lambda tokens: None, **options):
    tokenizer, mesh = make_tokenizer('char', ALPHABET), make_mesh(data=1, fsdp=1, tensor=1)
    tokens = Tokens(tuple(np.split(tokenizer.encode(text), cuts)))
    windows = eval_batches(tokens, batch_size=batch_size, seq_len=T, **options)
    sums = sum_losses(eval_step, PARAMS, windows, tokenizer.byte_lengths, mesh, on_batch)
    return make_evaluation(sums, len(tokens) - 1)


# One target; one window; a window and one target; 12 windows and 7 targets; 13 windows.
@pytest.mark.parametrize('n', [2, 9, 10, 104, 105])
def test_a_split_equals_a_plain_loop(n):
    ids = make_tokenizer('char', ALPHABET).encode(text_of(n)).astype(np.int32)
    nats, targets = 0.0, 0
    for start in range(0, n - 1, T):
        window = ids[start : start + T + 1]
        # The model is causal: the padding after the window changes nothing before it.
        logits_TV = np.float64(forward({'params': PARAMS}, np.resize(window[:-1], (1, T)))[0])
        for t, target in enumerate(window[1:]):
            nats -= logits_TV[t, target] - math.log(np.exp(logits_TV[t]).sum())
            targets += 1
    n_bytes = len(text_of(n)[1:].encode())

    got = evaluated(text_of(n), batch_size=3)
    assert (got.tokens, got.bytes) == (targets, n_bytes)
    assert targets == got.split_tokens == n - 1
    assert got.loss == pytest.approx(nats / targets, rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(nats / targets), rel=1e-5)
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


@pytest.mark.parametrize('stride', [1, 3, 5, T])
@pytest.mark.parametrize('n', [2, T, T + 1, T + 2, 42])
def test_a_stride_gives_every_target_its_stated_context(n, stride):
    ids = make_tokenizer('char', ALPHABET).encode(text_of(n)).astype(np.int32)
    nats = 0.0
    for target in range(1, n):  # each by itself, from the context that its window gives it
        start = max(0, math.ceil((target - T) / stride) * stride)
        assert target <= T or T - stride < target - start <= T
        context = np.resize(ids[start:target], (1, T))  # padded, which changes nothing before it
        logits_V = np.float64(forward({'params': PARAMS}, context)[0, target - start - 1])
        nats -= logits_V[ids[target]] - math.log(np.exp(logits_V).sum())
    got = evaluated(text_of(n), batch_size=3, stride=stride)
    assert (got.tokens, got.bytes) == (n - 1, len(text_of(n)[1:].encode()))
    assert got.loss == pytest.approx(nats / (n - 1), rel=1e-6)
    assert (got == evaluated(text_of(n), batch_size=3)) == (stride == T or n <= T + 1)


def test_batch_size_and_shards_change_nothing():
    text = text_of(101)
    one = evaluated(text, 3)
    assert one == evaluated(text, 3) == evaluated(text, 3, cuts=(1, 2, 50))
    for batch_size in (1, 5, 16):
        other = evaluated(text, batch_size)
        assert other.loss == pytest.approx(one.loss, rel=1e-6)
        assert (other.tokens, other.bytes) == (one.tokens, one.bytes)


@pytest.mark.parametrize('max_targets', [1, 8, 9, 16, 40, 103, 104, 106])
def test_a_part_is_made_of_evenly_spread_windows(max_targets):
    """13 windows of 8 targets, and one of 3 that is never taken for a part."""
    text = text_of(108)
    ids = make_tokenizer('char', ALPHABET).encode(text)
    n_windows = max(1, max_targets // T)
    starts = [T * ((2 * i + 1) * 13 // (2 * n_windows)) for i in range(n_windows)]
    gaps = np.diff(starts) // T
    assert not len(gaps) or max(gaps) - min(gaps) <= 1
    nats = 0.0
    for start in starts:
        window = ids[start : start + T + 1].astype(np.int32)
        logits_TV = np.float64(forward({'params': PARAMS}, window[None, :-1])[0])
        chosen_T = logits_TV[np.arange(T), window[1:]]
        nats += (np.log(np.exp(logits_TV).sum(-1)) - chosen_T).sum()
    got = evaluated(text, 3, max_targets=max_targets)
    assert (got.tokens, got.split_tokens) == (T * n_windows, 107)
    assert got.bytes == sum(len(text[start + 1 : start + T + 1].encode()) for start in starts)
    assert got.loss == pytest.approx(nats / got.tokens, rel=1e-6)
    assert f'over {got.tokens} tokens of 107, evenly spread' in str(got)
    assert got == evaluated(text, 3, max_targets=max_targets)


@pytest.mark.parametrize('max_targets', [0, 107, 1000])
def test_all_targets_are_no_part(max_targets):
    assert evaluated(text_of(108), 3, max_targets=max_targets) == evaluated(text_of(108), 3)


def test_every_batch_is_reported_and_may_be_the_last():
    counts = []
    got = evaluated(text_of(101), 3, on_batch=counts.append)
    assert sum(counts) == got.tokens == 100
    assert len(counts) == math.ceil(13 / 3)

    def stop(tokens):
        raise KeyError

    with pytest.raises(KeyError):
        evaluated(text_of(101), 3, on_batch=stop)


def test_targets_without_bytes():
    """A single <|endoftext|> has no bytes, so that bits per byte are unknown."""
    n_bytes = int(SMALL.byte_lengths[SMALL.separator])
    got = make_evaluation(Sums(nats=5.0, tokens=1, bytes=n_bytes), 1)
    assert (got.tokens, got.bytes, got.bits_per_byte) == (1, 0, None)
    assert 'bits per byte' not in str(got)
    assert str(got).endswith('over 1 token')


@pytest.mark.parametrize(
    ('nats', 'shown'), [(2.0, '7.389'), (50.0, '5.185e+21'), (9e3, '1.014e+304')]
)
def test_a_long_perplexity_is_shown_as_a_power_of_ten(nats, shown):
    got = str(Evaluation(nats, perplexity(nats), None, 8, 8, 8))
    assert f'nats, perplexity {shown}, over 8 tokens' in got
