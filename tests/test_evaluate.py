"""Evaluation of a whole split = a plain loop over its windows, one by one."""

import math

import jax
import numpy as np
import pytest
from tiny import rough_params, tiny

from gpt2_jax.data.dataset import Tokens
from gpt2_jax.data.tokenizers import ByteTokenizer, make_tokenizer
from gpt2_jax.inference.evaluate import count_bytes, evaluate
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


def evaluated(text, batch_size, cuts=(), stride=None):
    tokenizer = make_tokenizer('char', ALPHABET)
    tokens = Tokens(tuple(np.split(tokenizer.encode(text), cuts)))
    return evaluate(
        eval_step,
        PARAMS,
        tokens,
        tokenizer,
        batch_size=batch_size,
        seq_len=T,
        stride=stride,
        mesh=make_mesh(data=1, fsdp=1, tensor=1),
    )


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
    assert targets == n - 1
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


@pytest.mark.parametrize('block', [1, 7, 100, 1 << 22])
def test_bytes_of_the_targets(block):
    text = text_of(101)
    for tokenizer in (make_tokenizer('char', ALPHABET), ByteTokenizer()):
        tokens = Tokens((tokenizer.encode(text),))
        first = tokenizer.decode_bytes(tokens.read(0, 1))
        assert count_bytes(tokens, tokenizer, block) == len(text.encode()) - len(first)
