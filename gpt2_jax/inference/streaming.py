"""Text as it is decoded: whole characters, cut at a stop string, printed."""

import codecs
from collections.abc import Iterable, Iterator

import numpy as np

from gpt2_jax.data.tokenizers import Tokenizer
from gpt2_jax.errors import UserError
from gpt2_jax.inference.decoding import generate
from gpt2_jax.model.gpt2 import GPT2


def stream_text(
    chunks: Iterable[np.ndarray], tokenizer: Tokenizer, row: int = 0, stop: str = ''
) -> Iterator[str]:
    """The text of one row as it grows. It never splits a UTF-8 character, and ends before `stop`.

    `chunks` are int (B, n) as generate() yields them.
    """
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    held = ''  # the end of the text so far, which may be the beginning of `stop`
    for chunk in chunks:
        held += decoder.decode(tokenizer.decode_bytes(chunk[row]))
        if stop and stop in held:
            yield held[: held.index(stop)]
            return
        sure = max(0, len(held) - max(0, len(stop) - 1))
        yield held[:sure]
        held = held[sure:]
    yield held + decoder.decode(b'', final=True)


def default_prompt(tokenizer: Tokenizer) -> np.ndarray:
    """The prompt if none is given: a newline, or the first token if the alphabet has no newline."""
    try:
        return tokenizer.encode('\n')
    except UserError:
        return np.zeros(1, np.int32)


def print_samples(
    model: GPT2,
    params,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_samples: int,
    stop: str,
    **options,
):
    """Prints continuations of `prompt`: a single one as it grows, several once all are decoded.

    `options` are those of generate().
    """
    ids = tokenizer.encode(prompt) if prompt else default_prompt(tokenizer)
    chunks = generate(model, params, ids, num_samples=num_samples, **options)
    if num_samples > 1:
        chunks = list(chunks)
    for row in range(num_samples):
        if num_samples > 1:
            print(f'--- sample {row + 1} of {num_samples} ---')
        print(prompt, end='')
        for text in stream_text(chunks, tokenizer, row, stop):
            print(text, end='', flush=True)
        print()
