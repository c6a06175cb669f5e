"""Generation: cached = uncached text, sampling = its definition in numpy, and streaming."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bpe import SMALL
from tiny import rough_params, tiny

from gpt2_jax.data.tokenizers import ByteTokenizer, make_tokenizer
from gpt2_jax.errors import UsageError
from gpt2_jax.inference import decoding, streaming
from gpt2_jax.inference.decoding import CHUNK, generate
from gpt2_jax.inference.sampling import Sampling, sample_token
from gpt2_jax.inference.streaming import encode_prompt, print_samples, stream_text

CONTEXT, HALF = 20, 10
MODEL = tiny(n_positions=CONTEXT, n_layer=2)
PARAMS = rough_params(MODEL, seed=1, std=0.5)  # its greedy text does not repeat itself
PROMPT = [3, 1, 4]
GREEDY, LIVELY = Sampling(temperature=0), Sampling(temperature=2.0, top_k=7, top_p=0.9)
forward = jax.jit(MODEL.apply)


@pytest.fixture(scope='module', autouse=True)
def prefills_of_several_lengths():
    """Prompts are padded to several lengths also within this short context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, 'MIN_PREFILL', 4)
        yield


def test_kernels_and_precision_to_decode_with(monkeypatch):
    model, xla = tiny(dtype='bfloat16'), {'kernels': 'xla'}
    assert decoding.with_kernels(model, 'xla', '').cfg == tiny(dtype='bfloat16', **xla).cfg
    assert decoding.with_kernels(model, 'auto', 'float32').cfg == tiny(**xla).cfg
    with pytest.raises(UsageError, match=r'need an NVIDIA GPU.* --kernels=xla'):
        decoding.with_kernels(model, 'fused', '')
    monkeypatch.setattr(decoding, 'unmet_needs', lambda *machine: iter(()))
    assert (
        decoding.with_kernels(model, 'auto', '').cfg == tiny(dtype='bfloat16', kernels='fused').cfg
    )


def text(prompt=PROMPT, **options):
    """(num_samples, n) tokens."""
    notes = options.setdefault('notify', lambda note: None)
    return np.concatenate(
        list(generate(MODEL, PARAMS, np.array(prompt), **options | {'notify': notes})), axis=1
    )


def without_cache(prompt, n, pick=lambda logits_V, i: logits_V.argmax()):
    """Each token by a full forward pass over a window, which restarts from its half when full."""
    window, out = list(prompt[-CONTEXT:]), []
    for i in range(n):
        if len(window) > CONTEXT:
            window = window[-HALF:]
        padded = np.array([window + [0] * (CONTEXT - len(window))])
        window.append(int(pick(forward({'params': PARAMS}, padded)[0, len(window) - 1], i)))
        out.append(window[-1])
    return out


@pytest.mark.parametrize(
    'prompt', [PROMPT, [5], list(range(10)) + list(range(9)), [2, 7] * 10, [1, 2, 3] * 11]
)
def test_greedy_cached_equals_uncached(prompt):
    """Past the context, several times, and for prompts as long as the context and longer."""
    expected = without_cache(prompt, 45)
    assert len(set(expected)) > 3
    assert text(prompt, max_new_tokens=45, sampling=GREEDY)[0].tolist() == expected


def test_drawn_cached_equals_uncached():
    """Token i of sample s is drawn with the key fold_in(fold_in(key(seed), s), i)."""

    @jax.jit
    def draw(logits_V, s, i):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), s), i)
        return sample_token(logits_V[None], key[None], LIVELY)[0]

    got = text(max_new_tokens=45, num_samples=3, seed=7, sampling=LIVELY)
    for s in range(3):
        assert got[s].tolist() == without_cache(
            PROMPT, 45, lambda logits_V, i, s=s: draw(logits_V, s, i)
        )


def test_few_compilations_for_all_lengths():
    decoding.prefill.clear_cache()
    decoding.decode.clear_cache()
    for length in (1, 2, 11, 19, 20, 21, 50):
        text([1] * length, max_new_tokens=length, sampling=GREEDY)
    # 4, 16 and the context.
    assert decoding.prefill._cache_size() == 3
    assert decoding.decode._cache_size() == 1


def test_seeds_and_samples():
    three = text(max_new_tokens=30, num_samples=3, seed=7, sampling=LIVELY)
    assert three.shape == (3, 30)
    assert three.dtype == np.int32
    assert len({tuple(row) for row in three}) == 3
    assert np.array_equal(three, text(max_new_tokens=30, num_samples=3, seed=7, sampling=LIVELY))
    assert not np.array_equal(
        three, text(max_new_tokens=30, num_samples=3, seed=8, sampling=LIVELY)
    )
    one = text(max_new_tokens=30, seed=7, sampling=LIVELY)
    assert np.array_equal(one[0], three[0])  # the samples beside it change nothing
    shorter = text(max_new_tokens=21, seed=7, sampling=LIVELY)
    assert np.array_equal(one[:, :21], shorter)  # nor does the length


