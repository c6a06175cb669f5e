"""From the setting `data.corpus` to tokens: a named corpus, a text file, a prepared folder, or token files."""

from collections.abc import Callable

from gpt2_jax.data import bin_files, corpora, shards
from gpt2_jax.data.dataset import Dataset, from_text, hold_out
from gpt2_jax.data.tokenizers import make_tokenizer
from gpt2_jax.errors import UsageError


def load(
    *,
    corpus: str,
    tokenizer: str,
    val_fraction: float,
    holdout: float,
    fallback: str,
    notify: Callable[[str], None] = print,
) -> Dataset:
    """The data set that a configuration's `data` section names.

    With a `holdout`, that last part of the training tokens takes the place of the validation tokens. Where a named
    corpus can be had nowhere and a `fallback` is given, that is taken and `notify` is told. Raises UserError (see
    corpora.find_text, shards.open_shards, hold_out and bin_files.open_token_files), and UsageError where the tokens
    are another tokenizer's.
    """
    dataset = _load(corpus, tokenizer, val_fraction, fallback, notify)
    return hold_out(dataset, holdout) if holdout else dataset


def _load(
    corpus: str, tokenizer: str, val_fraction: float, fallback: str, notify: Callable[[str], None]
) -> Dataset:
    if corpus.endswith('.bin'):
        if tokenizer != 'gpt2':
            raise UsageError(
                f'{corpus} names files of GPT-2 tokens, but data.tokenizer is {tokenizer!r}: set '
                '--config.data.tokenizer=gpt2'
            )
        return bin_files.open_token_files(corpus, make_tokenizer(tokenizer, ''))
    if shards.is_prepared(corpus):
        dataset = shards.open_shards(corpus)
        if dataset.tokenizer.name != tokenizer:
            raise UsageError(
                f'{corpus} was prepared with the tokenizer {dataset.tokenizer.name!r}, but data.tokenizer '
                f'is {tokenizer!r}: set --config.data.tokenizer={dataset.tokenizer.name}, or prepare the '
                'text again'
            )
        return dataset
    try:
        found = corpora.find_text(corpus)
    except corpora.CorpusNotFound as error:
        if not fallback:
            raise
        notify(
            f'!!! {error}\n!!! FALLBACK: this run trains on {fallback!r} instead, the help texts that ship inside '
            f'Python. It is English, but not {corpus}: its figures compare with nothing.'
        )
        found = corpora.find_text(fallback)
    return from_text(found.name, found.text, make_tokenizer(tokenizer, found.text), val_fraction)
