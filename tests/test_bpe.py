"""GPT-2's tokenizer equals the plain algorithm and the published ids, also on text in pieces."""

import hashlib
import itertools
import re

import numpy as np
import pytest
import regex
from bpe import SMALL, TEXTS, known, published
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.data import tokenizers
from gpt2_jax.data.corpora import CorpusNotFound, find_text
from gpt2_jax.data.dataset import from_text
from gpt2_jax.data.tokenizers import (
    ByteTokenizer,
    Gpt2Tokenizer,
    encode_special,
    from_json,
    to_json,
)
from gpt2_jax.errors import UserError

# As OpenAI published it with GPT-2; tiktoken has a faster one.
PATTERN = regex.compile(
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)

# Characters that the pattern tells apart, or that Python and Unicode disagree on, in every order.
PARTS = [*"  \n\n\t\r'sStldve th12!\u00a0\u2003\u0085\x1c\u0301é漢🎭", "'ll", ' the', '   ']
hard_texts = st.lists(st.sampled_from(PARTS), max_size=40).map(''.join)
quick = settings(deadline=None, max_examples=300)


def plain_bpe(tokenizer, text):
    """Ids by the definition: in each piece, join the pair of lowest rank until there is none."""
    stand_ins = {byte: c for c, byte in tokenizers._stand_ins().items()}
    ranks = {tuple(line.split(' ')): i for i, line in enumerate(tokenizer.merges.splitlines())}
    ids = {c: i for i, c in enumerate(tokenizers._stand_ins())} | {
        ''.join(pair): 256 + i for pair, i in ranks.items()
    }
    for piece in PATTERN.findall(text):
        parts = [stand_ins[byte] for byte in piece.encode()]
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            pair, joined = min(pairs, key=ranks.get), []
            while parts:
                n = 2 if tuple(parts[:2]) == pair else 1
                joined.append(''.join(parts[:n]))
                parts = parts[n:]
            parts = joined
        yield from (ids[part] for part in parts)


@pytest.mark.parametrize('text', TEXTS)
def test_hard_texts(text):
    for tokenizer in known():
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16
        assert ids.tolist() == list(plain_bpe(tokenizer, text))
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.decode(ids.tolist()) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


@quick
@given(hard_texts)
def test_equal_to_the_plain_algorithm(text):
    assert SMALL.encode(text).tolist() == list(plain_bpe(SMALL, text))


@quick
@given(st.text(max_size=200))
def test_round_trip_over_all_of_unicode(text):
    for tokenizer in known():
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.separator not in ids


@quick
@given(hard_texts, hard_texts, hard_texts)
def test_a_cut_changes_no_id(before, text, after):
    at = SMALL.cut(text)
    assert 0 <= at <= len(text)
    if at:
        left, right = SMALL.encode(before + text[:at]), SMALL.encode(text[at:] + after)
        assert (
            np.concatenate([left, right]).tolist() == SMALL.encode(before + text + after).tolist()
        )


@quick
@given(hard_texts)
def test_blanks_apart_change_no_id(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, 'LONG_BLANKS', re.compile(tokenizers.BLANKS + '{2,}'))
        assert SMALL._encode_blanks_apart(text).tolist() == SMALL.encode(text).tolist()


@pytest.mark.parametrize('blank', [' ', '\n', '\u3000'])
def test_a_million_blanks(blank):
    run, text = blank * 1_000_001, f'the{blank * 1_000_001}the {blank * 1_000_001}'
    ids = SMALL.encode(text)
    parts = ['the', run[1:], f'{blank}the', f' {run}']
    assert ids.tolist() == np.concatenate([SMALL.encode(part) for part in parts]).tolist()
    assert SMALL.decode(ids) == text


def test_special_tokens_where_asked_for():
    text, end = 'the<|endoftext|><|endoftext|> the<|endof', [SMALL.separator]
    the = [SMALL.encode(part).tolist() for part in ('the', ' the<|endof')]
    assert encode_special(SMALL, text).tolist() == [*the[0], *end, *end, *the[1]]
    assert encode_special(SMALL, text).dtype == SMALL.encode(text).dtype
    for tokenizer, plain in ((SMALL, 'the'), (ByteTokenizer(), text)):
        assert encode_special(tokenizer, plain).tolist() == tokenizer.encode(plain).tolist()


@pytest.mark.parametrize(
    ('text', 'at'),
    [
        ('', 0),
        ('the', 0),
        (' the', 0),
        ('the ', 3),
        ('the\n', 3),
        ('a b c', 3),
        ('a b \n c', 3),
        ('a b \n ', 3),
        ('  \n', 0),
        ('a\u00a0b', 0),
        ('a b\u00a0c', 1),
        ('a\x1c b', 0),
        ('a\tb\rc', 3),
    ],
)
def test_where_it_cuts(text, at):
    assert SMALL.cut(text) == at


def test_small_vocabulary_by_hand():
    assert SMALL.vocab_size == 256 + 20 + 1
    assert SMALL.separator == 276
    the, ll, endoftext = 256 + 2, 256 + 4, '<|endoftext|>'
    assert SMALL.encode(" the'll the").tolist() == [the, ll, the]
    assert SMALL.encode('!"~\u00a1').tolist() == [
        0,
        1,
        93,
        126,
        94,
    ]  # bytes C2 A1: printable ones come first
    assert SMALL.encode('\x00\n \x7f').tolist() == [188, 198, 220, 221]  # then the others
    assert SMALL.separator not in SMALL.encode(endoftext)
    assert SMALL.decode(SMALL.encode(endoftext)) == endoftext
    assert SMALL.decode([the, SMALL.separator, the]) == ' the<|endoftext|> the'
    assert SMALL.byte_lengths[[the, ll, SMALL.separator]].tolist() == [4, 3, 0]
    assert SMALL.byte_lengths.shape == (277,)
    assert len(SMALL.encode('')) == 0
    assert SMALL.decode([]) == ''


@pytest.mark.parametrize(
    ('merges', 'number'),
    [
        ('', 0),
        ('t\n', 0),
        ('t h e\n', 0),
        ('t h\nt h\n', 1),
        ('t h\nth z e\n', 1),
        ('t h\nx yz\n', 1),
        ('t h\n\nt e', 1),
        ('t h\nt \u4e00\n', 1),
        ('t h\nt \u00a0\n', 1),
        ('t h\nte', 1),
        (None, 0),
    ],
)
def test_damaged_merges(merges, number):
    with pytest.raises(UserError, match=f'number {number} does not join'):
        Gpt2Tokenizer(merges)


def test_published_ids():
    tokenizer = published()
    assert (tokenizer.vocab_size, tokenizer.separator) == (50257, 50256)
    assert tokenizer.encode('Hello world').tolist() == [15496, 995]
    assert tokenizer.encode("\n\n 's<|endoftext|>").tolist() == [
        628,
        705,
        82,
        27,
        91,
        437,
        1659,
        5239,
        91,
        29,
    ]
    assert from_json(to_json(tokenizer)) == tokenizer
    files = {
        name: hashlib.sha256(text.encode()).hexdigest()
        for name, text in tokenizer.hub_files().items()
    }
    assert files == {
        'merges.txt': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
        'vocab.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
    }


def test_tinyshakespeare():
    tokenizer = published()
    try:
        text = find_text('tinyshakespeare').text
    except CorpusNotFound as error:
        pytest.skip(str(error))
    dataset = from_text('tinyshakespeare', text, tokenizer, 0.1)
    assert (len(dataset.train), len(dataset.val)) == (301_966, 36_059)
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
