"""Text as it is decoded: whole characters, cut at a stop string, printed."""

import codecs
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from gpt2_jax.data.tokenizers import Tokenizer, encode_special
from gpt2_jax.errors import UsageError, UserError
from gpt2_jax.inference.decoding import generate
from gpt2_jax.model.gpt2 import GPT2
from gpt2_jax.terminal import printable


def stream_text(
    chunks: Iterable[np.ndarray], tokenizer: Tokenizer, row: int = 0, stop: Sequence[str] = ()
) -> Iterator[str]:
    """The text of one row as it grows. It never splits a UTF-8 character.

    `chunks` are int (B, n) as generate() yields them. The text ends before the string of `stop`
    that is complete first; if several are complete at the same character, before the longest.
    """
    stop = [text for text in stop if text]
    longest = max(map(len, stop), default=1)
    held = ''  # the end of the text so far, which may be the beginning of a stop string
    for piece in _decode(chunks, tokenizer, row):
        held += piece
        found = [(held.index(text) + len(text), held.index(text)) for text in stop if text in held]
        if found:
            _, start = min(found)
            yield held[:start]
            return
        sure = max(0, len(held) - longest + 1)
        yield held[:sure]
        held = held[sure:]
    yield held


def _decode(chunks: Iterable[np.ndarray], tokenizer: Tokenizer, row: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    for chunk in chunks:
        yield decoder.decode(tokenizer.decode_bytes(chunk[row]))
    yield decoder.decode(b'', final=True)


def encode_prompt(tokenizer: Tokenizer, text: str, special_tokens: bool = False) -> np.ndarray:
    """The ids (T,) of a prompt.

    An empty text gives the token that separates documents, from which GPT-2 samples
    unconditionally; without such a token, a newline, or the tokenizer's first token. With
    `special_tokens`, <|endoftext|> in the text is that token, and not seven ordinary ones. Raises
    UserError for text without ids, UsageError if the tokenizer has no special tokens.
    """
    if special_tokens and tokenizer.separator is None:
        raise UsageError(f'the {tokenizer.name} tokenizer has no special tokens')
    if not text:
        return _first_token(tokenizer)
    return encode_special(tokenizer, text) if special_tokens else tokenizer.encode(text)


def _first_token(tokenizer: Tokenizer) -> np.ndarray:
    if tokenizer.separator is not None:
        return np.array([tokenizer.separator], np.int32)
    try:
        return tokenizer.encode('\n')
    except UserError:
        return np.zeros(1, np.int32)


def continue_text(
    model: GPT2, params, tokenizer: Tokenizer, prompt: str, **options
) -> Iterator[str]:
    """The text that the model writes after a prompt, in pieces, without any notice.

    `prompt` is as in encode_prompt, `options` as in generate.
    """
    ids = encode_prompt(tokenizer, prompt)
    chunks = generate(model, params, ids, notify=lambda text: None, **options)
    return stream_text(chunks, tokenizer)


def print_samples(
    model: GPT2,
    params,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_samples: int,
    stop: Sequence[str] = (),
    special_tokens: bool = False,
    notify: Callable[[str], None] = print,
    **options,
):
    """Prints continuations of `prompt`: a single one as it grows, several once all are decoded.

    `stop` is as in stream_text, `special_tokens` as in encode_prompt, `options` as in generate.
    `notify` is called after the last text, so that no notice interrupts a text. It is also called,
    on a new line, if a Ctrl-C or an error ends the last text.
    """
    notes: list[str] = []
    ids = encode_prompt(tokenizer, prompt, special_tokens)
    chunks = generate(model, params, ids, num_samples=num_samples, notify=notes.append, **options)
    try:
        if num_samples > 1:
            chunks = list(chunks)
        for row in range(num_samples):
            if num_samples > 1:
                print(f'--- sample {row + 1} of {num_samples} ---')
            try:
                print(printable(prompt, sys.stdout), end='')
                for text in stream_text(chunks, tokenizer, row, stop):
                    print(printable(text, sys.stdout), end='', flush=True)
            finally:
                print(flush=True)
    finally:
        for note in notes:
            notify(note)