def test_chunks():
    chunks = generate(
        MODEL,
        PARAMS,
        np.array(PROMPT),
        max_new_tokens=21,
        num_samples=3,
        sampling=LIVELY,
        notify=lambda note: None,
    )
    # The prompt of 3 tokens and 17 new ones fill the context; one more is drawn from it.
    assert [chunk.shape for chunk in chunks] == [(3, CHUNK), (3, 18 - CHUNK), (3, 21 - 18)]


def test_a_full_context_is_reported_once():
    notes = []
    text(max_new_tokens=CONTEXT - 2, sampling=GREEDY, strict_context=True, notify=notes.append)
    assert notes == []
    text(max_new_tokens=CONTEXT - 1, sampling=GREEDY, notify=notes.append)
    text(max_new_tokens=45, sampling=GREEDY, notify=notes.append)
    assert notes == ['the context of 20 tokens is full: continuing from its last 10'] * 2
    for prompt, n in ((PROMPT, CONTEXT - 1), ([1] * 21, 1)):
        with pytest.raises(
            UsageError, match=f'{len(prompt)} prompt tokens and {n} new ones .* context of 20'
        ):
            generate(MODEL, PARAMS, prompt, max_new_tokens=n, strict_context=True)
    with pytest.raises(UsageError, match='the prompt is empty'):
        generate(MODEL, PARAMS, [], max_new_tokens=1)


def test_an_error_comes_before_the_prompt(capsys):
    options = dict(num_samples=1, max_new_tokens=CONTEXT, strict_context=True)
    with pytest.raises(UsageError, match='5 prompt tokens'):
        print_samples(MODEL, PARAMS, ByteTokenizer(), 'ROMEO', **options)
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    ('prompt', 'said'),
    [
        ([1, 11], r'token 11 at position 1 of the prompt is outside the vocabulary \[0, 11\)'),
        ([-1], 'token -1 at position 0'),
        ([1.5], 'the prompt is float64'),
        ([[1, 2]], r'the prompt is int64 \(1, 2\): expected integers \(T,\)'),
        ('abc', 'the prompt is a text: expected its tokens'),
        ([], 'the prompt is empty'),
    ],
)
def test_a_prompt_that_is_no_row_of_tokens_is_refused(prompt, said):
    with pytest.raises(UsageError, match=said):
        generate(MODEL, PARAMS, prompt, max_new_tokens=1)


def test_a_prompt_longer_than_the_context_is_reported():
    notes = []
    text([1] * 20, max_new_tokens=1, notify=notes.append)
    assert notes == []
    text([1] * 21, max_new_tokens=1, notify=notes.append)
    assert notes == ['the prompt has 21 tokens: the model sees its last 20 only']


def test_a_context_of_one_token():
    model = tiny(n_positions=1, n_layer=1)
    params, expected = rough_params(model, std=0.5), [4]
    logits_VV = jax.jit(model.apply)({'params': params}, np.arange(11)[:, None])[:, 0]
    next_V = logits_VV.argmax(-1)  # the likeliest token after each token alone
    for _ in range(5):
        expected.append(int(next_V[expected[-1]]))
    chunks = generate(
        model, params, np.array([4]), max_new_tokens=5, sampling=GREEDY, notify=lambda note: None
    )
    got = [next(chunks, None) for _ in range(5)]
    assert np.concatenate(got, axis=1)[0].tolist() == expected[1:]


def numpy_distribution(logits, temperature, top_k, top_p):
    """The distribution of the next token, with the filters as loops."""
    probs = np.exp(np.float64(logits) / temperature)
    order = np.argsort(-probs).tolist()
    order = order[:top_k] if top_k else order
    total, kept, mass = sum(probs[order]), [], 0.0
    for token in order:
        if mass < top_p:
            kept.append(token)
        mass += probs[token] / total
    filtered = np.zeros(len(probs))
    filtered[kept] = probs[kept] / sum(probs[kept])
    return filtered


DRAWS = 20_000
LOGITS = np.float32([0.3, 2.0, -1.0, 1.1, 0.0, 1.9, -3.0, 0.7])


