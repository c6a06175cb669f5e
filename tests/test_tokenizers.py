"""Tokenizers: lossless, compared by value, and unknown characters are named."""

import codecs

import numpy as np
import pytest
from bpe import MERGES, SMALL

from gpt2_jax.data import tokenizers
from gpt2_jax.data.tokenizers import ByteTokenizer, CharTokenizer, Gpt2Tokenizer, make_tokenizer
from gpt2_jax.errors import UsageError, UserError

TEXT = 'To be, or not…\r\nß 漢字 🎭 é'


@pytest.mark.parametrize('name', ['char', 'byte'])
def test_round_trip(name):
    tokenizer = make_tokenizer(name, TEXT)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint8
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == TEXT
    assert tokenizer.decode_bytes(ids) == TEXT.encode()
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.byte_lengths[ids].sum() == len(TEXT.encode())
    assert len(tokenizer.encode('')) == 0
    assert tokenizer.decode([]) == ''


def test_ids_are_indices_in_the_sorted_alphabet():
    tokenizer = make_tokenizer('char', 'banana')
    assert tokenizer.alphabet == 'abn'
    assert tokenizer.encode('banana').tolist() == [1, 0, 2, 0, 2, 0]
    assert ByteTokenizer().encode('é').tolist() == [0xC3, 0xA9]


def test_large_text_equals_plain_loop(monkeypatch):
    monkeypatch.setattr(tokenizers, 'ENCODE_BLOCK', 7)
    text = TEXT * 5
    tokenizer = make_tokenizer('char', text)
    assert tokenizer.encode(text).tolist() == [tokenizer.alphabet.index(c) for c in text]


@pytest.mark.parametrize(
    ('size', 'dtype'), [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65537, np.uint32)]
)
def test_smallest_dtype(size, dtype):
    alphabet = ''.join(map(chr, range(0x10000, 0x10000 + size)))  # above the surrogates
    tokenizer = CharTokenizer(alphabet)
    assert tokenizer.encode(alphabet).dtype == dtype
    assert tokenizer.decode(tokenizer.encode(alphabet)) == alphabet


@pytest.mark.parametrize(
    ('unknown', 'code'),
    [('é', 'U+00E9'), ('A', 'U+0041'), ('\U0010ffff', 'U+10FFFF'), ('\udc80', 'U+DC80')],
)
def test_unknown_character_is_named(monkeypatch, unknown, code):
    monkeypatch.setattr(tokenizers, 'ENCODE_BLOCK', 4)
    with pytest.raises(UserError) as caught:
        CharTokenizer('abc').encode('abcab' + unknown + 'a' + unknown)
    message = str(caught.value)
    assert repr(unknown) in message
    assert code in message
    assert 'position 5 ' in message
    assert "'abc'" in message


@pytest.mark.parametrize('tokenizer', [CharTokenizer('abc'), ByteTokenizer(), SMALL])
def test_anything_but_one_text_is_refused(tokenizer):
    with pytest.raises(UsageError, match='a tokenizer encodes one text, a str; got list'):
        tokenizer.encode(['abc'])


def test_windows_line_ends_are_named():
    with pytest.raises(UserError, match=r'U\+000D\) at position 1 .*; .* a Windows line ending'):
        CharTokenizer('\nab').encode('a\r\nb')
    with pytest.raises(UserError, match=r"'abc'$"):
        CharTokenizer('abc').encode('d')


@pytest.mark.parametrize('tokenizer', [ByteTokenizer(), SMALL])
def test_half_a_surrogate_pair_has_no_bytes(tokenizer):
    with pytest.raises(UserError, match=r'U\+DC80\) at position 2 '):
        tokenizer.encode('é \udc80')


@pytest.mark.parametrize(('tokenizer', 'half'), [(ByteTokenizer(), 0xC3), (SMALL, 256 + 15)])
def test_streaming_never_splits_a_character(tokenizer, half):
    text, decoder = 'é🎭🎭 the漢字', codecs.getincrementaldecoder('utf-8')()
    pieces = [decoder.decode(tokenizer.decode_bytes([i])) for i in tokenizer.encode(text)]
    assert ''.join(pieces) == text
    assert '' in pieces
    assert tokenizer.decode([half]) == '\ufffd'


@pytest.mark.parametrize('tokenizer', [CharTokenizer('abc'), ByteTokenizer(), SMALL])
@pytest.mark.parametrize('bad', [-1, 277, 50304])
def test_id_outside_the_vocabulary(tokenizer, bad):
    """A vocabulary padded for speed has such ids; they decode to nothing."""
    with pytest.raises(
        UserError, match=rf'token {bad} at position 2 .* \[0, {tokenizer.vocab_size}\)'
    ):
        tokenizer.decode([0, 1, bad])


@pytest.mark.parametrize('tokenizer', [CharTokenizer('\n"abcé🎭'), ByteTokenizer(), SMALL])
def test_json_reads_back_equal(tokenizer):
    again = tokenizers.from_json(tokenizers.to_json(tokenizer))
    assert again == tokenizer
    assert again.encode('abc').tolist() == tokenizer.encode('abc').tolist()
    assert tokenizers.fingerprint(again) == tokenizers.fingerprint(tokenizer)


def test_fingerprints_differ():
    others = SMALL, Gpt2Tokenizer(MERGES + 'x y\n')
    prints = {
        tokenizers.fingerprint(t)
        for t in (CharTokenizer('ab'), CharTokenizer('abc'), ByteTokenizer(), *others)
    }
    assert len(prints) == 5
    assert all(len(p) == 64 for p in prints)


@pytest.mark.parametrize(
    ('text', 'named'),
    [
        ('{"name": "char", "alph', 'cannot be read as JSON'),
        ('[]', 'damaged'),
        ('{"alphabet": "abc"}', 'damaged'),
        ('{"name": "char"}', 'damaged'),
        ('{"name": "byte", "alphabet": "ab"}', 'damaged'),
        ('{"name": "wordpiece"}', "unknown kind 'wordpiece'"),
        ('{"name": ["char"]}', 'name is a list of 1, expected a text'),
        ('{"name": "char", "alphabet": ""}', 'empty'),
        ('{"name": "char", "alphabet": "aab"}', 'distinct'),
        ('{"name": "char", "alphabet": "ba"}', 'order'),
        ('{"name": "char", "alphabet": ["a", "b"]}', 'alphabet is a list of 2, expected a text'),
        ('{"name": "gpt2", "merges": 5}', 'merges is 5, expected a text'),
        ('[' * 100_000, 'nested too deeply'),
        ('{"name": "char", "alphabet": "\\ud800"}', 'surrogates not allowed'),
    ],
)
def test_damaged_json(text, named):
    with pytest.raises(UserError, match=named):
        tokenizers.from_json(text)


def test_wrong_requests():
    with pytest.raises(UsageError, match=r"'bpe'.*char, byte"):
        make_tokenizer('bpe', 'abc')
    with pytest.raises(UserError, match='empty'):
        make_tokenizer('char', '')
