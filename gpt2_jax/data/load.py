"""From the setting `data.corpus` to tokens: a name, a text, a prepared folder or .bin files."""

from collections.abc import Callable

from gpt2_jax import files
from gpt2_jax.data import bin_files, corpora, shards
from gpt2_jax.data.dataset import Dataset, from_text, hold_out
from gpt2_jax.data.tokenizers import make_tokenizer
from gpt2_jax.errors import UsageError


def load_dataset(
    *,
    corpus: str,
    tokenizer: str,
    val_fraction: float,
    holdout: float,
    fallback: str,
    notify: Callable[[str], None] = print,
) -> Dataset:
    """The data set that a configuration's `data` section names.

    With a `holdout`, the last part of the training tokens replaces the validation tokens. If a
    named corpus has no copy and cannot be downloaded, the corpus `fallback` is used, if one is
    given, and `notify` is called with a warning. Raises UserError (see corpora.find_text,
    shards.open_shards, hold_out and bin_files.open_token_files), and UsageError for the tokens of
    another tokenizer.
    """
    path = str(files.user_path(corpus))
    if path.endswith('.bin'):
        if tokenizer != 'gpt2':
            raise UsageError(
                f'{corpus} names files of GPT-2 tokens, but data.tokenizer is {tokenizer!r}: set '
                '--config.data.tokenizer=gpt2'
            )
        dataset = bin_files.open_token_files(corpus, make_tokenizer(tokenizer, ''))
    elif shards.is_prepared(path):
        dataset = shards.open_shards(path)
        if dataset.tokenizer.name != tokenizer:
            raise UsageError(
                f'{corpus} was prepared with the tokenizer {dataset.tokenizer.name!r}, but '
                f'data.tokenizer is {tokenizer!r}: set '
                f'--config.data.tokenizer={dataset.tokenizer.name}, or prepare the text again'
            )
    else:
        found = _find_text(corpus, fallback, notify)
        made = make_tokenizer(tokenizer, found.text)
        dataset = from_text(found.name, found.text, made, val_fraction)
    return hold_out(dataset, holdout) if holdout else dataset


def _find_text(corpus: str, fallback: str, notify: Callable[[str], None]) -> corpora.Corpus:
    """The text of a corpus or, with an announcement, that of its fallback."""
    try:
        return corpora.find_text(corpus)
    except corpora.CorpusNotFound as error:
        if not fallback:
            raise
        about = ' (the help texts inside Python)' if fallback == corpora.EMBEDDED else ''
        notify(
            f'!!! {error}\n!!! FALLBACK: this run trains on {fallback!r} instead{about}. Do not '
            f'compare its results with results on {corpus}.'
        )
    return corpora.find_text(fallback)
