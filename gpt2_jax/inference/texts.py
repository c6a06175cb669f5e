"""A text to score: its tokens by the tokenizer of a checkpoint, and the words of the original."""

import codecs
import dataclasses

import numpy as np

from gpt2_jax import files
from gpt2_jax.data import bin_files, corpora, documents, shards
from gpt2_jax.data.dataset import Dataset, Tokens
from gpt2_jax.data.tokenizers import Gpt2Tokenizer, Tokenizer
from gpt2_jax.errors import UsageError
from gpt2_jax.inference.detokenizers import make_detokenizer

BLOCK = 1 << 20  # tokens decoded at once


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Tokens to score, and two counts of the original text.

    `words` are separated by whitespace; `lines` is the number of line ends.
    """

    name: str
    tokens: Tokens
    words: int
    lines: int


def open_text(
    source: str, tokenizer: Tokenizer, *, split: str | None, detokenizer: str, text_field: str
) -> Text:
    """The text that `source` names, in the tokens of `tokenizer`.

    A text file, a corpus by name, or a file of documents (see data/documents.py) is taken whole,
    after the de-tokenizer `detokenizer`; a separator stands between documents if the tokenizer has
    one. Of a prepared folder or of token files (see data/load.py) only `split` is taken, or 'val'
    if `split` is None. Raises UserError for a source that cannot be read, or that holds the tokens
    of another tokenizer.
    """
    path = str(files.user_path(source))
    part = split or 'val'
    if dataset := _prepared(path, tokenizer, part):
        if detokenizer != 'none':
            raise UsageError(
                f'{source} holds tokens, but a de-tokenizer takes text: give the text itself'
            )
        tokens = getattr(dataset, part)
        return Text(f'{source} ({part})', tokens, *count_words(tokens, tokenizer))
    if split:
        raise UsageError(
            f'{source} is a text and is scored whole: --split is for prepared folders and token '
            'files'
        )
    texts = read_documents(source, text_field)
    detokenize = make_detokenizer(detokenizer)
    pieces = [tokenizer.encode(detokenize(text)) for text in texts if text]
    if tokenizer.separator is not None:
        separator = np.array([tokenizer.separator], np.min_scalar_type(tokenizer.separator))
        pieces = [array for piece in pieces for array in (separator, piece)][1:]
    tokens = Tokens((np.concatenate(pieces),) if pieces else ())
    return Text(
        source,
        tokens,
        sum(len(text.split()) for text in texts),
        sum(text.count('\n') for text in texts),
    )


def read_documents(source: str, text_field: str) -> list[str]:
    """The documents of a text file (one), a corpus by name (one), or a file of documents."""
    path = str(files.user_path(source))
    if documents.file_kind(path) == documents.TEXT:
        return [corpora.find_text(source).text]
    return [''.join(document) for document in documents.read(path, text_field)]


def _prepared(source: str, tokenizer: Tokenizer, split: str) -> Dataset | None:
    """The token files or the prepared folder that `source` names; None if it names neither."""
    if source.endswith('.bin'):
        if not isinstance(tokenizer, Gpt2Tokenizer):
            raise UsageError(
                f"{source} names files of GPT-2 tokens, but the checkpoint's tokenizer is "
                f'{tokenizer.name!r}: give the text itself'
            )
        return bin_files.open_token_files(source, tokenizer, (split,))
    if not shards.is_prepared(source):
        return None
    dataset = shards.open_shards(source)
    if dataset.tokenizer != tokenizer:
        other = dataset.tokenizer
        raise UsageError(
            f'{source} was prepared with another tokenizer, {other.name} of {other.vocab_size:,} '
            f"tokens, than the checkpoint's, {tokenizer.name} of {tokenizer.vocab_size:,}: give "
            'the text itself'
        )
    return dataset


def count_words(tokens: Tokens, tokenizer: Tokenizer, block: int = BLOCK) -> tuple[int, int]:
    """The words and the line ends in the text of `tokens`, as in Text; a separator ends a word."""
    # Incremental, because a block may end within a character.
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    words, lines, in_word = 0, 0, False
    for start in range(0, len(tokens), block):
        data = tokenizer.decode_bytes(tokens.read(start, min(start + block, len(tokens))))
        if text := decoder.decode(data.replace(b'<|endoftext|>', b' ')):
            words += len(text.split()) - (in_word and not text[0].isspace())
            lines += text.count('\n')
            in_word = not text[-1].isspace()
    return words, lines