def draw(sampling, logits=LOGITS):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(DRAWS))
    tokens = jax.jit(sample_token, static_argnums=2)(np.tile(logits, (DRAWS, 1)), keys, sampling)
    return np.bincount(tokens, minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    'settings',
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (3.0, 0, 1.0),
        (1.0, 3, 1.0),
        (1.0, 8, 1.0),
        (1.0, 99, 1.0),
        (1.0, 0, 0.8),
        (1.0, 0, 0.3),
        (3.0, 5, 0.7),
    ],
)
def test_draws_follow_the_filtered_distribution(settings):
    expected, got = numpy_distribution(LOGITS, *settings), draw(Sampling(*settings))
    assert np.array_equal(got > 0, expected > 0)
    assert np.all(np.abs(got - expected) <= 5 * np.sqrt(expected * (1 - expected) / DRAWS))


def test_sampling_without_chance_takes_the_likeliest():
    sample = jax.jit(sample_token, static_argnums=2)
    logits_BV = np.random.default_rng(0).normal(0, 3, (64, 11)).astype(np.float32)
    keys_B = jax.random.split(jax.random.key(0), 64)
    best_B = logits_BV.argmax(-1)
    for sampling in (
        GREEDY,
        Sampling(temperature=0, top_k=5, top_p=0.5),
        Sampling(top_k=1),
        Sampling(top_p=1e-6),
    ):
        assert np.array_equal(sample(logits_BV, keys_B, sampling), best_B), sampling
    assert not np.array_equal(sample(logits_BV, keys_B, Sampling()), best_B)


@pytest.mark.parametrize(
    'sampling', [Sampling(1e-38), Sampling(1e-300), Sampling(1e-3), Sampling(top_p=1e-38)]
)
def test_small_temperature_and_top_p_take_the_likeliest(sampling):
    assert draw(sampling).tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize('scale', [1e-30, 1.0, 1e30])
def test_a_temperature_divides_differences_of_logits(scale):
    """Logits of any size and a temperature of the same size give the same distribution."""
    expected = draw(Sampling(0.7))
    assert np.array_equal(draw(Sampling(0.7 * scale), LOGITS * np.float32(scale)), expected)


@pytest.mark.parametrize(
    ('sampling', 'kept'),
    [
        (Sampling(top_k=1), [0]),
        (Sampling(top_k=3), [0, 1, 2]),
        (Sampling(top_p=0.1), [0]),
        (Sampling(top_p=0.3), [0, 1, 2]),
        (Sampling(top_k=4, top_p=0.5), [0, 1]),
        (Sampling(1e-38, top_k=3), [0, 1, 2]),
    ],
)
def test_the_first_of_equal_logits_are_kept(sampling, kept):
    assert np.flatnonzero(draw(sampling, np.ones(8, np.float32))).tolist() == kept


def test_a_tie_for_the_last_kept_token():
    tie = np.float32([0, 5, 9, 5, 5, 0])
    assert np.flatnonzero(draw(Sampling(3.0, top_k=3), tie)).tolist() == [1, 2, 3]


def test_wrong_sampling_is_refused():
    for wrong in (
        dict(temperature=-1.0),
        dict(temperature=math.inf),
        dict(top_k=-1),
        dict(top_k=1.5),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(top_p=math.nan),
        dict(temperature=math.nan),
    ):
        with pytest.raises(UsageError, match=f'{next(iter(wrong))} = .* is not allowed; expected'):
            Sampling(**wrong)


def all_chunkings(ids, max_cuts):
    """The ids of one row, cut at up to `max_cuts` positions in every way."""
    cuts = [()] + [(a,) for a in range(len(ids) + 1)]
    if max_cuts == 2:
        cuts += [(a, b) for a in range(len(ids) + 1) for b in range(a, len(ids) + 1)]
    return [np.split(np.asarray(ids)[None], cut, axis=1) for cut in cuts] + [
        np.split(ids[None], len(ids), axis=1)
    ]


@pytest.mark.parametrize('tokenizer', [ByteTokenizer(), make_tokenizer('char', 'né 中文😀')])
def test_streamed_text_equals_decoded_text(tokenizer):
    whole = 'né 中文 😀n'
    ids = tokenizer.encode(whole)
    for chunks in all_chunkings(ids, 2):
        pieces = list(stream_text(chunks, tokenizer))
        assert ''.join(pieces) == whole
        assert not any('\ufffd' in piece for piece in pieces)


def test_bytes_that_are_not_utf8():
    ids = np.frombuffer(b'a\xff\xc3b\xe4\xb8', np.uint8)  # ends in the middle of a character
    for chunks in all_chunkings(ids, 2):
        assert ''.join(stream_text(chunks, ByteTokenizer())) == ByteTokenizer().decode(ids)


