"""For tests of GPT-2's tokenizer: a small one, the published one, and texts hard to split."""

import functools

import pytest

from gpt2_jax.data.tokenizers import Gpt2Tokenizer, make_tokenizer
from gpt2_jax.errors import UserError

# A word with its space, a contraction, runs of spaces and newlines, signs, numbers, half an emoji.
MERGES = ''.join(
    f'{line}\n'
    for line in (
        't h',
        'Ġ th',
        'Ġth e',
        'l l',
        "' ll",
        "' s",
        'Ġ Ġ',
        'ĠĠ ĠĠ',
        'Ċ Ċ',
        'Ġ Ċ',
        '! !',
        'Ġ !',
        '1 2',
        'Ġ 12',
        'Ã ©',
        'ð Ł',
        'Â ł',
        'a b',
        'ab c',
        'Ġ Ġthe',
    )
)
SMALL = Gpt2Tokenizer(MERGES)

TEXTS = (
    '',
    ' ',
    '\n',
    'the',
    ' the',
    '  the',
    "the  the \n\n the's they'll THEY'LL 'tis 's 'll",
    'a  b',
    'a \n b',
    'end ',
    'end  ',
    'end\n',
    'a\r\nb\r\n\r\n  c',
    'x\ty\t\tz',
    '12 123 1a2',
    '!!! !? ...',
    "'",
    "' s",
    "''s",
    "x's y'S",
    '<|endoftext|>',
    ' <|endoftext|> the',
    'café cafe\u0301',
    '漢字 かな',
    '🎭🎭 👩\u200d👩\u200d👧',
    'a\u00a0b \u00a0 c',
    'a\u2003b\u3000c',
    'a\x1cb \x1c c\x85d',
    '\x00\x7f\ufeff\uffff',
    '\u0663 ½ \u2167 x²',
    '\u0130\u0131\u017fK',
    '  \n  ',
    'the ' * 50,
    'the\n' * 50,
    'a' * 999,
    ' ' * 999,
)


@functools.lru_cache
def find_published() -> Gpt2Tokenizer | str:
    try:
        return make_tokenizer('gpt2', '')
    except UserError as error:
        return str(error)


def published() -> Gpt2Tokenizer:
    """GPT-2's own tokenizer. Skips the test if its vocabulary is not on this machine."""
    found = find_published()
    return pytest.skip(found) if isinstance(found, str) else found


def known() -> list[Gpt2Tokenizer]:
    """The small tokenizer, and the published one if its vocabulary is on this machine."""
    return [found for found in (SMALL, find_published()) if not isinstance(found, str)]
