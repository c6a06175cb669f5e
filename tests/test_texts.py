"""Texts to score: every source gives the same tokens, and words are counted as in the original."""

import json

import numpy as np
import pytest
from bpe import SMALL

from gpt2_jax import prepare
from gpt2_jax.data import shards
from gpt2_jax.data.dataset import Tokens
from gpt2_jax.data.tokenizers import ByteTokenizer, make_tokenizer
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.inference.texts import count_words, open_text

TEXT = "the  end, é\u00a0🎭 is near\n\n it's\there \n"
OPTIONS = {'split': None, 'detokenizer': 'none', 'text_field': 'text'}


def ids(text):
    return text.tokens.read(0, len(text.tokens)).tolist()


@pytest.mark.parametrize('tokenizer', [make_tokenizer('char', TEXT), ByteTokenizer(), SMALL])
def test_a_text_file(tmp_path, tokenizer):
    (tmp_path / 'a.txt').write_text(TEXT, 'utf-8')
    text = open_text(str(tmp_path / 'a.txt'), tokenizer, **OPTIONS)
    assert ids(text) == tokenizer.encode(TEXT).tolist()
    assert (text.words, text.lines) == (8, 3)  # the no-break space separates words too
    with pytest.raises(UsageError, match='is a text and is scored whole: --split'):
        open_text(str(tmp_path / 'a.txt'), tokenizer, **OPTIONS | {'split': 'val'})


def test_words_are_counted_before_detokenizing(tmp_path):
    (tmp_path / 'a.txt').write_text(' a two @-@ part end . \n')
    text = open_text(str(tmp_path / 'a.txt'), SMALL, **OPTIONS | {'detokenizer': 'wikitext'})
    assert SMALL.decode(ids(text)) == 'a two-part end.\n'
    assert (text.words, text.lines) == (6, 1)


def test_documents_are_joined_as_prepare_joins_them(tmp_path):
    documents = ['the end', '', 'x y\nz', 'the']
    path = tmp_path / 'a.jsonl'
    path.write_text(''.join(json.dumps({'body': document}) + '\n' for document in documents))
    for tokenizer in (SMALL, ByteTokenizer()):
        text = open_text(str(path), tokenizer, **OPTIONS | {'text_field': 'body'})
        end = [] if tokenizer.separator is None else [tokenizer.separator]
        assert ids(text) == [
            *tokenizer.encode('the end'),
            *end,
            *tokenizer.encode('x y\nz'),
            *end,
            *tokenizer.encode('the'),
        ]
        assert (text.words, text.lines) == (6, 1)
    (tmp_path / 'none.jsonl').touch()
    assert len(open_text(str(tmp_path / 'none.jsonl'), SMALL, **OPTIONS).tokens) == 0


def test_a_prepared_folder_by_split(tmp_path):
    (tmp_path / 'a.txt').write_text(TEXT * 20, 'utf-8')
    prepare.prepare(
        [str(tmp_path / 'a.txt')],
        str(tmp_path / 'out'),
        tokenizer_name='byte',
        val_fraction=0.25,
        shard_tokens=100,
    )
    dataset = shards.open_shards(tmp_path / 'out')
    for split in ('train', 'val'):
        text = open_text(str(tmp_path / 'out'), ByteTokenizer(), **OPTIONS | {'split': split})
        part = getattr(dataset, split)
        assert ids(text) == part.read(0, len(part)).tolist()
        assert text.name.endswith(f'out ({split})')
    default = open_text(str(tmp_path / 'out'), ByteTokenizer(), **OPTIONS)
    assert ids(default) == ids(text)
    assert default.words == 5 * 8
    with pytest.raises(
        UsageError, match=r'another tokenizer, byte of 256 tokens, than the .* gpt2 of 277'
    ):
        open_text(str(tmp_path / 'out'), SMALL, **OPTIONS)
    with pytest.raises(UsageError, match='holds tokens, but a de-tokenizer takes text'):
        open_text(str(tmp_path / 'out'), ByteTokenizer(), **OPTIONS | {'detokenizer': 'ptb'})


def test_token_files_of_one_split(tmp_path):
    tokens = np.array([*SMALL.encode('the end'), SMALL.separator, *SMALL.encode('the\n')], '<u2')
    tokens.tofile(tmp_path / 'val.bin')
    text = open_text(f'{tmp_path}/*.bin', SMALL, **OPTIONS)
    assert ids(text) == tokens.tolist()
    assert (text.words, text.lines) == (3, 1)
    with pytest.raises(UserError, match='no train file'):
        open_text(f'{tmp_path}/*.bin', SMALL, **OPTIONS | {'split': 'train'})
    with pytest.raises(UsageError, match="GPT-2 tokens, but the checkpoint's tokenizer is 'byte'"):
        open_text(f'{tmp_path}/*.bin', ByteTokenizer(), **OPTIONS)


@pytest.mark.parametrize('block', [1, 2, 3, 7, 1000])
@pytest.mark.parametrize('text', ['', ' ', 'a', 'a b', ' a  b ', 'é 🎭🎭\n\nthe', TEXT * 3])
def test_words_counted_from_tokens(text, block):
    for tokenizer in (SMALL, ByteTokenizer()):
        tokens = Tokens((tokenizer.encode(text),))
        assert count_words(tokens, tokenizer, block) == (len(text.split()), text.count('\n'))