@pytest.mark.parametrize(
    ('whole', 'stops', 'expected'),
    [
        ('to be\n\nor not', ['\n\n'], 'to be'),
        ('aaab and more', ['aab'], 'a'),
        ('ababac!', ['abac'], 'ab'),
        ('stop', ['stop'], ''),
        ('almost: sto', ['stop'], 'almost: sto'),
        ('x中中文y', ['中文'], 'x中'),
        ('a.b.c', ['.'], 'a'),
        ('one. two! three', ['!', '.'], 'one'),
        ('one. two! three', ['three', '!'], 'one. two'),
        ('abc and more', ['abc', 'b'], 'a'),  # b is complete first
        ('xabc', ['bc', 'abc'], 'x'),  # both are complete at c
        ('no end', ['END', ''], 'no end'),
        ('nearly: sto', ['stop', 'st'], 'nearly: '),
    ],
)
def test_text_ends_before_the_stop_string_that_is_complete_first(whole, stops, expected):
    for chunks in all_chunkings(ByteTokenizer().encode(whole), 2):
        assert ''.join(stream_text(chunks, ByteTokenizer(), stop=stops)) == expected


def test_stopping_stops_decoding():
    chunks = iter(np.split(ByteTokenizer().encode('one. two. three')[None], 15, axis=1))
    assert ''.join(stream_text(chunks, ByteTokenizer(), stop=['. t'])) == 'one'
    assert len(list(chunks)) == 15 - len('one. t')


def test_rows_are_streamed_separately():
    ids = np.stack([ByteTokenizer().encode(row) for row in ('first', 'other')])
    chunks = np.split(ids, 5, axis=1)
    assert [''.join(stream_text(chunks, ByteTokenizer(), row)) for row in (0, 1)] == [
        'first',
        'other',
    ]


def test_without_a_prompt_text_starts_as_a_document_does():
    assert encode_prompt(make_tokenizer('char', 'ab\n'), '').tolist() == [0]
    assert encode_prompt(ByteTokenizer(), '').tolist() == [10]
    assert encode_prompt(make_tokenizer('char', 'ab'), '').tolist() == [0]
    assert encode_prompt(SMALL, '').tolist() == [SMALL.separator]


def test_special_tokens_in_a_prompt():
    text, end = 'the<|endoftext|>x', SMALL.separator
    as_text = encode_prompt(SMALL, text).tolist()
    assert as_text == SMALL.encode(text).tolist()
    assert end not in as_text
    the, x = SMALL.encode('the').tolist(), SMALL.encode('x').tolist()
    assert encode_prompt(SMALL, text, special_tokens=True).tolist() == [*the, end, *x]
    alone = encode_prompt(SMALL, '<|endoftext|>', special_tokens=True)
    assert alone.tolist() == [end]
    assert np.issubdtype(alone.dtype, np.integer)
    assert encode_prompt(SMALL, 'the', special_tokens=True).tolist() == the
    with pytest.raises(UsageError, match='the byte tokenizer has no special tokens'):
        encode_prompt(ByteTokenizer(), 'the', special_tokens=True)


def test_printed_samples(capsys):
    tokenizer = make_tokenizer('char', 'abcdefghijk')
    options = dict(max_new_tokens=21, seed=7, sampling=LIVELY, notify=print)
    rows = [tokenizer.decode(row) for row in text(num_samples=3, **options)]
    full = capsys.readouterr().out
    assert full == 'the context of 20 tokens is full: continuing from its last 10\n'
    print_samples(MODEL, PARAMS, tokenizer, 'dbe', num_samples=1, stop=[], **options)
    assert capsys.readouterr().out == f'dbe{rows[0]}\n' + full  # after the text, not in it
    stop = rows[2][5:7]
    print_samples(MODEL, PARAMS, tokenizer, 'dbe', num_samples=3, stop=[stop], **options)
    texts = [f'--- sample {i} of 3 ---\ndbe{row.split(stop)[0]}\n' for i, row in enumerate(rows, 1)]
    assert capsys.readouterr().out == ''.join(texts) + full


def test_a_ctrl_c_keeps_the_notices(capsys, monkeypatch):
    """The text ends its line, and the notice follows as after a whole text."""
    tokenizer, stream = make_tokenizer('char', 'abcdefghijk'), streaming.stream_text

    def interrupted(*args):
        yield from itertools.islice(stream(*args), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, 'stream_text', interrupted)
    options = dict(max_new_tokens=60, notify=print)
    with pytest.raises(KeyboardInterrupt):
        print_samples(MODEL, PARAMS, tokenizer, 'dbe', num_samples=1, **options)
    written, notice, end = capsys.readouterr().out.split('\n')
    assert written.startswith('dbe')
    assert notice == 'the context of 20 tokens is full: continuing from its last 10'
    assert end == ''
